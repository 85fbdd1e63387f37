"""Every image once, in order, as a centre crop: what encoding and evaluation read.

Training draws random crops from an endless stream (vfmvae.data.source); here image number i is always the
same one, so that work can be cut into pieces and taken up again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from vfmvae.data.images import EXTENSIONS, all_files, image_files, read_image, split_files
from vfmvae.data.photographs import SCENES, Photographs
from vfmvae.data.source import ImageBatch, check_split_and_resolution, collate
from vfmvae.data.transforms import centre_crop

Part = Literal["train", "validation", "all"]
TRAINING_CROPS = 1000
"""How many crops of the embedded photographs stand for their endless training split."""


class OrderedImages(Protocol):
    """A finite list of images, any run of which can be read; labels index `classes`."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def names(self) -> list[str]:
        """A name of every image, with `/` between folders."""
        ...

    def read(self, start: int, stop: int) -> ImageBatch:
        """Images start to stop - 1; `key` holds their names."""
        ...


class FilesInOrder:
    """Centre crops of files below a folder; decoding runs in a few threads."""

    def __init__(
        self, root: Path, entries: Sequence[tuple[Path, str]], classes: tuple[str, ...], resolution: int
    ) -> None:
        """entries: each file with its class."""
        self.classes = classes
        self._files = [file for file, _ in entries]
        self._names = [file.relative_to(root).as_posix() for file in self._files]
        numbers = {name: number for number, name in enumerate(classes)}
        self._labels = [numbers[name] for _, name in entries]
        self._resolution = resolution
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self._files)

    def names(self) -> list[str]:
        return list(self._names)

    def read(self, start: int, stop: int) -> ImageBatch:
        """ValueError names a file that cannot be read."""
        crops = list(self._pool.map(self._crop, self._files[start:stop]))
        return collate(crops, self._labels[start:stop], self._names[start:stop])

    def _crop(self, file: Path) -> np.ndarray:
        return centre_crop(read_image(file), self._resolution)


class PhotographsInOrder:
    """The first `count` crops of a split of the embedded photographs."""

    classes = SCENES

    def __init__(self, photographs: Photographs, count: int) -> None:
        self._photographs = photographs
        self._count = count

    def __len__(self) -> int:
        return self._count

    def names(self) -> list[str]:
        return [self._name(number) for number in range(self._count)]

    def read(self, start: int, stop: int) -> ImageBatch:
        numbers = range(start, min(stop, self._count))
        crops = [self._photographs.crop(number) for number in numbers]
        keys = [self._name(number) for number in numbers]
        return collate([crop.pixels for crop in crops], [crop.label for crop in crops], keys)

    def _name(self, number: int) -> str:
        return f"{self._photographs.split}/{number:06d}"


def open_in_order(
    path: str | None, part: Part, resolution: int, images: int | None = None, seed: int = 0
) -> OrderedImages:
    """The images of a folder in the order of their names, or of the embedded photographs for None.

    `part` is a split as training makes them, or both; at most `images` of it. Classes are those of both
    splits, so labels mean the same in either. Photographs train without end: `TRAINING_CROPS` stand for them,
    or as many as asked, drawn from `seed`. Raises ValueError for a folder that is missing or empty.
    """
    if images is not None and images < 1:
        raise ValueError(f"images is {images}; it must be at least 1")
    check_split_and_resolution("train" if part == "all" else part, resolution)
    if path is None:
        if part == "all":
            raise ValueError("the embedded photographs are endless crops: choose part train or validation")
        photographs = Photographs(part, resolution, seed)
        endless = part == "train"
        count = (images or TRAINING_CROPS) if endless else min(images or len(photographs), len(photographs))
        return PhotographsInOrder(photographs, count)
    root = Path(path)
    everything = all_files(root)
    entries = everything if part == "all" else split_files(root)[part]
    if not entries:
        raise ValueError(f"no images for {part} in {path}: looked for {', '.join(EXTENSIONS)} at any depth")
    return FilesInOrder(root, entries[:images], tuple(sorted({name for _, name in everything})), resolution)


def list_images(inputs: Sequence[Path]) -> list[tuple[Path, str]]:
    """Image files given one by one or as folders (any depth), each with its name below that folder.

    Raises ValueError for an input that does not exist and for a folder without images.
    """
    found = []
    for given in inputs:
        if given.is_dir():
            files = image_files(given)
            if not files:
                raise ValueError(f"no images in {given}: looked for {', '.join(EXTENSIONS)} at any depth")
            found += [(file, file.relative_to(given).as_posix()) for file in files]
        elif given.exists():
            found.append((given, given.name))
        else:
            raise ValueError(f"image {given} does not exist; give image files or folders of them")
    return found
