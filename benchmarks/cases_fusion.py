"""Rows of OPERATIONS (cases.py) for the latent fusion and the discriminators' heads."""

from __future__ import annotations

import math

import torch
from case import Case, Operation, Shape, activations, flops
from torch import Tensor

from vfmvae import ops
from vfmvae.ops.batch_norm import _LOCAL_BATCH_NORM
from vfmvae.ops.fusion import _FUSION_PROJECTION, _NORMED_GEGLU

LAYERS: dict[str, list[Shape]] = {  # [B, N, C] of an encoder layer, and of all behind pixel-unshuffle
    "demo": [(8, 64, 128)],
    "full": [(1, 256, 768), (1, 1024, 1024)],
    "odd": [(1, 7, 12), (3, 33, 40)],
}
GATED: dict[str, list[Shape]] = {  # [B, N, C] of a compressed layer, and of the decompressed latent map
    "demo": [(8, 64, 32)],
    "full": [(1, 1024, 64), (1, 256, 512)],
    "odd": [(1, 7, 12), (3, 33, 40)],
}
HEADS: dict[str, list[Shape]] = {  # of a projected head's block, and of the patch discriminator's widest maps
    "demo": [(8, 96, 64)],
    "full": [(1, 384, 196), (1, 128, 65, 65)],
    "odd": [(1, 5, 7), (3, 24, 33), (2, 6, 5, 9)],
}
COMPRESSED = 64


def _layers(channels: int, widths: tuple[int, int], device: torch.device) -> list[Tensor]:
    tensors = []
    for width in widths:
        tensors += [1 + 0.1 * torch.randn(channels, device=device), torch.randn(channels, device=device)]
        tensors += [torch.randn(width, channels, device=device) / channels**0.5]
        tensors += [torch.randn(width, device=device)]
    return tensors


def fusion_projection(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Both results in one tensor, whose copy is in the time of every implementation."""
    channels = shape[2]
    widths = 3 * channels, COMPRESSED

    def project(x: Tensor, *parts: Tensor, fused: bool | str) -> Tensor:
        layers = ops.NormedLinear(*parts[:4]), ops.NormedLinear(*parts[4:])
        return torch.cat(ops.fusion_projection(x, *layers, fused=fused), dim=2)

    tensors = [activations(shape, dtype, device), *_layers(channels, widths, device)]
    work = flops(2 * math.prod(shape) * sum(widths))
    return Case(project, tensors, 1, work, "matrix", reads=(0, 1, 3, 5, 7), weight_reads=(2, 6))


def normed_geglu(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    channels = shape[2]

    def gated(x: Tensor, *parts: Tensor, fused: bool | str) -> Tensor:
        layers = ops.NormedLinear(*parts[:4]), ops.NormedLinear(*parts[4:])
        return ops.normed_geglu(x, *layers, fused=fused)

    tensors = [activations(shape, dtype, device), *_layers(channels, (2 * channels, 2 * channels), device)]
    work = flops(8 * math.prod(shape) * channels)
    return Case(gated, tensors, 1, work, "matrix", reads=tuple(range(9)))


def local_batch_norm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    tensors = [activations(shape, dtype, device), *torch.randn(2, shape[1], device=device).unbind()]

    def norm(x: Tensor, weight: Tensor, bias: Tensor, fused: bool | str) -> Tensor:
        return ops.local_batch_norm(x, 1, weight, bias, slope=0.2, fused=fused)

    return Case(norm, tensors, 1, flops(10 * math.prod(shape)), "fma", reads=(0, 1, 2))


OPERATIONS = {
    "fusion_projection": Operation(_FUSION_PROJECTION, fusion_projection, LAYERS),
    "normed_geglu": Operation(_NORMED_GEGLU, normed_geglu, GATED),
    "local_batch_norm": Operation(_LOCAL_BATCH_NORM, local_batch_norm, HEADS),
}
