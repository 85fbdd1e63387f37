"""Sizes of the tiles that the matrix kernels work in, per kernel and number of channels.

benchmarks/tune.py measures the candidates on a GPU and prints the table anew. tests/ops/test_mlp_triton.py
compiles every entry for sm_90: none may spill registers or need more shared memory than there is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MULTIPROCESSORS = 132
"""Of an H100 or H200: with fewer programs than that, tiles are made smaller."""


class Tile(NamedTuple):
    """What one program holds: pixels x hidden numbers (or columns); `warps` at work, `stages` of loads."""

    pixels: int
    hidden: int
    warps: int
    stages: int


WIDE = 1 << 30
"""Stands for any number of channels."""

# MOST_CHANNELS of the kernels that keep hidden numbers in registers; with more, modulated_mlp_wide.py.
# TILES: kernel -> largest number of channels -> tile, for 16-bit numbers.
# begin: benchmarks/tune.py --write replaces these lines
MEASURED = "not yet measured: chosen by registers, shared memory and reads of the L2 cache"
LIMITS_MEASURED = "NVIDIA H200, 2026-11-26, Triton 3.6.0, torch 2.11.0: ms of the backward, batch 8, bfloat16"
# 256 channels at 128 px: fused 2.01 (of inputs alone 1.87), by matrix products 1.00 (0.65). 128 at 256 px:
# fused 1.72, by matrix products 1.69, which keep 2 GB for it.
MOST_CHANNELS = {"forward": 256, "backward": 128}
TILES: dict[str, dict[int, Tile]] = {
    "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
    "input_grad": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
    "input_grad_of_scale": {64: Tile(128, 32, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
    "weight_grad": {64: Tile(64, 64, 4, 2), 128: Tile(64, 128, 8, 2), 256: Tile(32, 64, 8, 2)},
    "expand": {WIDE: Tile(128, 256, 8, 3)},
    "contract": {WIDE: Tile(128, 256, 8, 3)},
    "hidden_grad": {WIDE: Tile(128, 128, 8, 4)},
}
# end

# What benchmarks/tune.py tries besides. None of these spills in Triton 3.6 or 3.8.
CANDIDATES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        128: (
            Tile(128, 32, 8, 3),
            Tile(128, 32, 8, 2),
            Tile(128, 64, 8, 2),
            Tile(128, 128, 8, 2),
            Tile(64, 64, 4, 3),
        ),
        256: (Tile(128, 32, 8, 3), Tile(128, 32, 8, 2)),
    },
    "input_grad": {
        128: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 4, 2)),
        256: (Tile(64, 64, 8, 2),),
    },
    "input_grad_of_scale": {128: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 4, 2))},
    "weight_grad": {
        128: (Tile(32, 128, 8, 3), Tile(32, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 4, 2)),
        256: (Tile(32, 64, 8, 3), Tile(16, 64, 8, 3)),
    },
    "expand": {WIDE: (Tile(128, 256, 8, 4), Tile(128, 128, 8, 4), Tile(128, 128, 4, 3))},
    "contract": {WIDE: (Tile(128, 256, 8, 4), Tile(128, 128, 8, 4), Tile(128, 128, 4, 3))},
    "hidden_grad": {WIDE: (Tile(128, 128, 8, 3), Tile(64, 128, 8, 3))},
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
