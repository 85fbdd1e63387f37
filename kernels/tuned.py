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

# MOST_CHANNELS: pass -> up to which number of channels kernels that keep hidden numbers in registers are
# faster than those of modulated_mlp_wide.py: the forward, the gradients of the inputs, and of everything.
# TILES: kernel -> largest number of channels -> tile, for 16-bit numbers.
# begin: benchmarks/tune.py --write replaces these lines
MEASURED = "NVIDIA H200, 2026-11-26, Triton 3.6.0, torch 2.11.0+cu130"
LIMITS_MEASURED = (
    "NVIDIA H200, 2026-11-26, Triton 3.6.0, torch 2.11.0+cu130; ms at batch 8",
    "forward, 128 channels: fused 0.388, products 0.806",
    "forward, 256 channels: fused 0.320, products 0.365",
    "inputs, 128 channels: fused 0.647, products 0.978",
    "inputs, 256 channels: fused 1.321, products 0.615",
    "weights, 128 channels: fused 1.111, products 1.669",
    "weights, 256 channels: fused 1.640, products 0.995",
)
MOST_CHANNELS = {"forward": 256, "inputs": 128, "weights": 128}
TILES: dict[str, dict[int, Tile]] = {
    "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 3), 256: Tile(128, 64, 8, 2)},
    "input_grad": {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 4, 2), 256: Tile(128, 32, 8, 2)},
    "input_grad_of_scale": {64: Tile(128, 32, 8, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
    "weight_grad": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 64, 8, 3)},
    "expand": {WIDE: Tile(128, 128, 4, 3)},
    "contract": {WIDE: Tile(128, 256, 8, 4)},
    "hidden_grad": {128: Tile(128, 64, 4, 4), 256: Tile(128, 64, 4, 4), WIDE: Tile(128, 64, 4, 4)},
}
# end

# What benchmarks/tune.py tries besides. None of these spills in Triton 3.6 or 3.8.
HIDDEN_GRAD = (
    Tile(128, 128, 8, 3),
    Tile(64, 128, 8, 3),
    Tile(64, 128, 4, 3),
    Tile(64, 128, 4, 4),
    Tile(128, 64, 8, 3),
    Tile(128, 64, 4, 4),
)
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
        128: (
            Tile(128, 32, 8, 2),
            Tile(128, 32, 8, 3),
            Tile(128, 64, 8, 3),
            Tile(64, 128, 8, 2),
            Tile(64, 64, 8, 2),
            Tile(64, 64, 4, 2),
            Tile(64, 64, 4, 3),
            Tile(64, 32, 4, 3),
        ),
        256: (Tile(64, 64, 8, 2),),
    },
    "input_grad_of_scale": {
        128: (
            Tile(128, 32, 8, 2),
            Tile(128, 64, 8, 3),
            Tile(128, 32, 8, 3),
            Tile(64, 64, 4, 2),
            Tile(64, 64, 4, 3),
        )
    },
    "weight_grad": {
        128: (
            Tile(32, 128, 8, 3),
            Tile(32, 128, 8, 4),
            Tile(32, 64, 4, 2),
            Tile(64, 64, 8, 2),
            Tile(64, 64, 4, 2),
            Tile(64, 64, 4, 3),
        ),
        256: (Tile(32, 64, 8, 3), Tile(16, 64, 8, 3)),
    },
    "expand": {WIDE: (Tile(128, 256, 8, 4), Tile(128, 128, 8, 4), Tile(128, 128, 4, 3))},
    "contract": {WIDE: (Tile(128, 256, 8, 4), Tile(128, 128, 8, 4), Tile(128, 128, 4, 3))},
    "hidden_grad": {128: HIDDEN_GRAD, 256: HIDDEN_GRAD, WIDE: HIDDEN_GRAD},
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
    return cdiv(pixels, height) * height


def cdiv(count: int, step: int) -> int:
    """Steps that it takes; Triton's own, which also serves in kernels, takes 5 us."""
    return -(-count // step)
