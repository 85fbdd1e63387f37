"""The operations that kernels.py measures: a row of OPERATIONS each. Those of the decoder are here."""

from __future__ import annotations

import math
from functools import partial

import cases_alignment
import cases_attention
import cases_diffusion
import cases_fp8
import cases_fusion
import cases_perceptual
import torch
from case import Case, Operation, Shape, activations, flops
from torch import Tensor

from vfmvae import ops
from vfmvae.ops.conv import _DEPTHWISE
from vfmvae.ops.conv_norm import _DEPTHWISE_GROUP_NORM
from vfmvae.ops.convnext import _MODULATED_CONVNEXT
from vfmvae.ops.gated import _GEGLU
from vfmvae.ops.mlp import _MODULATED_MLP, _MODULATED_TO_RGB
from vfmvae.ops.norm import _GROUP_NORM
from vfmvae.ops.resample import _UPSAMPLE_BLUR

BLOCKS: dict[str, list[Shape]] = {  # [B, C, H, W] in the decoder's blocks; upsample_blur ends there
    "demo": [(8, 64, 8, 8), (8, 64, 16, 16), (8, 32, 32, 32), (8, 16, 64, 64)],
    "full": [(1, 512, 32, 32), (1, 512, 64, 64), (1, 256, 128, 128), (1, 128, 256, 256)],
    "odd": [(1, 12, 5, 7), (3, 24, 9, 33), (2, 128, 17, 40)],
}
TOKENS: dict[str, list[Shape]] = {  # [B, N, C] inside the latent fusion
    "demo": [(8, 64, 256)],
    "full": [(1, 1024, 2048)],
    "odd": [(1, 7, 12), (3, 33, 40)],
}


def depthwise_conv2d(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    channels = shape[1]
    weight = torch.randn(channels, 1, 7, 7, device=device) / 7
    tensors = [activations(shape, dtype, device), weight, torch.randn(channels, device=device)]
    work = flops(2 * 49 * math.prod(shape))
    return Case(ops.depthwise_conv2d, tensors, 1, work, "fma", reads=(1,), weight_reads=(0,))


def group_norm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    channels = shape[1]
    groups = max(1, min(32, channels // 4))
    tensors = [activations(shape, dtype, device), *torch.randn(2, channels, device=device).unbind()]

    def norm(x: Tensor, weight: Tensor, bias: Tensor, fused: bool | str) -> Tensor:
        return ops.group_norm(x, groups, weight, bias, fused=fused)

    return Case(norm, tensors, 1, flops(8 * math.prod(shape)), "fma", reads=(0, 1))


def depthwise_group_norm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    batch, channels = shape[:2]
    groups = max(1, min(32, channels // 4))
    weights = [torch.randn(channels, 1, 7, 7, device=device) / 7, *torch.randn(3, channels, device=device)]
    tensors = [activations(shape, dtype, device), torch.randn(batch, channels, device=device), *weights]

    def layer(x: Tensor, style: Tensor, conv: Tensor, bias: Tensor, *norm: Tensor, fused: str) -> Tensor:
        return ops.depthwise_group_norm(x, conv, bias, None, groups, *norm, style=style, fused=fused)

    return Case(layer, tensors, 2, flops(2 * 49 * math.prod(shape)), "fma", reads=tuple(range(6)))


def modulated_mlp(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    batch, channels = shape[:2]
    hidden = 4 * channels

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, device=device)

    tensors = [activations(shape, dtype, device), activations(shape, dtype, device), numbers(batch, channels)]
    tensors += [numbers(hidden, channels) / channels**0.5, numbers(hidden)]
    tensors += [numbers(channels, hidden) / hidden**0.5, numbers(channels), numbers(channels)]
    work = flops(4 * math.prod(shape) * hidden)
    return Case(ops.modulated_mlp, tensors, 3, work, "matrix", reads=tuple(range(1, 8)), passed_on=(0,))


def modulated_convnext(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    norm = depthwise_group_norm(shape, dtype, device)
    mlp = modulated_mlp(shape, dtype, device)
    groups = max(1, min(32, shape[1] // 4))

    def layer(x: Tensor, style: Tensor, conv: Tensor, bias: Tensor, *rest: Tensor, fused: str) -> Tensor:
        norm, weights = rest[:2], rest[2:]
        return ops.modulated_convnext(x, conv, bias, None, groups, *norm, style, *weights, fused=fused)

    tensors = [*norm.tensors, *mlp.tensors[3:]]
    return Case(layer, tensors, 2, mlp.flops, "matrix", reads=tuple(range(11)))


def modulated_to_rgb(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    batch, channels = shape[:2]
    weights = [torch.randn(3, channels, device=device) / channels**0.5, torch.randn(3, device=device)]
    tensors = [activations(shape, dtype, device), torch.randn(batch, channels, device=device), *weights]
    work = flops(2 * 3 * math.prod(shape))
    return Case(ops.modulated_to_rgb, tensors, 2, work, "fma", reads=(0, 1, 2))


def upsample_blur(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    batch, channels, height, width = shape
    x = activations((batch, 4 * channels, (height + 1) // 2, (width + 1) // 2), dtype, device)
    function = partial(ops.upsample_blur, kernel_size=5)
    return Case(function, [x], 1, flops(20 * math.prod(shape), backward=1), "fma")


def geglu(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    tensors = [activations(shape, dtype, device) for _ in range(2)]
    return Case(ops.geglu, tensors, 2, flops(15 * math.prod(shape), 2), "fma", reads=(0, 1))


OPERATIONS = {
    "modulated_convnext": Operation(_MODULATED_CONVNEXT, modulated_convnext, BLOCKS),
    "modulated_mlp": Operation(_MODULATED_MLP, modulated_mlp, BLOCKS),
    "depthwise_conv2d": Operation(_DEPTHWISE, depthwise_conv2d, BLOCKS),
    "group_norm": Operation(_GROUP_NORM, group_norm, BLOCKS),
    "depthwise_group_norm": Operation(_DEPTHWISE_GROUP_NORM, depthwise_group_norm, BLOCKS),
    "upsample_blur": Operation(_UPSAMPLE_BLUR, upsample_blur, BLOCKS),
    "modulated_to_rgb": Operation(_MODULATED_TO_RGB, modulated_to_rgb, BLOCKS),
    "geglu": Operation(_GEGLU, geglu, TOKENS),
    **cases_fusion.OPERATIONS,
    **cases_alignment.OPERATIONS,
    **cases_perceptual.OPERATIONS,
    **cases_attention.OPERATIONS,
    **cases_fp8.OPERATIONS,
    **cases_diffusion.OPERATIONS,
}
