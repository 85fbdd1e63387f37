"""Drawn scenes: an endless labelled source of images that needs no file, for trials and for measurements.

A scene is one object before a background. The class is the object's outline together with its pattern (`disc
plain`, `star dotted`, ...), so a model must see shape and texture to name it. Everything else varies freely
and says nothing about the class: both colours of the object, its place, size and turn, the background's
colours and texture, the light's direction and strength, and the shadow.

Image number i of a split is a function of (seed, split, i) alone, and of the limits of a CropConfig: `side`
is the share of the scene that a training image shows, so an object at 0.5 is twice as large as at 1. Objects
stay inside the image at every side, so below 0.44 they are no larger. Distances to outlines are exact enough
to draw edges one pixel soft, so an image at one resolution is the same scene as at another.

Legend for shape comments: B images, R resolution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vfmvae.data.drawn import Array, Drawn, Draws
from vfmvae.data.outlines import coverage, distances, turned
from vfmvae.data.transforms import CropConfig

SHAPES = ("disc", "square", "triangle", "star", "ring")
PATTERNS = ("plain", "striped", "dotted")
CLASSES = tuple(f"{shape} {pattern}" for shape in SHAPES for pattern in PATTERNS)
RADIUS = 0.42
"""Of an object where the image shows half of the scene, in sides of the image."""
LARGEST_RADIUS = 0.48  # objects grow no more where less is shown
WAVES = 4  # that a background's texture is a sum of


class Scenes(Drawn):
    """Drawn scenes of `CLASSES`."""

    name = "scenes"
    classes = CLASSES
    resolutions = (32, 256)
    draws = 32 + 3 * WAVES

    def render(self, labels: NDArray[np.int64], uniform: Array, crops: CropConfig) -> NDArray[np.uint8]:
        return render(labels, uniform, self.resolution, crops)


def render(
    labels: NDArray[np.int64], uniform: Array, resolution: int, crops: CropConfig
) -> NDArray[np.uint8]:
    """Scenes of classes [B] from uniform numbers [B, draws]: uint8 [B, 3, R, R]."""
    draw = Draws(uniform)
    axis = ((np.arange(resolution, dtype=np.float32) + 0.5) / resolution - 0.5)[None]
    x, y = axis[:, None, :], axis[:, :, None]  # [1, 1, R], [1, R, 1] in sides of the image, centre 0
    shown, mirrored = draw(*crops.side), (draw() < crops.flip)[:, 0, 0]
    radius = np.minimum(RADIUS * 0.5 / shown * draw(0.85, 1.0), LARGEST_RADIUS)
    room = 0.5 - radius
    left, top, turn = draw(-1, 1) * room, draw(-1, 1) * room, draw(-np.pi, np.pi)
    light, height = draw(-np.pi, np.pi), draw(0.5, 1.0)
    strength, ambient = draw(0.5, 1.0), draw(0.35, 0.6)

    image = _background(draw, x / shown, y / shown)  # [B, 3, R, R]
    lit = 1 + 0.35 * (draw(0.3, 1.0) * (np.cos(light) * x + np.sin(light) * y) * 2)
    image *= lit[:, None]

    # A shadow falls away from the light, soft and as far as the light is low.
    fall = 0.35 * radius * (1.3 - height)
    u, v = turned((x - left + np.cos(light) * fall) / radius, (y - top + np.sin(light) * fall) / radius, turn)
    shadow = coverage(outline(labels, u, v), np.float32(0.15))
    image *= (1 - draw(0.2, 0.6) * shadow)[:, None]

    u, v = turned((x - left) / radius, (y - top) / radius, turn)  # [B, R, R], the object's radius is 1
    distance = outline(labels, u, v)
    pixel = 1 / (resolution * radius)
    surface = _pattern(draw, labels, u, v, pixel)
    surface *= (ambient + strength * _facing(distance, light, height))[:, None]
    image += coverage(distance, pixel)[:, None] * (surface - image)
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    pixels[mirrored] = pixels[mirrored, ..., ::-1]
    return pixels


def outline(labels: NDArray[np.int64], u: Array, v: Array) -> Array:
    """Distance to the outline of each class's shape, below 0 inside; the points [B, R, R] are in radii."""
    return distances([SHAPES[shape] for shape in labels // len(PATTERNS)], u, v)


def _background(draw: Draws, x: Array, y: Array) -> Array:
    """Two colours mixed by a sum of waves of random direction and length: [B, 3, R, R]."""
    first, second = (draw.colour((0.2, 0.8), (0.0, 0.6)) for _ in range(2))
    rough, mixture = draw(0.15, 1.0), np.zeros_like(x + y)
    for wave in range(WAVES):
        frequency = 2.0 * 2**wave * draw(0.7, 1.4)
        direction, phase = draw(0, 2 * np.pi), draw(0, 2 * np.pi)
        along = np.cos(direction) * x + np.sin(direction) * y
        mixture = mixture + rough**wave * np.sin(2 * np.pi * frequency * along * 0.5 + phase)
    share = np.clip(0.5 + 0.25 * mixture, 0, 1)[:, None]
    return first + share * (second - first)


def _pattern(draw: Draws, labels: NDArray[np.int64], u: Array, v: Array, pixel: Array) -> Array:
    """The object's colour at each point: [B, 3, R, R]. Its second colour is clearly lighter or darker."""
    darker = draw.colour((0.15, 0.35), (0.3, 1.0))
    lighter = draw.colour((0.6, 0.85), (0.3, 1.0))
    swap = (draw() < 0.5)[:, None]
    base, mark = np.where(swap, darker, lighter), np.where(swap, lighter, darker)
    pattern, period = (labels % len(PATTERNS))[:, None, None], draw(0.5, 0.62)
    along, across = u / period + draw(), v / period + draw()
    along, across = along - np.floor(along) - 0.5, across - np.floor(across) - 0.5  # from the cell's centre
    stripes = (np.abs(along) - 0.25) * period
    dots = (np.sqrt(along**2 + across**2) - 0.3) * period
    distance = np.where(pattern == 1, stripes, np.where(pattern == 2, dots, np.float32(1)))
    marked = coverage(distance, pixel)[:, None]
    return base + marked * (mark - base)


def _facing(distance: Array, light: Array, height: Array) -> Array:
    """How much a rounded relief, highest in the middle of the object, faces the light."""
    across, down = np.gradient(distance, axis=2), np.gradient(distance, axis=1)
    length = np.sqrt(across**2 + down**2) + np.float32(1e-6)
    towards = (np.cos(light) * across + np.sin(light) * down) / length
    slope = 0.9 * (1 - np.clip(-distance / 0.45, 0, 1))
    return np.clip(height * np.sqrt(1 - slope**2) + np.sqrt(1 - 0.25 * height**2) * slope * towards, 0, 1.2)
