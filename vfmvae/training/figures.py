"""Pictures that a run leaves behind, over time: originals above their reconstructions, or samples.

<run>/figures/reconstructions_000001280000.png     after that many images
<run>/reconstructions.png                          the latest

or with `samples` in place of `reconstructions`.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vfmvae.atomic import write_atomically

GAP = 4
LATEST = "reconstructions.png"
LATEST_SAMPLES = "samples.png"
FOLDER = "figures"
_NAME = re.compile(r"(?:reconstructions|samples)_(\d{12})\.png")


def write_figure(
    run: Path, seen_images: int, images: Tensor, reconstructions: Tensor, columns: int = 8, rows: int = 2
) -> Path:
    """Write the picture of this moment of the run in folder `run`, also as the latest; returns the former.

    Arguments as for `save_reconstructions`. Each file appears whole or not at all; OSError with a sentence if
    one cannot be written.
    """
    sheet = _sheet(images, reconstructions, columns, rows)
    return _write(sheet, run / FOLDER / f"reconstructions_{seen_images:012d}.png", run / LATEST)


def write_samples(run: Path, seen_images: int, images: Tensor, columns: int = 8) -> Path:
    """The same for samples, uint8 [N, 3, H, W], in rows of `columns`."""
    rows = [_row(images[start : start + columns], columns) for start in range(0, len(images), columns)]
    sheet = _enlarged(torch.cat(rows, dim=1), images.shape[-1])
    return _write(sheet, run / FOLDER / f"samples_{seen_images:012d}.png", run / LATEST_SAMPLES)


def _write(sheet: Image.Image, path: Path, latest: Path) -> Path:
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    for target in (path, latest):
        write_atomically(target, lambda partial: partial.write_bytes(png.getvalue()))
    return path


def figures(run: Path) -> list[tuple[int, Path]]:
    """(seen images, picture) of a run, in order."""
    found = [(_NAME.fullmatch(path.name), path) for path in (run / FOLDER).glob("*.png")]
    return sorted((int(match[1]), path) for match, path in found if match)


def keep_figures_until(run: Path, seen_images: int) -> None:
    """Remove pictures of later moments, which a resumed run draws again."""
    for later, path in figures(run):
        if later > seen_images:
            path.unlink()


def save_reconstructions(
    path: Path, images: Tensor, reconstructions: Tensor, columns: int = 8, rows: int = 2
) -> None:
    """Write a PNG in which every row of originals stands above the row of their reconstructions.

    images, reconstructions: uint8 [N, 3, H, W]; the first columns * rows are shown, small ones enlarged
    without smoothing. ValueError for tensors of other shapes or dtypes.
    """
    _sheet(images, reconstructions, columns, rows).save(path, format="PNG")


def _sheet(images: Tensor, reconstructions: Tensor, columns: int, rows: int) -> Image.Image:
    same = images.shape == reconstructions.shape and images.dtype == reconstructions.dtype == torch.uint8
    if not same or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}, reconstructions {reconstructions.dtype}"
            f" {tuple(reconstructions.shape)}; needed are two uint8 [N, 3, H, W] of one shape"
        )
    shown = min(len(images), columns * rows)
    columns = min(columns, shown)
    bands = []
    for start in range(0, shown, columns):
        stop = min(start + columns, shown)
        bands += [_row(images[start:stop], columns), _row(reconstructions[start:stop], columns)]
        bands.append(torch.full((3, GAP, bands[0].shape[-1]), 255, dtype=torch.uint8))
    return _enlarged(torch.cat(bands[:-1], dim=1), images.shape[-1])


def _enlarged(sheet: Tensor, side: int) -> Image.Image:
    """uint8 [3, H, W] of images of a side, which small ones show larger."""
    picture = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    enlarge = max(1, 128 // side)
    return picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)


def _row(images: Tensor, columns: int) -> Tensor:
    """uint8 [n, 3, H, W] side by side, filled with white to `columns`: [3, H, columns*W]."""
    images = images.cpu()
    blank = images.new_full((columns - len(images), *images.shape[1:]), 255)
    return torch.cat([*images, *blank], dim=2)
