"""What training and evaluation ask of a source of images: a batch by its position, nothing else.

A source keeps no state between calls. `batch(step, batch_size, crops)` depends on the seed and its arguments
alone, so a run resumes by knowing its step, and rank r of n reads step * n + r.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor

from vfmvae.data.samples import Fault
from vfmvae.data.transforms import PUBLISHED_CROPS, CropConfig

Split = Literal["train", "validation"]


class Request(NamedTuple):
    """A training batch by its number, and how its images are cut."""

    number: int
    crops: CropConfig = PUBLISHED_CROPS


class ImageBatch(TypedDict):
    """Images as they are read: uint8, shape [B, 3, R, R] in channels-last memory."""

    image: Tensor  # uint8 [B, 3, R, R]
    label: Tensor  # int64 [B]
    key: list[str]  # where each image comes from, for messages and figures
    number: list[int]  # of the sample in its data set (of photographs: the crop's)
    faults: list[Fault]  # samples that could not be read; see vfmvae.data.images for what is in their place


class ImageSource(Protocol):
    """A set of images in one split: endless when training, `len(source)` images when validating.

    `crops` says how training images are cut.
    """

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def faults(self) -> list[Fault]:
        """What opening it has found that is no image at all."""
        ...

    def batch(self, step: int, batch_size: int, crops: CropConfig = PUBLISHED_CROPS) -> ImageBatch: ...


def validation_batches(source: ImageSource, batch_size: int) -> Iterator[ImageBatch]:
    """Every image of a validation source once, in order; the last batch may be smaller."""
    for step in range(-(-len(source) // batch_size)):
        yield source.batch(step, batch_size)


def positions(step: int, batch_size: int, split: Split, length: int) -> range:
    """The image numbers of a batch: endless for training, cut at `length` for validation."""
    if step < 0 or batch_size < 1:
        raise ValueError(f"step {step} must be at least 0 and batch_size {batch_size} at least 1")
    start = step * batch_size
    if split == "train":
        return range(start, start + batch_size)
    if start >= length:
        raise ValueError(f"batch {step} of {batch_size} begins beyond the {length} validation images")
    return range(start, min(start + batch_size, length))


def check_split_and_resolution(split: str, resolution: int) -> None:
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(get_args(Split))}")
    if resolution < 1:
        raise ValueError(f"resolution {resolution} must be at least 1 pixel")


def collate(
    crops: list[np.ndarray],
    labels: list[int],
    keys: list[str],
    numbers: list[int],
    faults: Sequence[Fault] = (),
) -> ImageBatch:
    """Crops uint8 [R, R, 3] as one batch, moved to NCHW without a copy beyond the stacking."""
    return {
        "image": torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2),
        "label": torch.tensor(labels, dtype=torch.int64),
        "key": keys,
        "number": numbers,
        "faults": list(faults),
    }
