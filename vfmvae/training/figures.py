"""Pictures that a run leaves behind."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

GAP = 4


def save_reconstructions(
    path: Path, images: Tensor, reconstructions: Tensor, columns: int = 8, rows: int = 2
) -> None:
    """Write a PNG in which every row of originals stands above the row of their reconstructions.

    images, reconstructions: uint8 [N, 3, H, W]; the first columns * rows are shown, small ones enlarged
    without smoothing.
    """
    shown = min(len(images), columns * rows)
    columns = min(columns, shown)
    bands = []
    for start in range(0, shown, columns):
        stop = min(start + columns, shown)
        bands += [_row(images[start:stop], columns), _row(reconstructions[start:stop], columns)]
        bands.append(torch.full((3, GAP, bands[0].shape[-1]), 255, dtype=torch.uint8))
    sheet = torch.cat(bands[:-1], dim=1)
    picture = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    enlarge = max(1, 128 // images.shape[-1])
    picture = picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)
    picture.save(path, format="PNG")


def _row(images: Tensor, columns: int) -> Tensor:
    """uint8 [n, 3, H, W] side by side, filled with white to `columns`: [3, H, columns*W]."""
    images = images.cpu()
    blank = images.new_full((columns - len(images), *images.shape[1:]), 255)
    return torch.cat([*images, *blank], dim=2)
