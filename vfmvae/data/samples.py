"""Images as they are stored: encoded bytes by number, each with a label and a key.

What a format has to give (`Samples`), whichever it is: a folder of files, tar shards, a Hugging Face data
set. In what order samples are seen, how they are decoded and cut is decided elsewhere (vfmvae.data.images).
"""

from __future__ import annotations

import errno
from typing import Literal, NamedTuple, Protocol

Part = Literal["train", "validation", "all"]
"""Which of a data set's samples: a split, or both."""
NO_LABEL = -1
NOT_THE_SAMPLE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of this process or machine, and not of a file."""
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff")
"""Files that are images, in any case; a sample with several is shown by the first in this order."""


class Fault(NamedTuple):
    """A sample that cannot be used, or something else about a data set that its owner should know, and why,
    in a few words.
    """

    key: str
    reason: str
    counts: bool = True
    """Whether it costs samples, of which only so many may be broken."""


class SampleError(ValueError):
    """A sample that cannot be used."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"cannot read image {key}: {reason}; repair or remove it")
        self.fault = Fault(key, reason)

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return SampleError, self.fault[:2]


class Samples(Protocol):
    """A finite list of encoded images, the same at every opening.

    Any process may hold one: it can be pickled, and opens its files when they are read. `classes` are those
    of the whole data set, whatever the part, and labels index them; a set without labels has one class, "".
    """

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def key(self, number: int) -> str:
        """A unique and stable name, with `/` between folders."""
        ...

    def label(self, number: int) -> int:
        """Index into `classes`, or NO_LABEL where the data set has labels and this sample has none."""
        ...

    def read(self, number: int) -> bytes:
        """The encoded image; SampleError for a file that is missing, cut short or damaged."""
        ...

    def faults(self) -> list[Fault]:
        """What opening the data set has found that is no sample at all, such as a damaged part of a shard."""
        ...
