"""The blur through which a discriminator sees its first images, real and generated alike, and how it fades.

A young generator's detail gives itself away; blurred, its images are compared by their large forms first
(StyleGAN3, arXiv 2106.12423; StyleGAN-XL, arXiv 2202.00273; StyleGAN-T, arXiv 2301.09515).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vfmvae.encoders.base import without_autocast

RADIUS_IN_SIGMAS = 3


class Blur(NamedTuple):
    """The last two arguments of `gaussian_blur`."""

    sigma: Tensor
    reach: int


def blur_sigma(seen_images: int, initial_sigma: float, fade_images: int) -> float:
    """Standard deviation of the blur in pixels: from `initial_sigma` linearly to 0 at `fade_images`.

    Args:
        seen_images: since the discriminator began to train.
        initial_sigma: 0 for no blur at any time.
        fade_images: 0 likewise.
    """
    if initial_sigma < 0 or fade_images < 0:
        raise ValueError(f"initial_sigma {initial_sigma} and fade_images {fade_images} must not be negative")
    if seen_images >= fade_images:
        return 0.0
    return initial_sigma * (1.0 - seen_images / fade_images)


def reach_of(sigma: float) -> int:
    """How far the filter of this width reaches, in pixels."""
    return int(RADIUS_IN_SIGMAS * sigma)


def gaussian_blur(images: Tensor, sigma: float | Tensor, reach: int | None = None) -> Tensor:
    """Gaussian blur, [B, C, H, W] -> the same, with the border pixels repeated outwards; differentiable.

    The filter reaches floor(3 sigma) pixels, so below sigma = 1/3 the images are returned as they are.
    Computed in float32 for 16-bit images, and returned in their dtype.

    Args:
        sigma: standard deviation in pixels, a scalar. The filter 2^-(x/s)^2 of the StyleGANs has 0.849 s.
        reach: pixels that are looked at, no fewer than the filter reaches. Where a tensor on the device
            stays and its value changes it must be given, since the shapes follow from it.
    """
    if reach is None:
        reach = reach_of(float(sigma))
    if reach == 0:
        return images
    wide = torch.promote_types(images.dtype, torch.float32)
    rows, columns = (_blur_matrix(n, sigma, reach, images.device, wide) for n in images.shape[-2:])
    with without_autocast(images.device):
        return (rows @ images.to(wide) @ columns.t()).to(images.dtype)


def _blur_matrix(
    length: int, sigma: float | Tensor, reach: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """[length, length]: row i holds the weights of the pixels that make pixel i.

    A matrix product is deterministic in both directions on a GPU, where the gradient of replicate padding is
    not, and its shape does not change while the blur fades.
    """
    out = torch.arange(length, device=device)[:, None]
    seen = torch.arange(-reach, length + reach, device=device)[None]  # the line with its repeated borders
    distance = (seen - out).to(dtype)
    weights = torch.exp(-0.5 * (distance / sigma).square())
    weights = weights * (distance.abs() <= RADIUS_IN_SIGMAS * sigma)
    weights = weights / weights.sum(dim=1, keepdim=True)  # [length, length + 2 reach]
    matrix = weights[:, reach : reach + length].clone()
    matrix[:, 0] += weights[:, :reach].sum(dim=1)
    matrix[:, -1] += weights[:, reach + length :].sum(dim=1)
    return matrix
