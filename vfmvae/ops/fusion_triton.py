"""Two layer norms of the same tokens, each before a linear layer, as one operation that torch knows.

    normed_linears(x, gain1, shift1, weight1, bias1, gain2, shift2, weight2, bias2, eps) -> y [..., D + E]

x [..., C]; gain, shift [C] are a norm's affine; weight [D, C] and [E, C]. With n = (x - mean) / deviation,

    weight (gain n + shift) + bias = (weight gain) n + (bias + weight shift)

so both halves of y are one product of n with folded weights, and what the backward keeps is n and not x. The
gradients of all weights follow from those of the folded ones. Products are cuBLAS's, in x.dtype with sums in
float32; the norm, forward and backward, is a Triton kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.gradients import weight_gradients_wanted
from vfmvae.ops.operation import Autograd, operation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_CHANNELS = 8192
"""Of x: a program of the norm holds them in registers (MOST_COLUMNS of kernels/norm.py)."""


def why_not(x: Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {x.dtype}"
    if not 1 <= x.shape[-1] <= MOST_CHANNELS:
        return f"it takes 1 to {MOST_CHANNELS} channels, not {x.shape[-1]}"
    return native.why_no_triton(x)


def _run(
    x: Tensor,
    gain1: Tensor,
    shift1: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gain2: Tensor,
    shift2: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; and for the backward n, 1 / deviation of each token in float32, and the folded weights."""
    from vfmvae.kernels.norm import normalise_rows_fwd

    channels = x.shape[-1]
    tokens = x.reshape(-1, channels)
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    normed = torch.empty(tokens.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(len(tokens), dtype=torch.float32, device=x.device)
    normalise_rows_fwd(tokens, normed, rstd, eps)
    first, width = len(weight1), len(weight1) + len(weight2)
    folded = torch.empty(width, channels, dtype=x.dtype, device=x.device)
    offset = torch.empty(width, dtype=torch.float32, device=x.device)
    for part, gain, shift, weight, bias in (
        (slice(first), gain1, shift1, weight1, bias1),
        (slice(first, width), gain2, shift2, weight2, bias2),
    ):
        torch.mul(weight, gain, out=folded[part])
        torch.addmv(bias.float(), weight.float(), shift.float(), out=offset[part])
    y = F.linear(normed, folded, offset.to(x.dtype))
    return y.view(*x.shape[:-1], width), normed, rstd, folded


def _fake(
    x: Tensor,
    gain1: Tensor,
    shift1: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gain2: Tensor,
    shift2: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, width = x.shape[-1], weight1.shape[0] + weight2.shape[0]
    tokens = x.shape[:-1].numel()

    def empty(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    normed, rstd = empty(tokens, channels), empty(tokens, dtype=torch.float32)
    return empty(*x.shape[:-1], width), normed, rstd, empty(width, channels)


def _run_backward(
    grad: Tensor,
    normed: Tensor,
    rstd: Tensor,
    folded: Tensor,
    gain1: Tensor,
    shift1: Tensor,
    weight1: Tensor,
    gain2: Tensor,
    shift2: Tensor,
    weight2: Tensor,
    of_x: bool,
    of_weights: bool,
) -> list[Tensor]:
    """The gradient of x as [tokens, C], if it is asked for; then, if they are, those of gain1, ..., bias2 in
    float32.
    """
    from vfmvae.kernels.norm import normalise_rows_bwd

    grad = grad.reshape(-1, len(folded)).to(normed.dtype)
    found = []
    if of_x:
        of_normed = torch.mm(grad, folded)
        normalise_rows_bwd(of_normed, normed, rstd, of_normed)
        found.append(of_normed)
    if of_weights:
        of_folded, of_offset = _sum_of_products(grad, normed), grad.sum(0, dtype=torch.float32)
        first = len(weight1)
        found += _unfold(of_folded[:first], of_offset[:first], gain1, shift1, weight1)
        found += _unfold(of_folded[first:], of_offset[first:], gain2, shift2, weight2)
    return found


def _backward_fake(
    grad: Tensor,
    normed: Tensor,
    rstd: Tensor,
    folded: Tensor,
    gain1: Tensor,
    shift1: Tensor,
    weight1: Tensor,
    gain2: Tensor,
    shift2: Tensor,
    weight2: Tensor,
    of_x: bool,
    of_weights: bool,
) -> list[Tensor]:
    found = [torch.empty_like(normed)] if of_x else []
    for gain, weight in ((gain1, weight1), (gain2, weight2)) if of_weights else ():
        shapes = (gain.shape, gain.shape, weight.shape, weight.shape[:1])
        found += [torch.empty(s, dtype=torch.float32, device=grad.device) for s in shapes]
    return found


def _unfold(
    of_folded: Tensor, of_offset: Tensor, gain: Tensor, shift: Tensor, weight: Tensor
) -> list[Tensor]:
    """Gradients of gain, shift, weight and bias, from those of weight * gain and bias + weight shift."""
    of_gain = (of_folded * weight).sum(0)
    of_shift = torch.mv(weight.float().t(), of_offset)
    of_weight = torch.outer(of_offset, shift.float()).addcmul_(of_folded, gain.float())
    return [of_gain, of_shift, of_weight, of_offset.clone()]


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, summed over tokens in float32 and not rounded after."""
    if a.dtype != torch.float32 and a.is_cuda:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.t().float() @ b.float()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gain1, shift1, weight1, _, gain2, shift2, weight2, _, _ = inputs
    ctx.shape, ctx.dtypes = x.shape, [t.dtype for t in inputs[1:9]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], gain1, shift1, weight1, gain2, shift2, weight2)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    of_weights = any(needs[1:9]) and weight_gradients_wanted()
    found = _linears_backward(grad, *ctx.saved_tensors, needs[0], of_weights)
    of_x = found.pop(0).view(ctx.shape) if needs[0] else None
    rest: list[Tensor | None] = [None] * 8
    if of_weights:
        pairs = zip(found, needs[1:9], ctx.dtypes, strict=True)
        rest = [g.to(dtype) if need else None for g, need, dtype in pairs]
    return (of_x, *rest, None)


_DEVICES = ("cpu", "cuda")
_linears_backward = operation("normed_linears_backward", _run_backward, _backward_fake, _DEVICES)
_linears = operation("normed_linears", _run, _fake, _DEVICES, Autograd(_setup, _backward))


def normed_linears(x: Tensor, *layers: Tensor, eps: float) -> Tensor:
    """`layers`: gain, shift, weight and bias of the one, then of the other."""
    return _linears(x, *layers, eps)[0]
