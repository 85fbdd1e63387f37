"""Tar shards in the layout of WebDataset as `Samples`: random access through an index per shard.

    imagenet1k-train-0000.tar ...        NAME.jpg and NAME.cls, or a .json with a "label", for every sample
    imagenet1k-validation-00.tar ...     the words of the names tell the splits (vfmvae.data.splits)
    classes.txt or classnames.txt        may lie beside them and name the classes, one per line

What a sample is, and how it is labelled: vfmvae.data.shard_index. A key is `shard/NAME`, the shard's path
without `.tar`. Shards named test are left out where others are named validation. Where the names tell no two
splits apart, a twentieth of the samples is held out by a hash of their keys.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from vfmvae.atomic import reason
from vfmvae.data.named_files import means_files, named_files
from vfmvae.data.packed import PackedStrings
from vfmvae.data.samples import NO_LABEL, NOT_THE_SAMPLE, Fault, Part, SampleError
from vfmvae.data.shard_index import ShardIndex, build_index, load_index, store_index, unreadable_shard
from vfmvae.data.splits import check_part, divide, hashed_rows

SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
"""Compressed ones are refused, but known for shards, so that the refusal can say why."""
OPEN_SHARDS = 64
"""Files that a process keeps open; a process may have 1024 by default."""
INDEX_THREADS = 8
CLASS_NAMES = ("classes.txt", "classnames.txt")


class ShardSamples:
    """The images of some shards; made by `open_shards`. May be read from many threads.

    After a fork or in a pickled copy, every process opens its own files.
    """

    def __init__(
        self, root: Path, shards: Sequence[str], indexes: Sequence[ShardIndex], classes: tuple[str, ...]
    ) -> None:
        """All samples of `shards`, named relative to `root`; labels are NO_LABEL or index `classes`."""
        self.classes = classes
        self._root = root.absolute()
        self._shards = list(shards)
        self._bytes = [index.bytes for index in indexes]
        self._shard = np.repeat(np.arange(len(indexes), dtype=np.int32), [len(i.names) for i in indexes])
        none = np.zeros(0, np.int64)
        self._offset = np.concatenate([none, *(index.offset for index in indexes)])
        self._size = np.concatenate([none, *(index.size for index in indexes)])
        self._label = np.concatenate([none, *(index.label for index in indexes)])
        self._names = PackedStrings.concatenate([index.names for index in indexes])
        told = list(zip(shards, indexes, strict=True))
        self._faults = [Fault(shard, fault) for shard, index in told for fault in index.faults]
        self._faults += [Fault(shard, note, False) for shard, index in told for note in index.notes]
        self._files = _OpenFiles()

    def __len__(self) -> int:
        return len(self._offset)

    def key(self, number: int) -> str:
        return f"{_prefix(self._shards[self._shard[number]])}/{self._names[number]}"

    def keys(self) -> list[str]:
        """All keys in order, faster than one by one."""
        prefixes = [_prefix(shard) for shard in self._shards]
        return [f"{prefixes[s]}/{n}" for s, n in zip(self._shard.tolist(), self._names, strict=True)]

    def label(self, number: int) -> int:
        return int(self._label[number])

    def read(self, number: int) -> bytes:
        shard = int(self._shard[number])
        offset, size = int(self._offset[number]), int(self._size[number])
        if size == 0:
            raise SampleError(self.key(number), "it has no bytes")
        name = self._shards[shard]
        try:
            file = self._files.get(self._root / name)
            # Not the time, as some touch files to keep them from a purge.
            if file.bytes != self._bytes[shard]:
                raise SampleError(self.key(number), f"shard {name} has changed since its data were opened")
            image = _read(file.descriptor, offset, size)
        except (FileNotFoundError, NotADirectoryError):
            raise SampleError(self.key(number), f"shard {name} has disappeared") from None
        except OSError as error:
            if error.errno in NOT_THE_SAMPLE:
                raise
            raise SampleError(self.key(number), f"shard {name}: {reason(error)}") from error
        if len(image) < size:
            raise SampleError(self.key(number), f"shard {name} gives {len(image)} of its {size} bytes")
        return image

    def faults(self) -> list[Fault]:
        return list(self._faults)

    def take(self, rows: np.ndarray) -> ShardSamples:
        """The samples of these numbers, in their order."""
        taken = object.__new__(ShardSamples)
        taken.__dict__.update(self.__dict__, _files=_OpenFiles(), _names=self._names.take(rows))
        for field in ("_shard", "_offset", "_size", "_label"):
            setattr(taken, field, getattr(self, field)[rows])
        return taken

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _files=_OpenFiles())


def is_shards(where: str) -> bool:
    """Whether `where` means tar shards: a file, a pattern, or a folder that holds some and no images."""
    return means_files(where, SHARDS)


def open_shards(where: str, part: Part, on_index: Callable[[int, int], None] | None = None) -> ShardSamples:
    """The samples of a folder of shards, a .tar file, a glob or a brace pattern, as `part` says.

    Shards without an index that fits are read first, headers and labels only; `on_index(done, total)` hears
    of each. Indexes are kept beside the shards, or where that cannot be in ~/.cache/vfmvae. Shards named test
    are read only where none is named validation. What is damaged is left out and told by `faults`.

    ValueError for an address, a missing file, an unknown part, and where no image is left for `part`.
    """
    check_part(part)
    root, found = named_files(where, SHARDS, "shard")
    training, validation = divide(found)
    shards = sorted({*training, *validation})
    indexes = open_indexes([root / shard for shard in shards], on_index)
    if not any(len(index.names) for index in indexes):
        first = next((f"{s} {i.faults[0]}" for s, i in zip(shards, indexes, strict=True) if i.faults), "")
        raise ValueError(f"no image is left in {where} (shards: {len(shards)}): {first}")
    _check_nested(shards, indexes)
    largest = max(int(index.label.max(initial=NO_LABEL)) for index in indexes)
    if largest == NO_LABEL:
        indexes = [index._replace(label=np.zeros_like(index.label)) for index in indexes]
    classes, unused = class_names(largest, [root, (root / shards[0]).parent])
    samples = ShardSamples(root, shards, indexes, classes)
    samples._faults += unused
    if validation and part != "all":
        chosen = set(training if part == "train" else validation)
        kept = np.array([shard in chosen for shard in shards])
        samples = samples.take(np.flatnonzero(kept[samples._shard]))
    elif part != "all":
        samples = samples.take(hashed_rows(part, samples.keys()))
    if not len(samples):
        raise ValueError(f"no image for {part} in {where}; give more shards, or open all of it")
    return samples


def open_indexes(files: Sequence[Path], on_index: Callable[[int, int], None] | None) -> list[ShardIndex]:
    """The index of every shard, from its file or made now in a few threads and stored."""
    pool = ThreadPoolExecutor(min(INDEX_THREADS, 2 * (os.cpu_count() or 1)), thread_name_prefix="index")
    try:
        indexes = list(pool.map(load_index, files))
        missing = [number for number, index in enumerate(indexes) if index is None]
        building = {pool.submit(_build, files[number]): number for number in missing}
        for done, future in enumerate(as_completed(building), start=1):
            number = building[future]
            indexes[number] = index = future.result()
            if len(index.names):
                store_index(files[number], index)
            if on_index:
                on_index(done, len(missing))
    finally:
        pool.shutdown(cancel_futures=True)
    return [index for index in indexes if index is not None]


def class_names(largest: int, folders: Sequence[Path]) -> tuple[tuple[str, ...], list[Fault]]:
    """The classes for labels up to `largest`; one, "", where that is NO_LABEL.

    Else the lines of a file with class names in the first of `folders` that has one. "0" to the largest label
    where there is none, or where it has too few lines, which is a fault.
    """
    if largest == NO_LABEL:
        return ("",), []
    numbers = tuple(map(str, range(largest + 1)))
    file = next((f / n for f in folders for n in CLASS_NAMES if (f / n).is_file()), None)
    if file is None:
        return numbers, []
    names = tuple(line.strip() for line in file.read_text("utf-8", "replace").rstrip().splitlines())
    if len(names) > largest:
        return names, []
    return numbers, [Fault(file.name, f"is not used: it has no line for label {largest}", False)]


def _build(file: Path) -> ShardIndex:
    try:
        return build_index(file)
    except OSError as error:
        return unreadable_shard(error)


def _check_nested(shards: Sequence[str], indexes: Sequence[ShardIndex]) -> None:
    """Keys can meet where a folder is named as a shard beside it: b/1.jpg in a.tar, 1.jpg in a/b.tar."""
    numbers = {_prefix(shard): number for number, shard in enumerate(shards)}
    for inner, number in numbers.items():
        for outer in map(str, Path(inner).parents):
            if outer in numbers:
                below = inner[len(outer) + 1 :]
                names = {f"{below}/{name}" for name in indexes[number].names}
                both = next((name for name in indexes[numbers[outer]].names if name in names), None)
                if both is not None:
                    raise ValueError(
                        f"shards {outer} and {inner} both hold {outer}/{both}; rename one of them"
                    )


def _prefix(shard: str) -> str:
    return shard[:-4] if shard.lower().endswith(".tar") else shard


def _read(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes, or those that there are: a call may give less than it is asked for."""
    image = os.pread(descriptor, size, offset)
    while 0 < len(image) < size and (more := os.pread(descriptor, size - len(image), offset + len(image))):
        image += more
    return image


class _OpenFile:
    """A descriptor that is closed when the last reader lets go of it, and not while one is reading."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.bytes = os.fstat(self.descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _OpenFiles:
    """The files that this process used last, `OPEN_SHARDS` of them."""

    def __init__(self) -> None:
        self._state = (os.getpid(), threading.Lock(), OrderedDict[Path, _OpenFile]())

    def get(self, path: Path) -> _OpenFile:
        if self._state[0] != os.getpid():  # forked, maybe while another thread held the lock
            self._state = (os.getpid(), threading.Lock(), OrderedDict())
        _, lock, files = self._state
        with lock:
            file = files.get(path)
            if file is not None:
                files.move_to_end(path)
                return file
        opened = _OpenFile(path)
        with lock:
            file = files.setdefault(path, opened)
            while len(files) > OPEN_SHARDS:
                files.popitem(last=False)
        return file
