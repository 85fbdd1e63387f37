"""Adaptive layer norm of diffusion transformers (adaLN, arXiv 2212.09748) and its gated residual.

Shapes: x [B, N, C] tokens; shift, scale and gate [B, C], one row per sample, which may be parts of a larger
tensor. Statistics are float32 (float64 for float64 x).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.arguments import check_tensors
from vfmvae.ops.dispatch import Fused, Implementation, Op
from vfmvae.ops.gradients import weight_gradients_wanted
from vfmvae.ops.operation import Autograd, operation

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_CHANNELS = 4096
"""A program of the norm holds them in registers (MOST_COLUMNS of kernels/modulation.py)."""
Norm = Literal["layer", "rms"]


def norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None = None,
    *,
    norm: Norm = "layer",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    fused: Fused = True,
) -> Tensor:
    """norm(x) * weight * (1 + scale) + shift, where scale and shift are those of the token's sample.

    Args:
        x: [B, N, C].
        shift, scale: [B, C] in any floating dtype, rows of any stride; a shift of None adds nothing.
        weight: [C], the norm's own factor; None for 1.
        norm: "layer" (x - mean) / sqrt(variance + eps), "rms" x / sqrt(mean(x^2) + eps); over channels.
        dtype: of the result; None for x's. A float32 stream of tokens may be read by 16-bit products.
        fused: "triton" reads x once and rounds once; it keeps x and each token's mean and deviation for the
            backward.

    Returns:
        [B, N, C] in `dtype`.

    Raises:
        ValueError: tensors of other shapes or on other devices, an unknown norm.
    """
    _check_tokens(x)
    if norm not in ("layer", "rms"):
        raise ValueError(f'norm is {norm!r}; it must be "layer" or "rms"')
    row = (x.shape[0], x.shape[2])
    check_tensors(x, ("shift", shift, row), ("scale", scale, row), ("weight", weight, row[1:]))
    return _NORM_MODULATE(fused, x, shift, scale, weight, norm, eps, dtype or x.dtype)


def norm_modulate_reference(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    norm: Norm,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    # Each operation by itself, in the order of the published models, which decides the last bits.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalise = F.layer_norm if norm == "layer" else F.rms_norm
    normed = normalise(wide, x.shape[2:], None if weight is None else weight.to(wide.dtype), eps=eps)
    modulated = normed * (1 + scale.to(wide.dtype))[:, None]
    if shift is not None:
        modulated = modulated + shift.to(wide.dtype)[:, None]
    return modulated.to(dtype)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor, *, fused: Fused = True) -> Tensor:
    """x + gate * branch, where gate is that of the token's sample.

    Args:
        x: [B, N, C].
        gate: [B, C] in any floating dtype, rows of any stride.
        branch: [B, N, C], also in another dtype than x.
        fused: "triton" keeps gate and branch for the backward, which reads the gradient once.

    Returns:
        [B, N, C] in x.dtype.

    Raises:
        ValueError: tensors of other shapes or on other devices.
    """
    _check_tokens(x)
    check_tensors(x, ("gate", gate, (x.shape[0], x.shape[2])), ("branch", branch, x.shape))
    return _GATED_RESIDUAL(fused, x, gate, branch)


def gated_residual_reference(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.promote_types(gate.dtype, branch.dtype))
    return (x + gate[:, None].to(wide) * branch).to(x.dtype)


def _check_tokens(x: Tensor) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [B, N, C], not {x.dtype} {list(x.shape)}")


def _run_norm(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    centred: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The result, and of each token the mean, if centred, and 1 / deviation: [1 or 2, B, N] float32."""
    from vfmvae.kernels.modulation import norm_modulate_fwd

    out, table = _norm_fake(x, shift, scale, weight, centred, eps, dtype)
    if x.numel():
        norm_modulate_fwd(x, shift, scale, weight, centred, eps, out, table)
    return out, table


def _norm_fake(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    centred: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    return out, torch.empty((1 + centred, *x.shape[:2]), dtype=torch.float32, device=x.device)


def _run_norm_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    table: Tensor,
    of_x: bool,
    of_shift: bool,
    of_scale: bool,
    of_weight: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """What is asked for of the gradients of x, of shift and scale [1 or 2, B, C] in `dtype`, of weight in
    float32.
    """
    from vfmvae.kernels.modulation import norm_modulate_bwd, sum_parts

    asked = (of_x, of_shift, of_scale, of_weight)
    found = _norm_backward_fake(grad, x, scale, weight, table, *asked, dtype)
    if x.numel() == 0:
        return [g.zero_() for g in found]
    partials = norm_modulate_bwd(grad, x, scale, weight, table, found[0] if of_x else None, *asked[1:])
    if of_shift or of_scale:
        sum_parts(partials[: of_shift + of_scale], found[of_x])
    if of_weight:
        torch.sum(partials[-1], dim=(0, 1), out=found[-1])
    return found


def _norm_backward_fake(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    table: Tensor,
    of_x: bool,
    of_shift: bool,
    of_scale: bool,
    of_weight: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    found = [torch.empty(x.shape, dtype=x.dtype, device=x.device)] if of_x else []
    if of_shift or of_scale:
        found.append(torch.empty((of_shift + of_scale, *scale.shape), dtype=dtype, device=x.device))
    if of_weight:
        found.append(torch.empty(x.shape[2:], dtype=torch.float32, device=x.device))
    return found


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shift, scale, weight, *_ = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (shift, scale, weight)]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, scale, weight, output[1])


def _norm_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, weight, table = ctx.saved_tensors
    of_shift, of_scale, of_weight = ctx.dtypes
    needs = list(ctx.needs_input_grad[:4])
    needs[3] = needs[3] and weight_gradients_wanted()
    dtype = of_scale if of_shift is None else torch.promote_types(of_shift, of_scale)
    found = iter(_norm_modulate_backward(grad, x, scale, weight, table, *needs, dtype))
    results: list[Tensor | None] = [next(found) if needs[0] else None]
    rows = iter(next(found) if needs[1] or needs[2] else ())
    results.append(next(rows).to(of_shift) if needs[1] else None)
    results.append(next(rows).to(of_scale) if needs[2] else None)
    results.append(next(found).to(of_weight) if needs[3] else None)
    return (*results, None, None, None)


def _norm_modulate_triton(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    norm: Norm,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    return _norm_modulate(x, shift, scale, weight, norm == "layer", eps, dtype)[0]


def _run_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    from vfmvae.kernels.modulation import gated_residual_fwd

    out = _residual_fake(x, gate, branch)
    if x.numel():
        gated_residual_fwd(x, gate, branch, out)
    return out


def _residual_fake(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _run_residual_backward(
    grad: Tensor, gate: Tensor, branch: Tensor, of_gate: bool, of_branch: bool
) -> list[Tensor]:
    """What is asked for of the gradients of gate and branch."""
    from vfmvae.kernels.modulation import gated_residual_bwd, sum_parts

    found = _residual_backward_fake(grad, gate, branch, of_gate, of_branch)
    if branch.numel() == 0:
        return [g.zero_() for g in found]
    partials = gated_residual_bwd(grad, gate, branch, of_gate, found[-1] if of_branch else None)
    if of_gate:
        sum_parts(partials, found[0])
    return found


def _residual_backward_fake(
    grad: Tensor, gate: Tensor, branch: Tensor, of_gate: bool, of_branch: bool
) -> list[Tensor]:
    asked = [gate] * of_gate + [branch] * of_branch
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in asked]


def _residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _residual_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x, *asked = ctx.needs_input_grad
    found = iter(_gated_residual_backward(grad, *ctx.saved_tensors, *asked) if any(asked) else ())
    return (grad if of_x else None, *(next(found) if need else None for need in asked))


_DEVICES = ("cpu", "cuda")
_norm_modulate_backward = operation(
    "norm_modulate_backward", _run_norm_backward, _norm_backward_fake, _DEVICES
)
_norm_modulate = operation(
    "norm_modulate", _run_norm, _norm_fake, _DEVICES, Autograd(_norm_setup, _norm_backward)
)
_gated_residual_backward = operation(
    "gated_residual_backward", _run_residual_backward, _residual_backward_fake, _DEVICES
)
_gated_residual_triton = operation(
    "gated_residual", _run_residual, _residual_fake, _DEVICES, Autograd(_residual_setup, _residual_backward)
)


def _why_not_norm(x: Tensor, *_: object) -> str | None:
    if x.shape[2] > MOST_CHANNELS:
        return f"it takes at most {MOST_CHANNELS} channels, not {x.shape[2]}"
    return _why_not_dtype(x) or native.why_no_triton(x)


def _why_not_residual(x: Tensor, gate: Tensor, branch: Tensor) -> str | None:
    return _why_not_dtype(x) or _why_not_dtype(branch) or native.why_no_triton(x)


def _why_not_dtype(x: Tensor) -> str | None:
    return None if x.dtype in TRITON_DTYPES else f"it takes float32, bfloat16 and float16, not {x.dtype}"


_NORM_MODULATE = Op(
    "norm_modulate",
    norm_modulate_reference,
    (Implementation("triton", _norm_modulate_triton, _why_not_norm),),
)
_GATED_RESIDUAL = Op(
    "gated_residual",
    gated_residual_reference,
    (Implementation("triton", _gated_residual_triton, _why_not_residual),),
)
