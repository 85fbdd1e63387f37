"""The distance of two feature maps in one read of each, and its gradient, which recomputes the lengths.

A position's features are a row: maps are [B, P, C] whose channels are dense, with P positions that may be
strided. float16, bfloat16 or float32, each map in its own dtype; arithmetic in float32. A program takes a few
rows of one sample and leaves one partial sum, so that results do not depend on the order of programs.

The kernels are compiled without contraction to multiply-adds, which do not round the first product:
a * s - b * t of equal vectors would not be 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CHANNELS = 4096  # a row has to fit into the registers of a program
TILE_ELEMENTS = 1024  # of two maps at once: twice as many take up to 164 registers per thread in the backward


@triton.jit
def _inverse_lengths(x):
    """1 / |x| and 1 / (|x| + 1e-10) of each row; both are 0 where the row is nothing but zeros."""
    length = tl.sqrt_rn(tl.sum(x * x, axis=1))
    nothing = length == 0.0
    exact = tl.where(nothing, 0.0, tl.div_rn(1.0, tl.where(nothing, 1.0, length)))
    return exact, tl.where(nothing, 0.0, tl.div_rn(1.0, length + 1e-10))


@triton.jit
def _rows_of_sample(positions, channels, tiles, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """This program's sample, rows [ROWS, 1], columns [1, WIDTH], and which of the tile are inside."""
    sample = tl.program_id(0) // tiles
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    return sample.to(tl.int64), row.to(tl.int64), column, (row < positions) & (column < channels)


@triton.jit
def _lpips_fwd_kernel(
    a_ptr,
    b_ptr,
    weights_ptr,
    partials_ptr,
    positions,
    channels,
    tiles,
    scale,
    a_batch_stride,
    a_row_stride,
    b_batch_stride,
    b_row_stride,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sample, row, column, inside = _rows_of_sample(positions, channels, tiles, ROWS, WIDTH)
    a = tl.load(a_ptr + sample * a_batch_stride + row * a_row_stride + column, mask=inside, other=0.0)
    b = tl.load(b_ptr + sample * b_batch_stride + row * b_row_stride + column, mask=inside, other=0.0)
    a, b = a.to(tl.float32), b.to(tl.float32)
    _, of_a = _inverse_lengths(a)
    _, of_b = _inverse_lengths(b)
    difference = a * of_a[:, None] - b * of_b[:, None]
    squares = difference * difference
    if WEIGHTED:
        squares *= tl.load(weights_ptr + column, mask=column < channels, other=0.0)
        squares = tl.where(inside, squares, 0.0)  # 0 x Inf, if a weight is Inf
    tl.store(partials_ptr + tl.program_id(0), scale * tl.sum(tl.sum(squares, axis=1), axis=0))


@triton.jit
def _lpips_bwd_kernel(
    grad_ptr,
    x_ptr,
    other_ptr,
    weights_ptr,
    grad_x_ptr,
    positions,
    channels,
    tiles,
    scale,
    grad_stride,
    x_batch_stride,
    x_row_stride,
    other_batch_stride,
    other_row_stride,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """With u = x / (|x| + 1e-10) and g = weights * (u - u of other), the gradient of x is
    2 grad / P * (g - x / |x| * sum(g * u)) / (|x| + 1e-10).
    """
    sample, row, column, inside = _rows_of_sample(positions, channels, tiles, ROWS, WIDTH)
    x = tl.load(x_ptr + sample * x_batch_stride + row * x_row_stride + column, mask=inside, other=0.0)
    other = tl.load(
        other_ptr + sample * other_batch_stride + row * other_row_stride + column, mask=inside, other=0.0
    )
    x, other = x.to(tl.float32), other.to(tl.float32)
    exact, of_x = _inverse_lengths(x)
    _, of_other = _inverse_lengths(other)
    unit = x * of_x[:, None]
    slope = unit - other * of_other[:, None]
    if WEIGHTED:
        slope *= tl.load(weights_ptr + column, mask=column < channels, other=0.0)
    along = tl.sum(slope * unit, axis=1) * exact
    factor = scale * tl.load(grad_ptr + sample * grad_stride).to(tl.float32)
    grad_x = (factor * of_x)[:, None] * (slope - x * along[:, None])
    place = (sample * positions + row) * channels + column
    tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


def lpips_fwd(a: Tensor, b: Tensor, weights: Tensor | None) -> Tensor:
    """[B, tiles] float32 whose rows sum up to the distances of a, b [B, P, C]; weights [C] float32."""
    (samples, positions, channels), (rows, width, tiles) = a.shape, lpips_tile(a)
    partials = torch.empty((samples, tiles), dtype=torch.float32, device=a.device)
    if samples == 0:
        return partials
    with torch.cuda.device_of(a):
        _lpips_fwd_kernel[(samples * tiles,)](
            a,
            b,
            a if weights is None else weights,
            partials,
            positions,
            channels,
            tiles,
            1.0 / positions,
            *a.stride()[:2],
            *b.stride()[:2],
            WEIGHTED=weights is not None,
            ROWS=rows,
            WIDTH=width,
            enable_fp_fusion=False,
        )
    return partials


def lpips_bwd(grad: Tensor, x: Tensor, other: Tensor, weights: Tensor | None, grad_x: Tensor) -> None:
    """Fills grad_x [B, P, C] (dense) from the gradient [B] of the distances; x, other [B, P, C]."""
    (samples, positions, channels), (rows, width, tiles) = x.shape, lpips_tile(x)
    if samples == 0:
        return
    with torch.cuda.device_of(x):
        _lpips_bwd_kernel[(samples * tiles,)](
            grad,
            x,
            other,
            x if weights is None else weights,
            grad_x,
            positions,
            channels,
            tiles,
            2.0 / positions,
            grad.stride(0),
            *x.stride()[:2],
            *other.stride()[:2],
            WEIGHTED=weights is not None,
            ROWS=rows,
            WIDTH=width,
            enable_fp_fusion=False,
        )


def lpips_tile(x: Tensor) -> tuple[int, int, int]:
    """Rows and columns of a program's tile of x [B, P, C], and tiles per sample."""
    _, positions, channels = x.shape
    width = triton.next_power_of_2(channels)
    rows = min(max(1, TILE_ELEMENTS // width), triton.next_power_of_2(positions))
    return rows, width, triton.cdiv(positions, rows)
