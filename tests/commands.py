"""Running a command inside of this process, and images and a tokenizer for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from unittest import mock

import numpy as np
import torch
from PIL import Image

from tests.tokenizer.tiny import tiny_tokenizer


class Command(Protocol):
    """A module with a main function."""

    def main(self) -> None: ...


def run(module: Command, *arguments: str | Path) -> int:
    """The exit code of `python -m module arguments`."""
    with mock.patch("sys.argv", ["command", *map(str, arguments)]):
        try:
            module.main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def save_tiny(folder: Path) -> Path:
    """A tokenizer with random weights, the same in every test."""
    torch.manual_seed(0)
    tiny_tokenizer().save(folder)
    return folder


def save_image(path: Path, width: int, height: int, seed: int = 0) -> np.ndarray:
    """A smooth random picture; returns its pixels uint8 [H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return np.asarray(image)


@contextmanager
def files_unchanged(folder: Path) -> Iterator[None]:
    """Asserts that nothing below a folder appears, vanishes or changes."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
