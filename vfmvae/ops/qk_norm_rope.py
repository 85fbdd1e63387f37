"""From the joint projection of self-attention to its queries and keys: norm per head, then rotary positions
(RoFormer, arXiv 2104.09864).

Shapes: qkv [B, N, 3 * heads * d], queries before keys before values, heads side by side in each.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops.arguments import check_tensors
from vfmvae.ops.dispatch import Fused, Op


class QKNorm(NamedTuple):
    """A norm over the head dimension d: weight [d], bias [d] or None."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    kind: Literal["layer", "rms"]


Rotation = tuple[Tensor, Tensor]


def qk_norm_rope(
    qkv: Tensor,
    heads: int,
    query_norm: QKNorm | None,
    key_norm: QKNorm | None,
    rotation: Rotation | None = None,
    *,
    fused: Fused = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of self-attention; the first two normalised over d, then rotated.

    Args:
        qkv: [B, N, 3 * heads * d].
        query_norm, key_norm: None for none.
        rotation: (cos, sin), [N, d] float32: x cos + turned(x) sin, where turned makes (-x2, x1) of each pair
            (x1, x2) of neighbours. A token that has no position has rows of 1 and 0. No gradient of it is
            computed. None for no rotation.
        fused: "triton" reads qkv once, with arithmetic in float32, and keeps it for the backward, which
            writes the gradient of qkv in one pass.

    Returns:
        query, key, value: [B, heads, N, d] in qkv.dtype, of any strides. The value may be a view of qkv.

    Raises:
        ValueError: tensors of other shapes or on other devices, an unknown norm, an odd d with a rotation.
    """
    if qkv.ndim != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be floating point [B, N, 3 C], not {qkv.dtype} {list(qkv.shape)}")
    if heads < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"qkv has {qkv.shape[2]} channels; they must be 3 * {heads} heads * d")
    width = qkv.shape[2] // (3 * heads)
    for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
        if norm is None:
            continue
        if norm.kind not in ("layer", "rms"):
            raise ValueError(f'{name} is of kind {norm.kind!r}; it must be "layer" or "rms"')
        check_tensors(qkv, (f"{name}.weight", norm.weight, (width,)), (f"{name}.bias", norm.bias, (width,)))
    if rotation is not None:
        if width % 2:
            raise ValueError(f"a rotation needs heads of even width, not {width}")
        shape = (qkv.shape[1], width)
        check_tensors(qkv, ("the rotation's cos", rotation[0], shape), ("its sin", rotation[1], shape))
    return _QK_NORM_ROPE(fused, qkv, heads, query_norm, key_norm, rotation)


def qk_norm_rope_reference(
    qkv: Tensor,
    heads: int,
    query_norm: QKNorm | None,
    key_norm: QKNorm | None,
    rotation: Rotation | None,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return _prepared(query, query_norm, rotation), _prepared(key, key_norm, rotation), value


def _prepared(x: Tensor, norm: QKNorm | None, rotation: Rotation | None) -> Tensor:
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm is not None:
        weight, bias = norm.weight.to(y.dtype), None if norm.bias is None else norm.bias.to(y.dtype)
        if norm.kind == "layer":
            y = F.layer_norm(y, y.shape[-1:], weight, bias, norm.eps)
        else:
            y = F.rms_norm(y, y.shape[-1:], weight, norm.eps)
            y = y if bias is None else y + bias
    if rotation is not None:
        cos, sin = (table.detach().to(y.dtype) for table in rotation)
        y = y * cos + _turned(y) * sin
    return y.to(x.dtype)


def _turned(x: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), dim=-1).flatten(-2)


_QK_NORM_ROPE = Op("qk_norm_rope", qk_norm_rope_reference)
