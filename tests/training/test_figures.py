"""The sheet of originals and reconstructions, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vfmvae.training.figures import GAP, figures, keep_figures_until, save_reconstructions, write_figure


def test_originals_stand_above_their_reconstructions(tmp_path: Path) -> None:
    images = (torch.arange(5) * 10).to(torch.uint8).view(5, 1, 1, 1).expand(5, 3, 128, 128)
    save_reconstructions(tmp_path / "sheet.png", images, images + 100, columns=3, rows=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (4 * 128 + GAP, 3 * 128, 3)
    first, second = sheet[:256], sheet[256 + GAP :]
    middle = slice(64, None, 128)
    assert first[middle, middle, 0].tolist() == [[0, 10, 20], [100, 110, 120]]
    assert second[middle, middle, 0].tolist() == [[30, 40, 255], [130, 140, 255]], "filled with white"
    assert (sheet[256 : 256 + GAP] == 255).all()


def test_small_images_are_enlarged_without_smoothing(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    save_reconstructions(tmp_path / "sheet.png", image, image)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (256, 128, 3)
    assert np.array_equal(sheet[:128:2, ::2], image[0].permute(1, 2, 0).numpy())
    assert np.array_equal(sheet[1:128:2, 1::2], image[0].permute(1, 2, 0).numpy())


def test_a_run_keeps_its_pictures_and_the_latest(tmp_path: Path) -> None:
    image = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    first = write_figure(tmp_path, 1_280_000, image, image)
    second = write_figure(tmp_path, 640, image, image + 9)
    assert first == tmp_path / "figures" / "reconstructions_000001280000.png"
    (tmp_path / "figures" / "other.png").touch()
    assert figures(tmp_path) == [(640, second), (1_280_000, first)]
    assert (tmp_path / "reconstructions.png").read_bytes() == second.read_bytes() != first.read_bytes()
    assert np.asarray(Image.open(second))[128:].max() == 9
    keep_figures_until(tmp_path, 640)
    assert figures(tmp_path) == [(640, second)]
    assert (tmp_path / "figures" / "other.png").exists()


def test_a_run_without_pictures_has_none(tmp_path: Path) -> None:
    keep_figures_until(tmp_path, 0)
    assert figures(tmp_path) == []


def test_a_picture_that_cannot_be_drawn_leaves_the_earlier_one(tmp_path: Path) -> None:
    image = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    before = write_figure(tmp_path, 640, image, image).read_bytes()
    for bad in (image.float(), image[:1], image[0], image[:, :1]):
        with pytest.raises(ValueError, match=r"needed are two uint8 \[N, 3, H, W\] of one shape"):
            write_figure(tmp_path, 640, image, bad)
    assert (tmp_path / "reconstructions.png").read_bytes() == before
