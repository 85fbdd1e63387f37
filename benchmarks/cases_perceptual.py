"""The rows of kernels.py for the perceptual losses: one layer's term of LPIPS, and structural similarity."""

from __future__ import annotations

import math

import torch
from case import Case, Operation, Shape, activations, flops
from torch import Tensor

from vfmvae import ops
from vfmvae.ops.perceptual import _LPIPS_DISTANCE, _SSIM

LAYERS: dict[str, list[Shape]] = {  # the maps of VGG16 at 256 px; tokens of the demo's encoder
    "demo": [(8, 96, 64, 1)],
    "full": [(1, 512, 16, 16), (1, 512, 32, 32), (1, 256, 64, 64), (1, 128, 128, 128), (1, 64, 256, 256)],
    "odd": [(1, 12, 5, 7), (3, 24, 9, 33), (2, 128, 17, 40)],
}
IMAGES: dict[str, list[Shape]] = {
    "demo": [(8, 3, 64, 64)],
    "full": [(1, 3, 256, 256)],
    "odd": [(1, 1, 11, 11), (3, 3, 33, 43), (2, 3, 40, 75)],
}


def lpips_distance(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """The prediction's map is the input; the target's takes no gradient."""
    target = activations(shape, dtype, device).relu_()
    weights = torch.rand(shape[1], device=device)

    def distance(prediction: Tensor, fused: bool | str) -> Tensor:
        return ops.lpips_distance(prediction, target, weights, fused=fused)

    work = flops(8 * math.prod(shape), 1.5, 1.5)
    prediction = activations(shape, dtype, device).relu_()
    return Case(distance, [prediction], 1, work, "fma", reads=(0,), constant_bytes=size_of(target))


def ssim(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    target, noise = (0.4 * activations(shape, dtype, device) for _ in range(2))

    def index(prediction: Tensor, fused: bool | str) -> Tensor:
        return ops.ssim(prediction, target, fused=fused)

    # Two blurs of 11 taps of four numbers per pixel, and of three.
    work = flops(2 * 2 * 11 * 4 * math.prod(shape), 0.75, 0.75)
    return Case(index, [target + noise], 1, work, "fma", reads=(0,), constant_bytes=size_of(target))


def size_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


OPERATIONS = {
    "lpips_distance": Operation(_LPIPS_DISTANCE, lpips_distance, LAYERS),
    "ssim": Operation(_SSIM, ssim, IMAGES),
}
