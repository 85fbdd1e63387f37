"""Which data files a folder, a file, a glob or a brace pattern names: tar shards, parquet files."""

from __future__ import annotations

import os
import re
from glob import glob, has_magic
from pathlib import Path

from vfmvae.data.folder import walk
from vfmvae.data.samples import IMAGE_EXTENSIONS

_IMAGE_FILES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://|pipe:", re.IGNORECASE)
# A range of numbers or a list, without braces inside.
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def means_files(where: str, endings: tuple[str, ...]) -> bool:
    """Whether `where` means files with one of `endings`: one, a pattern of them, or a folder that holds some.

    Also where they are not there, so that opening them can say so. A folder that holds images as well is one
    of images: the first that is met ends the walk.
    """
    if os.path.isdir(where):
        return _holds(Path(where), endings)
    name = where.partition("?")[0] if _REMOTE.match(where) else where
    return any(expanded.lower().endswith(endings) for expanded in expand_braces(name))


def named_files(where: str, endings: tuple[str, ...], what: str) -> tuple[Path, list[str]]:
    """The folder that names are relative to, and the names in sorted order.

    That folder is `where` itself, else the part of it before the first wildcard, else the file's: files have
    the same names whether they are opened as a folder or by a pattern below it. `what` they are, and the
    first of `endings`, is for messages. ValueError for an address, for a path that does not exist, also if a
    pattern lists it, and for a folder without such files.
    """
    if _REMOTE.match(where):
        raise ValueError(f"{what}s are read from this machine, not from {where}; copy them here first")
    path = Path(where)
    if path.is_dir():
        names = _find(path, endings)
        if not names:
            raise ValueError(f"no {what}s in {where}: looked for {endings[0]} files at any depth")
        return path, names
    if path.exists():
        return path.parent, [path.name]
    patterns = expand_braces(where)
    if patterns == [where] and not has_magic(where):
        raise ValueError(f"{what} {where} does not exist; give a {endings[0]} file, a folder or a pattern")
    found = [Path(name) for pattern in patterns for name in _matches(pattern, where, what)]
    parts = path.parts[:-1]
    wild = next((i for i, part in enumerate(parts) if has_magic(part) or "{" in part), len(parts))
    root = Path(*parts[:wild])
    return root, sorted({file.relative_to(root).as_posix() for file in found})


def expand_braces(pattern: str) -> list[str]:
    """What a shell makes of `{000..127}`, zeros kept, and of `{a,b}`, one inside the other too."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, listed = match.groups()
    if listed is not None:
        choices = listed.split(",")
    else:
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + step, step)]
    return [
        name
        for choice in choices
        for name in expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def _find(folder: Path, endings: tuple[str, ...]) -> list[str]:
    """Names below `folder` at any depth, hidden files and folders left out."""
    found: list[str] = []
    for below, names in walk(folder):
        before = f"{below}/" if below else ""
        found += [before + name for name in names if name.lower().endswith(endings)]
    return sorted(found)


def _holds(folder: Path, endings: tuple[str, ...]) -> bool:
    found = False
    for _, names in walk(folder):
        if any(name.lower().endswith(_IMAGE_FILES) for name in names):
            return False
        found = found or any(name.lower().endswith(endings) for name in names)
    return found


def _matches(pattern: str, where: str, what: str) -> list[str]:
    if not has_magic(pattern):
        if not os.path.exists(pattern):
            raise ValueError(f"{what} {pattern}, one of {where}, does not exist")
        return [pattern]
    found = [name for name in glob(pattern, recursive=True) if os.path.isfile(name)]
    if not found:
        raise ValueError(f"no file matches {pattern}; give a folder of {what}s or another pattern")
    return found
