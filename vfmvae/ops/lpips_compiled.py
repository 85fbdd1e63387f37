"""lpips_distance as operations that torch knows: kernels/lpips.py on CUDA, csrc/cpu/lpips.cpp on the CPU.

Shapes: a, b [B, C, H, W], read as they lie where that is channels-last; weights [C] or None; distances [B] in
float32. A gradient is channels-last. Nothing but the inputs is kept for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.operation import Autograd, operation

DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
MOST_CHANNELS = 4096  # of kernels/lpips.py
MOST_POSITIONS = 1 << 30


def why_not_triton(a: Tensor, b: Tensor, weights: Tensor | None) -> str | None:
    if a.shape[1] > MOST_CHANNELS:
        return f"it takes at most {MOST_CHANNELS} channels, not {a.shape[1]}"
    return _why_not("triton", a, b, weights) or native.why_no_triton(a)


def why_not_cpu(a: Tensor, b: Tensor, weights: Tensor | None) -> str | None:
    if a.dtype != b.dtype:
        return f"it takes maps of one dtype, not {a.dtype} and {b.dtype}"
    return _why_not("cpu", a, b, weights) or native.why_no_cpu_code(a)


def _why_not(name: str, a: Tensor, b: Tensor, weights: Tensor | None) -> str | None:
    for x in (a, b):
        if x.dtype not in DTYPES[name]:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[name])
            return f"it takes {known}, not {x.dtype}"
    if a.device != b.device or (weights is not None and weights.device != a.device):
        return "the tensors are on different devices"
    if 0 in a.shape[1:]:
        return f"maps {list(a.shape)} have no channels or no positions"
    if a.shape[2] * a.shape[3] > MOST_POSITIONS:
        return f"it takes at most {MOST_POSITIONS} positions, not {a.shape[2] * a.shape[3]}"
    if weights is not None and weights.requires_grad and torch.is_grad_enabled():
        return "it gives no gradient of weights"
    return None


def _fake(a: Tensor, b: Tensor, weights: Tensor | None) -> Tensor:
    return torch.empty(a.shape[0], dtype=torch.float32, device=a.device)


def _gradient_fake(grad: Tensor, x: Tensor, other: Tensor, weights: Tensor | None) -> Tensor:
    batch, channels, height, width = x.shape
    rows = torch.empty((batch, height, width, channels), dtype=x.dtype, device=x.device)
    return rows.permute(0, 3, 1, 2)


def _as_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H*W, C] with dense channels; copies only where no view can do it."""
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()


def _as_weights(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.float().contiguous()


def _run_triton(a: Tensor, b: Tensor, weights: Tensor | None) -> Tensor:
    from vfmvae.kernels.lpips import lpips_fwd

    return lpips_fwd(_as_rows(a), _as_rows(b), _as_weights(weights)).sum(dim=1)


def _gradient_triton(grad: Tensor, x: Tensor, other: Tensor, weights: Tensor | None) -> Tensor:
    """The gradient of x, whichever of the two maps that is."""
    from vfmvae.kernels.lpips import lpips_bwd

    grad_x = _gradient_fake(grad, x, other, weights)
    lpips_bwd(grad, _as_rows(x), _as_rows(other), _as_weights(weights), _as_rows(grad_x))
    return grad_x


def _run_cpu(a: Tensor, b: Tensor, weights: Tensor | None) -> Tensor:
    out = _fake(a, b, weights)
    a, b, weights = _as_rows(a), _as_rows(b), _as_weights(weights)  # copies must live as long as the call
    native.extension().lpips_cpu(**_arguments(a, b, weights, out))
    return out


def _gradient_cpu(grad: Tensor, x: Tensor, other: Tensor, weights: Tensor | None) -> Tensor:
    grad_x, grad = _gradient_fake(grad, x, other, weights), grad.float().contiguous()
    x, other, weights = _as_rows(x), _as_rows(other), _as_weights(weights)
    native.extension().lpips_gradient_cpu(grad=grad.data_ptr(), **_arguments(x, other, weights, grad_x))
    return grad_x


def _arguments(a: Tensor, b: Tensor, weights: Tensor | None, out: Tensor) -> dict[str, Any]:
    batch, positions, channels = a.shape
    return {
        "a": a.data_ptr(),
        "b": b.data_ptr(),
        "weights": 0 if weights is None else weights.data_ptr(),
        "out": out.data_ptr(),
        "a_strides": a.stride()[:2],
        "b_strides": b.stride()[:2],
        "dtype": str(a.dtype).removeprefix("torch."),
        "batch": batch,
        "positions": positions,
        "channels": channels,
        "threads": torch.get_num_threads(),
    }


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(gradient: Any) -> Autograd:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, weights = ctx.saved_tensors
        of_a = gradient(grad, a, b, weights) if ctx.needs_input_grad[0] else None
        of_b = gradient(grad, b, a, weights) if ctx.needs_input_grad[1] else None
        return of_a, of_b, None

    return Autograd(_setup, backward)


_lpips_triton_gradient = operation(
    "lpips_distance_triton_gradient", _gradient_triton, _gradient_fake, ("cpu", "cuda")
)
lpips_distance_triton = operation(
    "lpips_distance_triton", _run_triton, _fake, ("cpu", "cuda"), _autograd(_lpips_triton_gradient)
)
_lpips_cpu_gradient = operation("lpips_distance_cpu_gradient", _gradient_cpu, _gradient_fake, "cpu")
lpips_distance_cpu = operation("lpips_distance_cpu", _run_cpu, _fake, "cpu", _autograd(_lpips_cpu_gradient))
