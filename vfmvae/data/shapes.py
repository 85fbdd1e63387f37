"""Drawn shapes: bright, plain and upright on a dark ground; what a small diffusion model learns in minutes.

The class is the shape, each its own mirror image. Colours, place and size vary, all but the hues a little.
`side` of a CropConfig is as in vfmvae.data.scenes: the smaller, the larger the shape.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vfmvae.data.drawn import Array, Drawn, Draws
from vfmvae.data.outlines import coverage, distances
from vfmvae.data.transforms import CropConfig

CLASSES = ("disc", "ring", "square", "diamond", "triangle", "star", "cross", "heart")
RADIUS = 0.3
"""Of a shape where the image shows all of its surroundings, in sides of the image."""
LARGEST_RADIUS = 0.44  # where it shows less than two thirds


class Shapes(Drawn):
    """Drawn shapes of `CLASSES`."""

    name = "shapes"
    classes = CLASSES
    resolutions = (16, 256)
    draws = 10

    def render(self, labels: NDArray[np.int64], uniform: Array, crops: CropConfig) -> NDArray[np.uint8]:
        draw, resolution = Draws(uniform), self.resolution
        axis = ((np.arange(resolution, dtype=np.float32) + 0.5) / resolution - 0.5)[None]
        x, y = axis[:, None, :], axis[:, :, None]  # [1, 1, R], [1, R, 1] in sides of the image, centre 0
        shown, mirrored = draw(*crops.side), (draw() < crops.flip)[:, 0, 0]
        radius = np.minimum(RADIUS / shown, LARGEST_RADIUS)
        room = 0.5 * (0.5 - radius)
        left, top = draw(-1, 1) * room, draw(-1, 1) * room
        ground, colour = draw.colour((0.1, 0.25), (0.3, 0.6)), draw.colour((0.6, 0.75), (0.6, 1.0))
        u, v = (x - left) / radius, (y - top) / radius
        inside = coverage(distances([CLASSES[label] for label in labels], u, v), 1 / (resolution * radius))
        image = ground + inside[:, None] * (colour - ground)
        pixels = (image * 255 + 0.5).astype(np.uint8)
        pixels[mirrored] = pixels[mirrored, ..., ::-1]
        return pixels
