"""Gradients of attention.py's kernels: of the queries in one kernel, of keys and values in another.

Weights p = 2^(logit - sums) are computed again from q, k and the kept sums. With g the gradient of a row of
the result and o that row, the gradient of a logit is p (g v - g o), where g o is the same for all keys. With
the mean over heads every head gets g / heads.

No two programs add to one number, so results are the same each time. Gradients of the null key and value
are sums over all rows: each program of the first kernel writes its own part of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmvae.kernels.attention import _load, constants, logit_scale, tile
from vfmvae.kernels.tuned import cdiv


@triton.jit
def _attention_query_grad_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    null_key_ptr,
    null_value_ptr,
    out_ptr,  # [B, N, heads, D]
    sums_ptr,  # [B, heads, N]
    of_q_ptr,  # [B, N, heads, D]
    products_ptr,  # [B, heads, N]: g o
    of_null_key_ptr,  # [B, heads, tiles, D]; written if OF_NULL
    of_null_value_ptr,
    heads,
    length,
    tiles,
    grad_sample,
    grad_head,
    grad_row,
    q_sample,
    q_head,
    q_row,
    k_sample,
    k_head,
    k_row,
    v_sample,
    v_head,
    v_row,
    scale,  # times log2(e)
    of_logit,  # scale without that, divided by the number of heads that were averaged
    of_value,  # 1 divided by that number
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    NULL: tl.constexpr,
    OF_NULL: tl.constexpr,
    ROWS_FIT: tl.constexpr,
    KEYS_FIT: tl.constexpr,
):
    group = (tl.program_id(0) // tiles).to(tl.int64)  # sample * heads + head
    sample, head = group // heads, group % heads
    first = (tl.program_id(0) % tiles).to(tl.int64) * BM
    row, column = tl.arange(0, BM), tl.arange(0, BD)
    rows = length - first
    inside = row < rows
    q_ptr += sample * q_sample + head * q_head + first * q_row
    grad_ptr += sample * grad_sample + head * grad_head + first * grad_row
    start = ((sample * length + first) * heads + head) * D
    q = _load(q_ptr, row, column, q_row, rows, D, ROWS_FIT and D == BD)
    grad = _load(grad_ptr, row, column, grad_row, rows, D, ROWS_FIT and D == BD)
    out = _load(out_ptr + start, row, column, heads * D, rows, D, ROWS_FIT and D == BD)
    product = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(products_ptr + group * length + first + row, product, mask=inside)
    # Rows outside get weights of 0.
    sums = tl.load(sums_ptr + group * length + first + row, mask=inside, other=float("inf"))
    of_q = tl.zeros((BM, BD), tl.float32)
    k_ptr += sample * k_sample + head * k_head
    v_ptr += sample * v_sample + head * v_head
    key = tl.arange(0, BN)
    for start_key in range(0, length, BN):
        k = _load(k_ptr, key, column, k_row, length - start_key, D, KEYS_FIT and D == BD)
        v = _load(v_ptr, key, column, v_row, length - start_key, D, KEYS_FIT and D == BD)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if not KEYS_FIT:
            logit = tl.where((key < length - start_key)[None, :], logit, float("-inf"))
        weight = tl.exp2(logit - sums[:, None])
        of_weight = tl.dot(grad, tl.trans(v), input_precision="ieee")
        part = weight * (of_weight - product[:, None])
        of_q = tl.dot(part.to(k.dtype), k, of_q, input_precision="ieee")
        k_ptr += BN * k_row
        v_ptr += BN * v_row
    if NULL:
        used = column < D
        null_key = tl.load(null_key_ptr + head * D + column, mask=used, other=0.0).to(tl.float32)
        null_value = tl.load(null_value_ptr + head * D + column, mask=used, other=0.0).to(tl.float32)
        wide, wide_grad = q.to(tl.float32), grad.to(tl.float32)
        weight = tl.exp2(tl.sum(wide * null_key[None, :], 1) * scale - sums)
        part = weight * (tl.sum(wide_grad * null_value[None, :], 1) - product)
        of_q += part[:, None] * null_key[None, :]
        if OF_NULL:
            at = (group * tiles + tl.program_id(0) % tiles) * D + column
            of_null_key = tl.sum(part[:, None] * wide, 0) * of_logit
            of_null_value = tl.sum(weight[:, None] * wide_grad, 0) * of_value
            tl.store(of_null_key_ptr + at, of_null_key, mask=used)
            tl.store(of_null_value_ptr + at, of_null_value, mask=used)
    at = of_q_ptr + start + row[:, None] * (heads * D) + column[None, :]
    of_q = (of_q * of_logit).to(of_q_ptr.dtype.element_ty)
    tl.store(at, of_q, mask=inside[:, None] & (column < D)[None, :])


@triton.jit
def _attention_key_grad_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    sums_ptr,  # [B, heads, N]
    products_ptr,  # [B, heads, N]
    of_k_ptr,  # [B, N, heads, D]
    of_v_ptr,
    heads,
    length,
    tiles,
    grad_sample,
    grad_head,
    grad_row,
    q_sample,
    q_head,
    q_row,
    k_sample,
    k_head,
    k_row,
    v_sample,
    v_head,
    v_row,
    scale,  # as above
    of_logit,
    of_value,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROWS_FIT: tl.constexpr,
    KEYS_FIT: tl.constexpr,
):
    group = (tl.program_id(0) // tiles).to(tl.int64)  # sample * heads + head
    sample, head = group // heads, group % heads
    first = (tl.program_id(0) % tiles).to(tl.int64) * BN
    key, column = tl.arange(0, BN), tl.arange(0, BD)
    keys = length - first
    k_ptr += sample * k_sample + head * k_head + first * k_row
    v_ptr += sample * v_sample + head * v_head + first * v_row
    k = _load(k_ptr, key, column, k_row, keys, D, KEYS_FIT and D == BD)
    v = _load(v_ptr, key, column, v_row, keys, D, KEYS_FIT and D == BD)
    of_k = tl.zeros((BN, BD), tl.float32)
    of_v = tl.zeros((BN, BD), tl.float32)
    q_ptr += sample * q_sample + head * q_head
    grad_ptr += sample * grad_sample + head * grad_head
    sums_ptr += group * length
    products_ptr += group * length
    row = tl.arange(0, BM)
    for start_row in range(0, length, BM):
        q = _load(q_ptr, row, column, q_row, length - start_row, D, ROWS_FIT and D == BD)
        grad = _load(grad_ptr, row, column, grad_row, length - start_row, D, ROWS_FIT and D == BD)
        if ROWS_FIT:
            sums = tl.load(sums_ptr + row)
            product = tl.load(products_ptr + row)
        else:  # rows outside get weights of 0
            sums = tl.load(sums_ptr + row, mask=row < length - start_row, other=float("inf"))
            product = tl.load(products_ptr + row, mask=row < length - start_row, other=0.0)
        logit = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        weight = tl.exp2(logit - sums[None, :])
        of_v = tl.dot(weight.to(grad.dtype), grad, of_v, input_precision="ieee")
        of_weight = tl.dot(v, tl.trans(grad), input_precision="ieee")
        part = weight * (of_weight - product[None, :])
        of_k = tl.dot(part.to(q.dtype), q, of_k, input_precision="ieee")
        q_ptr += BM * q_row
        grad_ptr += BM * grad_row
        sums_ptr += BM
        products_ptr += BM
    inside = (key < keys)[:, None] & (column < D)[None, :]
    at = ((sample * length + first) * heads + head) * D + key[:, None] * (heads * D) + column[None, :]
    tl.store(of_k_ptr + at, (of_k * of_logit).to(of_k_ptr.dtype.element_ty), mask=inside)
    tl.store(of_v_ptr + at, (of_v * of_value).to(of_v_ptr.dtype.element_ty), mask=inside)


def attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null: tuple[Tensor, Tensor] | None,
    out: Tensor,
    sums: Tensor,
    averaged: int,
    of_q: Tensor,
    of_k: Tensor,
    of_v: Tensor,
    of_null: tuple[Tensor, Tensor] | None,
) -> None:
    """Fills of_q, of_k, of_v [B, N, heads, d] and of_null, the gradients of `null`, both float32.

    Args:
        grad: [B, heads, N, d], d dense; where heads were averaged, the same memory for each.
        out, sums: as the forward gave them for each head.
        averaged: how many heads were averaged, or 1.
    """
    batch, heads, length, width = q.shape
    products = torch.empty_like(sums)
    numbers = (heads, length)
    strides = tuple(stride for t in (grad, q, k, v) for stride in t.stride()[:3])
    scales = (logit_scale(width), width**-0.5 / averaged, 1 / averaged)

    size = tile("query_grad", width, length, batch * heads, q.dtype)
    tiles = cdiv(length, size.own)
    parts = None
    if of_null is not None:
        parts = torch.empty(2, batch, heads, tiles, width, dtype=torch.float32, device=q.device)
    null_key, null_value = null or (q, q)
    with torch.cuda.device_of(q):
        _attention_query_grad_kernel[(batch * heads * tiles,)](
            *(grad, q, k, v, null_key, null_value, out, sums, of_q, products),
            *((sums, sums) if parts is None else parts),
            *(*numbers, tiles, *strides, *scales),
            NULL=null is not None,
            OF_NULL=parts is not None,
            **constants(size, width, length),
        )
    if of_null is not None and parts is not None:
        for part, result in zip(parts, of_null, strict=True):
            torch.sum(part, (0, 2), out=result)

    size = tile("key_grad", width, length, batch * heads, q.dtype)
    tiles = cdiv(length, size.own)
    with torch.cuda.device_of(q):
        _attention_key_grad_kernel[(batch * heads * tiles,)](
            *(grad, q, k, v, sums, products, of_k, of_v),
            *(*numbers, tiles, *strides, *scales),
            **constants(size, width, length, of_keys=True),
        )
