"""From the joint projection of self-attention to its queries and keys: norm per head, then rotary positions
(RoFormer, arXiv 2104.09864).

Shapes: qkv [B, N, 3 * heads * d], queries before keys before values, heads side by side in each.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.arguments import check_tensors
from vfmvae.ops.dispatch import Fused, Implementation, Op
from vfmvae.ops.gradients import weight_gradients_wanted
from vfmvae.ops.operation import Autograd, operation

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_WIDTH = 512
"""Of a head: a program holds one for a few tokens in registers."""


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
        query, key, value: [B, heads, N, d] in qkv.dtype, of any strides. The value may be a view of qkv, and
        without norms and rotation all three are.

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
    if query_norm is key_norm is rotation is None and not isinstance(fused, str):
        query, key, value = _parts(qkv, heads)  # as they lie in it
        return query, key, value
    return _QK_NORM_ROPE(fused, qkv, heads, query_norm, key_norm, rotation)


def qk_norm_rope_reference(
    qkv: Tensor,
    heads: int,
    query_norm: QKNorm | None,
    key_norm: QKNorm | None,
    rotation: Rotation | None,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = _parts(qkv, heads)
    return _prepared(query, query_norm, rotation), _prepared(key, key_norm, rotation), value


def _parts(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values [B, heads, N, d], views of qkv."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


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


def _run(
    qkv: Tensor,
    heads: int,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    query_kind: str,
    key_kind: str,
    query_eps: float,
    key_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A kind of "" stands for no norm."""
    query, key, value = (_empty_heads(qkv, heads) for _ in range(3))
    norms = (query_kind, query_weight, query_bias, query_eps), (key_kind, key_weight, key_bias, key_eps)
    _fill(qkv, heads, *norms, cos, sin, query, key, value)
    return query, key, value


def _run_eager(
    qkv: Tensor,
    heads: int,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    query_kind: str,
    key_kind: str,
    query_eps: float,
    key_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The value is a view, which neither costs a copy nor is kept a second time for the backward."""
    query, key = (_empty_heads(qkv, heads) for _ in range(2))
    norms = (query_kind, query_weight, query_bias, query_eps), (key_kind, key_weight, key_bias, key_eps)
    _fill(qkv, heads, *norms, cos, sin, query, key, None)
    return query, key, qkv.unflatten(2, (3, heads, -1))[:, :, 2].transpose(1, 2)


def _fill(
    qkv: Tensor,
    heads: int,
    query_norm: _Norm,
    key_norm: _Norm,
    cos: Tensor | None,
    sin: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
) -> None:
    from vfmvae.kernels.qk_norm_rope import Norm, qk_norm_rope_fwd

    if qkv.numel():
        qk_norm_rope_fwd(qkv, heads, Norm(*query_norm), Norm(*key_norm), cos, sin, query, key, value)


_Norm = tuple[str, Tensor | None, Tensor | None, float]


def _empty_heads(qkv: Tensor, heads: int) -> Tensor:
    batch, tokens, channels = qkv.shape
    shape = (batch, tokens, heads, channels // (3 * heads))
    # Attention's result has the layout of its queries, and its heads are joined without a copy in this one.
    return torch.empty(shape, dtype=qkv.dtype, device=qkv.device).transpose(1, 2)


def _fake(
    qkv: Tensor,
    heads: int,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    query_kind: str,
    key_kind: str,
    query_eps: float,
    key_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_heads(qkv, heads), _empty_heads(qkv, heads), _empty_heads(qkv, heads)


def _run_backward(
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    qkv: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    query_kind: str,
    key_kind: str,
    query_eps: float,
    key_eps: float,
    of_qkv: bool,
    of_weights: list[bool],
) -> list[Tensor]:
    """What is asked for of the gradient of qkv, and [4, d] float32, whose rows are those of the queries'
    weight and bias and the keys', as far as they are asked for.
    """
    from vfmvae.kernels.qk_norm_rope import Norm, qk_norm_rope_bwd

    found = _backward_fake(
        *(of_query, of_key, of_value, qkv, query_weight, key_weight, cos, sin, query_kind, key_kind),
        *(query_eps, key_eps, of_qkv, of_weights),
    )
    if qkv.numel() == 0:
        return [g.zero_() for g in found]
    norms = Norm(query_kind, query_weight, None, query_eps), Norm(key_kind, key_weight, None, key_eps)
    given = (of_query, of_key, of_value, qkv, *norms, cos, sin, found[0] if of_qkv else None, of_weights)
    partials = qk_norm_rope_bwd(*given)
    if any(of_weights):
        torch.sum(partials, dim=0, out=found[-1])
    return found


def _backward_fake(
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    qkv: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    query_kind: str,
    key_kind: str,
    query_eps: float,
    key_eps: float,
    of_qkv: bool,
    of_weights: list[bool],
) -> list[Tensor]:
    found = [torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)] if of_qkv else []
    if any(of_weights):
        found.append(torch.empty((4, of_query.shape[3]), dtype=torch.float32, device=qkv.device))
    return found


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, _, query_weight, query_bias, key_weight, key_bias, cos, sin, *ctx.norms = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (query_weight, query_bias, key_weight, key_bias)]
    ctx.save_for_backward(qkv, query_weight, key_weight, cos, sin)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    of_weights = [need and weight_gradients_wanted() for need in needs[2:6]]
    if not (needs[0] or any(of_weights)):
        return (None,) * 12
    found = _qk_norm_rope_backward(*grads, *ctx.saved_tensors, *ctx.norms, needs[0], of_weights)
    of_qkv = found[0] if needs[0] else None
    rows = [
        found[-1][i].to(dtype) if need else None
        for i, (need, dtype) in enumerate(zip(of_weights, ctx.dtypes, strict=True))
    ]
    return (of_qkv, None, *rows, *(None,) * 6)


_DEVICES = ("cpu", "cuda")
_qk_norm_rope_backward = operation("qk_norm_rope_backward", _run_backward, _backward_fake, _DEVICES)
_qk_norm_rope = operation(
    "qk_norm_rope", _run, _fake, _DEVICES, Autograd(_setup, _backward), eager=_run_eager
)


def _qk_norm_rope_triton(
    qkv: Tensor,
    heads: int,
    query_norm: QKNorm | None,
    key_norm: QKNorm | None,
    rotation: Rotation | None,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key = query_norm or _NO_NORM, key_norm or _NO_NORM
    tensors = (query.weight, query.bias, key.weight, key.bias, *(rotation or (None, None)))
    return _qk_norm_rope(qkv, heads, *tensors, query.kind, key.kind, query.eps, key.eps)


class _NoNorm(NamedTuple):
    weight: None = None
    bias: None = None
    eps: float = 0.0
    kind: str = ""


_NO_NORM = _NoNorm()


def _why_not_triton(qkv: Tensor, heads: int, *_: object) -> str | None:
    if qkv.dtype not in TRITON_DTYPES:
        return f"it takes float32, bfloat16 and float16, not {qkv.dtype}"
    if qkv.shape[2] > 3 * heads * MOST_WIDTH:
        return f"it takes heads of at most {MOST_WIDTH} numbers, not {qkv.shape[2] // (3 * heads)}"
    return native.why_no_triton(qkv)


_QK_NORM_ROPE = Op(
    "qk_norm_rope",
    qk_norm_rope_reference,
    (Implementation("triton", _qk_norm_rope_triton, _why_not_triton),),
)
