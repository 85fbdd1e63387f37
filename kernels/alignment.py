"""The alignment loss and its gradient; the N x N distances of a sample exist only tile by tile.

For b, a [B, N, D] with unit rows u = b / |b| and v = a / |a|:

    d_ij = u_i . u_j - v_i . v_j        G_ij = sign(d_ij) where |d_ij| > margin, else 0
    distance = mean of relu(|d| - margin)
    its gradient at u_i = 2 / (B N^2) * sum over j of G_ij u_j,    as G is symmetric

_lengths_kernel reads b and a once: 1 / |b|, 1 / |a|, the hinge of the cosine. _similarity_kernel computes
tiles of d from the rows as they are, whose products are exact in float32, and scales the sums; each tile
gives a partial sum of the loss and its signs. _gradient_kernel multiplies signs by u, _finish_kernel adds
the cosine's part and goes through the normalisation.

Work per sample, in multiply-adds: 2 N^2 D for d and N^2 D for the gradient; reads and writes 4 N D numbers
beside. A program cannot keep both a tile and the gradient of its rows: 128 x 1024 sums of float32 are twice
the registers of a multiprocessor. Columns of the gradient in programs of their own would compute d again for
each, 4 times at D = 1024 with 256 columns each, 9 N^2 D in all. So the signs of a strip of rows wait in
memory for the second product: at most STRIP tiles of 16-bit numbers, 17 MiB whatever B and N (a strip that is
written once and read D / 128 times from the L2 cache). Of two tiles that mirror each other within a strip one
is computed: 5/8 of all at N = 512, half of them where only the loss is asked for.

Rows must be multiples of 16 bytes, or the hardware that copies tiles cannot read them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmvae.kernels.modulated_mlp import blocks
from vfmvae.kernels.tuned import MULTIPROCESSORS, cdiv

STRIP = 4 * MULTIPROCESSORS
"""Tiles of d in a strip, unless one row of tiles has more."""
ROW_ELEMENTS = 2048  # of b per program of the kernels that go by rows
LEAST_LENGTH = tl.constexpr(1e-12)  # as in F.normalize, which divides shorter rows by this
LARGEST_SCALE = tl.constexpr(0.9999e12)


class Tile(NamedTuple):
    """side x side distances, or side rows and columns of the gradient; `depth` numbers of a row at a time."""

    side: int
    depth: int
    warps: int
    stages: int


HALF = Tile(128, 64, 8, 4)
FLOAT32 = Tile(64, 32, 4, 2)


def tile(dtype: torch.dtype) -> Tile:
    return FLOAT32 if dtype == torch.float32 else HALF


@triton.jit
def _lengths_kernel(
    b_ptr,
    a_ptr,
    unit_ptr,
    of_b_ptr,
    of_a_ptr,
    hinge_ptr,
    rows,
    margin,
    D: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OF_GRADIENT: tl.constexpr,
):
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.arange(0, WIDTH)[None, :]
    at = row[:, None].to(tl.int64) * D + column
    inside = (row[:, None] < rows) & (column < D)
    b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    of_b = _scale(b)
    of_a = _scale(a)
    tl.store(of_b_ptr + row, of_b, mask=row < rows)
    tl.store(of_a_ptr + row, of_a, mask=row < rows)
    hinge = 1.0 - margin - tl.sum((a * of_a[:, None]) * (b * of_b[:, None]), 1)
    tl.store(hinge_ptr + row, tl.where(hinge <= 0, 0.0, hinge), mask=row < rows)
    if OF_GRADIENT:
        tl.store(unit_ptr + at, (b * of_b[:, None]).to(unit_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale(x):
    """1 / length of each row; comparisons are written so that NaN stays."""
    length = tl.sqrt_rn(tl.sum(x * x, 1))
    return 1.0 / tl.where(length < LEAST_LENGTH, LEAST_LENGTH, length)


@triton.jit
def _products(
    x_desc, sample, row, column, D: tl.constexpr, T: tl.constexpr, BK: tl.constexpr, P: tl.constexpr
):
    out = tl.zeros((T, T), tl.float32)
    for k in range(0, D, BK):
        x = x_desc.load([sample, row * T, k]).reshape(T, BK)
        y = x_desc.load([sample, column * T, k]).reshape(T, BK)
        out = tl.dot(x, tl.trans(y), out, input_precision=P)
    return out


@triton.jit
def _similarity_kernel(
    b_desc,  # [B, N, D] by [1, T, BK], like a
    a_desc,
    of_b_ptr,
    of_a_ptr,
    signs_ptr,  # [(last - first) * T, tiles * T]: G of the strip
    partials_ptr,  # a sum of relu(|d| - margin) per tile, zero at first
    first,  # row of tiles of the batch where the strip begins
    last,  # and where it ends
    tiles,  # in a row, and rows of them in a sample
    count,
    margin,
    D: tl.constexpr,
    T: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    OF_GRADIENT: tl.constexpr,
):
    here = first + tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles
    sample = here // tiles
    row = here % tiles
    mirror = sample * tiles + column
    mirrored = (mirror >= first) & (mirror < last)
    if mirrored & (column < row):
        return
    i = row * T + tl.arange(0, T)
    j = column * T + tl.arange(0, T)
    # Past the last row tiles are zero, and so is d: no sum and no sign needs a mask.
    at = sample.to(tl.int64) * count
    of_i = tl.load(of_b_ptr + at + i, mask=i < count, other=0.0)
    of_j = tl.load(of_b_ptr + at + j, mask=j < count, other=0.0)
    d = _products(b_desc, sample, row, column, D, T, BK, PRECISION) * of_i[:, None] * of_j[None, :]
    of_i = tl.load(of_a_ptr + at + i, mask=i < count, other=0.0)
    of_j = tl.load(of_a_ptr + at + j, mask=j < count, other=0.0)
    d -= _products(a_desc, sample, row, column, D, T, BK, PRECISION) * of_i[:, None] * of_j[None, :]
    excess = tl.abs(d) - margin
    excess = tl.where(excess <= 0, 0.0, excess)
    total = tl.sum(tl.sum(excess, 1), 0)
    both = mirrored & (column > row)
    tl.store(partials_ptr + here.to(tl.int64) * tiles + column, tl.where(both, 2 * total, total))
    if OF_GRADIENT:
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
        sign = tl.where(excess <= 0, 0.0, sign).to(signs_ptr.dtype.element_ty)
        _store_tile(signs_ptr, sign, here - first, column, tiles, T)
        if both:
            _store_tile(signs_ptr, tl.trans(sign), mirror - first, row, tiles, T)


@triton.jit
def _store_tile(signs_ptr, sign, row, column, tiles, T: tl.constexpr):
    place = tl.arange(0, T)
    at = (row.to(tl.int64) * T * tiles + column) * T
    tl.store(signs_ptr + at + place[:, None] * (tiles * T) + place[None, :], sign)


@triton.jit
def _gradient_kernel(
    signs_desc,  # [strip * T, tiles * T] by [T, BK]
    unit_desc,  # [B, N, D] by [1, BK, T]
    gradient_ptr,
    first,
    tiles,
    chunks,
    count,
    D: tl.constexpr,
    T: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    local = tl.program_id(0) // chunks
    chunk = (tl.program_id(0) % chunks) * T
    sample = (first + local) // tiles
    row = ((first + local) % tiles) * T
    out = tl.zeros((T, T), tl.float32)
    for k in range(0, tiles * T, BK):
        sign = signs_desc.load([local * T, k])
        unit = unit_desc.load([sample, k, chunk]).reshape(BK, T)
        out = tl.dot(sign, unit, out, input_precision=PRECISION)
    i = row + tl.arange(0, T)[:, None]
    c = chunk + tl.arange(0, T)[None, :]
    at = (sample.to(tl.int64) * count + i) * D + c
    tl.store(gradient_ptr + at, out, mask=(i < count) & (c < D))


@triton.jit
def _finish_kernel(
    gradient_ptr,  # in place: the sums of signs times u become the gradient of the loss at b
    b_ptr,
    a_ptr,
    of_b_ptr,
    of_a_ptr,
    hinge_ptr,
    rows,
    distance_factor,
    cosine_factor,
    D: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.arange(0, WIDTH)[None, :]
    at = row[:, None].to(tl.int64) * D + column
    inside = (row[:, None] < rows) & (column < D)
    of_b = tl.load(of_b_ptr + row, mask=row < rows, other=0.0)
    of_a = tl.load(of_a_ptr + row, mask=row < rows, other=0.0)
    hinge = tl.load(hinge_ptr + row, mask=row < rows, other=0.0)
    u = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32) * of_b[:, None]
    v = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    of_v = tl.where(hinge > 0, -cosine_factor, 0.0) * of_a
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0) * distance_factor + v * of_v[:, None]
    along = tl.sum(gradient * u, 1)
    along = tl.where(of_b > LARGEST_SCALE, 0.0, along)  # rows too short are divided by a constant
    gradient = (gradient - along[:, None] * u) * of_b[:, None]
    tl.store(gradient_ptr + at, gradient, mask=inside)


def alignment(
    b: Tensor, a: Tensor, margins: tuple[float, float], factors: tuple[float, float], of_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums for the loss, and its gradient.

    Args:
        b, a: [B, N, D] of one dtype, dense, no element missing.
        margins: of the distance and of the cosine.
        factors: that the sums of both are multiplied by in the loss.

    Returns:
        Partial sums of relu(|d| - margin) and of relu(1 - margin - cosine), and the gradient of the loss with
        respect to b [B, N, D], all in float32.
    """
    batch, count, width = b.shape
    rows, size = batch * count, tile(b.dtype)
    tiles = cdiv(count, size.side)
    of_b, of_a, hinge = torch.empty(3, rows, dtype=torch.float32, device=b.device).unbind()
    unit = torch.empty_like(b) if of_gradient else b
    partials = torch.zeros(batch * tiles, tiles, dtype=torch.float32, device=b.device)
    by_rows = row_block(width)
    by_tiles = {"D": width, "T": size.side, "BK": size.depth, "PRECISION": precision(b.dtype)}
    by_tiles |= {"num_warps": size.warps, "num_stages": size.stages}
    with torch.cuda.device_of(b):
        grid = (cdiv(rows, by_rows["HEIGHT"]),)
        _lengths_kernel[grid](
            *(b, a, unit, of_b, of_a, hinge, rows, margins[1]), D=width, OF_GRADIENT=of_gradient, **by_rows
        )
        described = [blocks(x, 1, size.side, size.depth) for x in (b, a)]
        strip = min(batch * tiles, max(1, STRIP // tiles)) if of_gradient else batch * tiles
        signs, gradient = hinge, None
        if of_gradient:
            signs = torch.empty(strip * size.side, tiles * size.side, dtype=b.dtype, device=b.device)
            gradient = torch.empty(b.shape, dtype=torch.float32, device=b.device)
        for first in range(0, batch * tiles, strip):
            last = min(first + strip, batch * tiles)
            _similarity_kernel[((last - first) * tiles,)](
                *(*described, of_b, of_a, signs, partials),
                *(first, last, tiles, count, margins[0]),
                OF_GRADIENT=of_gradient,
                **by_tiles,
            )
            if gradient is not None:
                chunks = cdiv(width, size.side)
                _gradient_kernel[((last - first) * chunks,)](
                    blocks(signs, size.side, size.depth),
                    blocks(unit, 1, size.depth, size.side),
                    *(gradient, first, tiles, chunks, count),
                    **by_tiles,
                )
        if gradient is not None:
            _finish_kernel[grid](
                *(gradient, b, a, of_b, of_a, hinge, rows, 2 * factors[0], factors[1]), D=width, **by_rows
            )
    return partials, hinge, gradient


def row_block(width: int) -> dict[str, int]:
    """Rows that a program of the kernels that go by rows takes, and its warps."""
    padded = triton.next_power_of_2(width)
    return {
        "HEIGHT": max(1, ROW_ELEMENTS // padded),
        "WIDTH": padded,
        "num_warps": 8 if padded > ROW_ELEMENTS else 4,
    }


def precision(dtype: torch.dtype) -> str:
    """Of products of float32 on matrix units; those of 16-bit numbers are exact."""
    return "tf32x3" if dtype == torch.float32 else "ieee"
