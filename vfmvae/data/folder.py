"""Image files below a folder as `Samples`, in the ImageNet layout or flat.

    folder/class/any/depth/name.jpg     the class is the first sub-folder; without sub-folders there is one
    folder/train/..., folder/val/...    a `val` or `validation` folder is the validation split; `train` (or,
                                        if there is none, everything else) trains; classes lie inside each

Without such a folder about a twentieth of the files is held out, chosen by a hash of each file's relative
name: the choice is the same on every machine and stays when files are added.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vfmvae.atomic import reason
from vfmvae.data.samples import IMAGE_EXTENSIONS, Fault, Part, SampleError
from vfmvae.data.source import Split
from vfmvae.data.splits import held_out

EXTENSIONS = tuple(sorted(f".{extension}" for extension in IMAGE_EXTENSIONS))
VALIDATION_FOLDERS = ("val", "validation")


class FolderSamples:
    """Files below a folder, by their names; see `Samples`."""

    def __init__(self, root: Path, entries: Sequence[tuple[Path, str]], classes: tuple[str, ...]) -> None:
        """entries: each file with its class."""
        self.root = root
        self.classes = classes
        numbers = {name: number for number, name in enumerate(classes)}
        self._names = [file.relative_to(root).as_posix() for file, _ in entries]
        self._labels = [numbers[name] for _, name in entries]

    def __len__(self) -> int:
        return len(self._names)

    def key(self, number: int) -> str:
        return self._names[number]

    def label(self, number: int) -> int:
        return self._labels[number]

    def read(self, number: int) -> bytes:
        try:
            return (self.root / self._names[number]).read_bytes()
        except OSError as error:
            raise SampleError(self._names[number], reason(error)) from None

    def faults(self) -> list[Fault]:
        return []


def open_folder(root: Path, part: Part) -> FolderSamples:
    """The images of a folder in the order of their names; ValueError for one that is missing or has none.

    Classes are the sub-folders of both splits in order, so that labels mean the same in either.
    """
    everything = all_files(root)
    entries = everything if part == "all" else split_files(root)[part]
    if not entries:
        raise ValueError(f"no images for {part} in {root}: looked for {_extensions()} at any depth")
    return FolderSamples(root, entries, tuple(sorted({name for _, name in everything})))


def split_files(root: Path) -> dict[Split, list[tuple[Path, str]]]:
    """The image files of both splits in sorted order, each with its class ("" outside of sub-folders)."""
    _check_folder(root)
    validation = next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    if validation is None:
        files = image_files(root)
        return _hashed_split(files, root / "train" if _all_below(files, root / "train") else root)
    base = root / "train" if (root / "train").is_dir() else root
    training = [file for file in image_files(base) if not file.is_relative_to(validation)]
    return {
        "train": [(file, _class_name(file, base)) for file in training],
        "validation": [(file, _class_name(file, validation)) for file in image_files(validation)],
    }


def all_files(root: Path) -> list[tuple[Path, str]]:
    """Both splits together, in sorted order; unlike them, of a single image too."""
    _check_folder(root)
    files = image_files(root)
    if len(files) == 1:
        return [(files[0], _class_name(files[0], root))]
    return sorted(entry for entries in split_files(root).values() for entry in entries)


def _check_folder(root: Path) -> None:
    if not root.exists():
        raise ValueError(f"image folder {root} does not exist; it should hold {_extensions()} files")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give the folder that holds the {_extensions()} files")


def _hashed_split(files: list[Path], base: Path) -> dict[Split, list[tuple[Path, str]]]:
    """About a twentieth of the files for validation, at least one and never all."""
    if len(files) == 1:
        raise ValueError(f"{base} holds one image only, {files[0].name}; training and validation need two")
    chosen = held_out(file.relative_to(base).as_posix() for file in files)
    named = [(file, _class_name(file, base)) for file in files]
    return {
        "train": [entry for entry, out in zip(named, chosen, strict=True) if not out],
        "validation": [entry for entry, out in zip(named, chosen, strict=True) if out],
    }


def _all_below(files: list[Path], folder: Path) -> bool:
    """Whether `folder` is the training split itself; beside other folders with images it is a class."""
    return bool(files) and all(file.is_relative_to(folder) for file in files)


def image_files(folder: Path) -> list[Path]:
    """Image files at any depth, sorted by relative name; hidden files and folders are left out."""

    def unreadable(error: OSError) -> None:
        raise ValueError(f"cannot list image folder {error.filename}: {error.strerror}") from error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, n) for n in names if not n.startswith(".") and n.lower().endswith(EXTENSIONS)]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _class_name(file: Path, base: Path) -> str:
    parts = file.relative_to(base).parts
    return parts[0] if len(parts) > 1 else ""


def _extensions() -> str:
    return ", ".join(EXTENSIONS)


def list_images(inputs: Sequence[Path]) -> list[tuple[Path, str]]:
    """Image files given one by one or as folders (any depth), each with its name below that folder.

    Raises ValueError for an input that does not exist and for a folder without images.
    """
    found = []
    for given in inputs:
        if given.is_dir():
            files = image_files(given)
            if not files:
                raise ValueError(f"no images in {given}: looked for {_extensions()} at any depth")
            found += [(file, file.relative_to(given).as_posix()) for file in files]
        elif given.exists():
            found.append((given, given.name))
        else:
            raise ValueError(f"image {given} does not exist; give image files or folders of them")
    return found
