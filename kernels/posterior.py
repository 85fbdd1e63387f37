"""A draw from the diagonal Gaussian posterior and its divergence in one pass, and the backward in another.

    s = clamp(logvar),    z = mean + exp(s / 2) noise,
    kl = sum over a sample of (mean^2 + exp(s) - 1 - s) / 2

mean, logvar [B, P, C] (P positions) with dense channels, rows of channels and samples at any stride; noise
and z dense. float16, bfloat16 or float32; arithmetic in float32.

The noise is read, or it is a function of (seed, place of the image in the global batch, element), which the
backward computes again: seed holds two int64 on the device, the random number and the first image's place, so
that a captured graph draws anew wherever they are changed. vfmvae/ops/noise.py defines the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-30.0)
HIGHEST = tl.constexpr(20.0)
ELEMENTS = 1024  # per program: with 4 warps, two counters of the generator per thread


@triton.jit
def exp(x):
    """To the last digits, for moderate x: tl.exp rounds x log2(e), which may have digits before the point."""
    power = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - power * 0.693359375) + power * 2.12194440e-4  # ln 2 in two parts, the first of 9 bits
    return tl.exp2(power) * tl.exp(rest)


@triton.jit
def _normal_pair(radius_word, angle_word):
    """Two independent standard normal numbers from two random words (Box and Muller, 1958)."""
    uniform = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt_rn(-2.0 * tl.log(uniform))
    # The angle's nearest multiple of a quarter turn is exact in the word; the rest is within an eighth.
    quarter = (angle_word + 0x20000000) >> 30
    rest = (angle_word - (quarter << 30)).to(tl.int32, bitcast=True)
    x = (rest.to(tl.float32) + 0.5) * 1.4629180792671596e-09
    square = x * x
    sin = x + x * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cos = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cos = 1.0 - 0.5 * square + square * square * cos
    swapped = (quarter & 1) == 1
    first = tl.where(swapped, sin, cos)
    second = tl.where(swapped, cos, sin)
    first = tl.where((quarter == 1) | (quarter == 2), -first, first)
    second = tl.where(quarter >= 2, -second, second)
    return radius * first, radius * second


@triton.jit
def _normal_numbers(seed_ptr, sample, first_block, BLOCKS: tl.constexpr):
    """Those of 4 * BLOCKS elements of a sample, [4 * BLOCKS]."""
    image = (tl.load(seed_ptr + 1) + sample).to(tl.uint64)
    block = (first_block + tl.arange(0, BLOCKS)).to(tl.uint32)
    none = tl.zeros((BLOCKS,), tl.uint32)
    low = none + (image & 0xFFFFFFFF).to(tl.uint32)
    high = none + (image >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed_ptr), block, none, low, high)
    a, b = _normal_pair(a, b)
    c, d = _normal_pair(c, d)
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(4 * BLOCKS)


@triton.jit
def _clamped(logvar):
    """NaN stays."""
    return tl.where(logvar < LOWEST, LOWEST, tl.where(logvar > HIGHEST, HIGHEST, logvar))


@triton.jit
def _posterior_fwd_kernel(
    mean_ptr,
    logvar_ptr,
    noise_ptr,  # or the seed
    z_ptr,
    partials_ptr,  # of kl, one per program
    elements,
    tiles,
    mean_sample,
    mean_row,
    logvar_sample,
    logvar_row,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    SEEDED: tl.constexpr,
):
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    begin = (tl.program_id(0) % tiles) * SIZE
    e = begin + tl.arange(0, SIZE)
    inside = e < elements
    row = e // C
    c = e % C
    mean_at = mean_ptr + sample * mean_sample + row.to(tl.int64) * mean_row + c
    logvar_at = logvar_ptr + sample * logvar_sample + row.to(tl.int64) * logvar_row + c
    mean = tl.load(mean_at, mask=inside, other=0.0).to(tl.float32)
    logvar = _clamped(tl.load(logvar_at, mask=inside, other=0.0).to(tl.float32))
    if SEEDED:
        noise = _normal_numbers(noise_ptr, sample, begin // 4, SIZE // 4)
    else:
        noise = tl.load(noise_ptr + sample * elements + e, mask=inside, other=0.0).to(tl.float32)
    std = exp(0.5 * logvar)
    z = mean + std * noise
    tl.store(z_ptr + sample * elements + e, z.to(z_ptr.dtype.element_ty), mask=inside)
    # Missing elements have mean and log variance 0, and no divergence.
    kl = 0.5 * (mean * mean + exp(logvar) - 1.0 - logvar)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(kl, 0))


@triton.jit
def _posterior_bwd_kernel(
    grad_z_ptr,
    grad_kl_ptr,
    mean_ptr,
    logvar_ptr,
    noise_ptr,  # or the seed
    grad_mean_ptr,
    grad_logvar_ptr,
    elements,
    tiles,
    mean_sample,
    mean_row,
    logvar_sample,
    logvar_row,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    SEEDED: tl.constexpr,
):
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    begin = (tl.program_id(0) % tiles) * SIZE
    e = begin + tl.arange(0, SIZE)
    inside = e < elements
    row = e // C
    c = e % C
    mean_at = mean_ptr + sample * mean_sample + row.to(tl.int64) * mean_row + c
    logvar_at = logvar_ptr + sample * logvar_sample + row.to(tl.int64) * logvar_row + c
    mean = tl.load(mean_at, mask=inside, other=0.0).to(tl.float32)
    raw = tl.load(logvar_at, mask=inside, other=0.0).to(tl.float32)
    logvar = _clamped(raw)
    at = sample * elements + e
    if SEEDED:
        noise = _normal_numbers(noise_ptr, sample, begin // 4, SIZE // 4)
    else:
        noise = tl.load(noise_ptr + at, mask=inside, other=0.0).to(tl.float32)
    of_z = tl.load(grad_z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    of_kl = tl.load(grad_kl_ptr + sample)
    of_mean = of_z + of_kl * mean
    of_logvar = 0.5 * (of_z * exp(0.5 * logvar) * noise + of_kl * (exp(logvar) - 1.0))
    of_logvar = tl.where((raw > LOWEST) & (raw < HIGHEST), of_logvar, 0.0)
    tl.store(grad_mean_ptr + at, of_mean.to(grad_mean_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_logvar_ptr + at, of_logvar.to(grad_logvar_ptr.dtype.element_ty), mask=inside)


def posterior_fwd(mean: Tensor, logvar: Tensor, noise: Tensor, z: Tensor) -> Tensor:
    """Fills z; returns kl [B] in float32. noise [B, P, C], or int64 [2]."""
    size = sizes(mean, logvar)
    partials = torch.empty(len(mean), size.tiles, dtype=torch.float32, device=mean.device)
    with torch.cuda.device_of(mean):
        _posterior_fwd_kernel[(partials.numel(),)](
            *(mean, logvar, noise, z, partials, size.elements, size.tiles, *size.strides),
            C=mean.shape[2],
            SIZE=ELEMENTS,
            SEEDED=noise.dtype == torch.int64,
        )
    return partials.sum(1)


def posterior_bwd(
    grad_z: Tensor,
    grad_kl: Tensor,
    mean: Tensor,
    logvar: Tensor,
    noise: Tensor,
    grad_mean: Tensor,
    grad_logvar: Tensor,
) -> None:
    """Fills the last two from grad_z [B, P, C], dense, and grad_kl [B] in float32."""
    size = sizes(mean, logvar)
    with torch.cuda.device_of(mean):
        _posterior_bwd_kernel[(len(mean) * size.tiles,)](
            *(grad_z, grad_kl, mean, logvar, noise, grad_mean, grad_logvar),
            *(size.elements, size.tiles, *size.strides),
            C=mean.shape[2],
            SIZE=ELEMENTS,
            SEEDED=noise.dtype == torch.int64,
        )


class Sizes(NamedTuple):
    elements: int
    """Of a sample."""
    tiles: int
    strides: tuple[int, int, int, int]
    """Of a sample and a row of channels in mean, and in logvar."""


def sizes(mean: Tensor, logvar: Tensor) -> Sizes:
    elements = mean.shape[1] * mean.shape[2]
    return Sizes(elements, triton.cdiv(elements, ELEMENTS), (*mean.stride()[:2], *logvar.stride()[:2]))
