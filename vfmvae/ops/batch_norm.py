"""Batch normalisation of the discriminators: over groups of a few images, with a leaky ReLU behind it.

Shapes: x [B, C, ...]; weight and bias [C]. Results are in x.dtype; statistics in float32 (float64 for float64
x).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.arguments import check_tensors
from vfmvae.ops.dispatch import Fused, Implementation, Op
from vfmvae.ops.gradients import weight_gradients_wanted
from vfmvae.ops.operation import Autograd, operation

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_NUMBERS = 1 << 30
"""Of a channel in a group, which the kernels count in 32 bits."""


def local_batch_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    slope: float = 1.0,
    *,
    fused: Fused = True,
) -> Tensor:
    """leaky_relu(batch norm of each group) with the biased variance of the group itself (StyleGAN-T, arXiv
    2301.09515).

    Args:
        x: [B, C, ...], any layout.
        groups: B images are so many groups of equal size one after another.
        weight, bias: [C].
        slope: of the leaky ReLU; 1 for none.
        fused: "triton" keeps x for the backward, which is plain PyTorch where it is to be differentiated
            again (a gradient penalty).

    Returns:
        [B, C, ...] in x.dtype.

    Raises:
        ValueError: groups that do not divide B, tensors of other shapes or on other devices.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [B, C, ...], not {x.dtype} {list(x.shape)}")
    if groups < 1 or x.shape[0] % groups:
        raise ValueError(f"{x.shape[0]} images cannot be cut into {groups} equal groups")
    check_tensors(x, ("weight", weight, x.shape[1:2]), ("bias", bias, x.shape[1:2]))
    return _LOCAL_BATCH_NORM(fused, x, groups, weight, bias, eps, slope)


def local_batch_norm_reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> Tensor:
    grouped = _grouped(x, groups)
    # On a CPU torch's own sums less exactly: gradients are off by 1e-5.
    norm = _by_torch if x.is_cuda else _by_hand
    y = norm(grouped, weight, bias, eps).reshape(x.shape)
    return y if slope == 1 else F.leaky_relu(y, slope)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[groups, images, C, positions]"""
    return x.reshape(groups, x.shape[0] // groups, x.shape[1], math.prod(x.shape[2:]))


def _by_torch(grouped: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """One operation: channels of different groups are different channels to it."""
    apart = grouped.transpose(0, 1)
    weight, bias = weight.repeat(len(grouped)), bias.repeat(len(grouped))
    # Not F.batch_norm, which refuses a single value per channel.
    y = torch.batch_norm(apart.flatten(1, 2), weight, bias, None, None, True, 0.0, eps, True)
    return y.reshape(apart.shape).transpose(0, 1)


def _by_hand(grouped: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    shape = (1, 1, -1, 1)
    wide = grouped.to(torch.promote_types(grouped.dtype, torch.float32))
    centred = wide - wide.mean(dim=(1, 3), keepdim=True)
    # On a CPU torch.var_mean over these axes takes several times as long.
    variance = centred.square().mean(dim=(1, 3), keepdim=True)
    scale = weight.view(shape) * (variance + eps).rsqrt()
    return (centred * scale + bias.view(shape)).to(grouped.dtype)


def _local_batch_norm_triton(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> Tensor:
    flat = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    return _norm(flat, weight, bias, groups, eps, slope)[0].reshape(x.shape)


def _run(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, slope: float
) -> tuple[Tensor, Tensor]:
    """The result, and the table [groups, 2, C] float32 of mean and 1 / sqrt(variance + eps)."""
    from vfmvae.kernels.batch_norm import batch_norm_fwd

    out, table = _fake(x, weight, bias, groups, eps, slope)
    if x.numel():
        batch_norm_fwd(x, groups, _plain(weight), _plain(bias), eps, slope, out, table)
    return out, table


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, slope: float
) -> tuple[Tensor, Tensor]:
    table = torch.empty((groups, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    return torch.empty_like(x), table


def _run_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, table: Tensor, slope: float
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and [2, C] float32, those of bias and weight."""
    from vfmvae.kernels.batch_norm import batch_norm_bwd

    of_x, of_weights = _backward_fake(grad, x, weight, bias, table, slope)
    if x.numel() == 0:
        return of_x, of_weights.zero_()
    sums = batch_norm_bwd(grad, x, _plain(weight), _plain(bias), table, slope, of_x)
    return of_x, sums.sum(0)


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, table: Tensor, slope: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty(table.shape[1:], dtype=torch.float32, device=x.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.eps, ctx.slope = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, output[1])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, table = ctx.saved_tensors
    if torch.is_grad_enabled():
        of_x, of_bias, of_weight = _plain_backward(grad, x, weight, bias, len(table), ctx.eps, ctx.slope)
    else:
        of_x, (of_bias, of_weight) = _norm_backward(grad, x, weight, bias, table, ctx.slope)
    found = (of_x, of_weight.to(weight.dtype), of_bias.to(bias.dtype))
    needs = ctx.needs_input_grad
    wanted = (needs[0], *(need and weight_gradients_wanted() for need in needs[1:3]))
    return (*(g if want else None for g, want in zip(found, wanted, strict=True)), None, None, None)


def _plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, bias and weight by what can itself be differentiated."""
    grouped, of_y = _grouped(x, groups).float(), _grouped(grad, groups).float()
    ones, zeros = torch.ones_like(weight, dtype=torch.float32), torch.zeros_like(bias, dtype=torch.float32)
    normed = _by_hand(grouped, ones, zeros, eps)
    variance = grouped.var(dim=(1, 3), keepdim=True, correction=0)
    scale, shift = weight.float()[:, None], bias.float()[:, None]
    of_y = torch.where(normed * scale + shift > 0, of_y, of_y * slope)
    product = of_y * normed
    means = of_y.mean(dim=(1, 3), keepdim=True) + normed * product.mean(dim=(1, 3), keepdim=True)
    of_x = scale * (variance + eps).rsqrt() * (of_y - means)
    return of_x.to(x.dtype).reshape(x.shape), of_y.sum(dim=(0, 1, 3)), product.sum(dim=(0, 1, 3))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


_DEVICES = ("cpu", "cuda")
_norm_backward = operation("local_batch_norm_backward", _run_backward, _backward_fake, _DEVICES)
_norm = operation("local_batch_norm", _run, _fake, _DEVICES, Autograd(_setup, _backward, again=True))


def _why_not_triton(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> str | None:
    if x.dtype not in TRITON_DTYPES:
        return f"it takes float32, bfloat16 and float16, not {x.dtype}"
    numbers = math.prod(x.shape[2:]) * x.shape[0] // groups
    if numbers > MOST_NUMBERS:
        return f"it takes at most {MOST_NUMBERS} numbers of a channel in a group, not {numbers}"
    return native.why_no_triton(x)


_LOCAL_BATCH_NORM = Op(
    "local_batch_norm",
    local_batch_norm_reference,
    (Implementation("triton", _local_batch_norm_triton, _why_not_triton),),
)
