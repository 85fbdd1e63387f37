"""Convolutions of the decoder: depthwise k x k and pointwise 1 x 1.

Shapes: x [B, C, H, W]; the fused forms keep channels-last memory. Weights are cast to x.dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops.dispatch import Fused, Implementation, Op, always


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, noise: Tensor | None = None, *, fused: Fused = True
) -> Tensor:
    """Depthwise convolution with "same" zero padding, plus an optional noise map.

    Args:
        x: [B, C, H, W].
        weight: [C, 1, k, k], k odd.
        bias: [C] or None.
        noise: [H, W], added to every channel and sample (legacy checkpoints), or None.

    Returns:
        [B, C, H, W] in x.dtype.
    """
    channels, size = x.shape[1], weight.shape[-1]
    if weight.shape != (channels, 1, size, size) or size % 2 == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, needed is [{channels}, 1, k, k] with k odd"
        )
    return _DEPTHWISE(fused, x, weight, bias, noise)


def depthwise_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None
) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2, groups=x.shape[1])
    return y if noise is None else y + noise.to(x.dtype)


def _depthwise_conv2d_torch(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None) -> Tensor:
    return depthwise_conv2d_reference(x.contiguous(memory_format=torch.channels_last), weight, bias, noise)


def pointwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, fused: Fused = True) -> Tensor:
    """1 x 1 convolution: x [B, C, H, W], weight [D, C], bias [D] or None -> [B, D, H, W] in x.dtype."""
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, needed is [D, {x.shape[1]}]")
    return _POINTWISE(fused, x, weight, bias)


def pointwise_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None].to(x.dtype), None if bias is None else bias.to(x.dtype))


def _pointwise_conv2d_gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # In channels-last memory a 1 x 1 convolution is one matrix product, without a copy.
    y = F.linear(x.permute(0, 2, 3, 1), weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y.permute(0, 3, 1, 2)


_DEPTHWISE = Op(
    "depthwise_conv2d",
    depthwise_conv2d_reference,
    (Implementation("channels_last", _depthwise_conv2d_torch, always),),
)
_POINTWISE = Op(
    "pointwise_conv2d", pointwise_conv2d_reference, (Implementation("gemm", _pointwise_conv2d_gemm, always),)
)
