"""One run at a time in a folder: two would remove each other's checkpoints and mix their metrics."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from vfmvae.atomic import reason

NAME = ".lock"
# What file systems say that have no locks, and those of a network whose lock service does not run.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def run_lock(
    folder: Path, warn: Callable[[str], None], works: str = "trains", option: str = "--run-dir"
) -> Iterator[None]:
    """While entered, no other process can enter this for the same folder.

    `works` and `option` are for the sentences: what is done there, and what names another folder.

    The kernel lets go of the lock when the process ends, however that ends; a file that a killed one leaves
    locks nothing. Where the file system has no locks `warn` is called with a sentence, and nothing is held.

    Raises ValueError if another process works there now, OSError with a sentence if the folder cannot be
    written.
    """
    path = folder / NAME
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        lock.acquire(blocking=False)
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except Timeout:
        raise ValueError(
            f"{_holder(path)} {works} in {folder} now; wait until it ends, stop it, or give another {option}"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OSError(f"could not write {path}: {reason(error)}") from None
        warn(
            f"warning: the file system of {folder} has no locks ({reason(error)}); take care that no second"
            f" process {works} there"
        )
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # whoever opened it in the meantime notices that it is gone
            for parent in made:
                parent.rmdir()  # unless a run left something there
        lock.release()


def _holder(path: Path) -> str:
    """What the process that has the lock wrote into it."""
    with suppress(OSError):
        return path.read_text(encoding="utf-8") or "another process"
    return "another process"
