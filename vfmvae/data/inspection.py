"""Look at every stored image once: counts, formats, sizes, classes, copies, broken ones, and some to show.

Each sample is read once and decoded once, in threads: Pillow lets go of Python's lock while it decodes. What
is kept of a sample is a few numbers, so memory hardly grows with the data set.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from vfmvae.data.contact_sheet import MOST_TILES, TILE, Tile
from vfmvae.data.decoding import decode
from vfmvae.data.samples import NO_LABEL, Fault, SampleError, Samples
from vfmvae.data.transforms import centre_crop

AHEAD = 3
"""Samples per thread that are read before they are needed: each may hold a decoded image."""


class Copy(NamedTuple):
    """A sample with the very bytes of an earlier one; both by number."""

    number: int
    first: int


@dataclass
class Inspection:
    """What `inspect` has found. Arrays have one entry per sample looked at, 0 for a broken one."""

    looked_at: int
    width: np.ndarray  # uint32 [N], upright
    height: np.ndarray  # uint32 [N], upright
    digest: np.ndarray  # uint64 [N], the beginning of the SHA-256 of the stored bytes
    class_images: np.ndarray  # int64 [classes], without broken ones
    unlabelled: int = 0
    """Samples with NO_LABEL, without broken ones."""
    bytes: int = 0
    """Of all that could be read, broken or not."""
    formats: Counter[str] = field(default_factory=Counter)
    """Images per file format, as Pillow calls them."""
    modes: Counter[str] = field(default_factory=Counter)
    """Images per mode as stored, before decoding makes all of them RGB."""
    broken: list[Fault] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    """For a contact sheet: the first image of each of MOST_TILES equal parts of the data set."""

    @property
    def decoded(self) -> int:
        return self.looked_at - len(self.broken)

    def sizes(self) -> dict[str, np.ndarray]:
        """Width, height and short side in pixels, of the images alone."""
        whole = self.width > 0
        width, height = self.width[whole], self.height[whole]
        return {"width": width, "height": height, "short side": np.minimum(width, height)}

    def copies(self) -> list[Copy]:
        """Images whose bytes an earlier image has, too.

        64 bits of a hash tell: among ten million different images two are taken for copies with a
        probability of 3e-6.
        """
        numbers = np.flatnonzero(self.width)
        _, first, group = np.unique(self.digest[numbers], return_index=True, return_inverse=True)
        firsts = numbers[first[group]]
        later = numbers != firsts
        return [Copy(*pair) for pair in zip(numbers[later].tolist(), firsts[later].tolist(), strict=True)]


class _Seen(NamedTuple):
    """One sample: a fault, or what its image is."""

    bytes: int
    fault: Fault | None = None
    digest: int = 0
    format: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    crop: np.ndarray | None = None


def inspect(
    samples: Samples, count: int, threads: int, on_seen: Callable[[Fault | None], object]
) -> Inspection:
    """Look at the first `count` samples; the result is the same for every number of threads.

    `on_seen` hears of each sample in order, with its fault if it is broken. Raises OSError where the machine,
    and not a sample, is at fault.
    """
    found = Inspection(
        looked_at=count,
        width=np.zeros(count, np.uint32),
        height=np.zeros(count, np.uint32),
        digest=np.zeros(count, np.uint64),
        class_images=np.zeros(len(samples.classes), np.int64),
    )
    tiles = min(MOST_TILES, count)
    shown: dict[int, Tile] = {}  # by the part of the data set that it stands for

    def look(number: int) -> _Seen:
        # Some crops are made in vain, by threads that run ahead of the first image of a part.
        return _look(samples, number, with_crop=number * tiles // count not in shown)

    with warnings.catch_warnings(), ThreadPoolExecutor(threads, "inspect") as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # as `decode` does
        for number, seen in enumerate(_in_order(pool, look, count, AHEAD * threads)):
            _note(found, samples, number, seen)
            part = number * tiles // count
            if seen.crop is not None and part not in shown:
                shown[part] = Tile(seen.crop, _class_name(samples, number))
            on_seen(seen.fault)
    found.tiles = [shown[part] for part in sorted(shown)]
    return found


def _look(samples: Samples, number: int, with_crop: bool) -> _Seen:
    data = b""
    try:
        data = samples.read(number)
        image = decode(data, samples.key(number))
    except SampleError as error:
        return _Seen(len(data), error.fault)
    with Image.open(io.BytesIO(data)) as header:
        kind, mode = header.format or "", header.mode
    digest = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    crop = centre_crop(image, TILE) if with_crop else None
    return _Seen(len(data), None, digest, kind, mode, image.size, crop)


def _in_order(
    pool: ThreadPoolExecutor, look: Callable[[int], _Seen], count: int, ahead: int
) -> Iterator[_Seen]:
    """`look` of every number below `count`, at most `ahead` of them before they are asked for."""
    begun: deque[Future[_Seen]] = deque()
    for number in range(count):
        begun.append(pool.submit(look, number))
        if len(begun) == ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _note(found: Inspection, samples: Samples, number: int, seen: _Seen) -> None:
    found.bytes += seen.bytes
    if seen.fault is not None:
        found.broken.append(seen.fault)
        return
    found.width[number], found.height[number] = seen.size
    found.digest[number] = seen.digest
    found.formats[seen.format] += 1
    found.modes[seen.mode] += 1
    label = samples.label(number)
    if label == NO_LABEL:
        found.unlabelled += 1
    else:
        found.class_images[label] += 1


def _class_name(samples: Samples, number: int) -> str:
    label = samples.label(number)
    return "no label" if label == NO_LABEL else samples.classes[label]
