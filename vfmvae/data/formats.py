"""Which format a data set has, by its path."""

from __future__ import annotations

from pathlib import Path

from vfmvae.data.folder import open_folder
from vfmvae.data.images import Images
from vfmvae.data.photographs import Photographs
from vfmvae.data.samples import Part, Samples
from vfmvae.data.source import ImageSource, Split, check_split_and_resolution


def open_samples(path: str, part: Part) -> Samples:
    """The stored images at `path`; ValueError where there are none."""
    return open_folder(Path(path), part)


def open_data(path: str | None, split: Split, resolution: int, seed: int = 0) -> ImageSource:
    """The embedded photographs for None, else the data set at `path`."""
    if path is None:
        return Photographs(split, resolution, seed)
    check_split_and_resolution(split, resolution)
    return Images(open_samples(path, split), resolution, split, seed)
