"""Convolutions of the decoder: depthwise k x k and pointwise 1 x 1.

Shapes: x [B, C, H, W]; the fused forms keep channels-last memory. Weights are cast to x.dtype, except that
the CUDA form of the depthwise convolution multiplies by float32 weights.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.arguments import check_maps, check_tensors
from vfmvae.ops.dispatch import Fused, Implementation, Op, always
from vfmvae.ops.gradients import weight_gradients_wanted
from vfmvae.ops.operation import Autograd, operation

COMPILED_KERNEL_SIZES = (3, 5, 7)
# csrc/depthwise_conv.cuh. By kernel size, how many blocks an H100's multiprocessor runs at a time.
CHANNELS_OF_BLOCK, COLUMNS_OF_BLOCK, COLUMNS_OF_THREAD = 64, 16, 4
MULTIPROCESSORS, RESIDENT_BLOCKS = 132, {3: 4, 5: 3, 7: 2}


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, noise: Tensor | None = None, *, fused: Fused = True
) -> Tensor:
    """Depthwise convolution with "same" zero padding, plus an optional noise map.

    Args:
        x: [B, C, H, W].
        weight: [C, 1, k, k], k odd.
        bias: [C] or None.
        noise: [H, W], added to every channel and sample (legacy checkpoints), or None.
        fused: "cuda" is compiled, forward and backward, with float32 weights, bias, noise and sums, and
            rounds once. "cpu" differs in the backward: a compiled pass gives the gradients of weight and
            bias, summed in float32. Both can be differentiated once.

    Returns:
        [B, C, H, W] in x.dtype.

    Raises:
        ValueError: an even k, tensors of other shapes or on other devices.
    """
    check_maps(x)
    check_kernel("weight", weight)
    _, channels, *sides = x.shape
    size = weight.shape[-1]
    check_tensors(
        x,
        ("weight", weight, (channels, 1, size, size)),
        ("bias", bias, (channels,)),
        ("noise", noise, tuple(sides)),
    )
    return _DEPTHWISE(fused, x, weight, bias, noise)


def check_kernel(name: str, weight: Tensor) -> None:
    if weight.ndim != 4 or weight.shape[-1] % 2 == 0:
        raise ValueError(f"{name} is {list(weight.shape)}; it must be [C, 1, k, k] with k odd")


def depthwise_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None
) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2, groups=x.shape[1])
    y = y.to(x.dtype)  # from that of autocast
    return y if noise is None else y + noise.to(x.dtype)


def _depthwise_conv2d_torch(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None) -> Tensor:
    return depthwise_conv2d_reference(x.contiguous(memory_format=torch.channels_last), weight, bias, noise)


def _run_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None) -> Tensor:
    if not x.is_cuda:
        return depthwise_conv2d_reference(_channels_last(x), weight, bias, noise)
    out = _depthwise_fake(x, weight, bias, noise)
    _launch_depthwise(x, weight, bias, noise, out)
    return out


def _depthwise_fake(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _setup_depthwise(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, noise = inputs
    # The gradient of x does not need x.
    of_weights = any(ctx.needs_input_grad[1:3])
    ctx.save_for_backward(x if of_weights else None, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.noise_dtype = None if noise is None else noise.dtype


def _depthwise_autograd(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """On a CPU, PyTorch's forward and input gradient, which are fast, and our gradient of the weight, where
    it is not: it takes ten times as long as the other two for 5 x 5 and 7 x 7, and more for maps of a few
    pixels. On CUDA all of it is ours.
    """
    if grad is None:
        return None, None, None, None
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_noise = ctx.needs_input_grad
    grad = _channels_last(grad)
    grad_x = grad_weight = grad_bias = grad_noise = None
    if needs_x:
        grad_x = _depthwise_input_gradient(grad, weight)
    if (needs_weight or needs_bias) and weight_gradients_wanted():
        size = weight.shape[-1]
        sums = _depthwise_weight_gradient(x, grad, size)
        grad_weight = sums[:-1].t().reshape(-1, 1, size, size).to(weight.dtype)
        grad_bias = sums[-1].to(ctx.bias_dtype) if needs_bias else None
    if needs_noise:
        grad_noise = grad.sum((0, 1), dtype=torch.float32).to(ctx.noise_dtype)
    return grad_x, grad_weight, grad_bias, grad_noise


def depthwise_conv2d_with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`depthwise_conv2d` in its "cuda" form, and the statistics of the result from the same pass.

    Takes what `why_no_statistics` has no objection to. y is cut into T tiles of neighbouring pixels, every
    image alike. The gradient is that of y alone: whoever uses the statistics treats them as functions of y.

    Returns:
        y: [B, C, H, W] in x.dtype.
        partials: [B, T, 2, C] float32, per tile the mean of y and the sum of squared deviations from it.
        counts: [T] float32, the pixels of each tile.
    """
    return _depthwise_statistics(x, weight, bias, noise)


def why_no_statistics(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None) -> str | None:
    """Why `depthwise_conv2d_with_statistics` cannot take these arguments, or None."""
    return _why_not_cuda(x, weight, bias, noise)


def _run_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    y, partials, counts = _statistics_fake(x, weight, bias, noise)
    _launch_depthwise(x, weight, bias, noise, y, (partials, counts))
    return y, partials, counts


def _statistics_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    # The number of tiles depends on all of the shape, so that torch.compile specialises on it.
    strips = -(-height // _strip_rows(*map(int, (*x.shape, weight.shape[-1]))))
    tiles = strips * -(-width // COLUMNS_OF_THREAD)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    partials = x.new_empty((batch, tiles, 2, channels), dtype=torch.float32)
    return y, partials, x.new_empty((tiles,), dtype=torch.float32)


def _setup_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _setup_depthwise(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _run_input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    # The transpose of a "same" convolution is one with the weight turned by half a circle.
    if not grad.is_cuda:
        return depthwise_conv2d_reference(_channels_last(grad), weight.flip(2, 3), None, None)
    out = _input_gradient_fake(grad, weight)
    _launch_depthwise(grad, weight, None, None, out, flipped=True)
    return out


def _input_gradient_fake(grad: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.channels_last)


def _launch_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    out: Tensor,
    statistics: tuple[Tensor, Tensor] | None = None,
    flipped: bool = False,
) -> None:
    batch, channels, height, width = x.shape
    x, weight = _channels_last(x), _plain_floats(weight)
    bias = None if bias is None else _plain_floats(bias)
    noise = None if noise is None else _plain_floats(noise)
    partials, counts = (0, 0) if statistics is None else (t.data_ptr() for t in statistics)
    native.extension().depthwise_conv_cuda(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        noise=0 if noise is None else noise.data_ptr(),
        out=out.data_ptr(),
        partials=partials,
        counts=counts,
        dtype=str(x.dtype).removeprefix("torch."),
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        kernel_size=weight.shape[-1],
        flipped=flipped,
        strip_rows=_strip_rows(batch, channels, height, width, weight.shape[-1]),
        device=x.device.index,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )


def _blocks(batch: int, channels: int, width: int) -> int:
    """Blocks of the CUDA kernels per strip of rows."""
    return batch * -(-channels // CHANNELS_OF_BLOCK) * -(-width // COLUMNS_OF_BLOCK)


@functools.lru_cache(maxsize=1024)
def _strip_rows(batch: int, channels: int, height: int, width: int, size: int) -> int:
    """Rows that one block of the CUDA kernels walks down: with few blocks some multiprocessors have nothing
    to do, with many more border rows are read and multiplied twice. No property of the GPU at hand enters,
    so that results do not depend on it.
    """
    blocks = _blocks(batch, channels, width)

    def cost(rows: int) -> tuple[int, int]:  # what one multiprocessor does, in rows
        own = -(-blocks * -(-height // rows) // MULTIPROCESSORS)
        return max(own, RESIDENT_BLOCKS[size]) * (rows + size - 1 + 4), -rows  # 4: the start of a block

    return min({max(4, -(-height // strips)) for strips in range(1, height + 1)}, key=cost)


def _plain_floats(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _run_weight_gradient(x: Tensor, grad: Tensor, size: int) -> Tensor:
    """x and the output's gradient [B, C, H, W] -> [k*k + 1, C] float32: weight, and bias in the last row."""
    batch, channels, height, width = x.shape
    x, grad = _channels_last(x), _channels_last(grad.to(x.dtype))
    out = _weight_gradient_fake(x, grad, size)
    arguments = {
        "x": x.data_ptr(),
        "grad": grad.data_ptr(),
        "out": out.data_ptr(),
        "dtype": str(x.dtype).removeprefix("torch."),
        "batch": batch,
        "height": height,
        "width": width,
        "channels": channels,
        "kernel_size": size,
    }
    if not x.is_cuda:
        native.extension().depthwise_weight_gradient_cpu(**arguments, threads=torch.get_num_threads())
        return out
    strip_rows = _strip_rows(batch, channels, height, width, size)
    groups = -(-channels // CHANNELS_OF_BLOCK)
    tiles = _blocks(batch, channels, width) // groups * -(-height // strip_rows)
    parts = max(1, min(tiles, MULTIPROCESSORS * 2 // groups))
    partials = x.new_empty((parts, size * size + 1, channels), dtype=torch.float32)
    native.extension().depthwise_weight_gradient_cuda(
        **arguments,
        partials=partials.data_ptr(),
        strip_rows=strip_rows,
        parts=parts,
        device=x.device.index,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
    return out


def _weight_gradient_fake(x: Tensor, grad: Tensor, size: int) -> Tensor:
    return x.new_empty((size * size + 1, x.shape[1]), dtype=torch.float32)


_DEVICES = ("cpu", "cuda")
_depthwise_weight_gradient = operation(
    "depthwise_weight_gradient", _run_weight_gradient, _weight_gradient_fake, _DEVICES
)
_depthwise_input_gradient = operation(
    "depthwise_input_gradient", _run_input_gradient, _input_gradient_fake, _DEVICES
)
_depthwise = operation(
    "depthwise_conv2d",
    _run_depthwise,
    _depthwise_fake,
    _DEVICES,
    Autograd(_setup_depthwise, _depthwise_autograd),
)
_depthwise_statistics = operation(
    "depthwise_conv2d_with_statistics",
    _run_statistics,
    _statistics_fake,
    "cuda",
    Autograd(_setup_statistics, _depthwise_autograd),
)


def _depthwise_conv2d_compiled(
    x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None
) -> Tensor:
    return _depthwise(x, weight, bias, noise)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _why_not_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {x.dtype}"
    return _why_not_size(x, weight) or native.why_no_cuda_code(x)


def _why_not_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None) -> str | None:
    del bias, noise
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {x.dtype}"
    return _why_not_size(x, weight) or native.why_no_cpu_code(x)


def _why_not_cpu_first(x: Tensor, weight: Tensor, bias: Tensor | None, noise: Tensor | None) -> str | None:
    """All that is compiled of it is the gradient of weight and bias."""
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    return "without gradients of weight and bias PyTorch's is faster"


def _why_not_size(x: Tensor, weight: Tensor) -> str | None:
    if weight.shape[-1] not in COMPILED_KERNEL_SIZES:
        return f"it takes kernel sizes {', '.join(map(str, COMPILED_KERNEL_SIZES))}, not {weight.shape[-1]}"
    if 0 in x.shape[1:]:
        return f"x {list(x.shape)} has no channels or no pixels"
    return None


def pointwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, fused: Fused = True) -> Tensor:
    """1 x 1 convolution: x [B, C, H, W], weight [D, C], bias [D] or None -> [B, D, H, W] in x.dtype.

    Raises:
        ValueError: tensors of other shapes or on other devices.
    """
    check_maps(x)
    outputs = weight.shape[0]
    check_tensors(x, ("weight", weight, (outputs, x.shape[1])), ("bias", bias, (outputs,)))
    return _POINTWISE(fused, x, weight, bias)


def pointwise_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.conv2d(x, weight[:, :, None, None].to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y.to(x.dtype)


def _pointwise_conv2d_gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # In channels-last memory a 1 x 1 convolution is one matrix product, without a copy.
    y = F.linear(x.permute(0, 2, 3, 1), weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y.permute(0, 3, 1, 2).to(x.dtype)


_DEPTHWISE = Op(
    "depthwise_conv2d",
    depthwise_conv2d_reference,
    (
        Implementation("cuda", _depthwise_conv2d_compiled, _why_not_cuda),
        Implementation("cpu", _depthwise_conv2d_compiled, _why_not_cpu, _why_not_cpu_first),
        Implementation("channels_last", _depthwise_conv2d_torch, always),
    ),
)
_POINTWISE = Op(
    "pointwise_conv2d", pointwise_conv2d_reference, (Implementation("gemm", _pointwise_conv2d_gemm, always),)
)
