"""Drawn images: endless labelled sources that need no file, for trials and for measurements.

Image number i of a split is a function of (seed, split, i) alone, and of the limits of a CropConfig.

Legend for shape comments: B images, R resolution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vfmvae.data.samples import Fault
from vfmvae.data.source import ImageBatch, Split, check_split_and_resolution, positions
from vfmvae.data.transforms import PUBLISHED_CROPS, CropConfig

Array = NDArray[Any]  # float32
VALIDATION_ROUNDS = 40
"""Held-out images of each class."""


class Drawn(ABC):
    """Images that `render` draws of a class and uniform numbers, as an `ImageSource`.

    Training is endless and draws classes at random. Validation is one list, the same for every seed and
    crops, in rounds over the classes.
    """

    name: str
    """What --data calls them."""
    classes: tuple[str, ...]
    resolutions: tuple[int, int]
    """The lowest and the highest."""
    draws: int
    """How many uniform numbers an image takes."""

    def __init__(self, split: Split = "train", resolution: int = 64, seed: int = 0) -> None:
        check_split_and_resolution(split, resolution)
        lowest, highest = self.resolutions
        if not lowest <= resolution <= highest:
            raise ValueError(
                f"resolution {resolution}: {self.name} are drawn at {lowest} to {highest} pixels; smaller"
                f" ones would not show their classes"
            )
        if seed < 0:
            raise ValueError(f"seed {seed} must be at least 0")
        self.split: Split = split
        self.resolution = resolution
        self.seed = seed

    @abstractmethod
    def render(self, labels: NDArray[np.int64], uniform: Array, crops: CropConfig) -> NDArray[np.uint8]:
        """Images of classes [B] from uniform numbers [B, draws]: uint8 [B, 3, R, R]."""

    def __len__(self) -> int:
        """Classes when training, which has no end; images of the list when validating."""
        return len(self.classes) * (1 if self.split == "train" else VALIDATION_ROUNDS)

    def faults(self) -> list[Fault]:
        return []

    def batch(self, step: int, batch_size: int, crops: CropConfig = PUBLISHED_CROPS) -> ImageBatch:
        """Images step * batch_size and following: image uint8 [B, 3, R, R], label int64 [B]."""
        return self.read(positions(step, batch_size, self.split, len(self)), crops)

    def read(self, numbers: Sequence[int], crops: CropConfig = PUBLISHED_CROPS) -> ImageBatch:
        """The images of these numbers, in this order."""
        training = self.split == "train"
        if not training:
            crops = PUBLISHED_CROPS
        drawn = [self._uniform(number) for number in numbers]
        labels = [int(uniform[0] * len(self.classes)) for uniform in drawn]
        if not training:
            labels = [number % len(self.classes) for number in numbers]
        images = self.render(np.array(labels), np.array(drawn, dtype=np.float32)[:, 1:], crops)
        return {
            "image": torch.from_numpy(images).contiguous(memory_format=torch.channels_last),
            "label": torch.tensor(labels, dtype=torch.int64),
            "key": [f"{self.classes[labels[i]]}/{self.split} {number}" for i, number in enumerate(numbers)],
            "number": list(numbers),
            "faults": [],
        }

    def _uniform(self, number: int) -> NDArray[np.float64]:
        """Uniform numbers, one for the class and as many as an image takes."""
        key = (self.seed, 0, number) if self.split == "train" else (0, 1, number)
        return np.random.default_rng(key).random(1 + self.draws)


class Draws:
    """Takes columns of uniform numbers [B, draws] one after the other, as [B, 1, 1]."""

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
