"""Gated activations (Shazeer, arXiv 2002.05202): GEGLU with the tanh form of GELU, of the fusion blocks, and
SwiGLU, of diffusion transformers.
"""

from __future__ import annotations

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


def _run(gate: Tensor, value: Tensor) -> Tensor:
    from vfmvae.kernels.gated import geglu_fwd

    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    geglu_fwd(gate, value, out)
    return out


def _fake(gate: Tensor, value: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _run_backward(grad: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    from vfmvae.kernels.gated import geglu_bwd

    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_value = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    geglu_bwd(grad, gate, value, grad_gate, grad_value)
    return grad_gate, grad_value


def _backward_fake(grad: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    empty = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return empty, torch.empty_like(empty)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _geglu_backward(grad, *ctx.saved_tensors)


def _run_halves(both: Tensor) -> Tensor:
    return _run(*both.chunk(2, dim=-1))


def _halves_fake(both: Tensor) -> Tensor:
    return _fake(*both.chunk(2, dim=-1))


def _run_halves_backward(grad: Tensor, both: Tensor) -> Tensor:
    from vfmvae.kernels.gated import geglu_bwd

    grad_both = torch.empty(both.shape, dtype=both.dtype, device=both.device)
    geglu_bwd(grad, *both.chunk(2, dim=-1), *grad_both.chunk(2, dim=-1))
    return grad_both


def _halves_backward_fake(grad: Tensor, both: Tensor) -> Tensor:
    return torch.empty(both.shape, dtype=both.dtype, device=both.device)


def _halves_backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    return (_geglu_halves_backward(grad, *ctx.saved_tensors),)


_DEVICES = ("cpu", "cuda")
_geglu_halves_backward = operation(
    "geglu_halves_backward", _run_halves_backward, _halves_backward_fake, _DEVICES
)
geglu_halves = operation(
    "geglu_halves", _run_halves, _halves_fake, _DEVICES, Autograd(_setup, _halves_backward)
)
"""[..., 2C], gate before value -> [..., C] by the kernels, whose gradient need not be put together."""
_geglu_backward = operation("geglu_backward", _run_backward, _backward_fake, _DEVICES)
_geglu_triton = operation("geglu", _run, _fake, _DEVICES, Autograd(_setup, _backward))


def _why_not_triton(gate: Tensor, value: Tensor) -> str | None:
    if gate.dtype not in TRITON_DTYPES:
        return f"it takes float32, bfloat16 and float16, not {gate.dtype}"
    return native.why_no_triton(gate)


_GEGLU = Op("geglu", geglu_reference, (Implementation("triton", _geglu_triton, _why_not_triton),))
_SWIGLU = Op("swiglu", swiglu_reference)
_SWIGLU_HALVES = Op("swiglu_halves", swiglu_halves_reference)
