"""Stored images of any format as an `ImageSource`, decoded and cut.

Training visits every sample once per epoch, in an order drawn from (seed, epoch); crop and mirroring are
drawn from (seed, position), within the limits of a CropConfig. So a batch depends on the seed and its number
alone: neither processes, nor reading workers, nor a restart change what a run sees. Validation is centre
crops in order.

A sample that cannot be read is reported in `faults`. In training its place is taken by another one, drawn
from (seed, position): batches keep their size, and every sample that can be read is still seen once per
epoch in its own place. In validation it is left out. A sample that lacks its label cannot be used either, in
training; elsewhere its label is NO_LABEL.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vfmvae.data.decoding import Plain, as_plain, decode
from vfmvae.data.samples import NO_LABEL, Fault, SampleError, Samples
from vfmvae.data.source import ImageBatch, Split, check_split_and_resolution, collate, positions
from vfmvae.data.transforms import PUBLISHED_CROPS, CropConfig, Window, centre_crop, cut, random_window

SUBSTITUTES = 31
"""Samples tried for the place of one that cannot be read, before the data set as a whole is given up."""

T = TypeVar("T")


class EncodedBatch(NamedTuple):
    """A training batch before decoding: what is cut of which bytes."""

    data: Tensor  # uint8 [all bytes]: the images one after the other, JPEG or PPM
    sizes: list[int]  # of each image, in bytes
    shapes: list[tuple[int, int]]  # width, height
    windows: list[Window]
    label: Tensor  # int64 [B]
    key: list[str]
    number: list[int]
    faults: list[Fault]


class _Drawn(NamedTuple):
    """A sample that could be used, and those before it that could not; none for a hole in validation."""

    number: int | None
    result: Any
    faults: list[Fault]


class Images:
    """Samples cropped to `resolution`; reading and decoding run in a few threads.

    Raises ValueError where SUBSTITUTES samples in a row cannot be read.
    """

    def __init__(self, samples: Samples, resolution: int, split: Split = "train", seed: int = 0) -> None:
        check_split_and_resolution(split, resolution)
        self.samples = samples
        self.resolution = resolution
        self.split: Split = split
        self.seed = seed
        self.classes = samples.classes
        self._pool: ThreadPoolExecutor | None = None
        self._pool_process = 0

    def keys_digest(self) -> str:
        """SHA-256 of the keys in their order."""
        digest = hashlib.sha256()
        for number in range(len(self.samples)):
            digest.update(os.fsencode(self.samples.key(number)) + b"\n")
        return digest.hexdigest()

    def __len__(self) -> int:
        """Samples in this split, broken ones too."""
        return len(self.samples)

    def faults(self) -> list[Fault]:
        """What opening the data set has found that is no sample at all."""
        return self.samples.faults()

    def batch(self, step: int, batch_size: int, crops: CropConfig = PUBLISHED_CROPS) -> ImageBatch:
        """Images step * batch_size and following: uint8 [B, 3, R, R]; fewer in validation, of broken ones."""
        chosen = positions(step, batch_size, self.split, len(self))
        return self._collate(self._threads().map(partial(self._crop, crops), chosen))

    def read(self, start: int, stop: int) -> ImageBatch:
        """Samples start to stop - 1 as centre crops, without those that cannot be read."""
        return self._collate(self._threads().map(self._centre, range(start, min(stop, len(self)))))

    def encoded(self, step: int, batch_size: int, crops: CropConfig = PUBLISHED_CROPS) -> EncodedBatch:
        """What `batch` decodes and cuts, for other decoders. Training only."""
        chosen = positions(step, batch_size, self.split, len(self))
        drawn = [self._draw(position, as_plain) for position in chosen]
        plain: list[Plain] = [one.result for one in drawn]
        numbers = [one.number for one in drawn if one.number is not None]
        return EncodedBatch(
            data=torch.from_numpy(np.frombuffer(b"".join(p.data for p in plain), dtype=np.uint8).copy()),
            sizes=[len(p.data) for p in plain],
            shapes=[(p.width, p.height) for p in plain],
            windows=[
                self._window(position, p.width, p.height, crops)
                for position, p in zip(chosen, plain, strict=True)
            ],
            label=torch.tensor([self.samples.label(number) for number in numbers], dtype=torch.int64),
            key=[self.samples.key(number) for number in numbers],
            number=numbers,
            faults=[fault for one in drawn for fault in one.faults],
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def _threads(self) -> ThreadPoolExecutor:
        """The pool of this process: threads do not follow into a forked or spawned one."""
        if self._pool is None or self._pool_process != os.getpid():
            threads = min(8, os.cpu_count() or 1)
            self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")
            self._pool_process = os.getpid()
        return self._pool

    def _crop(self, crops: CropConfig, position: int) -> _Drawn:
        if self.split == "validation":
            return self._centre(position)
        drawn = self._draw(position, decode)
        image: Image.Image = drawn.result
        window = self._window(position, image.width, image.height, crops)
        return drawn._replace(result=cut(image, window, self.resolution))

    def _window(self, position: int, width: int, height: int, crops: CropConfig) -> Window:
        return random_window(width, height, np.random.default_rng((self.seed, position)), crops)

    def _centre(self, number: int) -> _Drawn:
        try:
            image = decode(self.samples.read(number), self.samples.key(number))
            return _Drawn(number, centre_crop(image, self.resolution), [])
        except SampleError as error:
            return _Drawn(None, None, [error.fault])

    def _draw(self, position: int, use: Callable[[bytes, str], T]) -> _Drawn:
        """The sample of a position of training, or the first one that can stand for it."""
        faults: list[Fault] = []
        for number in self._candidates(position):
            try:
                return _Drawn(number, self._use(number, use), faults)
            except SampleError as error:
                faults.append(error.fault)
        raise ValueError(
            f"{len(faults)} images that were tried one after the other cannot be read, at last"
            f" {faults[-1].key}: {faults[-1].reason}; is the data set still there and whole?"
        )

    def _candidates(self, position: int) -> Iterator[int]:
        epoch, place = divmod(position, len(self))
        yield int(_epoch_order(self.seed, epoch, len(self))[place])
        others = np.random.default_rng((self.seed, position, 1))
        yield from others.integers(len(self), size=SUBSTITUTES).tolist()

    def _use(self, number: int, use: Callable[[bytes, str], T]) -> T:
        key = self.samples.key(number)
        if self.samples.label(number) == NO_LABEL:
            raise SampleError(key, "it has no label, and others have one")
        return use(self.samples.read(number), key)

    def _collate(self, drawn: Iterator[_Drawn]) -> ImageBatch:
        found = list(drawn)
        whole = [(one.number, one.result) for one in found if one.number is not None]
        numbers = [number for number, _ in whole]
        batch = collate(
            [crop for _, crop in whole] or [np.empty((self.resolution, self.resolution, 3), np.uint8)],
            [self.samples.label(number) for number in numbers],
            [self.samples.key(number) for number in numbers],
            numbers,
            [fault for one in found for fault in one.faults],
        )
        batch["image"] = batch["image"][: len(numbers)]
        return batch


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)
