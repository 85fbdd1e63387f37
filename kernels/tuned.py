"""Sizes of the tiles that the matrix kernels work in, per kernel and number of channels.

benchmarks/tune.py measures the candidates on a GPU and prints the table anew. tests/ops/test_mlp_triton.py
compiles every entry for sm_90: none may spill registers or need more shared memory than there is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What one program holds: pixels x hidden numbers (or columns); `warps` at work, `stages` of loads."""

    pixels: int
    hidden: int
    warps: int
    stages: int


MEASURED = "not yet measured: chosen by registers, shared memory and reads of the L2 cache, for an H100"
"""Card and date of TILES."""

# kernel -> largest number of channels (a power of two) -> tile, for 16-bit numbers.
TILES: dict[str, dict[int, Tile]] = {
    "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
    "input_grad": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
    "weight_grad": {64: Tile(64, 64, 4, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 64, 8, 2)},
    "expand": {1 << 30: Tile(128, 256, 8, 3)},
    "contract": {1 << 30: Tile(128, 256, 8, 3)},
    "hidden_grad": {1 << 30: Tile(128, 128, 8, 3)},
    "gemm_input_grad": {1 << 30: Tile(128, 256, 8, 3)},
}

# What benchmarks/tune.py tries besides.
CANDIDATES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        128: (Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(128, 64, 8, 2), Tile(128, 128, 8, 2)),
        256: (Tile(128, 32, 8, 3), Tile(128, 32, 8, 2)),
    },
}

FLOAT32 = Tile(16, 16, 4, 1)
"""Of float32, whose exact products do not run on the matrix units: for comparison, not for speed."""


def tile(kernel: str, channels: int, pixels: int, dtype: torch.dtype) -> Tile:
    """The tile for a map of `pixels` pixels per sample; a tile need not be much larger than the map."""
    if dtype == torch.float32:
        return FLOAT32
    table = TILES[kernel]
    found = table[min(width for width in table if width >= channels)]
    smallest = 64 if found.pixels >= 64 else found.pixels
    while found.pixels > smallest and _rows(pixels, found.pixels // 2) < _rows(pixels, found.pixels):
        found = found._replace(pixels=found.pixels // 2)
    return found


def _rows(pixels: int, height: int) -> int:
    return -(-pixels // height) * height
