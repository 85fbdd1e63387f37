"""Where the images of a tar shard lie: read once from its headers, then kept as NAME.tar.index.npz.

Samples follow the WebDataset rule: the files of an archive whose paths agree up to the first dot of the base
name are one sample, and the rest of the name is the extension, `n01440764/10026.jpg` and `10026.cls`. They
need not be neighbours. Hidden files are no samples.

    image   .jpg, or the first of IMAGE_EXTENSIONS that is there; .seg.png and others with a dot are no images
    label   .cls, an integer as text; else .json, an object with an integer "label"; negative ones are none

A damaged archive gives what can still be read: after a header that is not one, reading goes on at the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from vfmvae.atomic import reason, write_atomically
from vfmvae.data.packed import PackedStrings
from vfmvae.data.samples import IMAGE_EXTENSIONS, NO_LABEL

LABELS = ("cls", "json")
LARGEST_LABEL = 999_999
"""Classes are listed, and a number beyond this is an id of something else."""
FORMAT = 2
BLOCK = tarfile.BLOCKSIZE
SEARCHED_AT_ONCE = 4 * 2**20  # bytes
# What tarfile raises for headers, also for those that have a right checksum and senseless contents.
HEADER_ERRORS = (tarfile.TarError, ValueError, LookupError, OverflowError, MemoryError, RecursionError)
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class ShardIndex(NamedTuple):
    """The samples of a shard in the order of the archive, and what is wrong with it, in sentences."""

    offset: np.ndarray  # int64 [N], where an image begins in the archive
    size: np.ndarray  # int64 [N], bytes
    label: np.ndarray  # int64 [N], NO_LABEL where there is none
    names: PackedStrings  # [N]
    faults: tuple[str, ...]
    notes: tuple[str, ...]  # what costs no image
    bytes: int
    mtime_ns: int


class Member(NamedTuple):
    """A plain file in an archive."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class _Sample:
    """The image and the label file of a sample, each with the place of its extension in the table."""

    image: tuple[int, Member] | None = None
    label: tuple[int, Member] | None = None


def load_index(shard: Path) -> ShardIndex | None:
    """The stored index, if there is one for the shard as it is now."""
    try:
        status = shard.stat()
    except OSError:
        return None
    for place in index_places(shard):
        index = _read_index(place)
        if index is not None and (index.bytes, index.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return index
    return None


def store_index(shard: Path, index: ShardIndex) -> None:
    """Beside the shard, else in the user's cache, else nowhere: it is only for the next opening.

    For one thread at a time (vfmvae.atomic), of any number of processes.
    """
    numbers = np.stack([index.offset, index.size, index.label, index.names.ends])
    stamp = np.array([FORMAT, index.bytes, index.mtime_ns], np.int64)
    faults = np.frombuffer(json.dumps([index.faults, index.notes]).encode(), np.uint8)

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, stamp=stamp, numbers=numbers, names=index.names.text, faults=faults)

    for place in index_places(shard):
        try:
            return write_atomically(place, write)
        except OSError:
            continue


def index_places(shard: Path) -> tuple[Path, Path]:
    """Where an index may lie: beside the shard, and in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(shard.absolute())).hexdigest()[:40]
    return shard.with_name(f"{shard.name}.index.npz"), cache / "vfmvae" / "shards" / f"{name}.npz"


def _read_index(path: Path) -> ShardIndex | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            version, size, mtime_ns = stored["stamp"].tolist()
            if version != FORMAT:
                return None
            offset, sizes, label, ends = stored["numbers"]
            names = PackedStrings.split(stored["names"], ends)
            faults, notes = map(tuple, json.loads(stored["faults"].tobytes()))
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None
    return ShardIndex(offset, sizes, label, names, faults, notes, size, mtime_ns)


def build_index(shard: Path) -> ShardIndex:
    """Read the headers and the labels of a shard; what is damaged becomes a fault.

    OSError where the file cannot be opened or read.
    """
    faults: list[str] = []
    notes: list[str] = []
    with open(shard, "rb") as file:
        status = os.fstat(file.fileno())
        samples, twice = _group(_members(file, status.st_size, faults.append))
        found = {name: sample.image[1] for name, sample in samples.items() if sample.image}
        labels, unreadable = [], []
        for name in found:
            label = _label(file.fileno(), samples[name].label)
            labels.append(NO_LABEL if label is None else label)
            if label is None:
                unreadable.append(name)
    without = [name for name in samples if name not in found]
    if not found and not faults:
        faults.append(
            f"holds no images: looked for .{', .'.join(IMAGE_EXTENSIONS)} after the first dot of each name"
        )
    elif found and without:
        faults.append(f"{_count(without)} without an image after the first dot of the name")
    if twice:
        faults.append(f"{_count(twice)} there twice; the first is used")
    if unreadable:
        notes.append(f"{_count(unreadable)} with a label that is no integer up to {LARGEST_LABEL}")
    return ShardIndex(
        np.array([member.offset for member in found.values()], np.int64),
        np.array([member.size for member in found.values()], np.int64),
        np.array(labels, np.int64),
        PackedStrings.pack(found),
        tuple(faults),
        tuple(notes),
        status.st_size,
        status.st_mtime_ns,
    )


def _count(names: list[str]) -> str:
    return f"sample {names[0]} is" if len(names) == 1 else f"{len(names)} samples, the first {names[0]}, are"


def _group(members: Generator[Member, None, None]) -> tuple[dict[str, _Sample], list[str]]:
    """The samples by name, and the names of those that have two images or labels of one extension."""
    samples: dict[str, _Sample] = {}
    twice: dict[str, None] = {}
    for member in members:
        folder, slash, base = member.name.removeprefix("./").lstrip("/").rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        if not stem or not extension:
            continue
        name = folder + slash + stem
        sample = samples.setdefault(name, _Sample())
        for field, table in (("image", IMAGE_EXTENSIONS), ("label", LABELS)):
            if extension in table:
                rank, before = table.index(extension), getattr(sample, field)
                if before is None or rank < before[0]:
                    setattr(sample, field, (rank, member))
                elif rank == before[0]:
                    twice[name] = None
    return samples, list(twice)


def _label(descriptor: int, file: tuple[int, Member] | None) -> int | None:
    """The number in a .cls or .json, NO_LABEL where there is none, None where it cannot be read."""
    if file is None:
        return NO_LABEL
    rank, member = file
    text = os.pread(descriptor, member.size, member.offset)
    try:
        if LABELS[rank] == "cls":
            label = int(text)
        else:
            record = json.loads(text)
            given = record.get("label") if isinstance(record, dict) else None
            if given is not None and type(given) is not int:
                return None
            label = NO_LABEL if given is None else given
    except (ValueError, RecursionError):
        return None
    return max(label, NO_LABEL) if label <= LARGEST_LABEL else None


def _members(file: BinaryIO, end: int, report: Callable[[str], None]) -> Generator[Member, None, None]:
    """The plain files of an archive of `end` bytes, from one valid header to the next."""
    start = file.read(6)
    packed = next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), None)
    if packed:
        return report(f"is compressed with {packed}, and random access needs a plain tar: unpack it")
    if not start:
        return report("is empty")
    position = 0
    while True:
        file.seek(position)
        stopped = yield from _run(file, position, end, report)
        if stopped is None:
            return None
        position = stopped
        if position + BLOCK > end:
            return report("ends without the zeros that end an archive; it may be cut short")
        block = os.pread(file.fileno(), BLOCK, position)
        found = _next_header(file.fileno(), position + BLOCK, end)
        if found is None:
            if any(block):
                report(f"has no valid header at byte {position}, nor after it" if position else "is no tar")
            return None
        report(f"has no valid header at byte {position}; reading went on {found - position} bytes later")
        position = found


def _run(
    file: BinaryIO, start: int, end: int, report: Callable[[str], None]
) -> Generator[Member, None, int | None]:
    """Members from `start` on; returns where no header follows, or None after a member that is cut short."""
    try:
        archive = tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="backslashreplace")
    except HEADER_ERRORS:
        return start
    while True:
        try:
            member = archive.next() if archive.offset <= end else None
        except HEADER_ERRORS:
            return archive.offset
        if member is None:
            return archive.offset
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        if member.size < 0:
            return member.offset_data
        if member.isreg() and member.offset_data + member.size > end:
            report(f"is cut short at byte {end}, within {member.name}")
            return None
        if member.isreg() and member.sparse is None:
            yield Member(member.name, member.offset_data, member.size)


def _next_header(descriptor: int, start: int, end: int) -> int | None:
    """Where the next header with a right checksum begins; bytes may be missing, so at any byte."""
    for position in range(start, end, SEARCHED_AT_ONCE):
        piece = os.pread(descriptor, SEARCHED_AT_ONCE + BLOCK, position)  # and one across the end
        place = piece.find(b"ustar")
        while place >= 0:
            block = place - 257  # where POSIX and GNU tar put this word in a header
            if block >= 0 and _is_header(piece[block : block + BLOCK]):
                return position + block
            place = piece.find(b"ustar", place + 1)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return False
    return True


def unreadable_shard(error: OSError) -> ShardIndex:
    """What stands for a shard that cannot be opened."""
    none = np.zeros(0, np.int64)
    return ShardIndex(
        none, none, none, PackedStrings.pack([]), (f"cannot be read: {reason(error)}",), (), 0, 0
    )
