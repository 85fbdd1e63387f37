"""Queries, keys and values from a joint projection: norm over the head dimension, then rotary positions; and
the gradients.

    n = (x - mean) / deviation, or x / root mean square;   y = weight n + bias
    out = y cos + turned(y) sin,  turned: (x1, x2) -> (-x2, x1) of neighbours
    grad of y = grad cos - turned(grad sin)

qkv [B, N, 3 heads d] in float16, bfloat16 or float32 with dense channels; queries and keys [B, heads, N, d];
cos, sin [N, d] float32. Arithmetic and sums in float32. A program takes a few tokens of one sample and a part
of the heads, whose rows it holds in registers one head after another, beside the tokens' cos and sin. The
gradients of weight and bias are sums over samples, tokens and heads: a program writes what it contributes,
and that is added in a fixed order, so results do not change from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vfmvae.kernels.tuned import MULTIPROCESSORS, cdiv

TILE_ELEMENTS = 2048  # 16 per thread with 4 warps
STAGES = 2
"""Of loads: the next head is fetched while this one is worked on."""
KINDS = {"": 0, "layer": 1, "rms": 2}
"""Of norms, as the kernels know them."""


class Norm(NamedTuple):
    """A norm over d numbers: weight and bias [d] or None; kind is one of KINDS."""

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@triton.jit
def _turned(x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    first, second = tl.split(x.reshape(HEIGHT, WIDTH // 2, 2))
    return tl.join(-second, first).reshape(HEIGHT, WIDTH)


@triton.jit
def _normed(x, inside, eps, KIND: tl.constexpr, D: tl.constexpr):
    """n, and 1 / deviation of each row."""
    if KIND == 1:
        x = tl.where(inside, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    return x * rstd[:, None], rstd


@triton.jit
def _prepare(
    x_ptr, out_ptr, weight_ptr, bias_ptr, cos, sin, token, tokens, x_token, out_token, first_head, last_head,
    eps, KIND: tl.constexpr, BIASED: tl.constexpr, ROTATED: tl.constexpr, D: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Queries or keys. x and the output begin at those of this sample."""
    column = tl.arange(0, WIDTH)
    inside = (token < tokens)[:, None] & (column < D)[None, :]
    if KIND != 0:
        weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    if BIASED:
        bias = tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    for head in tl.range(first_head, last_head, num_stages=STAGES):
        at = token[:, None] * x_token + head * D + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if KIND != 0:
            x, _ = _normed(x, inside, eps, KIND, D)
            x *= weight[None, :]
        if BIASED:
            x += bias[None, :]
        if ROTATED:
            x = x * cos + _turned(x, HEIGHT, WIDTH) * sin
        at = token[:, None] * out_token + head * D + column[None, :]
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _prepare_backward(
    grad_ptr, x_ptr, of_x_ptr, partials_ptr, weight_ptr, cos, sin, token, tokens, grad_head, grad_token,
    x_token, of_x_token, first_head, last_head, eps,
    KIND: tl.constexpr, ROTATED: tl.constexpr, OF_X: tl.constexpr, OF_WEIGHT: tl.constexpr,
    OF_BIAS: tl.constexpr, D: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of queries or keys. Gradients and x begin at those of this sample; partials [2, d]: weight, bias."""
    column = tl.arange(0, WIDTH)
    inside = (token < tokens)[:, None] & (column < D)[None, :]
    if KIND != 0:
        weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    plain = tl.zeros((HEIGHT, WIDTH), tl.float32)
    product = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for head in tl.range(first_head, last_head, num_stages=STAGES):
        at = head * grad_head + token[:, None] * grad_token + column[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if ROTATED:
            grad = grad * cos - _turned(grad * sin, HEIGHT, WIDTH)
        if OF_BIAS:
            plain += grad
        if KIND != 0:
            at = token[:, None] * x_token + head * D + column[None, :]
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            normed, rstd = _normed(x, inside, eps, KIND, D)
            if OF_WEIGHT:
                product += tl.where(inside, grad * normed, 0.0)
            grad *= weight[None, :]
            along = tl.sum(grad * normed, 1) / D
            if KIND == 1:
                grad -= (tl.sum(grad, 1) / D)[:, None]
            grad = (grad - normed * along[:, None]) * rstd[:, None]
        if OF_X:
            at = token[:, None] * of_x_token + head * D + column[None, :]
            tl.store(of_x_ptr + at, grad.to(of_x_ptr.dtype.element_ty), mask=inside)
    if OF_WEIGHT:
        tl.store(partials_ptr + column, tl.sum(product, 0), mask=column < D)
    if OF_BIAS:
        tl.store(partials_ptr + D + column, tl.sum(plain, 0), mask=column < D)


@triton.jit
def _copy_heads(
    x_ptr, out_ptr, token, tokens, x_head, x_token, out_head, out_token, first_head, last_head,
    D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    inside = (token < tokens)[:, None] & (column < D)[None, :]
    for head in range(first_head, last_head):
        x = tl.load(x_ptr + head * x_head + token[:, None] * x_token + column[None, :], mask=inside)
        at = head * out_head + token[:, None] * out_token + column[None, :]
        tl.store(out_ptr + at, x, mask=inside)


@triton.jit
def _place(tokens, heads, heads_each, HEIGHT: tl.constexpr):
    """The program's sample, tokens [HEIGHT], first head and the one after its last."""
    groups = tl.cdiv(heads, heads_each)
    blocks = tl.cdiv(tokens, HEIGHT)
    first_head = tl.program_id(0) % groups * heads_each
    token = tl.program_id(0) // groups % blocks * HEIGHT + tl.arange(0, HEIGHT)
    sample = tl.program_id(0) // groups // blocks
    return sample.to(tl.int64), token.to(tl.int64), first_head, tl.minimum(first_head + heads_each, heads)


@triton.jit
def _table(ptr, token, tokens, ROTATED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of cos or sin; without a rotation nothing reads them."""
    column = tl.arange(0, WIDTH)
    inside = (token < tokens)[:, None] & (column < D)[None, :]
    table = token
    if ROTATED:
        table = tl.load(ptr + token[:, None] * D + column[None, :], mask=inside, other=0.0)
    return table


@triton.jit
def _qk_norm_rope_fwd_kernel(
    qkv_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    query_weight_ptr,
    query_bias_ptr,
    key_weight_ptr,
    key_bias_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    heads,
    heads_each,
    qkv_sample,
    qkv_token,
    query_eps,
    key_eps,
    QUERY_KIND: tl.constexpr,
    KEY_KIND: tl.constexpr,
    QUERY_BIASED: tl.constexpr,
    KEY_BIASED: tl.constexpr,
    ROTATED: tl.constexpr,
    OF_VALUE: tl.constexpr,
    D: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    sample, token, first, last = _place(tokens, heads, heads_each, HEIGHT)
    cos = _table(cos_ptr, token, tokens, ROTATED, D, WIDTH)
    sin = _table(sin_ptr, token, tokens, ROTATED, D, WIDTH)
    x_ptr = qkv_ptr + sample * qkv_sample
    out = sample * heads * tokens * D
    _prepare(
        x_ptr, query_ptr + out, query_weight_ptr, query_bias_ptr, cos, sin, token, tokens, qkv_token,
        heads * D, first, last, query_eps, QUERY_KIND, QUERY_BIASED, ROTATED, D, HEIGHT, WIDTH, STAGES,
    )  # fmt: skip
    _prepare(
        x_ptr + heads * D, key_ptr + out, key_weight_ptr, key_bias_ptr, cos, sin, token, tokens, qkv_token,
        heads * D, first, last, key_eps, KEY_KIND, KEY_BIASED, ROTATED, D, HEIGHT, WIDTH, STAGES,
    )  # fmt: skip
    if OF_VALUE:
        _copy_heads(
            x_ptr + 2 * heads * D, value_ptr + out, token, tokens, D, qkv_token, D, heads * D, first, last,
            D, WIDTH,
        )  # fmt: skip


@triton.jit
def _qk_norm_rope_bwd_kernel(
    of_query_ptr,
    of_key_ptr,
    of_value_ptr,
    qkv_ptr,
    of_qkv_ptr,
    partials_ptr,  # float32 [programs, 4, d]: of the queries' weight and bias, of the keys'
    query_weight_ptr,
    key_weight_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    heads,
    heads_each,
    query_sample,
    query_head,
    query_token,
    key_sample,
    key_head,
    key_token,
    value_sample,
    value_head,
    value_token,
    qkv_sample,
    qkv_token,
    query_eps,
    key_eps,
    QUERY_KIND: tl.constexpr,
    KEY_KIND: tl.constexpr,
    ROTATED: tl.constexpr,
    OF_QKV: tl.constexpr,
    OF_QUERY_WEIGHT: tl.constexpr,
    OF_QUERY_BIAS: tl.constexpr,
    OF_KEY_WEIGHT: tl.constexpr,
    OF_KEY_BIAS: tl.constexpr,
    D: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    sample, token, first, last = _place(tokens, heads, heads_each, HEIGHT)
    cos = _table(cos_ptr, token, tokens, ROTATED, D, WIDTH)
    sin = _table(sin_ptr, token, tokens, ROTATED, D, WIDTH)
    x_ptr = qkv_ptr + sample * qkv_sample
    of_x_token = 3 * heads * D
    of_x_ptr = of_qkv_ptr + sample * tokens * of_x_token
    partials_ptr += tl.program_id(0).to(tl.int64) * 4 * D
    if OF_QKV or OF_QUERY_WEIGHT or OF_QUERY_BIAS:
        _prepare_backward(
            of_query_ptr + sample * query_sample, x_ptr, of_x_ptr, partials_ptr, query_weight_ptr, cos, sin,
            token, tokens, query_head, query_token, qkv_token, of_x_token, first, last, query_eps,
            QUERY_KIND, ROTATED, OF_QKV, OF_QUERY_WEIGHT, OF_QUERY_BIAS, D, HEIGHT, WIDTH, STAGES,
        )  # fmt: skip
    if OF_QKV or OF_KEY_WEIGHT or OF_KEY_BIAS:
        _prepare_backward(
            of_key_ptr + sample * key_sample, x_ptr + heads * D, of_x_ptr + heads * D, partials_ptr + 2 * D,
            key_weight_ptr, cos, sin, token, tokens, key_head, key_token, qkv_token, of_x_token, first, last,
            key_eps, KEY_KIND, ROTATED, OF_QKV, OF_KEY_WEIGHT, OF_KEY_BIAS, D, HEIGHT, WIDTH, STAGES,
        )  # fmt: skip
    if OF_QKV:
        _copy_heads(
            of_value_ptr + sample * value_sample, of_x_ptr + 2 * heads * D, token, tokens,
            value_head, value_token, D, of_x_token, first, last, D, WIDTH,
        )  # fmt: skip


def qk_norm_rope_fwd(
    qkv: Tensor,
    heads: int,
    query_norm: Norm,
    key_norm: Norm,
    cos: Tensor | None,
    sin: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
) -> None:
    """Fills query, key and, where there is one, value [B, heads, N, d], each dense as [B, N, heads, d]."""
    batch, tokens, channels = qkv.shape
    qkv = _dense(qkv)
    tile = tile_of(batch, tokens, heads, channels // (3 * heads))
    with torch.cuda.device_of(qkv):
        _qk_norm_rope_fwd_kernel[(tile.programs,)](
            *(qkv, query, key, query if value is None else value),
            *(_or(t, qkv) for norm in (query_norm, key_norm) for t in (norm.weight, norm.bias)),
            *(_table_of(cos, qkv), _table_of(sin, qkv), tokens, heads, tile.heads),
            *(*qkv.stride()[:2], query_norm.eps, key_norm.eps),
            QUERY_KIND=KINDS[query_norm.kind],
            KEY_KIND=KINDS[key_norm.kind],
            QUERY_BIASED=query_norm.bias is not None,
            KEY_BIASED=key_norm.bias is not None,
            ROTATED=cos is not None,
            OF_VALUE=value is not None,
            D=channels // (3 * heads),
            HEIGHT=tile.height,
            WIDTH=tile.width,
            STAGES=STAGES,
        )


def qk_norm_rope_bwd(
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    qkv: Tensor,
    query_norm: Norm,
    key_norm: Norm,
    cos: Tensor | None,
    sin: Tensor | None,
    of_qkv: Tensor | None,
    of_weights: Sequence[bool],
) -> Tensor:
    """Fills of_qkv [B, N, 3 heads d], dense; returns float32 [programs, 4, d], what programs contribute to
    the gradients of the queries' weight and bias and the keys', as far as they are asked for.
    """
    batch, heads, tokens, width = of_query.shape
    qkv, of_query, of_key, of_value = (_dense(t) for t in (qkv, of_query, of_key, of_value))
    tile = tile_of(batch, tokens, heads, width)
    shape = (tile.programs if any(of_weights) else 0, 4, width)
    partials = torch.empty(shape, dtype=torch.float32, device=qkv.device)
    with torch.cuda.device_of(qkv):
        _qk_norm_rope_bwd_kernel[(tile.programs,)](
            *(of_query, of_key, of_value, qkv, _or(of_qkv, qkv), partials),
            *(_or(query_norm.weight, qkv), _or(key_norm.weight, qkv)),
            *(_table_of(cos, qkv), _table_of(sin, qkv), tokens, heads, tile.heads),
            *(*of_query.stride()[:3], *of_key.stride()[:3], *of_value.stride()[:3], *qkv.stride()[:2]),
            *(query_norm.eps, key_norm.eps),
            QUERY_KIND=KINDS[query_norm.kind],
            KEY_KIND=KINDS[key_norm.kind],
            ROTATED=cos is not None,
            OF_QKV=of_qkv is not None,
            OF_QUERY_WEIGHT=of_weights[0],
            OF_QUERY_BIAS=of_weights[1],
            OF_KEY_WEIGHT=of_weights[2],
            OF_KEY_BIAS=of_weights[3],
            D=width,
            HEIGHT=tile.height,
            WIDTH=tile.width,
            STAGES=STAGES,
        )
    return partials


class Tile(NamedTuple):
    """Tokens and numbers of a head that a program holds at once, heads that it takes, and all programs."""

    height: int
    width: int
    heads: int
    programs: int


def tile_of(batch: int, tokens: int, heads: int, width: int) -> Tile:
    padded = max(2, triton.next_power_of_2(width))
    height = min(triton.next_power_of_2(tokens), TILE_ELEMENTS // padded)
    blocks = batch * cdiv(tokens, height)
    heads_each = cdiv(heads, min(heads, cdiv(8 * MULTIPROCESSORS, blocks)))
    return Tile(height, padded, heads_each, blocks * cdiv(heads, heads_each))


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is given where it reads nothing."""
    return other if tensor is None else _dense(tensor)


def _table_of(table: Tensor | None, other: Tensor) -> Tensor:
    return other if table is None else table.float().contiguous()


def _dense(x: Tensor) -> Tensor:
    """x with its last dimension dense; copied only where that is not so."""
    return x if x.stride(-1) == 1 else x.contiguous()
