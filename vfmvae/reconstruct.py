"""Send images through a tokenizer and back, and look at the difference.

    python -m vfmvae.reconstruct photo.jpg more-photos/ --tokenizer runs/demo --output reconstructions

Every image becomes one PNG with the original on the left and its reconstruction on the right, and
`reconstructions.png` shows the first of them together. Images keep their size, less what a central crop takes
off to reach multiples that the tokenizer needs; with --resolution they are centred squares of that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from vfmvae.cli import UsageError, command, parse
from vfmvae.data.decoding import read_image
from vfmvae.data.folder import list_images
from vfmvae.data.transforms import centre_crop
from vfmvae.images import to_unit
from vfmvae.inference import (
    ModelOptions,
    PictureNames,
    as_picture,
    check_resolution,
    memory_errors,
    open_tokenizer,
    progress,
    reconstruct_images,
    say,
    write_picture,
)
from vfmvae.metrics.reconstruction import psnr, ssim
from vfmvae.tokenizer import Tokenizer

SHEET = "reconstructions.png"
SHEET_PAIRS = 24
SHEET_HEIGHT = 256
GAP = 8


@dataclass
class Reconstruct:
    """Images through a tokenizer and back, side by side.
    Example: python -m vfmvae.reconstruct photo.jpg more-photos/ --tokenizer runs/demo
    """

    inputs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files, and folders of them at any depth."""
    output: Path = Path("reconstructions")
    """Folder for the pictures."""
    resolution: int | None = None
    """Resize the short side to this and crop the centre square; if not given, keep the size and crop the
    centre to the multiple of 64 pixels that tokenizers need."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)


class Pair(NamedTuple):
    """An image as the tokenizer got it and what came back, uint8 [3, H, W], with their likeness.

    `size` says what that is of the file: "576 x 384 of 600 x 400".
    """

    name: str
    size: str
    original: Tensor
    reconstruction: Tensor
    psnr: float
    ssim: float


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer, files: Sequence[tuple[Path, str]], resolution: int | None, batch_size: int
) -> Iterator[Pair]:
    """The images one after the other, encoded in batches of neighbours of one size; see `list_images`.

    Raises ValueError for an image that cannot be read or is too small.
    """
    batch: list[_Item] = []
    for file, name in files:
        whole = read_image(file)
        pixels = fit(whole, resolution, tokenizer.image_multiple, file)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        if batch and (len(batch) == batch_size or batch[0].image.shape != image.shape):
            yield from _pairs(tokenizer, batch)
            batch = []
        size = f"{image.shape[2]} x {image.shape[1]}"
        of_file = f"{whole.width} x {whole.height}"
        batch.append(_Item(name, size if size == of_file else f"{size} of {of_file}", image))
    yield from _pairs(tokenizer, batch)


def fit(image: Image.Image, resolution: int | None, multiple: int, file: Path) -> np.ndarray:
    """The part of an RGB image that the tokenizer takes, uint8 [H, W, 3].

    A square of `resolution`, or the largest centred piece whose sides are multiples. ValueError names `file`
    where there is none.
    """
    if resolution is not None:
        return centre_crop(image, resolution)
    width, height = image.width // multiple * multiple, image.height // multiple * multiple
    if not width or not height:
        raise ValueError(
            f"{file} is {image.width} x {image.height}, and the tokenizer needs {multiple} pixels at least;"
            f" --resolution {multiple} enlarges it"
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


class _Item(NamedTuple):
    name: str
    size: str
    image: Tensor


def _pairs(tokenizer: Tokenizer, batch: Sequence[_Item]) -> Iterator[Pair]:
    originals = torch.stack([item.image for item in batch])
    reconstructions = reconstruct_images(tokenizer, originals)
    pair = to_unit(reconstructions), to_unit(originals)
    scores = zip(psnr(*pair).tolist(), ssim(*pair).tolist(), strict=True)
    for item, back, (decibel, similarity) in zip(batch, reconstructions, scores, strict=True):
        yield Pair(item.name, item.size, item.image, back, decibel, similarity)


def side_by_side(pair: Pair) -> Image.Image:
    """Original left, reconstruction right, with a white gap between."""
    height = pair.original.shape[1]
    gap = torch.full((3, height, GAP), 255, dtype=torch.uint8)
    return as_picture(torch.cat([pair.original, gap, pair.reconstruction], dim=2))


def contact_sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one height in rows, about as wide as high, on white."""
    widest = max(picture.width for picture in pictures)
    target = max(widest, round((sum(p.width * p.height for p in pictures) * 1.5) ** 0.5))
    rows: list[list[Image.Image]] = [[]]
    for picture in pictures:
        if rows[-1] and sum(p.width + 2 * GAP for p in rows[-1]) + picture.width > target:
            rows.append([])
        rows[-1].append(picture)
    height = pictures[0].height
    width = max(sum(p.width + 2 * GAP for p in row) for row in rows) - 2 * GAP
    sheet = Image.new("RGB", (width, len(rows) * (height + 2 * GAP) - 2 * GAP), "white")
    for number, row in enumerate(rows):
        left = 0
        for picture in row:
            sheet.paste(picture, (left, number * (height + 2 * GAP)))
            left += picture.width + 2 * GAP
    return sheet


def for_sheet(picture: Image.Image) -> Image.Image:
    """A picture at the height of the sheet; small ones are enlarged without smoothing."""
    width = max(1, round(picture.width * SHEET_HEIGHT / picture.height))
    filter = Image.Resampling.NEAREST if picture.height < SHEET_HEIGHT else Image.Resampling.LANCZOS
    return picture.resize((width, SHEET_HEIGHT), filter)


@command
def main() -> None:
    options = parse(Reconstruct, "reconstruct")
    if not options.inputs:
        raise UsageError("no images given: name image files or folders, as in `vfmvae reconstruct photo.jpg`")
    files = list_images(options.inputs)
    names = PictureNames(SHEET)
    targets = [options.output / names.take(name) for _, name in files]
    check_not_inputs([file for file, _ in files], [*targets, options.output / SHEET])
    console = Console()
    _, tokenizer = open_tokenizer(options.model, console)
    check_resolution(tokenizer, options.resolution)

    table = Table("image", "size", title="reconstructions", title_justify="left")
    table.add_column("PSNR (dB)", justify="right")
    table.add_column("SSIM", justify="right")
    scores: list[tuple[float, float]] = []
    shown: list[Image.Image] = []
    with memory_errors(), progress(console, "reconstructing", len(files)) as bar:
        pairs = reconstruct(tokenizer, files, options.resolution, options.model.batch_size)
        for pair, target in zip(pairs, targets, strict=True):
            picture = side_by_side(pair)
            write_picture(target, picture)
            if len(shown) < SHEET_PAIRS:
                shown.append(for_sheet(picture))
            table.add_row(escape(pair.name), pair.size, f"{pair.psnr:.2f}", f"{pair.ssim:.3f}")
            scores.append((pair.psnr, pair.ssim))
            bar.advance(bar.task_ids[0])
    write_picture(options.output / SHEET, contact_sheet(shown))
    mean_psnr, mean_ssim = np.mean(scores, axis=0)
    table.add_section()
    table.add_row("mean", "", f"{mean_psnr:.2f}", f"{mean_ssim:.3f}")
    console.print(table)
    say(console, f"{len(files)} pairs in {options.output}, together in {options.output / SHEET}")


def check_not_inputs(files: Sequence[Path], targets: Sequence[Path]) -> None:
    """ValueError if a picture would overwrite an image that was given."""
    given = {file.resolve() for file in files}
    for target in targets:
        if target.resolve() in given:
            raise ValueError(f"{target} is one of the images given; choose another --output")


if __name__ == "__main__":
    main()
