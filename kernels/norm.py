"""Normalisation of the rows of a matrix, without an affine: one read and one write each way.

    out = (x - mean(x)) / sqrt(var(x) + eps),    grad_x = rstd (grad - mean(grad) - out mean(grad out))

x [rows, columns] in float16, bfloat16 or float32 with dense columns; statistics and sums in float32. A
program holds whole rows in registers, so squares are summed of what is left after subtracting the mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_ELEMENTS = 4096  # per program, or one row: with 4 warps, 32 per thread
MOST_COLUMNS = 8192


@triton.jit
def _normalise_rows_fwd_kernel(
    x_ptr,
    out_ptr,
    rstd_ptr,
    rows,
    columns,
    x_stride,
    eps,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(x, 1), columns * 1.0)
    x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x, 1), columns * 1.0) + eps))
    out = (x * rstd[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * columns + column[None, :], out, mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _normalise_rows_bwd_kernel(
    grad_ptr,
    normed_ptr,
    rstd_ptr,
    grad_x_ptr,
    rows,
    columns,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normed = tl.load(normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    mean = tl.div_rn(tl.sum(grad, 1), columns * 1.0)
    along = tl.div_rn(tl.sum(grad * normed, 1), columns * 1.0)
    grad_x = rstd[:, None] * (grad - mean[:, None] - normed * along[:, None])
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


def normalise_rows_fwd(x: Tensor, out: Tensor, rstd: Tensor, eps: float) -> None:
    """Fills out (dense) and rstd [rows] float32 from x [rows, columns], whose rows may be strided."""
    rows, columns = x.shape
    if x.numel() == 0:
        return
    height, width, warps = tile(rows, columns)
    with torch.cuda.device_of(x):
        _normalise_rows_fwd_kernel[(triton.cdiv(rows, height),)](
            x, out, rstd, rows, columns, x.stride(0), eps, HEIGHT=height, WIDTH=width, num_warps=warps
        )


def normalise_rows_bwd(grad: Tensor, normed: Tensor, rstd: Tensor, grad_x: Tensor) -> None:
    """Fills grad_x, which may be grad, from what the forward gave; all dense."""
    rows, columns = normed.shape
    if normed.numel() == 0:
        return
    height, width, warps = tile(rows, columns)
    with torch.cuda.device_of(normed):
        _normalise_rows_bwd_kernel[(triton.cdiv(rows, height),)](
            grad, normed, rstd, grad_x, rows, columns, HEIGHT=height, WIDTH=width, num_warps=warps
        )


def tile(rows: int, columns: int) -> tuple[int, int, int]:
    """Rows and columns (all of them) of a program's tile, and its warps."""
    width = triton.next_power_of_2(columns)
    height = max(1, min(triton.next_power_of_2(rows), ROW_ELEMENTS // width))
    return height, width, 8 if width > ROW_ELEMENTS else 4
