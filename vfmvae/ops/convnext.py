"""The style-modulated ConvNeXt layer of the decoder (arXiv 2201.03545, modulated as in arXiv 1912.04958).

    x + gamma * (W2 gelu(d * (W1 (style * y)) + b1) + b2),    y = group_norm(depthwise_conv2d(x))

Modulation scales the inputs of W1, and the norm is what writes them: on CUDA it multiplies by style as it
writes, so that the MLP needs no weights per sample. In its gradient, which reads y's gradient anyway, that of
style is one more sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from vfmvae.ops import conv_norm, mlp_triton
from vfmvae.ops.arguments import check_maps, check_tensors
from vfmvae.ops.conv import check_kernel
from vfmvae.ops.conv_norm import depthwise_group_norm
from vfmvae.ops.demodulation import demodulation
from vfmvae.ops.dispatch import Fused, Implementation, Op, always
from vfmvae.ops.mlp import modulated_mlp, rows_of_mlp
from vfmvae.ops.norm import check_groups


class _Conv(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    noise: Tensor | None


class _Norm(NamedTuple):
    groups: int
    weight: Tensor
    bias: Tensor
    eps: float


class _MLP(NamedTuple):
    expand_weight: Tensor
    expand_bias: Tensor
    contract_weight: Tensor
    contract_bias: Tensor
    gamma: Tensor


def modulated_convnext(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    noise: Tensor | None,
    groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    style: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    contract_weight: Tensor,
    contract_bias: Tensor,
    gamma: Tensor,
    eps: float = 1e-5,
    *,
    fused: Fused = True,
) -> Tensor:
    """modulated_mlp(x, depthwise_group_norm(x, ...), style, ...): a whole ConvNeXt layer.

    Args:
        x: [B, C, H, W].
        conv_weight, conv_bias, noise: [C, 1, k, k], [C] or None, [H, W] or None, as in `depthwise_conv2d`.
        groups, norm_weight, norm_bias, eps: as in `group_norm`.
        style: [B, C]; float32 whatever x is.
        expand_weight, expand_bias, contract_weight, contract_bias, gamma: [E, C], [E], [C, E], [C], [C], as
            in `modulated_mlp`.
        fused: "triton" lets the norm modulate (CUDA, bfloat16 and float16); "separate" is one operation
            after the other.

    Returns:
        [B, C, H, W] in x.dtype. The fused forms can be differentiated once.

    Raises:
        ValueError: an even k, groups that do not divide C, tensors of other shapes or on other devices.
    """
    check_maps(x)
    check_kernel("conv_weight", conv_weight)
    check_groups(x, groups)
    _, channels, *sides = x.shape
    size = conv_weight.shape[-1]
    check_tensors(
        x,
        ("conv_weight", conv_weight, (channels, 1, size, size)),
        ("conv_bias", conv_bias, (channels,)),
        ("noise", noise, tuple(sides)),
        ("norm_weight", norm_weight, (channels,)),
        ("norm_bias", norm_bias, (channels,)),
        *rows_of_mlp(x, style, expand_weight, expand_bias, contract_weight, contract_bias, gamma),
    )
    conv, norm = _Conv(conv_weight, conv_bias, noise), _Norm(groups, norm_weight, norm_bias, eps)
    weights = _MLP(expand_weight, expand_bias, contract_weight, contract_bias, gamma)
    return _MODULATED_CONVNEXT(fused, x, style, conv, norm, weights)


def modulated_convnext_reference(x: Tensor, style: Tensor, conv: _Conv, norm: _Norm, weights: _MLP) -> Tensor:
    y = depthwise_group_norm(*_of_norm(x, None, conv, norm), fused=False)
    return modulated_mlp(x, y, style, *weights, fused=False)


def _separate(x: Tensor, style: Tensor, conv: _Conv, norm: _Norm, weights: _MLP) -> Tensor:
    return modulated_mlp(x, depthwise_group_norm(*_of_norm(x, None, conv, norm)), style, *weights)


def _modulated_by_the_norm(x: Tensor, style: Tensor, conv: _Conv, norm: _Norm, weights: _MLP) -> Tensor:
    y = conv_norm.with_statistics(*_of_norm(x, style, conv, norm))
    return mlp_triton.demodulated_mlp(x, y, demodulation(style, weights.expand_weight), *weights)


def _of_norm(x: Tensor, style: Tensor | None, conv: _Conv, norm: _Norm) -> tuple[Any, ...]:
    return (x, *conv, *norm, style)


def _why_not(x: Tensor, style: Tensor, conv: _Conv, norm: _Norm, weights: _MLP) -> str | None:
    objection = mlp_triton.why_not(x, weights.expand_weight)
    return objection or conv_norm.why_not_cuda(*_of_norm(x, style, conv, norm))


def _why_not_first(x: Tensor, *_: object) -> str | None:
    return mlp_triton.why_not_first(x)


_MODULATED_CONVNEXT = Op(
    "modulated_convnext",
    modulated_convnext_reference,
    (
        Implementation("triton", _modulated_by_the_norm, _why_not, _why_not_first),
        Implementation("separate", _separate, always),
    ),
)
