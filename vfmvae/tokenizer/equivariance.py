"""Equivariance regularisation: latents that scale and turn as the image does (EQ-VAE, arXiv 2502.09509).

One draw per batch. With `latent_probability` the latents are resized and rotated, and the decoder must give
the image resized and rotated alike; otherwise, with `image_probability`, the image itself is shrunk before
the encoder; otherwise nothing happens. A step is

    images = shrink_images(images, draw)                     # [B, 3, H, W], what the encoder sees
    latents = transform_latents(encode(images), draw)        # [B, z, h, w]
    target = transform_images(images, draw)                  # [B, 3, H', W'], what decode(latents) must be

Images are float in [-1, 1] and stay in that range: bilinear weights are positive and sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.serialization import check_fields

EQUIVARIANCE_UNIFORMS = 4
"""Uniform numbers that one draw takes."""


@dataclass(frozen=True)
class EquivarianceConfig:
    """How often a batch is transformed, and what is drawn from, each entry with equal probability."""

    latent_probability: float = 0.5
    """Share of batches whose latents, and targets, are scaled and rotated; 0: none."""
    image_probability: float = 0.25
    """Of the other batches, the share whose images are shrunk before the encoder; 0: none."""
    latent_scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Sizes of transformed latents, as shares of their own."""
    rotations: tuple[int, ...] = (0, 90, 180, 270)
    """Rotations of transformed latents in degrees, drawn independently of the scale."""
    image_scales: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Sizes of shrunk images, as shares of their own."""

    def __post_init__(self) -> None:
        check_fields(self, "equivariance")
        for name in ("latent_probability", "image_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"equivariance.{name} is {getattr(self, name)}; it must lie in [0, 1]")
        for name in ("latent_scales", "image_scales"):
            scales = getattr(self, name)
            if not scales or not all(0 < scale <= 1 for scale in scales):
                raise ValueError(f"equivariance.{name} is {scales}; needed are scales above 0 and up to 1")
        if not self.rotations or not set(self.rotations) <= {0, 90, 180, 270}:
            raise ValueError(
                f"equivariance.rotations is {self.rotations}; needed are some of 0, 90, 180 and 270"
            )


class Equivariance(NamedTuple):
    """What one batch does; the defaults leave it as it is. At most one of the two scales is not 1."""

    latent_scale: float = 1.0
    rotation: int = 0  # degrees, counterclockwise
    image_scale: float = 1.0


def draw_equivariance(config: EquivarianceConfig, uniforms: Sequence[float]) -> Equivariance:
    """The transformation of one batch from four numbers in [0, 1): two choose the branch, one the scale, one
    the rotation.

    The sizes of a batch's tensors follow from it, so it must be the same in every process of a run.
    """
    latent, image, scale, rotation = uniforms
    if latent < config.latent_probability:
        return Equivariance(
            latent_scale=config.latent_scales[int(scale * len(config.latent_scales))],
            rotation=config.rotations[int(rotation * len(config.rotations))],
        )
    if image < config.image_probability:
        return Equivariance(image_scale=config.image_scales[int(scale * len(config.image_scales))])
    return Equivariance()


def check_equivariance(config: EquivarianceConfig, resolution: int, multiple: int) -> None:
    """ValueError if a scale that can be drawn gives images whose sides are no multiple of `multiple`.

    `resolution`: side of the training images. `multiple`: what encoder and decoder both need.
    """
    possible = [count * multiple / resolution for count in range(1, resolution // multiple + 1)]
    for branch in ("latent", "image"):
        if getattr(config, f"{branch}_probability") == 0:
            continue
        for scale in getattr(config, f"{branch}_scales"):
            if not any(math.isclose(scale, share) for share in possible):
                raise ValueError(
                    f"equivariance.{branch}_scales holds {scale:g}, which makes {resolution} px images"
                    f" {scale * resolution:g} px; sides must be multiples of {multiple}, so the possible"
                    f" scales are {', '.join(f'{share:g}' for share in possible) or 'none'}; choose from"
                    f" these, or set equivariance.{branch}_probability to 0"
                )


def shrink_images(images: Tensor, draw: Equivariance) -> Tensor:
    """The encoder's input: images [B, 3, H, W], float, resized by the image scale with antialiasing."""
    return _resize(_checked(images), draw.image_scale, antialias=True)


def transform_latents(latents: Tensor, draw: Equivariance) -> Tensor:
    """Latents [B, z, h, w] -> [B, z, h', w'], resized without antialiasing, then rotated; differentiable.

    ValueError where a scaled side is not a whole number.
    """
    return _rotate(_resize(latents, draw.latent_scale, antialias=False), draw.rotation)


def transform_images(images: Tensor, draw: Equivariance) -> Tensor:
    """The target: the encoder's input [B, 3, H, W], float, transformed as its latents are; antialiased.

    ValueError as for `transform_latents`, and for integer images.
    """
    return _rotate(_resize(_checked(images), draw.latent_scale, antialias=True), draw.rotation)


def _checked(images: Tensor) -> Tensor:
    if not images.is_floating_point():
        raise ValueError(
            f"equivariance takes float images in [-1, 1], not {images.dtype}; convert them with to_unit"
        )
    return images


def _resize(x: Tensor, scale: float, antialias: bool) -> Tensor:
    if scale == 1.0:
        return x
    exact = [side * scale for side in x.shape[-2:]]
    size = [round(side) for side in exact]
    if not all(math.isclose(a, b) for a, b in zip(size, exact, strict=True)):
        raise ValueError(
            f"a map of {x.shape[-2]} x {x.shape[-1]} times scale {scale:g} is {exact[0]:g} x {exact[1]:g};"
            f" both must be whole numbers"
        )
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=antialias)


def _rotate(x: Tensor, degrees: int) -> Tensor:
    if degrees == 0:
        return x
    # A quarter turn swaps the strides of rows and columns; what follows wants channels last.
    return torch.rot90(x, degrees // 90, (-2, -1)).contiguous(memory_format=torch.channels_last)
