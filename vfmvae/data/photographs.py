"""The photographs that scikit-image carries inside its wheel, as crops: real images without a download.

Each photograph is cut in two before anything else: a strip of a quarter of its width or height is held out
for validation and the rest trains, so no pixel, and no resampled mixture of pixels, is in both. The strip is
chosen for its content; the stereo pair is cut at the same row, which rectification keeps aligned.

Each region becomes a pyramid of Lanczos-resized copies, a quarter octave apart, down to the asked resolution.
A crop is a slice of one level: as sharp as Lanczos makes it, and as cheap as a copy.

The range of a crop's side (`CropConfig.side`) chooses among the levels. Since a photograph has sizes of its
own, 0.5 stands for its first level, where a crop is sharpest, 1 for its last, where a crop is the whole short
side, and what is between for the levels between, evenly in log scale. So the default (0.5, 1) is every level.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from vfmvae.data.samples import Fault
from vfmvae.data.source import ImageBatch, Split, check_split_and_resolution, collate, positions
from vfmvae.data.transforms import PUBLISHED_CROPS, CropConfig, as_rgb

HELD_OUT_SHARE = 0.25
LEVELS_PER_OCTAVE = 4
VALIDATION_CROPS = 16  # per photograph


@dataclass(frozen=True)
class Photograph:
    """One file of scikit-image's data folder, the scene it shows and the side that is held out."""

    file: str
    scene: str
    held_out: Literal["left", "right", "top", "bottom"]


PHOTOGRAPHS = (
    Photograph("astronaut.png", "astronaut", "left"),
    Photograph("chelsea.png", "chelsea", "bottom"),
    Photograph("coffee.png", "coffee", "bottom"),
    Photograph("rocket.jpg", "rocket", "bottom"),
    Photograph("motorcycle_left.png", "motorcycle", "top"),
    Photograph("camera.png", "camera", "bottom"),
    Photograph("coins.png", "coins", "right"),
    Photograph("ihc.png", "ihc", "right"),
    Photograph("hubble_deep_field.jpg", "hubble_deep_field", "right"),
    Photograph("retina.jpg", "retina", "bottom"),
    Photograph("brick.png", "brick", "right"),
    Photograph("gravel.png", "gravel", "right"),
    Photograph("grass.png", "grass", "right"),
    Photograph("moon.png", "moon", "bottom"),
    Photograph("page.png", "page", "right"),
    Photograph("text.png", "text", "right"),
    Photograph("motorcycle_right.png", "motorcycle", "top"),
)
SCENES = tuple(dict.fromkeys(photograph.scene for photograph in PHOTOGRAPHS))


class Crop(NamedTuple):
    pixels: np.ndarray  # uint8 [R, R, 3]
    label: int
    key: str


class Photographs:
    """Square crops of the embedded photographs, as an `ImageSource`.

    Training is endless: crop i takes a photograph, a pyramid level, a place and a mirror image at random from
    (seed, i), within the limits of a CropConfig. Validation is one fixed list from the held-out strips, the
    same for every seed, in rounds over the photographs so that any beginning of it shows all of them. Labels
    are scenes (`classes`). Regions smaller than the resolution are enlarged: the strips are 75 to 353 pixels
    wide.
    """

    classes = SCENES

    def __init__(self, split: Split = "train", resolution: int = 64, seed: int = 0) -> None:
        check_split_and_resolution(split, resolution)
        self.split: Split = split
        self.resolution = resolution
        self.seed = seed
        self._pyramids = [pyramid(region(photograph, split), resolution) for photograph in PHOTOGRAPHS]

    def __len__(self) -> int:
        """Photographs when training; crops of the fixed list when validating."""
        return len(PHOTOGRAPHS) * (1 if self.split == "train" else VALIDATION_CROPS)

    def faults(self) -> list[Fault]:
        return []

    def batch(self, step: int, batch_size: int, crops: CropConfig = PUBLISHED_CROPS) -> ImageBatch:
        """Crops step * batch_size and following: image uint8 [B, 3, R, R], label int64 [B], key list[str]."""
        return self.read(positions(step, batch_size, self.split, len(self)), crops)

    def read(self, numbers: Sequence[int], crops: CropConfig = PUBLISHED_CROPS) -> ImageBatch:
        """The crops of these numbers, in this order."""
        cut = [self.crop(number, crops) for number in numbers]
        return collate([c.pixels for c in cut], [c.label for c in cut], [c.key for c in cut], list(numbers))

    def crop(self, index: int, crops: CropConfig = PUBLISHED_CROPS) -> Crop:
        """Crop number `index`; it depends on (split, resolution, seed, index, crops) alone."""
        training = self.split == "train"
        rng = np.random.default_rng((self.seed if training else 0, index))
        number = int(rng.integers(len(PHOTOGRAPHS))) if training else index % len(PHOTOGRAPHS)
        photograph, levels = PHOTOGRAPHS[number], self._pyramids[number]
        if training:
            levels = levels_within(levels, crops.side)
        level = levels[int(rng.integers(len(levels)))]
        top = int(rng.integers(level.shape[0] - self.resolution + 1))
        left = int(rng.integers(level.shape[1] - self.resolution + 1))
        pixels = level[top : top + self.resolution, left : left + self.resolution]
        if training and rng.random() < crops.flip:
            pixels = pixels[:, ::-1]
        key = f"{photograph.file}/{self.split} {level.shape[1]}x{level.shape[0]}+{left}+{top}"
        return Crop(pixels, SCENES.index(photograph.scene), key)


def region(photograph: Photograph, split: Split) -> Image.Image:
    """The part of a photograph that belongs to a split, RGB at native resolution."""
    image = _read(photograph.file)
    width, height = image.size
    side = photograph.held_out
    strip_first = side in ("left", "top")
    share = HELD_OUT_SHARE if strip_first else 1 - HELD_OUT_SHARE
    if side in ("left", "right"):
        cut = round(width * share)
        parts = (0, 0, cut, height), (cut, 0, width, height)
    else:
        cut = round(height * share)
        parts = (0, 0, width, cut), (0, cut, width, height)
    return image.crop(parts[0] if strip_first == (split == "validation") else parts[1])


def pyramid(image: Image.Image, resolution: int) -> list[np.ndarray]:
    """Copies uint8 [H, W, 3] of an image; short sides from its own to `resolution`, evenly in log scale."""
    short = min(image.size)
    octaves = math.log2(max(short, resolution) / resolution)
    count = math.ceil(octaves * LEVELS_PER_OCTAVE) + 1
    levels = []
    for shrink in np.linspace(0, octaves, count):
        scale = max(short, resolution) / short / 2**shrink
        size = (max(round(image.width * scale), resolution), max(round(image.height * scale), resolution))
        levels.append(np.asarray(image.resize(size, Image.Resampling.LANCZOS)))
    return levels


def levels_within(levels: list[np.ndarray], side: tuple[float, float]) -> list[np.ndarray]:
    """The levels of a pyramid that a range of a crop's side stands for; the nearest one if it has none."""
    smallest, largest = side
    places = np.linspace(0, 1, len(levels)) if len(levels) > 1 else np.ones(1)
    shares = 2 ** (places - 1)
    within = [level for level, share in zip(levels, shares, strict=True) if smallest <= share <= largest]
    middle = math.sqrt(smallest * largest)
    return within or [levels[int(np.argmin(np.abs(np.log2(shares / middle))))]]


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _read(file: str) -> Image.Image:
    path = data_folder() / file
    if not path.is_file():
        raise ValueError(f"photograph {path} is missing: reinstall scikit-image, or use a folder of images")
    with Image.open(path) as image:
        return as_rgb(image)


def data_folder() -> Path:
    """The data folder inside the installed scikit-image; located without importing the package."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise ValueError("the embedded photographs need scikit-image: pip install scikit-image")
    return Path(found.origin).parent / "data"
