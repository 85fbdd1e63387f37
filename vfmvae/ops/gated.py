"""Gated activations (Shazeer, arXiv 2002.05202): GEGLU with the tanh form of GELU, of the fusion blocks, and
SwiGLU, of diffusion transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.dispatch import Fused, Implementation, Op
from vfmvae.ops.operation import Autograd, operation

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def geglu(gate: Tensor, value: Tensor, *, fused: Fused = True) -> Tensor:
    """gelu_tanh(gate) * value, elementwise.

    Args:
        gate, value: [..., C], same shape, dtype and device. Halves of one tensor need not be copied apart.
        fused: "triton" computes in float32 and keeps nothing but its inputs for the backward, which is one
            pass.

    Returns:
        [..., C] in the inputs' dtype.

    Raises:
        ValueError: where shapes, dtypes or devices differ.
    """
    _check(gate, value)
    return _GEGLU(fused, gate, value)


def geglu_reference(gate: Tensor, value: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * value


def swiglu(gate: Tensor, value: Tensor, *, fused: Fused = True) -> Tensor:
    """silu(gate) * value, elementwise; arguments, result and errors as of `geglu`."""
    _check(gate, value)
    return _SWIGLU(fused, gate, value)


def swiglu_reference(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


def swiglu_halves(both: Tensor, *, fused: Fused = True) -> Tensor:
    """`swiglu` of the halves of both [..., 2C], gate before value: [..., C].

    The gradient of "triton" is written as one tensor; that of two halves would have to be put together.

    Raises:
        ValueError: an odd number of channels.
    """
    if both.ndim == 0 or both.shape[-1] % 2:
        raise ValueError(f"both is {list(both.shape)}; it must be [..., 2C]")
    return _SWIGLU_HALVES(fused, both)


def swiglu_halves_reference(both: Tensor) -> Tensor:
    return swiglu_reference(*both.chunk(2, dim=-1))


def _check(gate: Tensor, value: Tensor) -> None:
    if gate.shape != value.shape:
        raise ValueError(f"gate {list(gate.shape)} and value {list(value.shape)} differ in shape")
    if gate.dtype != value.dtype or gate.device != value.device:
        raise ValueError(
            f"gate ({gate.dtype} on {gate.device}) and value ({value.dtype} on {value.device}) differ"
        )


_DEVICES = ("cpu", "cuda")


def _operations(name: str, activation: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The kernels as vfmvae::NAME of gate and value, and vfmvae::NAME_halves of both in one tensor."""

    def run(gate: Tensor, value: Tensor) -> Tensor:
        from vfmvae.kernels.gated import gated_fwd

        out = fake(gate, value)
        gated_fwd(gate, value, out, activation)
        return out

    def fake(gate: Tensor, value: Tensor) -> Tensor:
        return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)

    def run_backward(grad: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        from vfmvae.kernels.gated import gated_bwd

        of_gate, of_value = backward_fake(grad, gate, value)
        gated_bwd(grad, gate, value, of_gate, of_value, activation)
        return of_gate, of_value

    def backward_fake(grad: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return fake(gate, value), fake(gate, value)

    def run_halves(both: Tensor) -> Tensor:
        return run(*both.chunk(2, dim=-1))

    def halves_fake(both: Tensor) -> Tensor:
        return fake(*both.chunk(2, dim=-1))

    def run_halves_backward(grad: Tensor, both: Tensor) -> Tensor:
        from vfmvae.kernels.gated import gated_bwd

        of_both = halves_backward_fake(grad, both)
        gated_bwd(grad, *both.chunk(2, dim=-1), *of_both.chunk(2, dim=-1), activation)
        return of_both

    def halves_backward_fake(grad: Tensor, both: Tensor) -> Tensor:
        return torch.empty(both.shape, dtype=both.dtype, device=both.device)

    backward = operation(f"{name}_backward", run_backward, backward_fake, _DEVICES)
    halves_backward = operation(
        f"{name}_halves_backward", run_halves_backward, halves_backward_fake, _DEVICES
    )
    of_two = Autograd(_setup, lambda ctx, grad: backward(grad, *ctx.saved_tensors))
    of_halves = Autograd(_setup, lambda ctx, grad: (halves_backward(grad, *ctx.saved_tensors),))
    return (
        operation(name, run, fake, _DEVICES, of_two),
        operation(f"{name}_halves", run_halves, halves_fake, _DEVICES, of_halves),
    )


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_geglu_triton, geglu_halves = _operations("geglu", "gelu")
_swiglu_triton, _swiglu_halves_triton = _operations("swiglu", "silu")


def _why_not_triton(gate: Tensor, *_: Tensor) -> str | None:
    if gate.dtype not in TRITON_DTYPES:
        return f"it takes float32, bfloat16 and float16, not {gate.dtype}"
    return native.why_no_triton(gate)


def _op(name: str, reference: Callable[..., Tensor], kernels: Callable[..., Tensor]) -> Op:
    return Op(name, reference, (Implementation("triton", kernels, _why_not_triton),))


_GEGLU = _op("geglu", geglu_reference, _geglu_triton)
_SWIGLU = _op("swiglu", swiglu_reference, _swiglu_triton)
_SWIGLU_HALVES = _op("swiglu_halves", swiglu_halves_reference, _swiglu_halves_triton)
