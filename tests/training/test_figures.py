"""The sheet of originals and reconstructions, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vfmvae.training.figures import GAP, save_reconstructions


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
