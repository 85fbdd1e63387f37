"""Every image once, in order, as a centre crop: what encoding and evaluation read.

Training draws random crops from an endless stream (vfmvae.data.source); here image number i is always the
same one, so that work can be cut into pieces and taken up again.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from vfmvae.data.drawn import Drawn
from vfmvae.data.formats import DRAWN, open_samples
from vfmvae.data.images import Images
from vfmvae.data.photographs import Photographs
from vfmvae.data.samples import Fault, Part, Samples
from vfmvae.data.source import ImageBatch, check_split_and_resolution

TRAINING_IMAGES = 1000
"""How many stand for an endless training split: crops of the embedded photographs, or drawn images."""


class OrderedImages(Protocol):
    """A finite list of images, any run of which can be read; labels index `classes`."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def names(self) -> list[str]:
        """A name of every image, with `/` between folders."""
        ...

    def faults(self) -> list[Fault]:
        """What opening it has found that is no image at all."""
        ...

    def read(self, start: int, stop: int) -> ImageBatch:
        """Images start to stop - 1, without those that cannot be read; `key` holds their names."""
        ...


class SamplesInOrder:
    """Centre crops of the first `count` stored samples."""

    def __init__(self, samples: Samples, resolution: int, count: int | None) -> None:
        self.classes = samples.classes
        self._images = Images(samples, resolution, "validation")
        self._count = len(samples) if count is None else min(count, len(samples))

    def __len__(self) -> int:
        return self._count

    def names(self) -> list[str]:
        return [self._images.samples.key(number) for number in range(self._count)]

    def faults(self) -> list[Fault]:
        return self._images.faults()

    def read(self, start: int, stop: int) -> ImageBatch:
        return self._images.read(start, min(stop, self._count))


class DrawnInOrder:
    """The first `count` images of a split that has no files: of the embedded photographs or drawn ones."""

    def __init__(self, source: Photographs | Drawn, count: int) -> None:
        self.classes = source.classes
        self._source = source
        self._count = count

    def __len__(self) -> int:
        return self._count

    def names(self) -> list[str]:
        return [self._name(number) for number in range(self._count)]

    def faults(self) -> list[Fault]:
        return []

    def read(self, start: int, stop: int) -> ImageBatch:
        batch = self._source.read(range(start, min(stop, self._count)))
        batch["key"] = [self._name(number) for number in batch["number"]]
        return batch

    def _name(self, number: int) -> str:
        return f"{self._source.split}/{number:06d}"


def batches_ahead(source: OrderedImages, rows: range, batch_size: int) -> Generator[ImageBatch, None, None]:
    """The images of `rows` in batches; the next one is read while one is used."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as reader:
        ahead: Future[ImageBatch] | None = None
        for start in range(rows.start, rows.stop, batch_size):
            following = reader.submit(source.read, start, min(start + batch_size, rows.stop))
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


def open_in_order(
    path: str | None, part: Part, resolution: int, images: int | None = None, seed: int = 0
) -> OrderedImages:
    """The images of a data set in its order, of the embedded photographs for None, or of drawn ones.

    `part` is a split as training makes them, or both; at most `images` of it. Classes are those of both
    splits, so labels mean the same in either. Photographs and drawn images train without end:
    `TRAINING_IMAGES` stand for them, or as many as asked, drawn from `seed`. Raises ValueError for a data set
    that is missing or empty.
    """
    if images is not None and images < 1:
        raise ValueError(f"images is {images}; it must be at least 1")
    check_split_and_resolution("train" if part == "all" else part, resolution)
    if path is not None and path not in DRAWN:
        return SamplesInOrder(open_samples(path, part), resolution, images)
    if part == "all":
        what = "the embedded photographs are crops" if path is None else f"{path} are"
        raise ValueError(f"{what} without an end: choose part train or validation")
    source = (Photographs if path is None else DRAWN[path])(part, resolution, seed)
    endless = part == "train"
    count = (images or TRAINING_IMAGES) if endless else min(images or len(source), len(source))
    return DrawnInOrder(source, count)
