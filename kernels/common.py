"""Small things that several kernels share: activations in float32, tiles of a matrix."""

from __future__ import annotations

import triton
import triton.language as tl

TILE_ELEMENTS = 2048  # per program of an elementwise kernel: with 4 warps, 16 elements in flight per thread


@triton.jit
def sigmoid_gate(x):
    """s and 1 - s, where s = sigmoid(x), so silu(x) = x s.

    Both are exact to rounding: subtracting s from 1 would lose the digits of the slope for large x.
    """
    tail = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + tail)
    smaller = tail * larger
    return tl.where(x >= 0, larger, smaller), tl.where(x >= 0, smaller, larger)


@triton.jit
def silu_slope(x, gate, rest):
    """d silu(x) / dx, where gate, rest = sigmoid_gate(x)."""
    return gate + x * gate * rest


@triton.jit
def gelu_tanh_gate(x):
    """s and 1 - s, where gelu_tanh(x) = x s and s = (1 + tanh(u)) / 2 = sigmoid(2u),
    u = sqrt(2 / pi) (x + 0.044715 x^3).
    """
    return sigmoid_gate(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gelu_tanh_slope(x, gate, rest):
    """d gelu_tanh(x) / dx, where gate, rest = gelu_tanh_gate(x)."""
    return gate + x * gate * rest * (1.5957691216057308 * (1.0 + 0.134145 * x * x))


def matrix_tile(rows: int, columns: int) -> tuple[int, int, tuple[int, int]]:
    """Tile height, tile width and grid that cover a matrix with tiles of at most TILE_ELEMENTS elements.

    Row tiles come first in the grid: only that axis may exceed 65535.
    """
    width = min(triton.next_power_of_2(columns), TILE_ELEMENTS)
    height = min(triton.next_power_of_2(rows), TILE_ELEMENTS // width)
    return height, width, (triton.cdiv(rows, height), triton.cdiv(columns, width))
