"""Gradients of the modulated MLP for up to 256 channels; hidden numbers are computed again, not kept.

One kernel goes through the hidden numbers for a tile of pixels and gives the gradient of x; asked for, also
of d. The other goes through the pixels of a part of a sample for a chunk of hidden numbers and gives all
else. Neither could keep both sums in registers. Parts are summed at last, in the same order always.

Notation as in modulated_mlp.py; grad is the gradient of out. With h the input of GELU and z = W1 x,

    dh = (W2^T grad) gelu'(h),    S = sum over the pixels of a sample of dh x^T  [E, C]
    grad of x = W1^T (d dh),    of W1 = sum of d S,    of W2 = sum of grad gelu(h)^T
    grad of b1 = sum of dh,     of d = sum of dh z = sum over C of S W1
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmvae.kernels.gelu import gelu_and_slope, gelu_form
from vfmvae.kernels.modulated_mlp import blocks, padded
from vfmvae.kernels.tuned import MULTIPROCESSORS, cdiv, tile

PROGRAMS = 4 * MULTIPROCESSORS
"""Parts are made until there are about this many programs."""


@triton.jit
def _mlp_input_grad_kernel(
    grad_desc,  # [B, P, C] by [1, BM, BC], like x and grad_x
    x_desc,
    demodulation_ptr,
    first_desc,  # [E, C] by [BN, BC], like second
    first_bias_ptr,
    second_desc,
    grad_x_desc,
    sum_ptr,  # over the pixels of each tile: with OF_SCALE of dh z [B, tiles, E], else of grad [B, tiles, C]
    tiles,
    C: tl.constexpr,
    E: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GELU: tl.constexpr,
    OF_SCALE: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program // tiles
    pixel = (program % tiles) * BM
    c = tl.arange(0, BC)
    grad = grad_desc.load([sample, pixel, 0]).reshape(BM, BC)
    if not OF_SCALE:
        tl.store(sum_ptr + program.to(tl.int64) * C + c, tl.sum(grad.to(tl.float32), 0), mask=c < C)
    x = x_desc.load([sample, pixel, 0]).reshape(BM, BC)
    grad_x = tl.zeros((BM, BC), tl.float32)
    for chunk in range(0, E, BN):
        e = chunk + tl.arange(0, BN)
        first = first_desc.load([chunk, 0])
        second = second_desc.load([chunk, 0])
        some = e < E
        scale = tl.load(demodulation_ptr + sample * E + e, mask=some, other=0.0)
        bias = tl.load(first_bias_ptr + e, mask=some, other=0.0)
        z = tl.dot(x, tl.trans(first), input_precision="ieee")
        grad_hidden = tl.dot(grad, tl.trans(second), input_precision="ieee")
        _, slope = gelu_and_slope(z * scale[None, :] + bias[None, :], GELU)
        grad_hidden *= slope
        if OF_SCALE:
            of_scale = tl.sum(grad_hidden * z, 0)
            tl.store(sum_ptr + program.to(tl.int64) * E + e, of_scale, mask=some)
        grad_hidden *= scale[None, :]
        grad_x = tl.dot(grad_hidden.to(x.dtype), first, grad_x, input_precision="ieee")
    grad_x_desc.store([sample, pixel, 0], grad_x.to(x.dtype).reshape(1, BM, BC))


@triton.jit
def _mlp_weight_grad_kernel(
    grad_desc,  # [B, P, C] by [1, BM, BC], like x
    x_desc,
    demodulation_ptr,
    first_desc,  # [E, C] by [BN, BC], like second
    first_bias_ptr,
    second_desc,
    sum_demodulation_ptr,  # [parts, E], where part = sample * splits + split
    sum_first_ptr,  # [parts, E, C]
    sum_first_bias_ptr,  # [parts, E]
    sum_second_ptr,  # [parts, E, C]
    pixels,
    pixels_per_split,
    splits,
    C: tl.constexpr,
    E: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GELU: tl.constexpr,
):
    chunks: tl.constexpr = (E + BN - 1) // BN
    part = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks  # programs that read the same pixels run at the same time
    sample = part // splits
    begin = (part % splits) * pixels_per_split
    end = tl.minimum(begin + pixels_per_split, pixels)
    e = chunk * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    some = e < E
    scale = tl.load(demodulation_ptr + sample * E + e, mask=some, other=0.0)
    bias = tl.load(first_bias_ptr + e, mask=some, other=0.0)
    first = first_desc.load([chunk * BN, 0])
    second = second_desc.load([chunk * BN, 0])
    of_bias = tl.zeros((BN,), tl.float32)
    of_first = tl.zeros((BN, BC), tl.float32)
    of_second = tl.zeros((BN, BC), tl.float32)
    for pixel in range(begin, end, BM):
        x = x_desc.load([sample, pixel, 0]).reshape(BM, BC)
        grad = grad_desc.load([sample, pixel, 0]).reshape(BM, BC)
        hidden = tl.dot(first, tl.trans(x), input_precision="ieee") * scale[:, None] + bias[:, None]
        grad_hidden = tl.dot(second, tl.trans(grad), input_precision="ieee")
        activated, slope = gelu_and_slope(hidden, GELU)
        grad_hidden *= slope
        of_bias += tl.sum(grad_hidden, 1)
        of_first = tl.dot(grad_hidden.to(x.dtype), x, of_first, input_precision="ieee")
        of_second = tl.dot(activated.to(x.dtype), grad, of_second, input_precision="ieee")

    inside = some[:, None] & (c < C)[None, :]
    at = part.to(tl.int64) * (E * C) + e[:, None] * C + c[None, :]
    tl.store(sum_second_ptr + at, of_second, mask=inside)
    of_demodulation = tl.sum(of_first * first_desc.load([chunk * BN, 0]).to(tl.float32), 1)
    tl.store(sum_first_ptr + at, of_first * scale[:, None], mask=inside)
    tl.store(sum_demodulation_ptr + part.to(tl.int64) * E + e, of_demodulation, mask=some)
    tl.store(sum_first_bias_ptr + part.to(tl.int64) * E + e, of_bias, mask=some)


class Gradients(NamedTuple):
    """All but those of x and of the last bias, in float32; first and second share memory."""

    demodulation: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor


def mlp_input_grad(
    grad: Tensor,
    x: Tensor,
    demodulation: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    grad_x: Tensor,
    of_scale: bool,
) -> Tensor:
    """Fills grad_x [B, P, C]; the gradient of d [B, E] with `of_scale`, else of the last bias [C]; float32.

    mlp_weight_grad gives that of d cheaper where it runs anyway.
    """
    batch, pixels, channels = x.shape
    hidden = len(first)
    size = tile("input_grad_of_scale" if of_scale else "input_grad", channels, pixels, x.dtype)
    width = padded(channels)
    tiles = cdiv(pixels, size.pixels)
    sums = torch.empty(batch, tiles, hidden if of_scale else channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _mlp_input_grad_kernel[(batch * tiles,)](
            blocks(grad, 1, size.pixels, width),
            blocks(x, 1, size.pixels, width),
            demodulation,
            blocks(first, size.hidden, width),
            first_bias,
            blocks(second, size.hidden, width),
            blocks(grad_x, 1, size.pixels, width),
            sums,
            tiles,
            C=channels,
            E=hidden,
            BC=width,
            BM=size.pixels,
            BN=size.hidden,
            GELU=gelu_form(x.dtype, x.is_cuda),
            OF_SCALE=of_scale,
            num_warps=size.warps,
            num_stages=size.stages,
        )
    return sums.sum(1) if of_scale else sums.sum((0, 1))


def mlp_weight_grad(
    grad: Tensor, x: Tensor, demodulation: Tensor, first: Tensor, first_bias: Tensor, second: Tensor
) -> Gradients:
    """All gradients but that of x and of the last bias."""
    batch, pixels, channels = x.shape
    hidden = len(first)
    size = tile("weight_grad", channels, pixels, x.dtype)
    width = padded(channels)
    chunks = cdiv(hidden, size.hidden)
    splits, pixels_per_split = split(pixels, size.pixels, batch * chunks)
    parts = batch * splits

    def sums(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    of_demodulation, of_first_bias = sums(parts, hidden), sums(parts, hidden)
    of_both = sums(2, parts, hidden, channels)
    of_first, of_second = of_both.unbind()
    with torch.cuda.device_of(x):
        _mlp_weight_grad_kernel[(parts * chunks,)](
            blocks(grad, 1, size.pixels, width),
            blocks(x, 1, size.pixels, width),
            demodulation,
            blocks(first, size.hidden, width),
            first_bias,
            blocks(second, size.hidden, width),
            of_demodulation,
            of_first,
            of_first_bias,
            of_second,
            pixels,
            pixels_per_split,
            splits,
            C=channels,
            E=hidden,
            BC=width,
            BM=size.pixels,
            BN=size.hidden,
            GELU=gelu_form(x.dtype, x.is_cuda),
            num_warps=size.warps,
            num_stages=size.stages,
        )
    of_demodulation = of_demodulation.view(batch, splits, hidden).sum(1)
    of_first, of_second = of_both.sum(1).unbind()
    return Gradients(of_demodulation, of_first, of_first_bias.sum(0), of_second)


def split(pixels: int, step: int, programs: int) -> tuple[int, int]:
    """Parts of a sample's pixels, and pixels in each: whole steps, no part empty, none under 16 steps."""
    wanted = min(max(1, PROGRAMS // programs), max(1, pixels // (16 * step)))
    per_split = cdiv(cdiv(pixels, wanted), step) * step
    return cdiv(pixels, per_split), per_split
