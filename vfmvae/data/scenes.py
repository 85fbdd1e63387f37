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

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vfmvae.data.samples import Fault
from vfmvae.data.source import ImageBatch, Split, check_split_and_resolution, positions
from vfmvae.data.transforms import PUBLISHED_CROPS, CropConfig

SHAPES = ("disc", "square", "triangle", "star", "ring")
PATTERNS = ("plain", "striped", "dotted")
CLASSES = tuple(f"{shape} {pattern}" for shape in SHAPES for pattern in PATTERNS)
VALIDATION_IMAGES = 40 * len(CLASSES)
SMALLEST, LARGEST = 32, 256  # resolutions
RADIUS = 0.42
"""Of an object where the image shows half of the scene, in sides of the image."""
LARGEST_RADIUS = 0.48  # objects grow no more where less is shown
WAVES = 4  # that a background's texture is a sum of

Array = NDArray[Any]  # float32


class Scenes:
    """Drawn scenes of `CLASSES`, as an `ImageSource`.

    Training is endless and draws classes at random. Validation is one list, the same for every seed, in
    rounds over the classes.
    """

    classes = CLASSES

    def __init__(self, split: Split = "train", resolution: int = 64, seed: int = 0) -> None:
        check_split_and_resolution(split, resolution)
        if not SMALLEST <= resolution <= LARGEST:
            raise ValueError(
                f"resolution {resolution}: scenes are drawn at {SMALLEST} to {LARGEST} pixels; smaller ones"
                f" would not show the patterns"
            )
        if seed < 0:
            raise ValueError(f"seed {seed} must be at least 0")
        self.split: Split = split
        self.resolution = resolution
        self.seed = seed

    def __len__(self) -> int:
        """Classes when training, which has no end; images of the list when validating."""
        return len(CLASSES) if self.split == "train" else VALIDATION_IMAGES

    def faults(self) -> list[Fault]:
        return []

    def batch(self, step: int, batch_size: int, crops: CropConfig = PUBLISHED_CROPS) -> ImageBatch:
        """Scenes step * batch_size and following: image uint8 [B, 3, R, R], label int64 [B]."""
        return self.read(positions(step, batch_size, self.split, len(self)), crops)

    def read(self, numbers: Sequence[int], crops: CropConfig = PUBLISHED_CROPS) -> ImageBatch:
        """The scenes of these numbers, in this order."""
        training = self.split == "train"
        if not training:
            crops = PUBLISHED_CROPS
        drawn = [self._draws(number) for number in numbers]
        labels = [int(draws[0] * len(CLASSES)) for draws in drawn]
        if not training:
            labels = [number % len(CLASSES) for number in numbers]
        images = render(np.array(labels), np.array(drawn, dtype=np.float32)[:, 1:], self.resolution, crops)
        return {
            "image": torch.from_numpy(images).contiguous(memory_format=torch.channels_last),
            "label": torch.tensor(labels, dtype=torch.int64),
            "key": [f"{CLASSES[labels[i]]}/{self.split} {number}" for i, number in enumerate(numbers)],
            "number": list(numbers),
            "faults": [],
        }

    def _draws(self, number: int) -> NDArray[np.float64]:
        """Uniform numbers, as many as a scene takes."""
        key = (self.seed, 0, number) if self.split == "train" else (0, 1, number)
        return np.random.default_rng(key).random(1 + DRAWS)


# Drawing --------------------------------------------------------------------------------------------------

DRAWS = 32 + 3 * WAVES


class _Draws:
    """Takes columns of uniform numbers [B, DRAWS] one after the other, as [B, 1, 1]."""

    def __init__(self, uniform: Array) -> None:
        self._uniform = uniform
        self._taken = 0

    def __call__(self, low: float = 0.0, high: float = 1.0) -> Array:
        column = self._uniform[:, self._taken, None, None]
        self._taken += 1
        return low + (high - low) * column

    def colour(self, lightness: tuple[float, float], saturation: tuple[float, float]) -> Array:
        """A random hue: [B, 3, 1, 1] in [0, 1]."""
        phases = np.array([0, 1 / 3, 2 / 3], dtype=np.float32)[:, None, None]
        hue, grey, strength = (x[:, None] for x in (self(), self(*lightness), self(*saturation)))
        return np.clip(
            grey + strength * np.minimum(grey, 1 - grey) * np.cos(2 * np.pi * (hue - phases)), 0, 1
        )


def render(
    labels: NDArray[np.int64], uniform: Array, resolution: int, crops: CropConfig
) -> NDArray[np.uint8]:
    """Scenes of classes [B] from uniform numbers [B, DRAWS]: uint8 [B, 3, R, R]."""
    draw = _Draws(uniform)
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
    u, v = _turned(
        (x - left + np.cos(light) * fall) / radius, (y - top + np.sin(light) * fall) / radius, turn
    )
    shadow = _coverage(outline(labels, u, v), np.float32(0.15))
    image *= (1 - draw(0.2, 0.6) * shadow)[:, None]

    u, v = _turned((x - left) / radius, (y - top) / radius, turn)  # [B, R, R], the object's radius is 1
    distance = outline(labels, u, v)
    pixel = 1 / (resolution * radius)
    surface = _pattern(draw, labels, u, v, pixel)
    surface *= (ambient + strength * _facing(distance, light, height))[:, None]
    image += _coverage(distance, pixel)[:, None] * (surface - image)
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    pixels[mirrored] = pixels[mirrored, ..., ::-1]
    return pixels


def outline(labels: NDArray[np.int64], u: Array, v: Array) -> Array:
    """Distance to the outline of each class's shape, below 0 inside; the points [B, R, R] are in radii."""
    shape = labels // len(PATTERNS)
    distance = np.empty(np.broadcast_shapes(u.shape, v.shape), dtype=np.float32)
    for number, name in enumerate(SHAPES):
        chosen = shape == number
        if chosen.any():
            distance[chosen] = _SHAPES[name](u[chosen], v[chosen])
    return distance


def _disc(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v) - 0.85


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.7


def _triangle(u: Array, v: Array) -> Array:
    return np.maximum(np.sqrt(np.float32(0.75)) * np.abs(u) + 0.5 * v, -v) - 0.5


def _star(u: Array, v: Array) -> Array:
    """Five points: the plane is folded about each, then a star is the inside of one edge."""
    sector = np.float32(2 * np.pi / 5)
    angle = np.abs((np.arctan2(u, -v) + sector / 2) % sector - sector / 2)
    length = np.sqrt(u * u + v * v)
    tip, notch = np.array([1.0, 0.0]), 0.42 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    normal = np.array([notch[1] - tip[1], tip[0] - notch[0]])
    normal = (normal / np.linalg.norm(normal)).astype(np.float32)
    return normal[0] * (length * np.cos(angle) - np.float32(1)) + normal[1] * length * np.sin(angle)


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.sqrt(u * u + v * v) - 0.66) - 0.24


_SHAPES = {"disc": _disc, "square": _square, "triangle": _triangle, "star": _star, "ring": _ring}


def _background(draw: _Draws, x: Array, y: Array) -> Array:
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


def _pattern(draw: _Draws, labels: NDArray[np.int64], u: Array, v: Array, pixel: Array) -> Array:
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
    marked = _coverage(distance, pixel)[:, None]
    return base + marked * (mark - base)


def _facing(distance: Array, light: Array, height: Array) -> Array:
    """How much a rounded relief, highest in the middle of the object, faces the light."""
    across, down = np.gradient(distance, axis=2), np.gradient(distance, axis=1)
    length = np.sqrt(across**2 + down**2) + np.float32(1e-6)
    towards = (np.cos(light) * across + np.sin(light) * down) / length
    slope = 0.9 * (1 - np.clip(-distance / 0.45, 0, 1))
    return np.clip(height * np.sqrt(1 - slope**2) + np.sqrt(1 - 0.25 * height**2) * slope * towards, 0, 1.2)


def _turned(x: Array, y: Array, turn: Array) -> tuple[Array, Array]:
    cosine, sine = np.cos(turn), np.sin(turn)
    return cosine * x + sine * y, cosine * y - sine * x


def _coverage(distance: Array, width: Array | np.float32) -> Array:
    """How much of a pixel of this width lies inside: 1 inside, 0 outside."""
    return np.clip(0.5 - distance / width, 0, 1)
