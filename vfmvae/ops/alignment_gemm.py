"""The alignment loss by blocks of rows, in plain PyTorch: its gradient comes from the same blocks.

The dense form keeps several N x N matrices for the backward pass; here a block of distances is made, gives
its part of loss and gradient, and is gone. The distances are symmetric: a block of rows takes the columns
from its own first one on, and what lies beside the square on the diagonal counts twice.

Shapes: prediction and target [B, N, D]; a part [S, N, D] of whole samples goes through at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENTS = 1 << 20
"""Distances at a time, unless a row has more."""
EPSILON = 1e-12  # as in F.normalize


def alignment(
    prediction: Tensor,
    target: Tensor,
    margins: tuple[float, float],
    factors: tuple[float, float],
    of_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and its gradient with respect to the prediction, in float32 (float64 for float64).

    `margins` and `factors` are those of the sums of distances and cosines.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    gradient = None
    if of_gradient:
        gradient = torch.zeros(prediction.shape, dtype=dtype, device=prediction.device)
    samples, rows = blocks(prediction.shape[1])
    losses = []
    for first in range(0, len(prediction), samples):
        part = slice(first, first + samples)
        into = None if gradient is None else gradient[part]
        losses += _of_samples(
            prediction[part].to(dtype), target[part].to(dtype), margins, factors, rows, into
        )
    return torch.stack(losses).sum(), gradient


def blocks(count: int) -> tuple[int, int]:
    """Samples in a part and rows in a block, for samples of `count` rows."""
    rows = min(count, max(128, count // 8), max(1, ELEMENTS // count))
    return max(1, ELEMENTS // (rows * count)), rows


def _of_samples(
    prediction: Tensor,
    target: Tensor,
    margins: tuple[float, float],
    factors: tuple[float, float],
    rows: int,
    gradient: Tensor | None,
) -> list[Tensor]:
    """The loss of each block, and the gradient added to `gradient`, which is zero at first."""
    length = torch.linalg.vector_norm(prediction, dim=-1, keepdim=True)
    b, a = prediction / length.clamp_min(EPSILON), F.normalize(target, dim=-1, eps=EPSILON)
    losses = []
    for first in range(0, b.shape[1], rows):
        block, rest = slice(first, first + rows), slice(first + rows, None)
        excess = torch.bmm(b[:, block], b[:, first:].transpose(1, 2))
        excess.baddbmm_(a[:, block], a[:, first:].transpose(1, 2), alpha=-1)
        excess = F.softshrink(excess, margins[0])  # sign(d) relu(|d| - margin)
        size = excess.abs()
        distance = size[:, :, :rows].sum() + 2 * size[:, :, rows:].sum()
        hinge = F.relu(1.0 - margins[1] - (a[:, block] * b[:, block]).sum(dim=-1, keepdim=True))
        losses.append(factors[0] * distance + factors[1] * hinge.sum())
        del size
        if gradient is not None:
            sign = excess.sign_()
            gradient[:, block].baddbmm_(sign, b[:, first:])
            gradient[:, rest].baddbmm_(sign[:, :, rows:].transpose(1, 2), b[:, block])
            # No later block adds to these rows.
            of_rows = gradient[:, block].mul_(2 * factors[0])
            of_rows.addcmul_(a[:, block], (hinge > 0).to(b.dtype), value=-factors[1])
            _through_normalization(of_rows, b[:, block], length[:, block])
    return losses


def _through_normalization(gradient: Tensor, unit: Tensor, length: Tensor) -> None:
    """The gradient at x / max(|x|, epsilon) becomes that at x, in place."""
    along = (gradient * unit).sum(dim=-1, keepdim=True).masked_fill_(length < EPSILON, 0.0)
    gradient.addcmul_(unit, along, value=-1).div_(length.clamp_min(EPSILON))
