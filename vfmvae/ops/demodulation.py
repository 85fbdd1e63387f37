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

    1 / sqrt(sum over C of (weight style)^2 + 1e-8), in the inputs' dtype. It can be differentiated once.
    """
    return _demodulation(style, weight)


def _run(style: Tensor, weight: Tensor) -> Tensor:
    return F.linear(style.square(), weight.square()).add_(DEMODULATION_EPS).rsqrt_()


def _fake(style: Tensor, weight: Tensor) -> Tensor:
    return style.new_empty((style.shape[0], weight.shape[0]))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    style, weight, scale = ctx.saved_tensors
    needs_style, needs_weight = ctx.needs_input_grad
    slope = scale.pow(3).mul_(grad).neg_()  # with regard to half of the sum of squares
    grad_style = grad_weight = None
    if needs_style:
        grad_style = torch.mm(slope, weight.square()).mul_(style)
    if needs_weight and weight_gradients_wanted():
        grad_weight = torch.mm(slope.t(), style.square()).mul_(weight)
    return grad_style, grad_weight


_demodulation = operation("demodulation", _run, _fake, ("cpu", "cuda"), Autograd(_setup, _backward))
