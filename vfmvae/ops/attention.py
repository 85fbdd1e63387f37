"""Softmax attention as the tokenizer uses it: plain, with a learned null key, with the mean over heads.

Shapes: query, key, value [B, heads, N, d].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops.dispatch import Fused, Implementation, Op, always


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor | None = None,
    null_value: Tensor | None = None,
    head_mean: bool = False,
    *,
    fused: Fused = True,
) -> Tensor:
    """softmax(query key^T / sqrt(d)) value.

    Args:
        query, key, value: [B, heads, N, d], same dtype.
        null_key, null_value: [heads, d], one more key and value that every query may attend to; both or none.
        head_mean: average the heads' results.

    Returns:
        [B, heads, N, d], or [B, N, d] with `head_mean`, in query.dtype.
    """
    if (null_key is None) != (null_value is None):
        raise ValueError("null_key and null_value come together: one of them is missing")
    return _ATTENTION(fused, query, key, value, null_key, null_value, head_mean)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor | None,
    null_value: Tensor | None,
    head_mean: bool,
) -> Tensor:
    key, value = _with_null(key, null_key), _with_null(value, null_value)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = (query @ key.transpose(-2, -1)).to(wide) * query.shape[-1] ** -0.5  # [B, heads, N, N(+1)]
    out = logits.softmax(dim=-1).to(value.dtype) @ value
    return out.mean(dim=1) if head_mean else out


def _attention_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor | None,
    null_value: Tensor | None,
    head_mean: bool,
) -> Tensor:
    out = F.scaled_dot_product_attention(query, _with_null(key, null_key), _with_null(value, null_value))
    return out.mean(dim=1) if head_mean else out


def _with_null(tokens: Tensor, null: Tensor | None) -> Tensor:
    if null is None:
        return tokens
    first = null.to(tokens.dtype)[None, :, None, :].expand(tokens.shape[0], -1, 1, -1)
    return torch.cat([first, tokens], dim=2)


_ATTENTION = Op("attention", attention_reference, (Implementation("sdpa", _attention_sdpa, always),))
