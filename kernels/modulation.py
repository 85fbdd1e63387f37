"""Adaptive layer norm and the gated residual of transformers, and their gradients: each tensor of tokens is
read once and written once.

    norm_modulate    n = (x - mean) / deviation, or x / root mean square;  out = n weight (1 + scale) + shift
    gated_residual   out = x + gate * branch

x, branch [B, N, C] in float16, bfloat16 or float32 with dense channels; shift, scale, gate [B, C], rows of
any stride; weight [C]. Arithmetic and sums in float32. A program takes a part of one sample's tokens: of the
norm whole tokens, which it holds in registers, of the residual CHANNELS of each. Gradients of shift, scale
and gate are sums over tokens, of weight over samples too: a program writes what its part contributes, and
that is added in a fixed order, so results do not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmvae.kernels.tuned import MULTIPROCESSORS, cdiv

CHANNELS = 128
"""Of a tile of the residual: 256 bytes of 16-bit numbers. Widths of transformers are multiples of it."""
TILE_ELEMENTS = 2048  # 16 per thread with 4 warps
MOST_COLUMNS = 4096
STAGES = 2
"""Of the backward norm's loads: the next tokens are fetched while these are worked on."""


@triton.jit
def _norm_modulate_fwd_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    weight_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    tokens,
    channels,
    parts,
    per_part,
    x_sample,
    x_token,
    shift_sample,
    scale_sample,
    eps,
    CENTRED: tl.constexpr,
    SHIFTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    part = tl.program_id(0) % parts
    sample = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.arange(0, WIDTH)
    used = column < channels
    factor = 1.0 + tl.load(scale_ptr + sample * scale_sample + column, mask=used, other=0.0).to(tl.float32)
    if WEIGHTED:
        factor *= tl.load(weight_ptr + column, mask=used, other=0.0).to(tl.float32)
    if SHIFTED:
        shift = tl.load(shift_ptr + sample * shift_sample + column, mask=used, other=0.0).to(tl.float32)
    begin = part * per_part
    end = tl.minimum(begin + per_part, tokens)
    for first in range(begin, end, HEIGHT):
        token = (first + tl.arange(0, HEIGHT)).to(tl.int64)
        inside = (token < end)[:, None] & used[None, :]
        at = sample * x_sample + token[:, None] * x_token + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        row = sample * tokens + token
        if CENTRED:
            mean = tl.div_rn(tl.sum(x, 1), channels * 1.0)
            x = tl.where(inside, x - mean[:, None], 0.0)
            tl.store(mean_ptr + row, mean, mask=token < end)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x, 1), channels * 1.0) + eps))
        tl.store(rstd_ptr + row, rstd, mask=token < end)
        out = x * rstd[:, None] * factor[None, :]
        if SHIFTED:
            out += shift[None, :]
        at = row[:, None] * channels + column[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_modulate_bwd_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    of_x_ptr,
    of_shift_ptr,  # this and the next two: float32 [B, parts, C]
    of_scale_ptr,
    of_weight_ptr,
    tokens,
    channels,
    parts,
    per_part,
    grad_sample,
    grad_token,
    x_sample,
    x_token,
    scale_sample,
    CENTRED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OF_X: tl.constexpr,
    OF_SHIFT: tl.constexpr,
    OF_SCALE: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    part = tl.program_id(0) % parts
    sample = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.arange(0, WIDTH)
    used = column < channels
    factor = 1.0 + tl.load(scale_ptr + sample * scale_sample + column, mask=used, other=0.0).to(tl.float32)
    if WEIGHTED:
        factor *= tl.load(weight_ptr + column, mask=used, other=0.0).to(tl.float32)
    plain = tl.zeros((WIDTH,), tl.float32)
    product = tl.zeros((WIDTH,), tl.float32)
    begin = part * per_part
    end = tl.minimum(begin + per_part, tokens)
    for first in tl.range(begin, end, HEIGHT, num_stages=STAGES):
        token = (first + tl.arange(0, HEIGHT)).to(tl.int64)
        inside = (token < end)[:, None] & used[None, :]
        at = sample * grad_sample + token[:, None] * grad_token + column[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        row = sample * tokens + token
        if OF_SHIFT:
            plain += tl.sum(grad, 0)
        if OF_X or OF_SCALE or OF_WEIGHT:
            at = sample * x_sample + token[:, None] * x_token + column[None, :]
            normed = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + row, mask=token < end, other=0.0)
            if CENTRED:
                mean = tl.load(mean_ptr + row, mask=token < end, other=0.0)
                normed = tl.where(inside, normed - mean[:, None], 0.0)
            normed *= rstd[:, None]
            if OF_SCALE or OF_WEIGHT:
                product += tl.sum(grad * normed, 0)
            if OF_X:
                grad *= factor[None, :]
                of_x = grad - normed * tl.div_rn(tl.sum(grad * normed, 1), channels * 1.0)[:, None]
                if CENTRED:
                    of_x -= tl.div_rn(tl.sum(grad, 1), channels * 1.0)[:, None]
                of_x *= rstd[:, None]
                at = row[:, None] * channels + column[None, :]
                tl.store(of_x_ptr + at, of_x.to(of_x_ptr.dtype.element_ty), mask=inside)
    at = (sample * parts + part) * channels + column
    if OF_SHIFT:
        tl.store(of_shift_ptr + at, plain, mask=used)
    # Read again: kept over the loop they would take registers.
    if OF_SCALE:
        if WEIGHTED:
            weight = tl.load(weight_ptr + column, mask=used, other=0.0).to(tl.float32)
            tl.store(of_scale_ptr + at, product * weight, mask=used)
        else:
            tl.store(of_scale_ptr + at, product, mask=used)
    if OF_WEIGHT:
        scale = tl.load(scale_ptr + sample * scale_sample + column, mask=used, other=0.0).to(tl.float32)
        tl.store(of_weight_ptr + at, product * (1.0 + scale), mask=used)


@triton.jit
def _gated_residual_fwd_kernel(
    x_ptr, gate_ptr, branch_ptr, out_ptr, tokens, channels, parts, per_part, x_sample, x_token,
    gate_sample, branch_sample, branch_token,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(channels, WIDTH)
    column = tl.program_id(0) % chunks * WIDTH + tl.arange(0, WIDTH)
    part = tl.program_id(0) // chunks % parts
    sample = (tl.program_id(0) // chunks // parts).to(tl.int64)
    used = column < channels
    gate = tl.load(gate_ptr + sample * gate_sample + column, mask=used, other=0.0).to(tl.float32)
    begin = part * per_part
    end = tl.minimum(begin + per_part, tokens)
    for first in range(begin, end, HEIGHT):
        token = (first + tl.arange(0, HEIGHT)).to(tl.int64)[:, None]
        inside = (token < end) & used[None, :]
        at = sample * x_sample + token * x_token + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        at = sample * branch_sample + token * branch_token + column[None, :]
        branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        out = x + gate[None, :] * branch
        at = (sample * tokens + token) * channels + column[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_residual_bwd_kernel(
    grad_ptr,
    gate_ptr,
    branch_ptr,
    of_gate_ptr,  # float32 [B, parts, C]
    of_branch_ptr,
    tokens,
    channels,
    parts,
    per_part,
    grad_sample,
    grad_token,
    gate_sample,
    branch_sample,
    branch_token,
    OF_GATE: tl.constexpr,
    OF_BRANCH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    chunks = tl.cdiv(channels, WIDTH)
    column = tl.program_id(0) % chunks * WIDTH + tl.arange(0, WIDTH)
    part = tl.program_id(0) // chunks % parts
    sample = (tl.program_id(0) // chunks // parts).to(tl.int64)
    used = column < channels
    if OF_BRANCH:
        gate = tl.load(gate_ptr + sample * gate_sample + column, mask=used, other=0.0).to(tl.float32)
    product = tl.zeros((HEIGHT, WIDTH), tl.float32)
    begin = part * per_part
    end = tl.minimum(begin + per_part, tokens)
    for first in range(begin, end, HEIGHT):
        token = (first + tl.arange(0, HEIGHT)).to(tl.int64)[:, None]
        inside = (token < end) & used[None, :]
        at = sample * grad_sample + token * grad_token + column[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if OF_GATE:
            at = sample * branch_sample + token * branch_token + column[None, :]
            product += grad * tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if OF_BRANCH:
            at = (sample * tokens + token) * channels + column[None, :]
            of_branch = (grad * gate[None, :]).to(of_branch_ptr.dtype.element_ty)
            tl.store(of_branch_ptr + at, of_branch, mask=inside)
    if OF_GATE:
        at = (sample * parts + part) * channels + column
        tl.store(of_gate_ptr + at, tl.sum(product, 0), mask=used)


@triton.jit
def _sum_parts_kernel(partials_ptr, out_ptr, channels, parts, WIDTH: tl.constexpr):
    chunks = tl.cdiv(channels, WIDTH)
    column = tl.program_id(0) % chunks * WIDTH + tl.arange(0, WIDTH)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    total = tl.zeros((WIDTH,), tl.float32)
    for part in range(parts):
        at = (row * parts + part) * channels + column
        total += tl.load(partials_ptr + at, mask=column < channels, other=0.0)
    tl.store(out_ptr + row * channels + column, total.to(out_ptr.dtype.element_ty), mask=column < channels)


def norm_modulate_fwd(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    centred: bool,
    eps: float,
    out: Tensor,
    table: Tensor,
) -> None:
    """Fills out [B, N, C] and table [1 or 2, B, N] float32: the mean if centred, and 1 / deviation."""
    batch, tokens, channels = x.shape
    x, scale = _dense(x), _dense(scale)
    added = scale if shift is None else _dense(shift)
    height, width, warps = row_tile(tokens, channels, 2 * TILE_ELEMENTS)
    parts, per_part = split(tokens, 16 * MULTIPROCESSORS // batch, max(8, height))
    with torch.cuda.device_of(x):
        _norm_modulate_fwd_kernel[(batch * parts,)](
            *(x, added, scale, scale if weight is None else weight.contiguous(), out, table[0], table[-1]),
            *(tokens, channels, parts, per_part),
            *(*x.stride()[:2], added.stride(0), scale.stride(0), eps),
            CENTRED=centred,
            SHIFTED=shift is not None,
            WEIGHTED=weight is not None,
            HEIGHT=height,
            WIDTH=width,
            num_warps=warps,
        )


def norm_modulate_bwd(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    table: Tensor,
    of_x: Tensor | None,
    of_shift: bool,
    of_scale: bool,
    of_weight: bool,
) -> Tensor:
    """Fills of_x [B, N, C]; returns [sums, B, parts, C] float32, what parts of samples contribute to the
    gradients of shift, scale and weight, as far as they are asked for, in this order.
    """
    batch, tokens, channels = x.shape
    grad, x, scale = _dense(grad), _dense(x), _dense(scale)
    height, width, warps = row_tile(tokens, channels, TILE_ELEMENTS)
    parts, per_part = split(tokens, 4 * MULTIPROCESSORS // batch, max(16, height))
    partials = table.new_empty((of_shift + of_scale + of_weight, batch, parts, channels))
    planes = iter(partials)
    sums = [next(planes) if asked else table for asked in (of_shift, of_scale, of_weight)]
    with torch.cuda.device_of(x):
        _norm_modulate_bwd_kernel[(batch * parts,)](
            *(grad, x, scale, scale if weight is None else weight.contiguous(), table[0], table[-1]),
            *(grad if of_x is None else of_x, *sums),
            *(tokens, channels, parts, per_part),
            *(*grad.stride()[:2], *x.stride()[:2], scale.stride(0)),
            CENTRED=len(table) == 2,
            WEIGHTED=weight is not None,
            OF_X=of_x is not None,
            OF_SHIFT=of_shift,
            OF_SCALE=of_scale,
            OF_WEIGHT=of_weight,
            HEIGHT=height,
            WIDTH=width,
            STAGES=STAGES,
            num_warps=warps,
        )
    return partials


def gated_residual_fwd(x: Tensor, gate: Tensor, branch: Tensor, out: Tensor) -> None:
    """Fills out [B, N, C], dense."""
    batch, tokens, channels = x.shape
    x, gate, branch = _dense(x), _dense(gate), _dense(branch)
    height, width, parts, per_part = _residual_tiles(batch, tokens, channels)
    with torch.cuda.device_of(x):
        _gated_residual_fwd_kernel[(batch * parts * cdiv(channels, width),)](
            *(x, gate, branch, out, tokens, channels, parts, per_part),
            *(*x.stride()[:2], gate.stride(0), *branch.stride()[:2]),
            HEIGHT=height,
            WIDTH=width,
        )


def gated_residual_bwd(
    grad: Tensor, gate: Tensor, branch: Tensor, of_gate: bool, of_branch: Tensor | None
) -> Tensor:
    """Fills of_branch [B, N, C]; returns [B, parts, C] float32 (parts 0 where not asked for), what parts of
    samples contribute to the gradient of gate.
    """
    batch, tokens, channels = branch.shape
    grad, gate, branch = _dense(grad), _dense(gate), _dense(branch)
    height, width, parts, per_part = _residual_tiles(batch, tokens, channels)
    shape = (batch, parts if of_gate else 0, channels)
    partials = torch.empty(shape, dtype=torch.float32, device=branch.device)
    with torch.cuda.device_of(branch):
        _gated_residual_bwd_kernel[(batch * parts * cdiv(channels, width),)](
            *(grad, gate, branch, partials, grad if of_branch is None else of_branch),
            *(tokens, channels, parts, per_part),
            *(*grad.stride()[:2], gate.stride(0), *branch.stride()[:2]),
            OF_GATE=of_gate,
            OF_BRANCH=of_branch is not None,
            HEIGHT=height,
            WIDTH=width,
        )
    return partials


def sum_parts(partials: Tensor, out: Tensor) -> None:
    """Fills out [..., C] with the sums over parts of partials [..., parts, C]; both dense."""
    channels, parts = out.shape[-1], partials.shape[-2]
    width = min(CHANNELS, triton.next_power_of_2(channels))
    with torch.cuda.device_of(out):
        _sum_parts_kernel[(out.numel() // channels * cdiv(channels, width),)](
            partials, out, channels, parts, WIDTH=width, num_warps=1
        )


def row_tile(tokens: int, channels: int, elements: int) -> tuple[int, int, int]:
    """Tokens and channels (all of them) of a tile of `elements` numbers for 4 warps, and its warps."""
    width = triton.next_power_of_2(channels)
    height = max(1, min(triton.next_power_of_2(tokens), elements // width))
    return height, width, max(4, 4 * width // elements)


def split(tokens: int, wanted: int, least: int) -> tuple[int, int]:
    """Parts of a sample, about as many as `wanted`, and the tokens of each, a multiple of `least`."""
    per_part = cdiv(cdiv(tokens, max(1, wanted)), least) * least
    return cdiv(tokens, per_part), per_part


def _residual_tiles(batch: int, tokens: int, channels: int) -> tuple[int, int, int, int]:
    """Height and width of a tile, parts and tokens per part."""
    width = min(CHANNELS, triton.next_power_of_2(channels))
    height = min(triton.next_power_of_2(tokens), TILE_ELEMENTS // width)
    wanted = 8 * MULTIPROCESSORS // (batch * cdiv(channels, width))
    return height, width, *split(tokens, wanted, height)


def _dense(x: Tensor) -> Tensor:
    """x with its last dimension dense; copied only where that is not so."""
    return x if x.stride(-1) == 1 else x.contiguous()
