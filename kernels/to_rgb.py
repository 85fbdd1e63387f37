"""The modulated 1 x 1 convolution to an image: one read of x forward; one read and one write backward.

    out[b, p, k] = bias[k] + sum over c of x[b, p, c] * style[b, c] * weight[k, c],    k < 3

x [B, P, C] (P pixels) in float16, bfloat16 or float32; style [B, C], weight [3, C], bias [3] and
out [B, P, 3] in float32, as are all products and sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FWD_ELEMENTS = 8192  # of x per program: with 4 warps, 64 per thread, loaded 16 bytes at a time
BWD_ELEMENTS = 2048  # per step of a loop that keeps three sums per element
PROGRAMS = 8 * 132
"""Parts of the backward are made until there are about this many programs."""


@triton.jit
def _to_rgb_fwd_kernel(
    x_ptr,
    style_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    pixels,
    tiles,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    sample = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BP
    pixel = tl.arange(0, BP)
    inside = first + pixel < pixels
    start = sample.to(tl.int64) * pixels + first
    red = tl.zeros((BP,), tl.float32) + tl.load(bias_ptr)
    green = tl.zeros((BP,), tl.float32) + tl.load(bias_ptr + 1)
    blue = tl.zeros((BP,), tl.float32) + tl.load(bias_ptr + 2)
    for chunk in tl.static_range(0, C, BC):
        c = chunk + tl.arange(0, BC)
        at = pixel[:, None] * C + c[None, :]
        mask = inside[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + start * C + at, mask=mask, other=0.0).to(tl.float32)
        style = tl.load(style_ptr + sample * C + c, mask=c < C, other=0.0)
        red += tl.sum(x * (style * tl.load(weight_ptr + c, mask=c < C, other=0.0))[None, :], 1)
        green += tl.sum(x * (style * tl.load(weight_ptr + C + c, mask=c < C, other=0.0))[None, :], 1)
        blue += tl.sum(x * (style * tl.load(weight_ptr + 2 * C + c, mask=c < C, other=0.0))[None, :], 1)
    out = out_ptr + start * 3 + pixel * 3
    tl.store(out, red, mask=inside)
    tl.store(out + 1, green, mask=inside)
    tl.store(out + 2, blue, mask=inside)


@triton.jit
def _to_rgb_bwd_kernel(
    grad_ptr,
    x_ptr,
    style_ptr,
    weight_ptr,
    grad_x_ptr,
    sums_ptr,  # [parts, 3, C]: of grad[k] x[c] over the pixels of a part = sample * splits + split
    pixels,
    pixels_per_split,
    splits,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    chunks: tl.constexpr = (C + BC - 1) // BC
    part = (tl.program_id(0) // chunks).to(tl.int64)
    sample = (part // splits).to(tl.int32)
    c = (tl.program_id(0) % chunks) * BC + tl.arange(0, BC)
    used = c < C
    begin = (part % splits).to(tl.int32) * pixels_per_split
    end = tl.minimum(begin + pixels_per_split, pixels)
    style = tl.load(style_ptr + sample * C + c, mask=used, other=0.0)
    red = style * tl.load(weight_ptr + c, mask=used, other=0.0)
    green = style * tl.load(weight_ptr + C + c, mask=used, other=0.0)
    blue = style * tl.load(weight_ptr + 2 * C + c, mask=used, other=0.0)
    of_red = tl.zeros((BP, BC), tl.float32)
    of_green = tl.zeros((BP, BC), tl.float32)
    of_blue = tl.zeros((BP, BC), tl.float32)
    for first in range(begin, end, BP):
        pixel = tl.arange(0, BP)
        inside = first + pixel < end
        start = sample.to(tl.int64) * pixels + first
        at = pixel[:, None] * C + c[None, :]
        mask = inside[:, None] & used[None, :]
        x = tl.load(x_ptr + start * C + at, mask=mask, other=0.0).to(tl.float32)
        grad = grad_ptr + start * 3 + pixel * 3
        grad_red = tl.load(grad, mask=inside, other=0.0)[:, None]
        grad_green = tl.load(grad + 1, mask=inside, other=0.0)[:, None]
        grad_blue = tl.load(grad + 2, mask=inside, other=0.0)[:, None]
        grad_x = grad_red * red[None, :] + grad_green * green[None, :] + grad_blue * blue[None, :]
        tl.store(grad_x_ptr + start * C + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        of_red += grad_red * x
        of_green += grad_green * x
        of_blue += grad_blue * x
    sums = sums_ptr + part * (3 * C) + c
    tl.store(sums, tl.sum(of_red, 0), mask=used)
    tl.store(sums + C, tl.sum(of_green, 0), mask=used)
    tl.store(sums + 2 * C, tl.sum(of_blue, 0), mask=used)


def to_rgb_fwd(x: Tensor, style: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """Fills out; all dense."""
    batch, pixels, channels = x.shape
    height, width = block(pixels, channels, FWD_ELEMENTS)
    tiles = triton.cdiv(pixels, height)
    with torch.cuda.device_of(x):
        _to_rgb_fwd_kernel[(batch * tiles,)](
            x, style, weight, bias, out, pixels, tiles, C=channels, BP=height, BC=width
        )


def to_rgb_bwd(grad: Tensor, x: Tensor, style: Tensor, weight: Tensor, grad_x: Tensor) -> Tensor:
    """Fills grad_x from grad [B, P, 3]; returns the sum over pixels of grad[k] x[c], [B, 3, C] in float32."""
    batch, pixels, channels = x.shape
    height, width = block(pixels, channels, BWD_ELEMENTS)
    chunks = triton.cdiv(channels, width)
    wanted = min(max(1, PROGRAMS // (batch * chunks)), max(1, pixels // (8 * height)))
    per_split = triton.cdiv(triton.cdiv(pixels, wanted), height) * height
    splits = triton.cdiv(pixels, per_split)
    sums = torch.empty(batch * splits, 3, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _to_rgb_bwd_kernel[(batch * splits * chunks,)](
            *(grad, x, style, weight, grad_x, sums),
            *(pixels, per_split, splits),
            C=channels,
            BP=height,
            BC=width,
        )
    return sums.view(batch, splits, 3, channels).sum(1)


def block(pixels: int, channels: int, elements: int) -> tuple[int, int]:
    """Pixels and channels of a tile."""
    width = min(triton.next_power_of_2(channels), 256)
    return min(triton.next_power_of_2(pixels), elements // width), width
