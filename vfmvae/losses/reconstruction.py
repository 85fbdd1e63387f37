"""Losses between images [B, 3, H, W] in [-1, 1], computed in float32; each a scalar, 0 for equal images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae import ops


def l1_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference over all values. 2 is the distance of black from white."""
    _check_shapes(prediction, target)
    return (prediction.float() - target.float()).abs().mean()


def l2_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference over all values. 4 is the distance of black from white."""
    _check_shapes(prediction, target)
    return (prediction.float() - target.float()).square().mean()


def ssim_loss(prediction: Tensor, target: Tensor, *, fused: ops.Fused = True) -> Tensor:
    """1 - structural similarity, mean over the batch; between 0 and 2. See `vfmvae.ops.ssim`.

    VFM-VAE (arXiv 2510.18457) adds it with weight 1 where the decoder is fine-tuned.

    Raises ValueError for images that differ in shape or are smaller than the window, 11 x 11.
    """
    _check_shapes(prediction, target)
    return 1.0 - ops.ssim(prediction, target, data_range=2.0, fused=fused).mean()


def multiscale_l1_loss(predictions: Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
    """Sum of the L1 losses of smaller images against the target, resized bilinearly with antialiasing.

    VFM-VAE (arXiv 2510.18457): 0.1 times this over the decoder's five smaller images.

    Args:
        predictions: images [B, 3, h, w], at least one.
        target: the images at full size; or, resized already, a batch of images for each prediction.
    """
    if isinstance(target, Tensor):
        target = [resized(target, image.shape[-2:]) for image in predictions]
    elif len(target) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions and {len(target)} targets; each needs its own")
    losses = [l1_loss(image, small) for image, small in zip(predictions, target, strict=True)]
    return torch.stack(losses).sum()


def resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize with antialiasing; [B, 3, H, W] -> [B, 3, *size]."""
    return F.interpolate(images, tuple(size), mode="bilinear", align_corners=False, antialias=True)


def _check_shapes(prediction: Tensor, target: Tensor) -> None:
    """ValueError unless the shapes are equal: broadcasting would hide a mistake."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )
