"""modulated_to_rgb by Triton kernels, as an operation that torch knows.

x [B, C, H, W]; style [B, C]; weight [3, C]; bias [3] -> [B, 3, H, W], channels-last, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.gradients import weight_gradients_wanted
from vfmvae.ops.operation import Autograd, operation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(x: Tensor, style: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {x.dtype}"
    if weight.shape[0] != 3:
        return f"it gives three colours, not {weight.shape[0]}"
    return native.why_no_triton(x)


def _fake(x: Tensor, style: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    return torch.empty(
        (batch, 3, height, width),
        dtype=torch.float32,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _run(x: Tensor, style: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from vfmvae.kernels.to_rgb import to_rgb_fwd

    out = _fake(x, style, weight, bias)
    if out.numel():
        to_rgb_fwd(_pixels(x), *map(_plain, (style, weight, bias)), _pixels(out))
    return out


def _backward_fake(grad: Tensor, x: Tensor, style: Tensor, weight: Tensor, of_weights: bool) -> list[Tensor]:
    """Gradients of x, style and, if `of_weights`, of weight and bias; float32 but for x."""
    shapes = [style.shape, weight.shape, weight.shape[:1]] if of_weights else [style.shape]
    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    return [of_x, *(torch.empty(s, dtype=torch.float32, device=x.device) for s in shapes)]


def _run_backward(grad: Tensor, x: Tensor, style: Tensor, weight: Tensor, of_weights: bool) -> list[Tensor]:
    from vfmvae.kernels.to_rgb import to_rgb_bwd

    if x.numel() == 0:
        return [t.zero_() for t in _backward_fake(grad, x, style, weight, of_weights)]
    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    grad, style, weight = _pixels(grad.float()), _plain(style), _plain(weight)
    sums = to_rgb_bwd(grad, _pixels(x), style, weight, _pixels(of_x))  # [B, 3, C]
    of_style = (sums * weight).sum(1)
    if not of_weights:
        return [of_x, of_style]
    return [of_x, of_style, (sums * style[:, None, :]).sum(0), grad.sum((0, 1))]


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    of_weights = any(needs[2:]) and weight_gradients_wanted()
    found: list[Tensor | None] = [*_to_rgb_backward(grad, *ctx.saved_tensors, of_weights)]
    found += [None] * (len(needs) - len(found))
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


def _pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] as dense [B, H W, C]."""
    batch, channels, height, width = x.shape
    # Copied where it must be; torch may call any strides of a dimension of size 1 dense.
    tokens = x.permute(0, 2, 3, 1).contiguous()
    return tokens.view(batch, height * width, channels)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


_DEVICES = ("cpu", "cuda")
_to_rgb_backward = operation("modulated_to_rgb_backward", _run_backward, _backward_fake, _DEVICES)
modulated_to_rgb = operation("modulated_to_rgb", _run, _fake, _DEVICES, Autograd(_setup, _backward))
