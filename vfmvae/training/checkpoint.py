"""Checkpoints of a run, by torch.distributed.checkpoint: sharded over ranks, written in the background.

A folder takes a checkpoint's name only when everything is in it and on the disk, and says of every file what
it must be like; a damaged one is passed over for the one before it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from vfmvae.atomic import reason
from vfmvae.training.checkpoint_folder import (
    RECORD,
    checkpoints,
    find_damage,
    partial_of,
    path_of,
    read_checksums,
    set_aside,
)
from vfmvae.training.checkpoint_storage import CheckpointReader, CheckpointWriter, read_metadata
from vfmvae.training.distributed import rank, world_size
from vfmvae.training.state import FORMAT, TrainingState

T = TypeVar("T")
WRITE_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other's files; a rank that dies is noticed at once."""


@dataclass(frozen=True)
class Stored:
    """An intact checkpoint."""

    path: Path
    step: int
    numbers: Mapping[str, Any]
    """`TrainingState.numbers` as they were saved: enough to build the parts of the stage it is from."""
    record: Mapping[str, Any]
    damaged: tuple[str, ...]
    """One sentence for each newer checkpoint that was passed over."""


class Checkpoints:
    """The checkpoints of one run: saves, keeps the newest few, and finds the newest that is intact.

    Every rank builds one, and calls every method, at the same place of the program; the folder is shared.
    """

    def __init__(self, folder: Path, keep: int = 3, background: bool = True) -> None:
        """`keep`: how many checkpoints stay. `background`: `save` returns when the state is copied to CPU
        memory, and a thread writes it; else when it is written."""
        if keep < 1:
            raise ValueError(f"checkpoints to keep: {keep}; it must be at least 1")
        self.folder = folder
        self.last_step: int | None = None
        """The step that was saved or loaded last, written or still being written."""
        self._keep = keep
        self._background = background
        self._rank, self._ranks = rank(), world_size()
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            # A group of its own: the writing thread's messages must not mix with those of the training step.
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT))
        else:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._writing: tuple[Path, Future[Any]] | None = None

    def save(self, state: TrainingState) -> None:
        """Save `state` as the checkpoint of its step; waits for an earlier save first.

        Raises OSError with a sentence if the checkpoint, or in the background the one before, cannot be
        written. Earlier checkpoints stay as they are then, and nothing incomplete is left. After an error of
        the one before, this one is not begun.
        """
        self.wait()
        path = path_of(self.folder, state.step)
        writer = CheckpointWriter(path, state.record(), self._keep)
        tensors, alone = state.tensors(), self._group is None
        with self._errors_of(path):
            if not self._background:
                dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=alone)
            else:
                writing = dcp.async_save(
                    tensors, storage_writer=writer, process_group=self._group, no_dist=alone
                )
                assert isinstance(writing, Future), "the writer stages before async_save returns"
                self._writing = path, writing
        self.last_step = state.step

    def wait(self) -> None:
        """Wait until the last save is on the disk; OSError with a sentence if it could not be written."""
        if self._writing is None:
            return
        path, writing = self._writing
        self._writing = None
        with self._errors_of(path):
            writing.result()

    def close(self) -> None:
        """Wait for the last save, as `wait`, and end."""
        try:
            self.wait()
        finally:
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def newest(self) -> Stored | None:
        """The newest intact checkpoint, or None where there is none at all.

        Damaged ones that are newer are renamed to `<name>.damaged`. Raises ValueError if none of several is
        intact, or if a newer version of this project wrote it, and OSError as `wait` does.
        """
        self.wait()
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self._agreed(checkpoints(self.folder))):
            why = self._damage(path)
            if why is None:
                return self._read_record(path, tuple(self._set_aside(*each) for each in damaged))
            damaged.append((path, why))
        if damaged:
            reasons = "; ".join(f"{path.name}: {why}" for path, why in damaged)
            raise ValueError(f"no checkpoint in {self.folder} is intact ({reasons}); start a new run")
        return None

    def load(self, stored: Stored, state: TrainingState) -> None:
        """Read a checkpoint into `state`, on as many ranks as there are now.

        Raises ValueError if it is of another model, or holds what no checkpoint holds; `state` is as it was
        then.
        """
        names = read_checksums(stored.path).keys()
        metadata = read_metadata(stored.path, names)
        try:
            targets = state.targets(metadata.state_dict_metadata)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"checkpoint {stored.path} is of another model: {error}") from None
        reader = CheckpointReader(stored.path, metadata)
        try:
            dcp.load(targets, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        except dcp.CheckpointException as error:
            raise OSError(f"could not read checkpoint {stored.path}: {_cause(error)}") from None
        state.restore(targets, stored.record)
        self.last_step = stored.step

    def load_newest(self, state: TrainingState) -> Stored | None:
        """`load` the `newest` intact checkpoint and return it; None, and nothing done, if there is none."""
        stored = self.newest()
        if stored is not None:
            self.load(stored, state)
        return stored

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, or None; every rank reads a share of the files."""
        try:
            files = read_checksums(path)
            why = find_damage(path, files, sorted(files)[self._rank :: self._ranks])
        except ValueError as error:
            why = str(error)
        if self._group is None:
            return why
        found: list[str | None] = [None] * self._ranks
        dist.all_gather_object(found, why, group=self._group)
        return next((each for each in found if each is not None), None)

    def _read_record(self, path: Path, damaged: tuple[str, ...]) -> Stored:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        if record["format"] > FORMAT:
            raise ValueError(
                f"checkpoint {path} has format {record['format']}, this version reads up to {FORMAT}; update"
                f" vfmvae"
            )
        return Stored(path, record["step"], record["numbers"], record, damaged)

    def _set_aside(self, path: Path, why: str) -> str:
        if self._rank == 0:
            set_aside(path)
        return f"checkpoint {path} is damaged ({why}); it is now called {path.name}.damaged"

    def _agreed(self, value: T) -> T:
        """What rank 0 says."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    @contextmanager
    def _errors_of(self, path: Path) -> Iterator[None]:
        """A failed write as OSError with a sentence, and its partial folder removed."""
        try:
            yield
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            self.last_step = None
            why = _why_not_written(_cause(error), self.folder)
            if self._rank == 0:
                shutil.rmtree(partial_of(path), ignore_errors=True)
            raise OSError(f"could not write the checkpoint {path}: {why}") from None


def _cause(error: BaseException) -> BaseException:
    """What the first rank that failed met."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error


def _why_not_written(error: BaseException, folder: Path) -> str:
    """The cause behind what torch raises, which reports a full disk as a broken archive."""
    if isinstance(error, OSError):
        return reason(error)
    if not isinstance(error, RuntimeError):
        raise error
    if folder.exists() and shutil.disk_usage(folder).free < 2**20:
        return os.strerror(errno.ENOSPC)
    return str(error).strip().splitlines()[-1]
