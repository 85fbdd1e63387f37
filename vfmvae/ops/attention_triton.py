"""Attention by Triton kernels, as an operation that torch knows.

    query, key, value [B, heads, N, d], null_key, null_value [heads, d]
        -> [B, heads, N, d], which lies in memory as [B, N, heads, d], or with the mean over heads [B, N, d]

Kept for the backward pass are the arguments, each head's result and one number per row of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.gradients import weight_gradients_wanted
from vfmvae.ops.operation import Autograd, operation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 128


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor | None,
    null_value: Tensor | None,
    head_mean: bool,
) -> Tensor:
    given = (query, key, value, null_key, null_value)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given if t is not None)
    return _attention(*given, head_mean, keep)[0]


def why_not(query: Tensor) -> str | None:
    if query.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {query.dtype}"
    if query.shape[-1] > LARGEST_HEAD:
        return f"it takes heads of at most {LARGEST_HEAD} numbers, not {query.shape[-1]}"
    absent = native.why_no_triton(query)
    if absent is not None or query.device.type != "cuda":
        return absent
    return _card_objection(query.device.index or 0)


@torch.compiler.assume_constant_result
def _card_objection(device_index: int) -> str | None:
    if not torch.cuda.is_available():
        return None  # a tensor without memory
    major, minor = torch.cuda.get_device_capability(device_index)
    return None if major >= 8 else f"it is made for cards from sm_80 on, and this is sm_{major}{minor}"


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor | None,
    null_value: Tensor | None,
    head_mean: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result; if `keep`, log2 of the sums of 2^logit, [B, heads, N] in float32, and with the mean over
    heads the result of each.
    """
    from vfmvae.kernels.attention import attention_fwd, attention_mean_fwd

    found = _fake(query, key, value, null_key, null_value, head_mean, keep)
    if query.numel() == 0:
        return found
    out, sums, each = found
    rows = [_dense_rows(t) for t in (query, key, value)]
    null = _null(null_key, null_value)
    if head_mean:
        attention_mean_fwd(*rows, null, out, (each.transpose(1, 2), sums) if keep else None)
    else:
        attention_fwd(*rows, null, out.transpose(1, 2), sums if keep else None)
    return found


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor | None,
    null_value: Tensor | None,
    head_mean: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, width = query.shape
    sums = query.new_empty((batch, heads, length) if keep else 0, dtype=torch.float32)
    if not head_mean:
        return _tokens_first(query), sums, query.new_empty(0)
    out = query.new_empty((batch, length, width))
    return out, sums, _tokens_first(query) if keep else query.new_empty(0)


def _run_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor | None,
    null_value: Tensor | None,
    each: Tensor,
    sums: Tensor,
    head_mean: bool,
    of_null: bool,
) -> list[Tensor]:
    """Gradients of query, key, value and, if `of_null`, of null_key and null_value in float32."""
    from vfmvae.kernels.attention_backward import attention_bwd

    found = _backward_fake(grad, query, key, value, null_key, null_value, each, sums, head_mean, of_null)
    if query.numel() == 0:
        return [t.zero_() for t in found]
    heads, grad = query.shape[1], grad.to(query.dtype)
    if head_mean:
        grad = grad.contiguous()[:, None].expand(-1, heads, -1, -1)
    rows = [_dense_rows(t) for t in (grad, query, key, value)]
    of_rows = [t.transpose(1, 2) for t in found[:3]]
    attention_bwd(
        *rows,
        _null(null_key, null_value),
        _dense_tokens(each),
        sums,
        heads if head_mean else 1,
        *of_rows,
        (found[3], found[4]) if of_null else None,
    )
    return found


def _backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor | None,
    null_value: Tensor | None,
    each: Tensor,
    sums: Tensor,
    head_mean: bool,
    of_null: bool,
) -> list[Tensor]:
    batch, heads, length, width = query.shape
    found = [_tokens_first(query) for _ in range(3)]
    if of_null:
        found += [query.new_empty((heads, width), dtype=torch.float32) for _ in range(2)]
    return found


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *given, ctx.head_mean, ctx.kept = inputs
    out, sums, each = output
    ctx.mark_non_differentiable(sums, each)
    ctx.save_for_backward(*given, each if ctx.head_mean else out, sums)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.kept:
        raise RuntimeError("attention ran where no gradients were to be computed, and kept nothing for them")
    needs = ctx.needs_input_grad
    of_null = any(needs[3:5]) and weight_gradients_wanted()
    saved = ctx.saved_tensors
    found: list[Tensor | None] = [*_attention_backward(grad, *saved, ctx.head_mean, of_null)]
    found += [None] * (len(needs) - len(found))
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


def _tokens_first(x: Tensor) -> Tensor:
    """Memory for [B, heads, N, d] in which a token's heads lie together."""
    batch, heads, length, width = x.shape
    return x.new_empty((batch, length, heads, width)).transpose(1, 2)


def _dense_rows(x: Tensor) -> Tensor:
    """[B, heads, N, d] with dense d; copied only where it must be."""
    return x if x.stride(3) == 1 else x.contiguous()


def _dense_tokens(x: Tensor) -> Tensor:
    """[B, heads, N, d] as dense [B, N, heads, d]."""
    return x.transpose(1, 2).contiguous()


def _null(key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if key is None or value is None else (key.contiguous(), value.contiguous())


_DEVICES = ("cpu", "cuda")
_attention_backward = operation("attention_backward", _run_backward, _backward_fake, _DEVICES)
_attention = operation("attention", _run, _fake, _DEVICES, Autograd(_setup, _backward))
