"""Two pictures of one place: random views with known geometry between them, for self-supervised training.

Tensors only, whole batches at once, on any device. Images are float [B, 3, H, W] in [-1, 1]; coordinates
(x, y) run from -1 to 1 over a view or a place, as in torch.nn.functional.grid_sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


class Views(NamedTuple):
    """One view per place. A point u of the view lies at centre + half * mirror * u in the place."""

    images: Tensor  # [B, 3, R, R]
    centre: Tensor  # [B, 2]
    half: Tensor  # [B, 1], half of the side: 1 is the whole place
    mirror: Tensor  # [B, 2], (1 or -1, 1)

    def to_place(self, points: Tensor) -> Tensor:
        """Points [B, N, 2] of the view as points of the place."""
        return self.centre[:, None] + (self.half * self.mirror)[:, None] * points

    def from_place(self, points: Tensor) -> Tensor:
        """Points [B, N, 2] of the place as points of the view; beyond [-1, 1] they are outside of it."""
        return (points - self.centre[:, None]) / (self.half * self.mirror)[:, None]


def draw_views(places: Tensor, resolution: int, generator: torch.Generator) -> Views:
    """A random square of 0.5 to 1 times the side, mirrored half of the time, with random colours and blur.

    places: float [B, 3, P, P] in [-1, 1]; P should be at most twice `resolution`, because the bilinear
    sampling does not average beyond that. Two views of a place always meet. Random numbers come from the CPU
    generator on every device.
    """
    batch, device = places.shape[0], places.device
    half = 0.5 * 2 ** torch.rand(batch, 1, generator=generator)
    centre = (1 - half) * (2 * torch.rand(batch, 2, generator=generator) - 1)
    mirror = torch.ones(batch, 2)
    mirror[:, 0] -= 2 * (torch.rand(batch, generator=generator) < 0.5).float()
    views = Views(places, centre.to(device), half.to(device), mirror.to(device))
    points = grid_points(resolution, device).expand(batch, -1, -1)
    grid = views.to_place(points).view(batch, resolution, resolution, 2)
    images = F.grid_sample(places, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return views._replace(images=jitter(images, generator))


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random saturation, colour cast, contrast, brightness and blur per image, grey for a third of them."""

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        draw = torch.rand(images.shape[0], channels, 1, 1, generator=generator)
        return (low + (high - low) * draw).to(images.device)

    grey = to_grey(images)
    saturation = uniform(0, 1.5) * (uniform(0, 1) > 0.3)
    images = grey + saturation * (images - grey) * uniform(0.8, 1.2, channels=3)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + uniform(0.5, 1.5) * (images - mean) + uniform(-0.3, 0.3)
    blurred = _binomial_blur(images)
    return torch.lerp(images, blurred, uniform(-1, 1).clamp(min=0)).clamp(-1, 1)


def to_grey(images: Tensor) -> Tensor:
    """Luma [B, 1, H, W] of RGB images [B, 3, H, W]."""
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def _binomial_blur(images: Tensor) -> Tensor:
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=images.dtype, device=images.device) / 16
    flat = F.pad(images.flatten(0, 1)[:, None], (2, 2, 2, 2), mode="replicate")
    rows = F.conv2d(flat, taps.view(1, 1, 1, 5))
    return F.conv2d(rows, taps.view(1, 1, 5, 1)).view_as(images)


def grid_points(side: int, device: torch.device) -> Tensor:
    """Centres of a side x side grid over [-1, 1], row by row: [1, side * side, 2] as (x, y)."""
    axis = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) * (2 / side) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], dim=-1).view(1, side * side, 2)
