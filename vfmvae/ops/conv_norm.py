"""Depthwise convolution and the group norm behind it, as in a ConvNeXt layer (arXiv 2201.03545).

On CUDA the convolution leaves the statistics of its output (csrc/depthwise_conv.cu), so that the norm reads
it once instead of twice.
"""

from __future__ import annotations

from torch import Tensor

from vfmvae.ops import norm_cuda
from vfmvae.ops.arguments import check_maps, check_tensors
from vfmvae.ops.conv import (
    check_kernel,
    depthwise_conv2d,
    depthwise_conv2d_with_statistics,
    why_no_statistics,
)
from vfmvae.ops.dispatch import Fused, Implementation, Op, always
from vfmvae.ops.norm import check_groups, group_norm


def depthwise_group_norm(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    noise: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    style: Tensor | None = None,
    *,
    fused: Fused = True,
) -> Tensor:
    """group_norm(depthwise_conv2d(x, conv_weight, conv_bias, noise), groups, weight, bias, eps, style=style).

    Args:
        x: [B, C, H, W].
        conv_weight, conv_bias, noise: [C, 1, k, k], [C] or None, [H, W] or None, as in `depthwise_conv2d`.
        groups, weight, bias, eps, style: as in `group_norm`.
        fused: "cuda" takes the statistics in the convolution; "separate" is one operation after the other.

    Returns:
        [B, C, H, W] in x.dtype. The fused forms can be differentiated once.

    Raises:
        ValueError: an even k, groups that do not divide C, tensors of other shapes or on other devices.
    """
    check_maps(x)
    check_kernel("conv_weight", conv_weight)
    check_groups(x, groups)
    batch, channels, *sides = x.shape
    size = conv_weight.shape[-1]
    check_tensors(
        x,
        ("conv_weight", conv_weight, (channels, 1, size, size)),
        ("conv_bias", conv_bias, (channels,)),
        ("noise", noise, tuple(sides)),
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("style", style, (batch, channels)),
    )
    return _DEPTHWISE_GROUP_NORM(fused, x, conv_weight, conv_bias, noise, groups, weight, bias, eps, style)


def depthwise_group_norm_reference(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    noise: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    style: Tensor | None,
) -> Tensor:
    y = depthwise_conv2d(x, conv_weight, conv_bias, noise, fused=False)
    return group_norm(y, groups, weight, bias, eps, style=style, fused=False)


def _separate(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    noise: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    style: Tensor | None,
) -> Tensor:
    y = depthwise_conv2d(x, conv_weight, conv_bias, noise)
    return group_norm(y, groups, weight, bias, eps, style=style)


def with_statistics(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    noise: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    style: Tensor | None,
) -> Tensor:
    y, partials, counts = depthwise_conv2d_with_statistics(x, conv_weight, conv_bias, noise)
    return norm_cuda.group_norm_from_partials(y, partials, counts, groups, weight, bias, eps, None, style)


def why_not_cuda(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    noise: Tensor | None,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    style: Tensor | None,
) -> str | None:
    objection = why_no_statistics(x, conv_weight, conv_bias, noise)
    return objection or norm_cuda.why_not(x, groups, weight, bias, eps, None, style)


_DEPTHWISE_GROUP_NORM = Op(
    "depthwise_group_norm",
    depthwise_group_norm_reference,
    (
        Implementation("cuda", with_statistics, why_not_cuda),
        Implementation("separate", _separate, always),
    ),
)
