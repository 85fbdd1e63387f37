"""Keeping latents near a foundation model: the weight of the alignment loss, the distance from a snapshot.

The alignment loss itself is `vfmvae.ops.vf_alignment_loss`, which a tokenizer calls with its margins.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_WEIGHT = 1e8  # of an alignment loss


def adaptive_weight(
    reconstruction_loss: Tensor, other_loss: Tensor, weight: Tensor, limit: float = MAX_WEIGHT
) -> Tensor:
    """Ratio of the two losses' gradient norms at `weight`, without gradient; a scalar.

    |d reconstruction / d weight| / (|d other / d weight| + 1e-4), clamped to [0, limit], as in VQGAN (arXiv
    2012.09841, for an adversarial loss, limit 1e4) and VA-VAE (arXiv 2501.01423, for an alignment loss, limit
    1e8). Both graphs are kept for the backward pass that follows.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, weight, retain_graph=True)
    (of_other,) = torch.autograd.grad(other_loss, weight, retain_graph=True)
    return gradient_ratio(of_reconstruction, of_other, limit)


def gradient_ratio(of_reconstruction: Tensor, of_other: Tensor, limit: float = MAX_WEIGHT) -> Tensor:
    """The adaptive weight from the two gradients, of any one shape; a scalar in float32 without gradient."""
    ratio = of_reconstruction.float().norm() / (of_other.float().norm() + 1e-4)
    return ratio.clamp(0.0, limit).detach()


def latent_preservation_loss(latents: Tensor, snapshot: Tensor) -> Tensor:
    """Mean squared difference between latents and those of a frozen earlier model; a scalar in float32.

    AlignTok (arXiv 2509.25162) trains its encoder with the squared L2 distance from the latents, after the
    adapter, that the model gave before the encoder was trained. Its normalisation is
    our choice: the mean over all elements, so that a weight means the same at every resolution and number of
    channels, beside reconstruction losses that are means too. Times the number of channels it is the mean
    squared length of a position's difference.

    Args:
        latents: [B, z, h, w]; receives the gradient.
        snapshot: [B, z, h, w], of the same images; taken as a constant.

    Raises:
        ValueError: the shapes differ.
    """
    if latents.shape != snapshot.shape:
        raise ValueError(
            f"latents {tuple(latents.shape)} and snapshot {tuple(snapshot.shape)} differ in shape"
        )
    return (latents.float() - snapshot.detach().float()).square().mean()
