"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Give a temporary path for each of `paths` (one folder); on success they take the final names, in order.

    On failure the temporary files are removed, earlier files stay as they were, and an I/O error is raised
    again as OSError with a sentence that names the file.
    """
    folder = paths[0].parent
    temporary: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.", suffix=".partial")
            os.close(handle)
            temporary.append(Path(name))
        yield temporary
        for partial, path in zip(temporary, paths, strict=True):
            _flush_to_disk(partial)
            os.chmod(partial, 0o666 & ~_umask())
            os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        names = ", ".join(str(path) for path in paths)
        raise OSError(f"could not write {names}: {_reason(error)}; nothing was changed there") from None
    finally:
        for partial in temporary:
            partial.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary)` and then rename to `path`; see `replacing`."""
    with replacing(path) as (partial,):
        write(partial)


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
