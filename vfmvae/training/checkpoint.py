"""Checkpoints of a training run: `<run>/checkpoints/step_00000100/`, written by torch.distributed.checkpoint.

A checkpoint folder takes its name only when it is complete, so whatever has the name can be resumed from.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.stateful import Stateful

from vfmvae.atomic import reason

_NAME = re.compile(r"step_(\d{8,})$")
_PARTIAL = ".partial"
# What reading a checkpoint raises that is cut off, damaged, or of another model.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    RuntimeError,
    EOFError,
    ImportError,
    pickle.UnpicklingError,
    dcp.CheckpointException,
)


def save_checkpoint(folder: Path, step: int, state: Stateful) -> Path:
    """Write `state` as checkpoint `step` of the run's checkpoint folder; returns its path.

    Raises OSError with a sentence if it cannot be written, or if that checkpoint is there already; nothing
    incomplete is left under the checkpoint's name.
    """
    path = folder / f"step_{step:08d}"
    partial = folder / f".{path.name}{_PARTIAL}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with _single_process():
            dcp.save({"run": state}, checkpoint_id=partial, no_dist=True)
        os.rename(partial, path)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        why = _why_not_written(error, folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"could not write the checkpoint {path}: {why}") from None
    return path


def load_checkpoint(path: Path, state: Stateful) -> None:
    """Read a checkpoint into `state`.

    Raises ValueError if the checkpoint is damaged or belongs to another model; `state` is unusable then.
    """
    try:
        with _single_process():
            dcp.load({"run": state}, checkpoint_id=path, no_dist=True)
    except _DAMAGE as error:
        detail = str(error).strip().splitlines()
        raise ValueError(
            f"checkpoint {path} is damaged or of another model: {detail[-1] if detail else repr(error)};"
            f" without this folder, --resume takes the checkpoint before it"
        ) from None


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and _NAME.match(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    match = _NAME.match(path.name)
    assert match is not None, path
    return int(match[1])


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote."""
    for partial in folder.glob(f".step_*{_PARTIAL}"):
        shutil.rmtree(partial)


@contextmanager
def _single_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no process group": a single process is what we asked for
        yield


def _why_not_written(error: BaseException, folder: Path) -> str:
    """The cause behind what torch raises, which reports a full disk as a broken archive."""
    if isinstance(error, OSError) and error.strerror:
        return reason(error)
    if shutil.disk_usage(folder).free < 2**20:
        return os.strerror(errno.ENOSPC)
    return str(error).strip().splitlines()[-1]
