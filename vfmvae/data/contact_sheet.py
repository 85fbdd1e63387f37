"""A contact sheet: small squares of images in a grid, with their classes below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 8
MOST_TILES = COLUMNS * 6
TILE = 128
GAP = 8
CAPTION = 16


class Tile(NamedTuple):
    """uint8 [TILE, TILE, 3] and what is written below, or ""."""

    pixels: np.ndarray
    caption: str


def contact_sheet(tiles: Sequence[Tile]) -> Image.Image:
    """At least one tile, row by row on white; room for captions only if there are any."""
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    step = TILE + GAP + (CAPTION if any(tile.caption for tile in tiles) else 0)
    sheet = Image.new("RGB", (columns * (TILE + GAP) + GAP, rows * step + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for number, tile in enumerate(tiles):
        left, top = GAP + number % columns * (TILE + GAP), GAP + number // columns * step
        sheet.paste(Image.fromarray(tile.pixels), (left, top))
        draw.text((left, top + TILE + 2), _fitting(tile.caption, font), fill="black", font=font)
    return sheet


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text in one line, cut so that it is not wider than a tile."""
    line = " ".join(text.split())
    if font.getlength(line) <= TILE:
        return line
    while line and font.getlength(line + "...") > TILE:
        line = line[:-1]
    return line + "..."
