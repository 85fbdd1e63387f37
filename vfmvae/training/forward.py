"""The forward pass of a training step: one module call, which DDP and FSDP can wrap.

The graph is cut at the latents (`StepOutput.leaf`) and, by the step, at the images, so that the gradients of
several losses can be measured where they are small before one backward pass carries their sum on.

Shapes: images [B, 3, H, W] in [-1, 1]; latents [B, z, h, w].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vfmvae.encoders import Features, FrozenEncoder
from vfmvae.losses.alignment import latent_preservation_loss
from vfmvae.tokenizer import DiscretePosterior, Posterior, Tokenizer
from vfmvae.tokenizer.equivariance import Equivariance, shrink_images, transform_images, transform_latents


class StepOutput(NamedTuple):
    """What one forward computes."""

    images: list[Tensor]  # reconstruction [B, 3, H, W], then the five smaller images
    targets: Tensor  # [B, 3, H, W], what the reconstruction should be
    latents: Tensor  # [B, z, h, w], sampled; ends the encoder side's graph
    leaf: Tensor  # the same values; the decoder side's graph begins here
    posterior: Posterior | DiscretePosterior
    encoded: Features  # what the encoder says of the images: layers [B, N, C] each, pooled [B, C]
    alignment: Tensor | None  # scalar, a function of `leaf`
    preservation: Tensor | None  # scalar, a function of the posterior's mean


class Snapshot(nn.Module):
    """A tokenizer's encoder side as it was, which gives the latents' mean."""

    def __init__(
        self, fusion: nn.Module, bottleneck: nn.Module, encoder: FrozenEncoder | None = None
    ) -> None:
        """Copies of these parts. `encoder`: None where the tokenizer's own does not change meanwhile."""
        super().__init__()
        self.encoder, self.fusion, self.bottleneck = encoder, fusion, bottleneck
        self.requires_grad_(False)

    def forward(
        self, images: Tensor, features: Sequence[Tensor], latent_size: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Images, and what the tokenizer's encoder says of them -> the posterior's mean [B, z, h, w].

        Fusion is computed in `dtype`.
        """
        if self.encoder is not None:
            features = self.encoder(images).layers
        tokens = [layer.to(dtype) for layer in features]
        return self.bottleneck(self.fusion(tokens, latent_size).float()).mode()


class TrainingForward(nn.Module):
    """A tokenizer with everything that a run asks of its parameters: the step's forward, and evaluation's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None,
        equivariance: Equivariance,
        align: bool,
        snapshot: Snapshot | None = None,
    ) -> StepOutput:
        """Args:
        images: [B, 3, H, W] in [-1, 1].
        noise: the seed of standard normal noise, int64 [2] (`StepDraws.seed`), or the noise itself,
            [B, z, h, w] of the latents that these images get (smaller where `equivariance` shrinks them);
            a discrete bottleneck needs none.
        align: compute the alignment loss.
        snapshot: compute the distance from its latents.
        """
        tokenizer = self.tokenizer
        inputs = shrink_images(images, equivariance)
        size = latent_size(tokenizer, inputs)
        encoded = tokenizer.encoder(inputs)
        features = encoded.layers
        posterior = tokenizer.fuse(features, size)
        latents = posterior.sample(noise)
        leaf = latents.detach().requires_grad_(latents.requires_grad)
        decoded, smaller = tokenizer.decode(transform_latents(leaf, equivariance), return_multiscale=True)
        alignment = tokenizer.alignment_loss(leaf, features) if align else None
        preservation = None
        if snapshot is not None:
            with torch.no_grad():
                earlier = snapshot(inputs, features, size, tokenizer.dtype)
            preservation = latent_preservation_loss(posterior.mode(), earlier)
        targets = transform_images(inputs, equivariance)
        return StepOutput(
            [decoded, *smaller], targets, latents, leaf, posterior, encoded, alignment, preservation
        )

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], float in [-1, 1] or uint8 -> what decoding the posterior's mode gives."""
        return self.tokenizer.decode(self.tokenizer.encode(images).mode())


def latent_size(tokenizer: Tokenizer, images: Tensor) -> tuple[int, int]:
    """Rows and columns of the latents of images [B, 3, H, W]."""
    downsample = tokenizer.config.downsample
    return images.shape[-2] // downsample, images.shape[-1] // downsample
