"""Demodulation of a modulated 1 x 1 convolution (StyleGAN2, arXiv 1912.04958), its gradient in few steps.

A decoder has one per layer, each of a few thousand numbers: what it costs is the count of operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops.gradients import weight_gradients_wanted
from vfmvae.ops.operation import Autograd, operation

DEMODULATION_EPS = 1e-8


def demodulation(style: Tensor, weight: Tensor) -> Tensor:
    """What brings each output of weight [E, C], its inputs scaled by style [B, C], to unit norm: [B, E].

    1 / sqrt(sum over C of (weight style)^2 + 1e-8), computed and returned in float32, or float64 if one of
    the inputs is. It can be differentiated once; gradients are in each input's own dtype.
    """
    return _demodulation(style, weight)


def _wide(style: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (style.dtype, weight.dtype) else torch.float32


def _run(style: Tensor, weight: Tensor) -> Tensor:
    wide = _wide(style, weight)
    style, weight = style.to(wide), weight.to(wide)
    return F.linear(style.square(), weight.square()).add_(DEMODULATION_EPS).rsqrt_()


def _fake(style: Tensor, weight: Tensor) -> Tensor:
    return style.new_empty((style.shape[0], weight.shape[0]), dtype=_wide(style, weight))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    style, weight, scale = ctx.saved_tensors
    of_style, of_weight = style.dtype, weight.dtype
    style, weight = style.to(scale.dtype), weight.to(scale.dtype)
    needs_style, needs_weight = ctx.needs_input_grad
    slope = scale.pow(3).mul_(grad).neg_()  # with regard to half of the sum of squares
    grad_style = grad_weight = None
    if needs_style:
        grad_style = torch.mm(slope, weight.square()).mul_(style).to(of_style)
    if needs_weight and weight_gradients_wanted():
        grad_weight = torch.mm(slope.t(), style.square()).mul_(weight).to(of_weight)
    return grad_style, grad_weight


_demodulation = operation("demodulation", _run, _fake, ("cpu", "cuda"), Autograd(_setup, _backward))
