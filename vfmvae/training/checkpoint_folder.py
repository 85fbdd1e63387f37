"""Folders of checkpoints: `step_00000100/` with everything in it, or nothing under that name.

checkpoints/step_00000100/            complete
    __<rank>_<n>.distcp  .metadata    tensors, as torch.distributed.checkpoint lays them out
    run.json                          step, numbers: everything that is no tensor
    checksums.json                    size and SHA-256 of every other file
checkpoints/.step_00000200.partial/   being written, or being removed
checkpoints/step_00000300.damaged/    set aside by a run that found it damaged
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vfmvae.atomic import reason

CHECKSUMS = "checksums.json"
RECORD = "run.json"
METADATA = ".metadata"
_NAME = re.compile(r"step_(\d{8,})$")
_PARTIAL = ".partial"
_DAMAGED = ".damaged"
_CHUNK = 2**22  # bytes that are hashed at a time


class FileDigest(NamedTuple):
    """What a file must be like to be whole."""

    bytes: int
    sha256: str


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies when it is complete."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    match = _NAME.match(path.name)
    assert match is not None, path
    return int(match[1])


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and _NAME.match(path.name)]
    return sorted(found, key=step_of)


def partial_of(path: Path) -> Path:
    """Where a checkpoint lies while it is written, and while it is removed."""
    return path.with_name(f".{path.name}{_PARTIAL}")


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote or removed a checkpoint."""
    for partial in folder.glob(f".step_*{_PARTIAL}"):
        shutil.rmtree(partial)


def commit(path: Path) -> None:
    """Give a completely written partial folder the checkpoint's name, on the disk too."""
    partial = partial_of(path)
    _sync_folder(partial)
    os.rename(partial, path)
    _sync_folder(path.parent)


def remove_all_but_newest(folder: Path, keep: int) -> None:
    """Remove the oldest checkpoints so that `keep` stay."""
    for path in checkpoints(folder)[:-keep]:
        partial = partial_of(path)
        shutil.rmtree(partial, ignore_errors=True)
        os.rename(path, partial)  # a kill must not leave half of it under its name
        shutil.rmtree(partial)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that nobody resumes from it, and its step can be written again."""
    aside = path.with_name(path.name + _DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    return path.rename(aside)


def digests(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Size and SHA-256 of files, read in pieces."""
    return {name: _digest(folder / name) for name in names}


def write_json(path: Path, value: object) -> None:
    """Write JSON, to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def write_checksums(folder: Path, files: dict[str, FileDigest]) -> None:
    """Write checksums.json, the last file of a checkpoint."""
    write_json(folder / CHECKSUMS, {name: digest._asdict() for name, digest in sorted(files.items())})


def read_checksums(folder: Path) -> dict[str, FileDigest]:
    """What checksums.json says, or ValueError with what is wrong with it."""
    try:
        listed = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        files = {name: FileDigest(int(d["bytes"]), str(d["sha256"])) for name, d in listed.items()}
    except FileNotFoundError:
        raise ValueError(f"{CHECKSUMS} is missing") from None
    except OSError as error:
        raise ValueError(f"{CHECKSUMS} cannot be read: {reason(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{CHECKSUMS} is not what was written") from None
    if not {RECORD, METADATA} <= files.keys() or any(Path(name).name != name for name in files):
        raise ValueError(f"{CHECKSUMS} does not list the files of a checkpoint")
    return files


def find_damage(folder: Path, files: dict[str, FileDigest], names: Sequence[str]) -> str | None:
    """What is wrong with the first damaged file among `names`, or None; reads them all."""
    for name in names:
        try:
            size = (folder / name).stat().st_size
            if size != files[name].bytes:
                return f"{name} has {size} bytes, {files[name].bytes} were written"
            if _digest(folder / name).sha256 != files[name].sha256:
                return f"the content of {name} is not what was written (SHA-256 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {reason(error)}"
    return None


def _digest(path: Path) -> FileDigest:
    sha256, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            size += len(chunk)
    return FileDigest(size, sha256.hexdigest())


def _sync_folder(path: Path) -> None:
    """Names are on the disk when their folder is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
