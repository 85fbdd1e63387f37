"""Batch norm over groups of images, with a leaky ReLU behind it, and its gradients.

x [G * I, C, N] in float16, bfloat16 or float32, with any strides: G groups of I images, each channel of a
group normalised over its I * N numbers. Statistics and sums are float32. A program takes a few channels of
one group and a part of their numbers. Where a group has one part, one kernel does everything, and what it
reads twice lies in the cache; else a kernel writes what each part contributes, and the next one adds that in
a fixed order, so results do not change from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmvae.kernels.common import TILE_ELEMENTS
from vfmvae.kernels.tuned import MULTIPROCESSORS

CHANNELS_AT_ONCE = 16
"""Where a pixel's channels lie side by side: 32 bytes of 16-bit numbers, what memory gives at once."""
LEAST_TILES = 4  # of a part
MOST_PARTS = 64


class Split(NamedTuple):
    """How the work is divided. Tiles are CHANNELS x NUMBERS."""

    channels: int
    numbers: int
    parts: int
    per_part: int


@triton.jit
def _places(number, c, group, images, positions, image_stride, channel_stride, position_stride):
    """Offsets of the numbers [BN] of the channels [BC] of a group, [BC, BN]."""
    image = (group * images + number // positions).to(tl.int64)
    position = (number % positions).to(tl.int64)
    of_number = image * image_stride + position * position_stride
    return c.to(tl.int64)[:, None] * channel_stride + of_number[None, :]


@triton.jit
def _statistics(
    x_ptr, c, channels, group, images, positions, sx_image, sx_channel, sx_position, begin, end,
    BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Mean, and sum of squared deviations from it, of the numbers begin .. end of each channel."""
    mean = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    seen = 0.0
    for first in range(begin, end, BN):
        number = first + tl.arange(0, BN)
        inside = (number < end)[None, :] & (c < channels)[:, None]
        at = _places(number, c, group, images, positions, sx_image, sx_channel, sx_position)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(end - first, BN).to(tl.float32)
        of_tile = tl.div_rn(tl.sum(x, 1), count)
        apart = tl.where(inside, x - of_tile[:, None], 0.0)
        change = of_tile - mean
        total = seen + count
        squares += tl.sum(apart * apart, 1) + change * change * (seen * count / total)
        mean += change * (count / total)
        seen = total
    return mean, squares


@triton.jit
def _gradient_sums(
    grad_ptr, x_ptr, mean, rstd, weight, bias, slope, c, channels, group, images, positions,
    sg_image, sg_channel, sg_position, sx_image, sx_channel, sx_position, begin, end,
    BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums over the numbers of the gradient before the activation, and of it times the normalised number."""
    plain = tl.zeros((BC, BN), tl.float32)
    product = tl.zeros((BC, BN), tl.float32)
    for first in range(begin, end, BN):
        number = first + tl.arange(0, BN)
        inside = (number < end)[None, :] & (c < channels)[:, None]
        at = _places(number, c, group, images, positions, sx_image, sx_channel, sx_position)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        at = _places(number, c, group, images, positions, sg_image, sg_channel, sg_position)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normed = (x - mean[:, None]) * rstd[:, None]
        grad = tl.where(normed * weight[:, None] + bias[:, None] > 0, grad, grad * slope)
        plain += grad
        product += tl.where(inside, grad * normed, 0.0)
    return tl.sum(plain, 1), tl.sum(product, 1)


@triton.jit
def _statistics_kernel(
    x_ptr,
    partials_ptr,  # [G, parts, 2, C]
    channels,
    images,
    positions,
    sx_image,
    sx_channel,
    sx_position,
    parts,
    per_part,
    BC: tl.constexpr,
    BN: tl.constexpr,
):
    chunks = tl.cdiv(channels, BC)
    part = tl.program_id(0) % parts
    group = tl.program_id(0) // parts // chunks
    c = (tl.program_id(0) // parts % chunks) * BC + tl.arange(0, BC)
    begin = part * per_part
    end = tl.minimum(begin + per_part, images * positions)
    mean, squares = _statistics(
        x_ptr, c, channels, group, images, positions, sx_image, sx_channel, sx_position, begin, end, BC, BN
    )
    row = partials_ptr + (group.to(tl.int64) * parts + part) * 2 * channels + c
    tl.store(row, mean, mask=c < channels)
    tl.store(row + channels, squares, mask=c < channels)


@triton.jit
def _normalise_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    partials_ptr,
    table_ptr,  # [G, 2, C]: mean and 1 / deviation, for the backward
    out_ptr,
    channels,
    images,
    positions,
    sx_image,
    sx_channel,
    sx_position,
    so_image,
    so_channel,
    so_position,
    parts,
    per_part,
    eps,
    slope,
    BC: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two, at least `parts`; 1: the statistics are taken here
):
    chunks = tl.cdiv(channels, BC)
    part = tl.program_id(0) % parts
    group = tl.program_id(0) // parts // chunks
    c = (tl.program_id(0) // parts % chunks) * BC + tl.arange(0, BC)
    used = c < channels
    total = images * positions
    count = total * 1.0
    begin = part * per_part
    end = tl.minimum(begin + per_part, total)
    if PARTS == 1:
        mean, squares = _statistics(
            x_ptr,
            c,
            channels,
            group,
            images,
            positions,
            sx_image,
            sx_channel,
            sx_position,
            begin,
            end,
            BC,
            BN,
        )
    else:
        other = tl.arange(0, PARTS)
        row = partials_ptr + (group.to(tl.int64) * parts + other)[None, :] * 2 * channels + c[:, None]
        there = (other < parts)[None, :] & used[:, None]
        means = tl.load(row, mask=there, other=0.0)
        deviations = tl.load(row + channels, mask=there, other=0.0)
        counts = tl.maximum(tl.minimum(per_part, total - other * per_part), 0).to(tl.float32)[None, :]
        mean = tl.div_rn(tl.sum(means * counts, 1), count)
        change = tl.where(there, means - mean[:, None], 0.0)
        squares = tl.sum(deviations + change * change * counts, 1)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, count) + eps))
    if part == 0:
        table = table_ptr + group.to(tl.int64) * 2 * channels + c
        tl.store(table, mean, mask=used)
        tl.store(table + channels, rstd, mask=used)
    weight = tl.load(weight_ptr + c, mask=used, other=0.0)
    bias = tl.load(bias_ptr + c, mask=used, other=0.0)
    for first in range(begin, end, BN):
        number = first + tl.arange(0, BN)
        inside = (number < end)[None, :] & used[:, None]
        at = _places(number, c, group, images, positions, sx_image, sx_channel, sx_position)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean[:, None]) * rstd[:, None] * weight[:, None] + bias[:, None]
        y = tl.where(y > 0, y, y * slope)
        at = _places(number, c, group, images, positions, so_image, so_channel, so_position)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_sums_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    table_ptr,
    partials_ptr,  # [G, parts, 2, C]
    channels,
    images,
    positions,
    sg_image,
    sg_channel,
    sg_position,
    sx_image,
    sx_channel,
    sx_position,
    parts,
    per_part,
    slope,
    BC: tl.constexpr,
    BN: tl.constexpr,
):
    chunks = tl.cdiv(channels, BC)
    part = tl.program_id(0) % parts
    group = tl.program_id(0) // parts // chunks
    c = (tl.program_id(0) // parts % chunks) * BC + tl.arange(0, BC)
    used = c < channels
    begin = part * per_part
    end = tl.minimum(begin + per_part, images * positions)
    table = table_ptr + group.to(tl.int64) * 2 * channels + c
    mean, rstd = tl.load(table, mask=used, other=0.0), tl.load(table + channels, mask=used, other=0.0)
    weight = tl.load(weight_ptr + c, mask=used, other=0.0)
    bias = tl.load(bias_ptr + c, mask=used, other=0.0)
    plain, product = _gradient_sums(
        grad_ptr, x_ptr, mean, rstd, weight, bias, slope, c, channels, group, images, positions,
        sg_image, sg_channel, sg_position, sx_image, sx_channel, sx_position, begin, end, BC, BN,
    )  # fmt: skip
    row = partials_ptr + (group.to(tl.int64) * parts + part) * 2 * channels + c
    tl.store(row, plain, mask=used)
    tl.store(row + channels, product, mask=used)


@triton.jit
def _gradient_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    table_ptr,
    partials_ptr,
    sums_ptr,  # [G, 2, C]: of the gradients of bias and weight
    grad_x_ptr,  # strides are those of `so`
    channels,
    images,
    positions,
    sg_image,
    sg_channel,
    sg_position,
    sx_image,
    sx_channel,
    sx_position,
    so_image,
    so_channel,
    so_position,
    parts,
    per_part,
    slope,
    BC: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
):
    chunks = tl.cdiv(channels, BC)
    part = tl.program_id(0) % parts
    group = tl.program_id(0) // parts // chunks
    c = (tl.program_id(0) // parts % chunks) * BC + tl.arange(0, BC)
    used = c < channels
    total = images * positions
    count = total * 1.0
    begin = part * per_part
    end = tl.minimum(begin + per_part, total)
    table = table_ptr + group.to(tl.int64) * 2 * channels + c
    mean, rstd = tl.load(table, mask=used, other=0.0), tl.load(table + channels, mask=used, other=0.0)
    weight = tl.load(weight_ptr + c, mask=used, other=0.0)
    bias = tl.load(bias_ptr + c, mask=used, other=0.0)
    if PARTS == 1:
        plain, product = _gradient_sums(
            grad_ptr, x_ptr, mean, rstd, weight, bias, slope, c, channels, group, images, positions,
            sg_image, sg_channel, sg_position, sx_image, sx_channel, sx_position, begin, end, BC, BN,
        )  # fmt: skip
    else:
        other = tl.arange(0, PARTS)
        row = partials_ptr + (group.to(tl.int64) * parts + other)[None, :] * 2 * channels + c[:, None]
        there = (other < parts)[None, :] & used[:, None]
        plain = tl.sum(tl.load(row, mask=there, other=0.0), 1)
        product = tl.sum(tl.load(row + channels, mask=there, other=0.0), 1)
    if part == 0:
        sums = sums_ptr + group.to(tl.int64) * 2 * channels + c
        tl.store(sums, plain, mask=used)
        tl.store(sums + channels, product, mask=used)
    plain, product = tl.div_rn(plain, count), tl.div_rn(product, count)
    for first in range(begin, end, BN):
        number = first + tl.arange(0, BN)
        inside = (number < end)[None, :] & used[:, None]
        at = _places(number, c, group, images, positions, sx_image, sx_channel, sx_position)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        at = _places(number, c, group, images, positions, sg_image, sg_channel, sg_position)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normed = (x - mean[:, None]) * rstd[:, None]
        grad = tl.where(normed * weight[:, None] + bias[:, None] > 0, grad, grad * slope)
        grad_x = (weight * rstd)[:, None] * (grad - plain[:, None] - normed * product[:, None])
        at = _places(number, c, group, images, positions, so_image, so_channel, so_position)
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


def batch_norm_fwd(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, slope: float, out: Tensor, table: Tensor
) -> None:
    """Fills out [B, C, N] and table [groups, 2, C]; weight, bias and table are float32 and dense."""
    batch, channels, positions = x.shape
    images = batch // groups
    cut = split(groups, images * positions, channels, x.stride(1) == 1)
    partials = table.new_empty((groups, cut.parts if cut.parts > 1 else 0, 2, channels))
    sizes = (channels, images, positions, *x.stride())
    grid = (groups * cut.parts * triton.cdiv(channels, cut.channels),)
    with torch.cuda.device_of(x):
        if cut.parts > 1:
            _statistics_kernel[grid](
                *(x, partials, *sizes, cut.parts, cut.per_part), BC=cut.channels, BN=cut.numbers
            )
        _normalise_kernel[grid](
            *(x, weight, bias, partials, table, out, *sizes, *out.stride()),
            *(cut.parts, cut.per_part, eps, slope),
            BC=cut.channels,
            BN=cut.numbers,
            PARTS=triton.next_power_of_2(cut.parts),
        )


def batch_norm_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, table: Tensor, slope: float, grad_x: Tensor
) -> Tensor:
    """Fills grad_x [B, C, N]; returns [groups, 2, C] float32, what groups add to the gradients of bias and
    weight.
    """
    batch, channels, positions = x.shape
    groups = table.shape[0]
    images = batch // groups
    cut = split(groups, images * positions, channels, x.stride(1) == 1)
    partials = table.new_empty((groups, cut.parts if cut.parts > 1 else 0, 2, channels))
    sums = torch.empty_like(table)
    given = (grad, x, weight, bias, table, partials)
    sizes = (channels, images, positions, *grad.stride(), *x.stride())
    grid = (groups * cut.parts * triton.cdiv(channels, cut.channels),)
    with torch.cuda.device_of(x):
        if cut.parts > 1:
            _gradient_sums_kernel[grid](
                *(*given, *sizes, cut.parts, cut.per_part, slope), BC=cut.channels, BN=cut.numbers
            )
        _gradient_kernel[grid](
            *(*given, sums, grad_x, *sizes, *grad_x.stride(), cut.parts, cut.per_part, slope),
            BC=cut.channels,
            BN=cut.numbers,
            PARTS=triton.next_power_of_2(cut.parts),
        )
    return sums


def split(groups: int, numbers: int, channels: int, side_by_side: bool) -> Split:
    """For channels of `numbers` numbers each. `side_by_side`: a pixel's channels are neighbours in memory."""
    width = min(CHANNELS_AT_ONCE, triton.next_power_of_2(channels)) if side_by_side else 1
    length = min(TILE_ELEMENTS // width, triton.next_power_of_2(numbers))
    wanted = 2 * MULTIPROCESSORS // (groups * triton.cdiv(channels, width))
    parts = max(1, min(wanted, numbers // (LEAST_TILES * length), MOST_PARTS))
    per_part = triton.cdiv(triton.cdiv(numbers, parts), length) * length
    return Split(width, length, triton.cdiv(numbers, per_part), per_part)
