"""How close a reconstruction is to its image; images are [B, C, H, W] in [-1, 1]."""

from __future__ import annotations

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
    """Structural similarity of each pair, [B]; see `vfmvae.ops.ssim`. Computed in float64."""
    return ops.ssim(prediction.double(), target.double(), data_range)
