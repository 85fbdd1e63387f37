"""The files of `vfmvae sample`: images under way, which outlive a kill, and what is there at the end.

Images under way lie in one hidden file, which all processes write to: pixels uint8 [N, H, W, 3], then one
byte for each image, 1 once its pixels are there. What decides the images lies beside it, so that a command
with other settings does not go on with them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vfmvae.atomic import reason, remove_leftovers, write_atomically
from vfmvae.cli import UsageError
from vfmvae.data.latents import LatentBatch
from vfmvae.decode import write_arrays
from vfmvae.inference import write_picture
from vfmvae.serialization import read_json
from vfmvae.training.run_lock import NAME as LOCK

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

        Written and not mapped: a full disk is an error, and no crash. OSError with a sentence.
        """
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        with writing(self.path), open(self.path, "r+b") as file:
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
        """The settings first: pixels alone are known for a leftover."""
        for path in (self.path.with_name(BEGUN_SETTINGS), self.path):
            path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside is raised again with a sentence."""
    try:
        yield
    except OSError as error:
        raise OSError(f"could not write {path}: {reason(error)}") from None


def check_folder(folder: Path) -> None:
    """ValueError unless the images will be the only ones here, or were begun here; for one process, which
    has the folder's lock.
    """
    for below in (folder, folder / SINGLES):
        remove_leftovers(below)
    begun = (folder / BEGUN_SETTINGS).exists()
    if not begun:
        (folder / BEGUN).unlink(missing_ok=True)  # of a process that was killed between the two
    ours = {ARRAYS, SETTINGS, GRID, SINGLES, BEGUN, BEGUN_SETTINGS} if begun else set()
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours | {LOCK})
    if foreign and begun:
        raise ValueError(f"{folder} holds images that were begun, and {foreign[0]}: move that away to go on")
    if foreign:
        raise ValueError(f"{folder} is not empty (it has {foreign[0]}); give a new folder as --output")


def begin(folder: Path, described: Mapping[str, Any], count: int, side: int) -> str | None:
    """Make the file of images under way, or find one that is of the same; for one process, before others.

    `described`: all that decides the images. Returns a sentence where images were lost. UsageError where
    images were begun with other settings.
    """
    settings, begun, lost = folder / BEGUN_SETTINGS, folder / BEGUN, None
    ours = json.loads(json.dumps(described))
    if settings.exists():
        theirs = _read_settings(settings)
        made = _images_made(folder, theirs)
        other = _first_difference(theirs, ours)
        if other is None and made is not None:
            return None
        if other is None:
            lost = f"note: {begun} is damaged, so all images are made again"
        elif made:
            raise UsageError(
                f"{folder} holds images that were begun with {other}; give the same options to go on, or"
                f" another --output"
            )
    with writing(begun), open(begun, "wb") as file:
        file.truncate(_bytes(count, side))
    write_atomically(settings, lambda path: path.write_text(json.dumps(ours), encoding="utf-8"))
    return lost


def _bytes(count: int, side: int) -> int:
    return count * (side * side * 3 + 1)


def _images_made(folder: Path, described: Mapping[str, Any]) -> int | None:
    """How many of those so described are there; None if the file is not as it must be."""
    count, side, path = described.get("images", 0), described.get("resolution", 0), folder / BEGUN
    if not path.is_file() or path.stat().st_size != _bytes(count, side):
        return None
    return count - len(ImagesUnderWay(folder, count, side).missing())


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete {path.parent} or give another --output") from None


def _first_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str = "") -> str | None:
    """In words, of the settings that decide images."""
    for name in sorted(theirs.keys() | ours.keys()):
        a, b = theirs.get(name), ours.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := _first_difference(a, b, f"{where}{name}."):
                return found
        elif a != b and (where or name not in NAMES):
            return f"{where}{name} {a}, which now is {b}"
    return None


def finish(
    folder: Path, under_way: ImagesUnderWay, labels: Sequence[int], described: Mapping[str, Any]
) -> None:
    """The files of all images, once these are there; the archive comes last.

    OSError where some are not there, say because a network's file system lost what a process wrote.
    """
    if missing := under_way.missing():
        raise OSError(f"{under_way.path} lacks {len(missing)} images, the first of them number {missing[0]}")
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
