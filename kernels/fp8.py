"""Rows of a matrix as float8_e4m3fn with a scale each: one read and one write.

    scale = the least power of two with max|x| / scale <= 448,    out = float8(x / scale)

x [rows, columns] in float16, bfloat16 or float32 with dense columns. Dividing by a power of two is exact, so
that the one rounding is the cast's, to nearest even. A program holds whole rows in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmvae.kernels.norm import tile


@triton.jit
def _quantise_rows_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    rows,
    columns,
    x_stride,
    out_stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True)
    # The exponent of 448 = 1.75 * 2^8 is taken off; the sum carries where the mantissa is above 1.75.
    exponent = tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = x * inverse[:, None]
    # float8_e4m3fn has no infinity, and the cast would make 448 of it.
    scaled = tl.where(tl.abs(scaled) <= 448.0, scaled, float("nan"))
    at = row[:, None] * out_stride + column[None, :]
    written = (row < rows)[:, None] & (column < out_stride)[None, :]
    tl.store(out_ptr + at, scaled.to(tl.float8e4nv), mask=written)
    tl.store(scale_ptr + row, scale, mask=row < rows)


def quantise_rows(x: Tensor, out: Tensor, scale: Tensor) -> None:
    """Fills out [rows, width] float8 (dense; zeros beyond x's columns) and scale [rows] float32 from x
    [rows, columns], whose rows may be strided.
    """
    rows, columns = x.shape
    if out.numel() == 0:
        return
    height, width, warps = tile(rows, out.shape[1])
    with torch.cuda.device_of(x):
        _quantise_rows_kernel[(triton.cdiv(rows, height),)](
            x,
            out,
            scale,
            rows,
            columns,
            x.stride(0),
            out.shape[1],
            HEIGHT=height,
            WIDTH=width,
            num_warps=warps,
        )
