"""Losses of diffusion training: velocities, and tokens held to an encoder's; each a scalar in float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def velocity_loss(prediction: Tensor, velocity: Tensor) -> Tensor:
    """Mean squared difference, of an image and then of all; SiT, arXiv 2401.08740.

    Args:
        prediction, velocity: latents' [B, C, h, w] or class tokens' [B, D].

    Raises ValueError for shapes that differ.
    """
    _check_shapes(prediction, velocity, "velocity")
    return (prediction.float() - velocity.float()).square().flatten(1).mean(dim=1).mean()


def cosine_loss(prediction: Tensor, velocity: Tensor) -> Tensor:
    """Mean of 1 - cosine over the channels, dimension 1; between 0 and 2. LightningDiT, arXiv 2501.01423.

    Args:
        prediction, velocity: [B, C, h, w].

    Raises ValueError for shapes that differ.
    """
    _check_shapes(prediction, velocity, "velocity")
    cosine = F.cosine_similarity(prediction.float(), velocity.float(), dim=1)
    return (1 - cosine).flatten(1).mean(dim=1).mean()


def token_alignment_loss(projected: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of -cosine; between -1 and 1. REPA, arXiv 2410.06940.

    Args:
        projected: [B, T, D], what a head makes of a diffusion model's tokens; receives the gradient.
        target: [B, T, D], a frozen encoder's tokens of the clean image, for REG the class token first; taken
            as a constant.

    Raises ValueError for shapes that differ.
    """
    _check_shapes(projected, target, "target")
    cosine = F.cosine_similarity(projected.float(), target.detach().float(), dim=-1)
    return -cosine.mean(dim=1).mean()


def standardise_tokens(target: Tensor, eps: float = 1e-6) -> Tensor:
    """(y - mean) / (std + eps) over the tokens of an image, each channel by itself: iREPA's target.

    What all places have in common says nothing of where things are. The std is the sample's, of T - 1.

    Args:
        target: patch tokens [B, T, D], T at least 2; a class token is not one of them.

    Returns the same shape in float32.

    Raises ValueError for fewer tokens.
    """
    if target.ndim != 3 or target.shape[1] < 2:
        raise ValueError(f"target is {tuple(target.shape)}; needed are [B, T, D] with 2 tokens T at least")
    target = target.float()
    return (target - target.mean(dim=1, keepdim=True)) / (target.std(dim=1, keepdim=True) + eps)


def _check_shapes(prediction: Tensor, target: Tensor, name: str) -> None:
    """ValueError unless the shapes are equal: broadcasting would hide a mistake."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and {name} {tuple(target.shape)} differ in shape"
        )
