"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

_SUFFIX = ".partial"


@contextlib.contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Give a temporary path for each of `paths` (one folder); on success they take the final names, in order.

    Missing folders are made. On failure they and the temporary files are removed, earlier files stay as they
    were, and an I/O error is raised again as OSError with a sentence that names the file.
    """
    folder = paths[0].parent
    missing = [parent for parent in (folder, *folder.parents) if not os.path.exists(parent)]
    temporary: list[Path] = []
    done = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.", suffix=_SUFFIX)
            os.close(handle)
            temporary.append(Path(name))
        yield temporary
        for partial in temporary:
            _flush_to_disk(partial)
            os.chmod(partial, 0o666 & ~_umask())
        for partial, path in zip(temporary, paths, strict=True):
            os.replace(partial, path)
        done = True
    except (OSError, SafetensorError) as error:
        names = ", ".join(str(path) for path in paths)
        raise OSError(f"could not write {names}: {reason(error)}; nothing was changed there") from None
    finally:
        for partial in temporary:
            partial.unlink(missing_ok=True)
        if not done:
            _remove_empty(missing)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)` and then rename to `path`; see `replacing`."""
    with replacing(path) as (partial,):
        write(partial)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed process left in `folder`, itself not below."""
    for partial in folder.glob(f".*{_SUFFIX}"):
        if partial.is_file():
            partial.unlink()


def reason(error: Exception) -> str:
    """What went wrong in a few words, without the file name and the error number that OSError adds."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _remove_empty(folders: list[Path]) -> None:
    """Remove those of `folders` that are there and empty; the innermost comes first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
