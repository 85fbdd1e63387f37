"""Convolutions of the decoder: depthwise k x k and pointwise 1 x 1.

Shapes: x [B, C, H, W]; the fused forms keep channels-last memory. Weights are cast to x.dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.dispatch import Fused, Implementation, Op, always
from vfmvae.ops.gradients import weight_gradients_wanted
from vfmvae.ops.operation import Autograd, operation

CPU_KERNEL_SIZES = (3, 5, 7)


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, noise: Tensor | None = None, *, fused: Fused = True
) -> Tensor:
    """Depthwise convolution with "same" zero padding, plus an optional noise map.

    Args:
        x: [B, C, H, W].
        weight: [C, 1, k, k], k odd.
        bias: [C] or None.
        noise: [H, W], added to every channel and sample (legacy checkpoints), or None.
        fused: "cpu" differs in the backward: a compiled pass gives the gradients of weight and bias, summed
            in float32. It can be differentiated once.

    Returns:
        [B, C, H, W] in x.dtype.
    """
    channels, size = x.shape[1], weight.shape[-1]
    if weight.shape != (channels, 1, size, size) or size % 2 == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, needed is [{channels}, 1, k, k] with k odd"
        )
    return _DEPTHWISE(fused, x, weight, bias, noise)


def depthwise_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None
) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2, groups=x.shape[1])
    return y if noise is None else y + noise.to(x.dtype)


def _depthwise_conv2d_torch(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None) -> Tensor:
    return depthwise_conv2d_reference(x.contiguous(memory_format=torch.channels_last), weight, bias, noise)


def _run_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return depthwise_conv2d_reference(_channels_last(x), weight, bias, None)


def _depthwise_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _setup_depthwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _depthwise_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """PyTorch's forward and input gradient, which are fast, and our gradient of the weight, where it is not:
    it takes ten times as long as the other two for 5 x 5 and 7 x 7, and more for maps of a few pixels.
    """
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    grad = _channels_last(grad)
    grad_x = grad_weight = grad_bias = None
    if needs_x:  # the transpose of a "same" convolution is one with the weight turned by half a circle
        grad_x = depthwise_conv2d_reference(grad, weight.flip(2, 3), None, None)
    if (needs_weight or needs_bias) and weight_gradients_wanted():
        size = weight.shape[-1]
        sums = _depthwise_weight_gradient(x, grad, size)
        grad_weight = sums[:-1].t().reshape(-1, 1, size, size).to(weight.dtype)
        grad_bias = sums[-1].to(weight.dtype) if needs_bias else None
    return grad_x, grad_weight, grad_bias


def _run_weight_gradient(x: Tensor, grad: Tensor, size: int) -> Tensor:
    """x and the output's gradient [B, C, H, W] -> [k*k + 1, C] float32: weight, and bias in the last row."""
    batch, channels, height, width = x.shape
    x, grad = _channels_last(x), _channels_last(grad)
    out = _weight_gradient_fake(x, grad, size)
    native.extension().depthwise_weight_gradient_cpu(
        x=x.data_ptr(),
        grad=grad.data_ptr(),
        out=out.data_ptr(),
        dtype=str(x.dtype).removeprefix("torch."),
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        kernel_size=size,
        threads=torch.get_num_threads(),
    )
    return out


def _weight_gradient_fake(x: Tensor, grad: Tensor, size: int) -> Tensor:
    return x.new_empty((size * size + 1, x.shape[1]), dtype=torch.float32)


_depthwise_weight_gradient = operation(
    "depthwise_weight_gradient", _run_weight_gradient, _weight_gradient_fake, "cpu"
)
_depthwise = operation(
    "depthwise_conv2d",
    _run_depthwise,
    _depthwise_fake,
    "cpu",
    Autograd(_setup_depthwise, _depthwise_autograd),
)


def _depthwise_conv2d_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None) -> Tensor:
    y = _depthwise(x, weight, bias)
    return y if noise is None else y + noise.to(x.dtype)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _why_not_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None) -> str | None:
    del bias, noise
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {x.dtype}"
    if weight.shape[-1] not in CPU_KERNEL_SIZES:
        return f"it takes kernel sizes {', '.join(map(str, CPU_KERNEL_SIZES))}, not {weight.shape[-1]}"
    return native.why_no_cpu_code(x)


def pointwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, fused: Fused = True) -> Tensor:
    """1 x 1 convolution: x [B, C, H, W], weight [D, C], bias [D] or None -> [B, D, H, W] in x.dtype."""
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, needed is [D, {x.shape[1]}]")
    return _POINTWISE(fused, x, weight, bias)


def pointwise_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None].to(x.dtype), None if bias is None else bias.to(x.dtype))


def _pointwise_conv2d_gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # In channels-last memory a 1 x 1 convolution is one matrix product, without a copy.
    y = F.linear(x.permute(0, 2, 3, 1), weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y.permute(0, 3, 1, 2)


_DEPTHWISE = Op(
    "depthwise_conv2d",
    depthwise_conv2d_reference,
    (
        Implementation("cpu", _depthwise_conv2d_cpu, _why_not_cpu),
        Implementation("channels_last", _depthwise_conv2d_torch, always),
    ),
)
_POINTWISE = Op(
    "pointwise_conv2d", pointwise_conv2d_reference, (Implementation("gemm", _pointwise_conv2d_gemm, always),)
)
