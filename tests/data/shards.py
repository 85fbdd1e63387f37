"""Tar shards for the tests, written by tarfile, ways to damage them, and what is read from them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from vfmvae.data.webdataset import ShardSamples


def jpeg(number: int) -> bytes:
    """A small image, another one for every number."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


def write_tar(
    path: Path, files: Iterable[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT
) -> dict[str, int]:
    """A shard of these files in this order; where the header of each begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    places = {}
    with tarfile.open(path, "w", format=format) as archive:
        for name, contents in files:
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            places[name] = archive.offset
            archive.addfile(member, io.BytesIO(contents))
    return places


def labelled(numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    """Samples 0007.jpg and 0007.cls; label n % 10."""
    return [
        file for n in numbers for file in ((f"{n:04}.jpg", jpeg(n)), (f"{n:04}.cls", str(n % 10).encode()))
    ]


def overwrite(path: Path, offset: int, contents: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(contents)


def write_imagenet(root: Path) -> Path:
    """Three training shards of 20 and two validation shards of 5 samples."""
    for shard in range(3):
        write_tar(root / f"imagenet1k-train-{shard:04}.tar", labelled(range(20 * shard, 20 * shard + 20)))
    for shard in range(2):
        numbers = range(100 + 5 * shard, 105 + 5 * shard)
        write_tar(root / f"imagenet1k-validation-{shard:02}.tar", labelled(numbers))
    return root


def contents(samples: ShardSamples) -> dict[str, tuple[bytes, int]]:
    keys = [samples.key(number) for number in range(len(samples))]
    assert len(set(keys)) == len(keys) and keys == samples.keys()
    return {key: (samples.read(n), samples.label(n)) for n, key in enumerate(keys)}


def names(samples: ShardSamples) -> list[str]:
    return [samples.key(number).rpartition("/")[2] for number in range(len(samples))]


def reasons(samples: ShardSamples) -> str:
    return "; ".join(f"{fault.key} {fault.reason}" for fault in samples.faults())
