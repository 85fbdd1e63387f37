"""The files of `vfmvae sample`: images under way, which outlive a kill, and what is there at the end.

Images under way lie in one hidden file, which all processes write to: pixels uint8 [N, H, W, 3], then one
byte for each image, 1 once its pixels are there. What decides the images lies beside it, so that a command
with other settings does not go on with them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vfmvae.atomic import remove_leftovers, write_atomically
from vfmvae.cli import UsageError
from vfmvae.data.latents import LatentBatch
from vfmvae.decode import check_new, write_arrays
from vfmvae.inference import write_picture
from vfmvae.serialization import read_json

ARRAYS, SETTINGS, GRID, SINGLES = "samples.npz", "samples.json", "samples.png", "images"
BEGUN, BEGUN_SETTINGS = f".{ARRAYS}.begun", f".{SETTINGS}.begun"
NAMES = ("model", "guide", "tokenizer", "vfmvae")
"""Settings that may differ when images are gone on with: the hashes say what the models are."""
GRID_SIDE = 8
CHUNK = 256


class ImagesUnderWay:
    """The images of all processes, as far as they are made."""

    def __init__(self, folder: Path, count: int, side: int) -> None:
        """Of a folder where `begin` was called."""
        self.path = folder / BEGUN
        self.count, self.side = count, side
        self._size = side * side * 3

    def missing(self) -> list[int]:
        """Numbers of the images that are still to be made."""
        with open(self.path, "rb") as file:
            file.seek(self.count * self._size)
            there = np.frombuffer(file.read(), np.uint8)
        return np.flatnonzero(there == 0).tolist()

    def write(self, numbers: Sequence[int], images: Tensor) -> None:
        """Images uint8 [B, 3, H, W] on the CPU; each is marked once all of them are on the disk.

        Written and not mapped: a full disk is an error, and no crash.
        """
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        with open(self.path, "r+b") as file:
            for number, image in zip(numbers, pixels, strict=True):
                file.seek(number * self._size)
                file.write(image.data)
            file.flush()
            os.fsync(file.fileno())
            for number in numbers:
                file.seek(self.count * self._size + number)
                file.write(b"\1")

    def pixels(self) -> np.ndarray:
        """All of them, uint8 [N, H, W, 3], mapped."""
        return np.memmap(self.path, np.uint8, "r", shape=(self.count, self.side, self.side, 3))

    def remove(self) -> None:
        for path in (self.path, self.path.with_name(BEGUN_SETTINGS)):
            path.unlink(missing_ok=True)


def check_folder(folder: Path) -> None:
    """ValueError unless the images will be the only ones here, or were begun here; for one process."""
    if not folder.is_dir():
        check_new(folder)
        return
    remove_leftovers(folder)
    if not (folder / BEGUN_SETTINGS).exists():
        (folder / BEGUN).unlink(missing_ok=True)  # of a process that was killed between the two
    ours = {ARRAYS, SETTINGS, GRID, SINGLES, BEGUN, BEGUN_SETTINGS}
    begun = (folder / BEGUN_SETTINGS).exists()
    if not begun or any(path.name not in ours for path in folder.iterdir()):
        check_new(folder)


def begin(folder: Path, described: Mapping[str, Any], count: int, side: int) -> None:
    """Make the file of images under way, or find one that is of the same; for one process, before others.

    `described`: all that decides the images. UsageError where images were begun with other settings.
    """
    settings = folder / BEGUN_SETTINGS
    ours = json.loads(json.dumps(described))
    size = count * (side * side * 3 + 1)
    if settings.exists():
        theirs = read_json(settings)
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in NAMES and theirs.get(name) != ours.get(name):
                raise UsageError(
                    f"{folder} holds images that were begun with {name} {theirs.get(name)}, which now is"
                    f" {ours.get(name)}; give the same options to go on, or another --output"
                )
        if (folder / BEGUN).is_file() and (folder / BEGUN).stat().st_size == size:
            return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / BEGUN, "wb") as file:
        file.truncate(size)
    write_atomically(settings, lambda path: path.write_text(json.dumps(ours), encoding="utf-8"))


def finish(
    folder: Path, under_way: ImagesUnderWay, labels: Sequence[int], described: Mapping[str, Any]
) -> None:
    """The files of all images, once these are there; the archive comes last."""
    pixels = under_way.pixels()
    side = min(GRID_SIDE, int(np.ceil(np.sqrt(len(pixels)))))
    write_picture(folder / GRID, grid(pixels[: side * side], side))
    text = json.dumps(described, indent=2) + "\n"
    write_atomically(folder / SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))
    write_arrays(_in_parts(pixels, labels), folder / ARRAYS, len(pixels))
    under_way.remove()


def grid(pixels: np.ndarray, columns: int) -> Image.Image:
    """Images uint8 [N, H, W, 3] in rows, left to right."""
    height, width = pixels.shape[1:3]
    sheet = Image.new("RGB", (columns * width, -(-len(pixels) // columns) * height))
    for number, image in enumerate(pixels):
        sheet.paste(Image.fromarray(image), (number % columns * width, number // columns * height))
    return sheet


def _in_parts(pixels: np.ndarray, labels: Sequence[int]) -> Iterator[tuple[LatentBatch, Tensor]]:
    """As `vfmvae.decode.write_arrays` takes images: a part in memory at a time."""
    for first in range(0, len(pixels), CHUNK):
        rows = slice(first, first + CHUNK)
        images = torch.from_numpy(np.array(pixels[rows])).permute(0, 3, 1, 2)
        yield {"label": torch.tensor(labels[rows])}, images  # type: ignore[typeddict-item, misc]
