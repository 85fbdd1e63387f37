"""Files appear whole or not at all, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vfmvae.atomic import remove_leftovers, replacing, write_atomically


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: writing fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_written_file_has_its_content_and_ordinary_permissions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, lambda partial: partial.write_text("content"))
    assert path.read_text() == "content"
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert os.listdir(path.parent) == ["file.txt"]


def test_nothing_is_there_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with replacing(path) as (partial,):
        partial.write_text("half")
        assert not path.exists()
        assert partial.parent == path.parent, "a rename is atomic on one disk only"
    assert path.read_text() == "half"


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(partial: Path) -> None:
        partial.write_text("new, and then")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"could not write .*file\.txt: No space left on device; nothing was"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_write_that_really_fails_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    tensors = {"weight": torch.zeros(100_000)}
    with largest_file(4096), pytest.raises(OSError, match=r"could not write .*model\.safetensors: "):
        write_atomically(path, lambda partial: save_file(tensors, partial))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_two_files_change_together_or_not_at_all(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")
    with pytest.raises(ValueError, match="our own"), replacing(first, second) as (a, b):
        a.write_text("new")
        raise ValueError("our own")
    assert first.read_text() == "old"
    assert os.listdir(tmp_path) == ["first"]
    with replacing(first, second) as (a, b):
        a.write_text("1")
        b.write_text("2")
    assert (first.read_text(), second.read_text()) == ("1", "2")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"could not write .*file/config\.json: (File exists|Not a directory)"):
        write_atomically(tmp_path / "file" / "config.json", lambda partial: partial.write_text("x"))


def test_folders_that_a_failed_write_made_are_removed(tmp_path: Path) -> None:
    def write(partial: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="could not write"):
        write_atomically(tmp_path / "a" / "b" / "file", write)
    assert os.listdir(tmp_path) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="could not write"):
        write_atomically(tmp_path / "a" / "b" / "file", write)
    assert os.listdir(tmp_path) == ["a"], "what was there before stays, though it is empty"


def test_folders_that_others_use_by_now_stay(tmp_path: Path) -> None:
    def write(partial: Path) -> None:
        (partial.parent / "other").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a" / "b" / "file", write)
    assert os.listdir(tmp_path / "a" / "b") == ["other"]


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    with replacing(tmp_path / "killed") as (partial,):
        partial.write_text("half")
        left = partial.read_text(), partial.name
    (tmp_path / left[1]).write_text(left[0])
    for name in ("killed", "user.partial", ".hidden"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "killed", "user.partial"]
