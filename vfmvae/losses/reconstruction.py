"""Pixel losses; images are [B, 3, H, W] in [-1, 1], computed in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def l1_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference over all values; a scalar. 2 is the distance of black from white."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )
    return (prediction.float() - target.float()).abs().mean()


def multiscale_l1_loss(predictions: Sequence[Tensor], target: Tensor) -> Tensor:
    """Sum of the L1 losses of smaller images against the target, resized bilinearly with antialiasing; a
    scalar.

    VFM-VAE (arXiv 2510.18457): 0.1 times this over the decoder's five smaller images.
    """
    losses = [l1_loss(image, resized(target, image.shape[-2:])) for image in predictions]
    return torch.stack(losses).sum()


def resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize with antialiasing; [B, 3, H, W] -> [B, 3, *size]."""
    return F.interpolate(images, tuple(size), mode="bilinear", align_corners=False, antialias=True)
