"""Adaptive layer norm of diffusion transformers (adaLN, arXiv 2212.09748) and its gated residual.

Shapes: x [B, N, C] tokens; shift, scale and gate [B, C], one row per sample, which may be parts of a larger
tensor. Statistics are float32 (float64 for float64 x).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops.arguments import check_tensors
from vfmvae.ops.dispatch import Fused, Op

Norm = Literal["layer", "rms"]


def norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None = None,
    *,
    norm: Norm = "layer",
    eps: float = 1e-6,
    fused: Fused = True,
) -> Tensor:
    """norm(x) * weight * (1 + scale) + shift, where scale and shift are those of the token's sample.

    Args:
        x: [B, N, C].
        shift, scale: [B, C] in any floating dtype, rows of any stride; a shift of None adds nothing.
        weight: [C], the norm's own factor; None for 1.
        norm: "layer" (x - mean) / sqrt(variance + eps), "rms" x / sqrt(mean(x^2) + eps); over channels.
        fused: "triton" reads x once and rounds once; it keeps x and each token's mean and deviation for the
            backward.

    Returns:
        [B, N, C] in x.dtype.

    Raises:
        ValueError: tensors of other shapes or on other devices, an unknown norm.
    """
    _check_tokens(x)
    if norm not in ("layer", "rms"):
        raise ValueError(f'norm is {norm!r}; it must be "layer" or "rms"')
    row = (x.shape[0], x.shape[2])
    check_tensors(x, ("shift", shift, row), ("scale", scale, row), ("weight", weight, row[1:]))
    return _NORM_MODULATE(fused, x, shift, scale, weight, norm, eps)


def norm_modulate_reference(
    x: Tensor, shift: Tensor | None, scale: Tensor, weight: Tensor | None, norm: Norm, eps: float
) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalise = F.layer_norm if norm == "layer" else F.rms_norm
    normed = normalise(wide, x.shape[2:], eps=eps)
    factor = 1 + scale.to(wide.dtype)
    if weight is not None:
        factor = factor * weight.to(wide.dtype)
    if shift is None:
        return (normed * factor[:, None]).to(x.dtype)
    return torch.addcmul(shift.to(wide.dtype)[:, None], normed, factor[:, None]).to(x.dtype)


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
    return torch.addcmul(x, gate[:, None], branch).to(x.dtype)


def _check_tokens(x: Tensor) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [B, N, C], not {x.dtype} {list(x.shape)}")


_NORM_MODULATE = Op("norm_modulate", norm_modulate_reference)
_GATED_RESIDUAL = Op("gated_residual", gated_residual_reference)
