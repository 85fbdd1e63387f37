"""How close a reconstruction is to its image; images are [B, C, H, W] in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vfmvae import ops


def psnr(prediction: Tensor, target: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, [B]; infinite for equal images. Computed in float64."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )
    error = (prediction.double() - target.double()).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(data_range**2 / error)


def ssim(prediction: Tensor, target: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity of each pair, [B]; see `vfmvae.ops.ssim`. Computed in float64.

    Black counts as 0, as for images in [0, 1] or [0, 255]: the comparison of means depends on where 0 is.
    """
    black = data_range / 2
    return ops.ssim(prediction.double() + black, target.double() + black, data_range)


@torch.no_grad()
def lpips(prediction: Tensor, target: Tensor, network: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Perceptual distance of each pair, [B] in float32, without gradient; lower is closer.

    `network` comes from `vfmvae.losses.perceptual`; only with LPIPS is the number the published one.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )
    return network(prediction, target)
