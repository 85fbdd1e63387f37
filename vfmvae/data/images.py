"""A folder of images as an `ImageSource`, in the ImageNet layout or flat.

    folder/class/any/depth/name.jpg     the class is the first sub-folder; without sub-folders there is one
    folder/train/..., folder/val/...    a `val` or `validation` folder is the validation split; `train` (or,
                                        if there is none, everything else) trains; classes lie inside each

Without such a folder about a twentieth of the files is held out, chosen by a hash of each file's relative
name: the choice is the same on every machine and stays when files are added. Training visits every file once
per epoch in an order drawn from (seed, epoch); crop and mirroring are drawn from (seed, position), within the
limits of a CropConfig. Validation is centre crops in order.
"""

from __future__ import annotations

import hashlib
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vfmvae.data.photographs import Photographs
from vfmvae.data.source import ImageBatch, ImageSource, Split, check_split_and_resolution, collate, positions
from vfmvae.data.transforms import PUBLISHED_CROPS, CropConfig, as_rgb, centre_crop, random_crop

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VALIDATION_FOLDERS = ("val", "validation")
HELD_OUT_ONE_IN = 20
# What Pillow raises for files that are cut short, damaged, or not images at all.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ImageFolder:
    """Images below a folder, cropped to `resolution`; decoding runs in a few threads.

    `classes` are the sub-folder names of both splits in order, and labels index them. Raises ValueError for a
    path that is missing, not a folder, or without images; `batch` does for a file that cannot be read.
    """

    def __init__(self, path: str | Path, resolution: int, split: Split = "train", seed: int = 0) -> None:
        check_split_and_resolution(split, resolution)
        self.path = Path(path)
        self.resolution = resolution
        self.split: Split = split
        self.seed = seed
        splits = split_files(self.path)
        if not splits[split]:
            raise ValueError(f"no images for {split} in {path}: looked for {_extensions()} at any depth")
        self.files = [file for file, _ in splits[split]]
        self.classes = tuple(sorted({name for entries in splits.values() for _, name in entries}))
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._labels = [numbers[name] for _, name in splits[split]]
        self._pool: ThreadPoolExecutor | None = None
        self._pool_process = 0

    def __len__(self) -> int:
        """Images in this split."""
        return len(self.files)

    def batch(self, step: int, batch_size: int, crops: CropConfig = PUBLISHED_CROPS) -> ImageBatch:
        """Images step * batch_size and following: image uint8 [B, 3, R, R], label int64 [B], key."""
        chosen = positions(step, batch_size, self.split, len(self))
        numbers = [self._file_number(position) for position in chosen]
        images = list(self._threads().map(partial(self._crop, crops), chosen, numbers))
        keys = [self.files[number].relative_to(self.path).as_posix() for number in numbers]
        return collate(images, [self._labels[number] for number in numbers], keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def _threads(self) -> ThreadPoolExecutor:
        """The pool of this process: threads do not follow into a forked or spawned one."""
        if self._pool is None or self._pool_process != os.getpid():
            threads = min(8, os.cpu_count() or 1)
            self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")
            self._pool_process = os.getpid()
        return self._pool

    def _file_number(self, position: int) -> int:
        if self.split == "validation":
            return position
        epoch, place = divmod(position, len(self))
        return int(_epoch_order(self.seed, epoch, len(self))[place])

    def _crop(self, crops: CropConfig, position: int, number: int) -> np.ndarray:
        image = read_image(self.files[number])
        if self.split == "validation":
            return centre_crop(image, self.resolution)
        return random_crop(image, self.resolution, np.random.default_rng((self.seed, position)), crops)


def open_data(path: str | None, split: Split, resolution: int, seed: int = 0) -> ImageSource:
    """The embedded photographs for None, else the image folder at `path`."""
    if path is None:
        return Photographs(split, resolution, seed)
    return ImageFolder(path, resolution, split, seed)


def read_image(file: Path) -> Image.Image:
    """A file as an upright RGB image; ValueError names it where it is missing, damaged or no image."""
    try:
        with Image.open(file) as opened:
            return as_rgb(opened)
    except DECODE_ERRORS as error:
        raise ValueError(f"cannot read image {file}: {error}; repair or remove it") from error


def split_files(root: Path) -> dict[Split, list[tuple[Path, str]]]:
    """The image files of both splits in sorted order, each with its class ("" outside of sub-folders)."""
    _check_folder(root)
    held_out = next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    if held_out is None:
        files = image_files(root)
        return _hashed_split(files, root / "train" if _all_below(files, root / "train") else root)
    base = root / "train" if (root / "train").is_dir() else root
    training = [file for file in image_files(base) if not file.is_relative_to(held_out)]
    return {
        "train": [(file, _class_name(file, base)) for file in training],
        "validation": [(file, _class_name(file, held_out)) for file in image_files(held_out)],
    }


def all_files(root: Path) -> list[tuple[Path, str]]:
    """Both splits together, in sorted order; unlike them, of a single image too."""
    _check_folder(root)
    files = image_files(root)
    if len(files) == 1:
        return [(files[0], _class_name(files[0], root))]
    return sorted(entry for entries in split_files(root).values() for entry in entries)


def _check_folder(root: Path) -> None:
    if not root.exists():
        raise ValueError(f"image folder {root} does not exist; it should hold {_extensions()} files")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give the folder that holds the {_extensions()} files")


def _hashed_split(files: list[Path], base: Path) -> dict[Split, list[tuple[Path, str]]]:
    """About a twentieth of the files for validation, at least one and never all."""
    if len(files) == 1:
        raise ValueError(f"{base} holds one image only, {files[0].name}; training and validation need two")
    hashes = {file: _stable_hash(file.relative_to(base).as_posix()) for file in files}
    held_out = {file for file in files if hashes[file] % HELD_OUT_ONE_IN == 0}
    if files and not held_out:
        held_out = {min(files, key=hashes.__getitem__)}
    if len(held_out) == len(files):
        held_out.discard(max(files, key=hashes.__getitem__, default=base))
    named = [(file, _class_name(file, base)) for file in files]
    return {
        "train": [entry for entry in named if entry[0] not in held_out],
        "validation": [entry for entry in named if entry[0] in held_out],
    }


def _all_below(files: list[Path], folder: Path) -> bool:
    """Whether `folder` is the training split itself; beside other folders with images it is a class."""
    return bool(files) and all(file.is_relative_to(folder) for file in files)


def image_files(folder: Path) -> list[Path]:
    """Image files at any depth, sorted by relative name; hidden files and folders are left out."""

    def unreadable(error: OSError) -> None:
        raise ValueError(f"cannot list image folder {error.filename}: {error.strerror}") from error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, n) for n in names if not n.startswith(".") and n.lower().endswith(EXTENSIONS)]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _stable_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _class_name(file: Path, base: Path) -> str:
    parts = file.relative_to(base).parts
    return parts[0] if len(parts) > 1 else ""


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


def _extensions() -> str:
    return ", ".join(EXTENSIONS)
