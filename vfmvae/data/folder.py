"""Image files below a folder as `Samples`, in the ImageNet layout or flat.

    folder/class/any/depth/name.jpg     the class is the first sub-folder; without sub-folders there is one
    folder/train/..., folder/val/...    a `val`, `validation` or `valid` folder is the validation split, and
                                        beside `train` also `test`; `train` (or, if there is none, everything
                                        else) trains; classes lie inside each

Without such a folder about a twentieth of the files is held out, chosen by a hash of each file's relative
name: the choice is the same on every machine and stays when files are added.

A class folder without images, and pictures of kinds that are not read, are told by `faults`: the first would
have been a class, and moves the numbers of those after it. Neither counts as a broken image.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vfmvae.atomic import reason
from vfmvae.data.samples import IMAGE_EXTENSIONS, NO_LABEL, NOT_THE_SAMPLE, Fault, Part, SampleError
from vfmvae.data.source import Split
from vfmvae.data.splits import held_out

EXTENSIONS = tuple(sorted(f".{extension}" for extension in IMAGE_EXTENSIONS))
VALIDATION_FOLDERS = ("val", "validation", "valid")
PACKED = (".tar", ".parquet")
FEW_IMAGES = 20  # beside packed data they are pictures about it
UNREAD = (".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".jpe", ".jfif", ".tga", ".dng")
"""Files that show images as well, and are not read."""


class FolderSamples:
    """Files below a folder, by their names; see `Samples`."""

    def __init__(
        self, root: Path, entries: Sequence[_Entry], classes: tuple[str, ...], faults: Sequence[Fault] = ()
    ) -> None:
        self.classes = classes
        self._faults = list(faults)
        # Where there are classes, an image outside of them has none.
        numbers = {"": NO_LABEL, **{name: number for number, name in enumerate(classes)}}
        self._root = str(root)
        self._names = [entry.name for entry in entries]
        self._labels = [numbers[entry.class_name] for entry in entries]

    def __len__(self) -> int:
        return len(self._names)

    def key(self, number: int) -> str:
        return self._names[number]

    def label(self, number: int) -> int:
        return self._labels[number]

    def read(self, number: int) -> bytes:
        path = f"{self._root}/{self._names[number]}"
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise SampleError(self._names[number], "it is no regular file")  # a pipe would wait for ever
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            if error.errno in NOT_THE_SAMPLE:
                raise
            raise SampleError(self._names[number], reason(error)) from None

    def faults(self) -> list[Fault]:
        return self._faults


class _Entry(NamedTuple):
    """A file by its name below the folder, and its class, "" outside of sub-folders."""

    name: str
    class_name: str


def open_folder(root: Path, part: Part) -> FolderSamples:
    """The images of a folder in the order of their names; ValueError for one that is missing or has none.

    Classes are the sub-folders of both splits in order, so that labels mean the same in either.
    """
    if not root.exists():
        raise ValueError(f"image folder {root} does not exist; it should hold {_extensions()} files")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give the folder that holds the {_extensions()} files")
    found = _list(root)
    names = found.images
    if part == "all" and len(names) == 1:
        entry = _entry(names[0], "")
        return FolderSamples(root, [entry], (entry.class_name,), _unread(found))
    splits = _split(root, names)
    everything = sorted(entry for entries in splits.values() for entry in entries)
    entries = everything if part == "all" else splits[part]
    if not entries:
        raise ValueError(f"no images for {part} in {root}: looked for {_extensions()} at any depth")
    classes = {entry.class_name for entry in everything}
    ordered = tuple(sorted(classes - {""} or classes))
    empty = _empty_classes(root, names, found.folders, ordered)
    return FolderSamples(root, entries, ordered, [*empty, *_unread(found)])


def _empty_classes(root: Path, names: list[str], folders: list[str], classes: tuple[str, ...]) -> list[Fault]:
    """Folders that lie where classes do, and have no image in either split."""
    if classes == ("",):
        return []
    bases, known = _bases(root, names), set(classes)
    found = []
    for folder in sorted(folders):
        parent, slash, name = folder.rpartition("/")
        if parent + slash in bases and f"{folder}/" not in bases and name not in known:
            found.append(Fault(f"{folder}/", "a folder without images, of which no class is made", False))
    return found


def _unread(found: _Listing) -> list[Fault]:
    return [
        Fault(f"*{extension}", f"{count} of a kind that is not read, the first {first}", False)
        for extension, (count, first) in sorted(found.unread.items())
    ]


def _bases(root: Path, names: list[str]) -> tuple[str, str | None]:
    """The beginnings of names that lead to the classes, in training and in a folder for validation."""
    # The folder `test` has labels seldom, and validates where nothing else does.
    candidates = (*VALIDATION_FOLDERS, *(["test"] if (root / "train").is_dir() else []))
    validation = next((f"{name}/" for name in candidates if (root / name).is_dir()), None)
    if validation is None:
        # Where other folders with images lie beside it, `train` is a class.
        return "train/" if all(n.startswith("train/") for n in names) else "", None
    return "train/" if (root / "train").is_dir() else "", validation


def _split(root: Path, names: list[str]) -> dict[Split, list[_Entry]]:
    """The files of both splits, in order."""
    base, validation = _bases(root, names)
    if validation is None:
        return _hashed_split(root, names, base)
    training = [name for name in names if name.startswith(base) and not name.startswith(validation)]
    return {
        "train": [_entry(name, base) for name in training],
        "validation": [_entry(name, validation) for name in names if name.startswith(validation)],
    }


def _hashed_split(root: Path, names: list[str], base: str) -> dict[Split, list[_Entry]]:
    """About a twentieth of the files for validation, at least one and never all."""
    if len(names) == 1:
        raise ValueError(f"{root} holds one image only, {names[0]}; training and validation need two")
    chosen = held_out(name[len(base) :] for name in names)
    entries = [_entry(name, base) for name in names]
    return {
        "train": [entry for entry, out in zip(entries, chosen, strict=True) if not out],
        "validation": [entry for entry, out in zip(entries, chosen, strict=True) if out],
    }


def _entry(name: str, base: str) -> _Entry:
    """`base`: the beginning of the name that leads to the classes."""
    first, slash, _ = name[len(base) :].partition("/")
    return _Entry(name, first if slash else "")


class _Listing(NamedTuple):
    """What lies below a folder by its name there: images in order, folders, and pictures that are not read
    by their extension (how many, and the first).
    """

    images: list[str]
    folders: list[str]
    unread: dict[str, tuple[int, str]]


def image_names(folder: Path) -> list[str]:
    """Image files at any depth by their names below a folder, sorted; hidden ones are left out."""
    return _list(folder).images


def _list(folder: Path) -> _Listing:
    images: list[str] = []
    packed: list[str] = []
    folders: list[str] = []
    unread: dict[str, list[str]] = {}
    for below, names in walk(folder):
        before = f"{below}/" if below else ""
        folders += [below] if below else []
        for name in names:
            lower = name.lower()
            if lower.endswith(EXTENSIONS):
                images.append(before + name)
            elif lower.endswith(PACKED):
                packed.append(before + name)
            elif lower.endswith(UNREAD):
                unread.setdefault(os.path.splitext(lower)[1], []).append(before + name)
    if packed and len(images) <= max(FEW_IMAGES, len(packed)) and images:
        raise ValueError(
            f"{folder} holds {len(packed)} tar or parquet files ({packed[0]}) and {len(images)} images"
            f" ({images[0]}); give a folder or a pattern of the ones, such as"
            f" {folder}/**/*{Path(packed[0]).suffix}"
        )
    return _Listing(sorted(images), folders, {ext: (len(names), min(names)) for ext, names in unread.items()})


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The folders in `folder`, itself ("") among them, by their names below it, and the files of each.

    Hidden ones are left out. Links are followed, but not to a folder that the path has already gone through,
    so a walk ends. ValueError for a folder that cannot be listed.
    """

    def unreadable(error: OSError) -> None:
        raise ValueError(f"cannot list folder {error.filename}: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        folders[:] = [n for n in folders if not n.startswith(".") and not _leads_back(folder, parent, n)]
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        yield "" if below == "." else below, [name for name in files if not name.startswith(".")]


def _leads_back(top: Path, parent: str, name: str) -> bool:
    """Whether a folder is a link to one on the path from `top` to it, or above: it would never end."""
    path = Path(parent, name)
    if not path.is_symlink():
        return False
    target = os.path.join(os.path.realpath(path), "")
    passed = (Path(parent), *Path(parent).parents)
    on_path = passed[: passed.index(top) + 1]
    return any(os.path.join(os.path.realpath(folder), "").startswith(target) for folder in on_path)


def _extensions() -> str:
    return ", ".join(EXTENSIONS)


def list_images(inputs: Sequence[Path]) -> list[tuple[Path, str]]:
    """Image files given one by one or as folders (any depth), each with its name below that folder.

    Raises ValueError for an input that does not exist and for a folder without images.
    """
    found = []
    for given in inputs:
        if given.is_dir():
            names = image_names(given)
            if not names:
                raise ValueError(f"no images in {given}: looked for {_extensions()} at any depth")
            found += [(given / name, name) for name in names]
        elif given.exists():
            found.append((given, given.name))
        else:
            raise ValueError(f"image {given} does not exist; give image files or folders of them")
    return found
