"""The front of a latent-fusion block: two layer norms of the same tokens, each followed by a projection.

Shapes: x [B, N, C].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops.dispatch import Fused, Implementation, Op, always


class NormedLinear(NamedTuple):
    """A layer norm's affine [C], [C] and the linear layer after it: weight [D, C], bias [D]."""

    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor


def fusion_projection(
    x: Tensor, attention: NormedLinear, skip: NormedLinear, eps: float = 1e-5, *, fused: Fused = True
) -> tuple[Tensor, Tensor]:
    """(LN1(x) Wqkv + b, LN3(x) Wskip + b): [B, N, 3D] for attention and the projected residual [B, N, E].

    The fused form normalises once and folds both affines into the weights, so one matrix product does it all.
    Results are in x.dtype; statistics in float32 (float64 for float64 x).
    """
    return _FUSION_PROJECTION(fused, x, attention, skip, eps)


def fusion_projection_reference(
    x: Tensor, attention: NormedLinear, skip: NormedLinear, eps: float
) -> tuple[Tensor, Tensor]:
    def project(layer: NormedLinear) -> Tensor:
        normed = F.layer_norm(
            x, x.shape[-1:], layer.norm_weight.to(x.dtype), layer.norm_bias.to(x.dtype), eps
        )
        return F.linear(normed, layer.weight.to(x.dtype), layer.bias.to(x.dtype))

    return project(attention), project(skip)


def _fusion_projection_gemm(
    x: Tensor, attention: NormedLinear, skip: NormedLinear, eps: float
) -> tuple[Tensor, Tensor]:
    layers = (attention, skip)
    weight = torch.cat([layer.weight * layer.norm_weight for layer in layers])
    bias = torch.cat([layer.bias + layer.weight @ layer.norm_bias for layer in layers])
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    y = F.linear(normed, weight.to(x.dtype), bias.to(x.dtype))  # [B, N, 3D + E]
    first = attention.weight.shape[0]
    return y[..., :first], y[..., first:]


_FUSION_PROJECTION = Op(
    "fusion_projection",
    fusion_projection_reference,
    (Implementation("gemm", _fusion_projection_gemm, always),),
)
