"""Softmax attention in one pass over the keys: plain, with a learned null key, with the mean over heads.

    out[i] = (e0 w + sum over j of e_j v_j) / (e0 + sum over j of e_j),  e_j = exp(q_i k_j / sqrt(d) - max)

The null key k_0 = u and its value w, [heads, d], are no tokens: they are what the running maximum, sum and
result of every row begin with (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).

q, k, v [B, heads, N, d] in float16, bfloat16 or float32: d dense, the other strides as they are, so the
three parts of one matrix product [B, N, 3, heads, d] are read in place. Results are [B, N, heads, d] in
memory. Products sum in float32, as does the softmax.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmvae.kernels.tuned import MULTIPROCESSORS, cdiv


class Tile(NamedTuple):
    """What a program holds: rows (or keys) of its own, and as many of the others as a step of its loop."""

    own: int
    others: int
    warps: int
    stages: int


TILES = {
    "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2)},
    "head_mean": {64: Tile(128, 64, 8, 3), 128: Tile(64, 64, 8, 2)},
    "query_grad": {64: Tile(128, 64, 8, 2), 128: Tile(64, 32, 8, 2)},
    "key_grad": {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2)},
}
"""Kernel -> largest width of a head -> tile, for 16-bit numbers."""
FLOAT32 = Tile(16, 16, 4, 1)
"""Of float32, whose exact products do not run on the matrix units: for comparison, not for speed."""


@triton.jit
def _load(ptr, row, column, stride, rows, D: tl.constexpr, WHOLE: tl.constexpr):
    """A block of a matrix of `rows` rows and D columns; zeros outside. WHOLE: nothing of it is outside."""
    at = ptr + row[:, None] * stride + column[None, :]
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=(row < rows)[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _attend(
    q,  # [BM, BD]
    k_ptr,
    v_ptr,
    null_key_ptr,
    null_value_ptr,
    length,
    k_row,
    v_row,
    scale,  # times log2(e)
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    NULL: tl.constexpr,
    KEYS_FIT: tl.constexpr,
):
    """The result [BM, BD] of one head and log2 of the sum of 2^logit, [BM]."""
    column = tl.arange(0, BD)
    if NULL:
        null_key = tl.load(null_key_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        null_value = tl.load(null_value_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        most = tl.sum(q.to(tl.float32) * null_key[None, :], 1) * scale
        total = tl.full((BM,), 1.0, tl.float32)
        mean = tl.zeros((BM, BD), tl.float32) + null_value[None, :]
    else:
        most = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        mean = tl.zeros((BM, BD), tl.float32)
    row = tl.arange(0, BN)
    for first in range(0, length, BN):
        k = _load(k_ptr, row, column, k_row, length - first, D, KEYS_FIT and D == BD)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if not KEYS_FIT:
            logit = tl.where((row < length - first)[None, :], logit, float("-inf"))
        new = tl.maximum(most, tl.max(logit, 1))
        # Where no logit is above -inf, which takes infinite inputs, the difference to it would be NaN.
        shift = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(logit - shift[:, None])
        shrink = tl.exp2(most - shift)
        total = total * shrink + tl.sum(weight, 1)
        v = _load(v_ptr, row, column, v_row, length - first, D, KEYS_FIT and D == BD)
        mean = tl.dot(weight.to(v.dtype), v, mean * shrink[:, None], input_precision="ieee")
        most = new
        k_ptr += BN * k_row
        v_ptr += BN * v_row
    return mean / total[:, None], most + tl.log2(total)


@triton.jit
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    null_key_ptr,
    null_value_ptr,
    out_ptr,  # [B, N, heads, D]
    sums_ptr,  # [B, heads, N]: log2 of the sum of 2^logit; written if KEEP
    heads,
    length,
    tiles,
    q_sample,
    q_head,
    q_row,
    k_sample,
    k_head,
    k_row,
    v_sample,
    v_head,
    v_row,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    NULL: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS_FIT: tl.constexpr,
    KEYS_FIT: tl.constexpr,
):
    group = (tl.program_id(0) // tiles).to(tl.int64)  # sample * heads + head
    sample, head = group // heads, group % heads
    first = (tl.program_id(0) % tiles).to(tl.int64) * BM
    row, column = tl.arange(0, BM), tl.arange(0, BD)
    q_ptr += sample * q_sample + head * q_head + first * q_row
    q = _load(q_ptr, row, column, q_row, length - first, D, ROWS_FIT and D == BD)
    out, sums = _attend(
        q,
        k_ptr + sample * k_sample + head * k_head,
        v_ptr + sample * v_sample + head * v_head,
        null_key_ptr + head * D,
        null_value_ptr + head * D,
        length,
        k_row,
        v_row,
        scale,
        D,
        BD,
        BM,
        BN,
        NULL,
        KEYS_FIT,
    )
    inside = (row < length - first)[:, None] & (column < D)[None, :]
    at = out_ptr + ((sample * length + first) * heads + head) * D
    at = at + row[:, None] * (heads * D) + column[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(sums_ptr + group * length + first + row, sums, mask=row < length - first)


@triton.jit
def _attention_mean_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    null_key_ptr,
    null_value_ptr,
    out_ptr,  # [B, N, D]
    each_ptr,  # [B, N, heads, D], the result of each head; written if KEEP
    sums_ptr,  # [B, heads, N], as above
    heads,
    length,
    tiles,
    q_sample,
    q_head,
    q_row,
    k_sample,
    k_head,
    k_row,
    v_sample,
    v_head,
    v_row,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    NULL: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS_FIT: tl.constexpr,
    KEYS_FIT: tl.constexpr,
):
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BM
    row, column = tl.arange(0, BM), tl.arange(0, BD)
    inside = (row < length - first)[:, None] & (column < D)[None, :]
    q_ptr += sample * q_sample + first * q_row
    k_ptr += sample * k_sample
    v_ptr += sample * v_sample
    each_ptr += (sample * length + first) * heads * D
    sums_ptr += sample * heads * length + first
    mean = tl.zeros((BM, BD), tl.float32)
    for _ in range(0, heads):
        q = _load(q_ptr, row, column, q_row, length - first, D, ROWS_FIT and D == BD)
        out, sums = _attend(
            q,
            k_ptr,
            v_ptr,
            null_key_ptr,
            null_value_ptr,
            length,
            k_row,
            v_row,
            scale,
            D,
            BD,
            BM,
            BN,
            NULL,
            KEYS_FIT,
        )
        mean += out
        if KEEP:
            at = each_ptr + row[:, None] * (heads * D) + column[None, :]
            tl.store(at, out.to(each_ptr.dtype.element_ty), mask=inside)
            tl.store(sums_ptr + row, sums, mask=row < length - first)
        q_ptr += q_head
        k_ptr += k_head
        v_ptr += v_head
        null_key_ptr += D
        null_value_ptr += D
        each_ptr += D
        sums_ptr += length
    at = out_ptr + (sample * length + first) * D + row[:, None] * D + column[None, :]
    tl.store(at, (mean / heads).to(out_ptr.dtype.element_ty), mask=inside)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, null: tuple[Tensor, Tensor] | None, out: Tensor, sums: Tensor | None
) -> None:
    """Fills out [B, N, heads, d] and sums [B, heads, N], float32; `null`: key and value [heads, d], dense."""
    batch, heads, length, width = q.shape
    size = tile("forward", width, length, batch * heads, q.dtype)
    tiles = cdiv(length, size.own)
    null_key, null_value = null or (q, q)
    with torch.cuda.device_of(q):
        _attention_fwd_kernel[(batch * heads * tiles,)](
            *(q, k, v, null_key, null_value, out, out if sums is None else sums),
            *(heads, length, tiles),
            *(stride for t in (q, k, v) for stride in t.stride()[:3]),
            logit_scale(width),
            NULL=null is not None,
            KEEP=sums is not None,
            **constants(size, width, length),
        )


def attention_mean_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null: tuple[Tensor, Tensor] | None,
    out: Tensor,
    kept: tuple[Tensor, Tensor] | None,
) -> None:
    """Fills out [B, N, d]; `kept`: the results of each head and the sums, filled as by attention_fwd."""
    batch, heads, length, width = q.shape
    size = tile("head_mean", width, length, batch, q.dtype)
    tiles = cdiv(length, size.own)
    null_key, null_value = null or (q, q)
    with torch.cuda.device_of(q):
        _attention_mean_fwd_kernel[(batch * tiles,)](
            *(q, k, v, null_key, null_value, out, *(kept or (out, out))),
            *(heads, length, tiles),
            *(stride for t in (q, k, v) for stride in t.stride()[:3]),
            logit_scale(width),
            NULL=null is not None,
            KEEP=kept is not None,
            **constants(size, width, length),
        )


def logit_scale(width: int) -> float:
    """What makes of q k the power of two that enters the softmax."""
    return width**-0.5 * math.log2(math.e)


def tile(kernel: str, width: int, length: int, groups: int, dtype: torch.dtype) -> Tile:
    """The tile for `groups` sequences of `length` rows: smaller where it would be empty or programs few."""
    if dtype == torch.float32:
        return FLOAT32
    table = TILES[kernel]
    found = table[min(limit for limit in table if limit >= width)]
    while found.own > 64 and (length <= found.own // 2 or groups * cdiv(length, found.own) < MULTIPROCESSORS):
        found = found._replace(own=found.own // 2)
    return found


def constants(size: Tile, width: int, length: int, of_keys: bool = False) -> dict[str, object]:
    """What a kernel is compiled for; `of_keys`: what is its own are keys, else rows."""
    rows, keys = (size.others, size.own) if of_keys else (size.own, size.others)
    return {
        "D": width,
        "BD": max(16, triton.next_power_of_2(width)),
        "BM": rows,
        "BN": keys,
        "ROWS_FIT": length % rows == 0,
        "KEYS_FIT": length % keys == 0,
        "num_warps": size.warps,
        "num_stages": size.stages,
    }
