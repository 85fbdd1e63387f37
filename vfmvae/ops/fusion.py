"""Layer norms of a latent-fusion block together with the linear layers behind them: the block's front, where
two norms of the same tokens each have a projection, and its gated MLP, where one norm has two.

Shapes: x [B, N, C].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import fusion_triton
from vfmvae.ops.arguments import check_tensors
from vfmvae.ops.dispatch import Fused, Implementation, Op, always
from vfmvae.ops.gated import geglu_halves, geglu_reference


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

    The fused forms normalise once and fold both affines into the weights, so one matrix product does it all,
    and the two results are views of one tensor. Results are in x.dtype; statistics in float32 (float64 for
    float64 x). "triton" keeps the normalised tokens for its backward and not x.

    Raises:
        ValueError: weights that do not fit x, or each other, or are on another device.
    """
    _check(x, attention, skip)
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
    y = F.linear(normed, weight.to(x.dtype), bias.to(x.dtype))
    return _parts(y, attention, skip)


def _fusion_projection_triton(
    x: Tensor, attention: NormedLinear, skip: NormedLinear, eps: float
) -> tuple[Tensor, Tensor]:
    return _parts(fusion_triton.normed_linears(x, *attention, *skip, eps=eps), attention, skip)


def _parts(y: Tensor, attention: NormedLinear, skip: NormedLinear) -> tuple[Tensor, Tensor]:
    """Not slices: the gradients of those are two tensors of zeros of the size of y, filled and added."""
    first, second = y.split([len(attention.weight), len(skip.weight)], dim=-1)
    return first, second


def normed_geglu(
    x: Tensor, gate: NormedLinear, value: NormedLinear, eps: float = 1e-5, *, fused: Fused = True
) -> Tensor:
    """gelu_tanh(LN(x) Wgate + b) * (LN(x) Wvalue + b): [B, N, D] of x [B, N, C].

    The two layers usually share one norm; the fused form is that of `fusion_projection`, followed by a GEGLU
    that reads both halves of its product where they lie, and writes their gradients as halves of one tensor.

    Raises:
        ValueError: as for `fusion_projection`; weights of unequal shapes.
    """
    _check(x, gate, value)
    if gate.weight.shape != value.weight.shape:
        raise ValueError(
            f"the gate's weight is {list(gate.weight.shape)}, the value's {list(value.weight.shape)}"
        )
    return _NORMED_GEGLU(fused, x, gate, value, eps)


def normed_geglu_reference(x: Tensor, gate: NormedLinear, value: NormedLinear, eps: float) -> Tensor:
    def norm(layer: NormedLinear) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], layer.norm_weight.to(x.dtype), layer.norm_bias.to(x.dtype), eps)

    first = norm(gate)
    shared = gate.norm_weight is value.norm_weight and gate.norm_bias is value.norm_bias
    second = first if shared else norm(value)
    pair = zip((first, second), (gate, value), strict=True)
    projected = [F.linear(n, layer.weight.to(x.dtype), layer.bias.to(x.dtype)) for n, layer in pair]
    return geglu_reference(*projected)


def _normed_geglu_triton(x: Tensor, gate: NormedLinear, value: NormedLinear, eps: float) -> Tensor:
    return geglu_halves(fusion_triton.normed_linears(x, *gate, *value, eps=eps))


def _check(x: Tensor, *layers: NormedLinear) -> None:
    if x.ndim == 0:
        raise ValueError("x is a single number; needed is [B, N, C]")
    channels = x.shape[-1]
    for layer in layers:
        width = layer.weight.shape[0]
        check_tensors(
            x,
            ("norm_weight", layer.norm_weight, (channels,)),
            ("norm_bias", layer.norm_bias, (channels,)),
            ("weight", layer.weight, (width, channels)),
            ("bias", layer.bias, (width,)),
        )


def _why_not_triton(x: Tensor, *_: object) -> str | None:
    return fusion_triton.why_not(x)


_FUSION_PROJECTION = Op(
    "fusion_projection",
    fusion_projection_reference,
    (
        Implementation("triton", _fusion_projection_triton, _why_not_triton),
        Implementation("gemm", _fusion_projection_gemm, always),
    ),
)
_NORMED_GEGLU = Op(
    "normed_geglu", normed_geglu_reference, (Implementation("triton", _normed_geglu_triton, _why_not_triton),)
)
