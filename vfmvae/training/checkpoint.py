"""Checkpoints of a training run: `<run>/checkpoints/step_00000100/`, written by torch.distributed.checkpoint.

A checkpoint folder takes its name only when it is complete, so whatever has the name can be resumed from.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.stateful import Stateful

_NAME = re.compile(r"step_(\d{8,})$")


def save_checkpoint(folder: Path, step: int, state: Stateful) -> Path:
    """Write `state` as checkpoint `step` of the run's `folder`.

    Raises OSError with a sentence if it cannot be written; nothing is left under the checkpoint's name then.
    """
    path = folder / f"step_{step:08d}"
    partial = folder / f".{path.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _quietly(dcp.save, {"run": state}, checkpoint_id=partial, no_dist=True)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    except (OSError, dcp.CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"could not write the checkpoint {path}: {_reason(error, folder)}") from None
    return path


def load_checkpoint(path: Path, state: Stateful) -> None:
    """Read a checkpoint into `state`.

    Raises ValueError if the checkpoint is damaged or belongs to another model.
    """
    try:
        _quietly(dcp.load, {"run": state}, checkpoint_id=path, no_dist=True)
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, dcp.CheckpointException) as error:
        detail = str(error).strip().splitlines()
        raise ValueError(
            f"checkpoint {path} cannot be loaded into this run: {detail[-1] if detail else error!r}"
        ) from None


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and _NAME.match(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    match = _NAME.match(path.name)
    assert match is not None, path
    return int(match[1])


def _quietly(call: Any, *args: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no process group": a single process is what we asked for
        call(*args, **kwargs)


def _reason(error: Exception, folder: Path) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        if shutil.disk_usage(folder).free < 2**20:
            return os.strerror(errno.ENOSPC)
    except OSError:
        pass
    return str(error).strip().splitlines()[-1]
