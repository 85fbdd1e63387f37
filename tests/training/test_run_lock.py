"""A folder with a run in it is closed to others for as long as that process lives, and no longer."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from tests.helpers import ROOT
from vfmvae.training.run_lock import NAME, run_lock

HOLDER = """
import os, pathlib, sys, time
from vfmvae.training.run_lock import run_lock
with run_lock(pathlib.Path(sys.argv[1]), print):
    if not os.fork():  # as processes that read images do, it outlives a killed parent for a while
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock, and a child of its own that does not."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


def refuse(sentence: str) -> None:
    raise AssertionError(sentence)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holder(folder) as process:
        (folder / "config.json").touch()
        message = f"process {process.pid} on .* trains in {folder} now; wait until it ends, stop it, or give"
        for _ in range(2):
            with pytest.raises(ValueError, match=message), run_lock(folder, refuse):
                pass
        process.kill()
        process.wait()
        with run_lock(folder, refuse):
            assert (folder / NAME).read_text().startswith(f"process {os.getpid()} on ")
    assert (folder / "config.json").exists()


def test_the_lock_ends_with_the_block(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    for _ in range(2):
        with pytest.raises(KeyError), run_lock(tmp_path, refuse):
            raise KeyError("a failed run")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with run_lock(tmp_path / "deep" / "run", refuse):
        pass
    assert not (tmp_path / "deep" / "run").exists()


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    said: list[str] = []
    with run_lock(tmp_path, said.append):
        (tmp_path / "config.json").touch()
    assert said == [
        f"warning: the file system of {tmp_path} has no locks (No locks available); take care that no second"
        f" process trains there"
    ]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", read_only)
    with (
        pytest.raises(OSError, match=r"could not write .*\.lock: Read-only file system"),
        run_lock(tmp_path, refuse),
    ):
        pass
