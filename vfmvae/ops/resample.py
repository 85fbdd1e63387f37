"""Upsampling of the decoder: pixel shuffle, replicated border, fixed binomial blur, residual.

Shapes: x [B, C * upscale^2, H, W] -> [B, C, H * upscale, W * upscale]. The blur is the outer product of a
binomial row ([1], [1 2 1] or [1 4 6 4 1]) with itself, normalised to sum 1, applied to each channel
alone; it removes the checkerboard that a pixel shuffle leaves (Sugawara et al., arXiv 1806.02658;
binomial filters as in StyleGAN, arXiv 1812.04948). The map is linear in x, so its backward is the
transposed map, which is an operation too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.dispatch import Fused, Implementation, Op
from vfmvae.ops.operation import Autograd, operation

BINOMIAL_ROWS = {1: (1.0,), 3: (1.0, 2.0, 1.0), 5: (1.0, 4.0, 6.0, 4.0, 1.0)}
UPSCALES = (1, 2)


def upsample_blur(
    x: Tensor, kernel_size: int, upscale: int = 2, residual: Tensor | None = None, *, fused: Fused = True
) -> Tensor:
    """Pixel shuffle by `upscale`, binomial blur with replicated borders, + residual.

    Args:
        x: [B, C * upscale^2, H, W], floating point, any memory layout; channel order as in pixel_shuffle.
        kernel_size: 1 (no blur), 3 or 5.
        upscale: 2, or 1 for no pixel shuffle.
        residual: [B, C, H * upscale, W * upscale], added after the blur.
        fused: "cuda" and "cpu" run one compiled pass (float32 and bfloat16, on CUDA float16 too) whose sums
            are in float32 and whose result is channels-last; everything else goes to the reference.

    Returns:
        [B, C, H * upscale, W * upscale] in x.dtype, or in the promoted dtype where the residual's differs.

    Raises:
        ValueError: for other kernel sizes or factors, shapes that do not fit, or integer tensors.
    """
    _check(x, kernel_size, upscale, residual)
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    return _UPSAMPLE_BLUR(fused, x, kernel_size, upscale, residual)


def upsample_blur_reference(
    x: Tensor, kernel_size: int, upscale: int = 2, residual: Tensor | None = None
) -> Tensor:
    # Of no samples pixel_shuffle has no gradient, and there is nothing to shuffle.
    y = F.pixel_shuffle(x, upscale) if x.shape[0] else x.reshape(_output_shape(x, upscale))
    channels, margin = y.shape[1], kernel_size // 2
    if margin:
        row = torch.tensor(BINOMIAL_ROWS[kernel_size], dtype=x.dtype, device=x.device)
        kernel = torch.outer(row, row) / row.sum().square()
        y = F.conv2d(_replicate(y, margin), kernel.expand(channels, 1, -1, -1), groups=channels)
        y = y.to(x.dtype)  # under autocast
    return y if residual is None else y + residual


def _replicate(y: Tensor, margin: int) -> Tensor:
    if y.is_cuda or not torch.compiler.is_compiling():
        return F.pad(y, (margin, margin, margin, margin), mode="replicate")
    # torch 2.14 does not compile the padding's gradient on a CPU: it expects strides that it does not get.
    for dim in (2, 3):
        first, last = (y.narrow(dim, at, 1) for at in (0, y.shape[dim] - 1))
        y = torch.cat([first] * margin + [y] + [last] * margin, dim)
    return y


def _check(x: Tensor, kernel_size: int, upscale: int, residual: Tensor | None) -> None:
    if kernel_size not in BINOMIAL_ROWS:
        raise ValueError(f"kernel_size {kernel_size} is not one of {', '.join(map(str, BINOMIAL_ROWS))}")
    if upscale not in UPSCALES:
        raise ValueError(f"upscale {upscale} is not one of {', '.join(map(str, UPSCALES))}")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be a floating point [B, C, H, W], not {x.dtype} {list(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x {list(x.shape)} has no channels or no pixels")
    if x.shape[1] % upscale**2:
        raise ValueError(f"{x.shape[1]} channels cannot be shuffled into {upscale} x {upscale} pixels")
    if residual is not None and list(residual.shape) != _output_shape(x, upscale):
        raise ValueError(
            f"the residual {list(residual.shape)} has not the output's shape {_output_shape(x, upscale)}"
        )
    if residual is not None and residual.device != x.device:
        raise ValueError(f"the residual is on {residual.device}, x on {x.device}")


def _output_shape(x: Tensor, upscale: int) -> list[int]:
    batch, channels, height, width = x.shape
    return [batch, channels // upscale**2, height * upscale, width * upscale]


# The two maps as operations that torch.compile and autograd know. Both are channels-last inside and out.


def _run(x: Tensor, residual: Tensor | None, kernel_size: int, upscale: int) -> Tensor:
    out = _fake(x, residual, kernel_size, upscale)
    batch, _, height, width = x.shape
    size = (batch, height, width, out.shape[1])
    _launch(x, residual, out, size, kernel_size, upscale, adjoint=False)
    return out


def _fake(x: Tensor, residual: Tensor | None, kernel_size: int, upscale: int) -> Tensor:
    return _empty_channels_last(_output_shape(x, upscale), x)


def _run_adjoint(grad: Tensor, kernel_size: int, upscale: int) -> Tensor:
    out = _adjoint_fake(grad, kernel_size, upscale)
    batch, _, height, width = out.shape
    size = (batch, height, width, grad.shape[1])
    _launch(grad, None, out, size, kernel_size, upscale, adjoint=True)
    return out


def _adjoint_fake(grad: Tensor, kernel_size: int, upscale: int) -> Tensor:
    batch, channels, height, width = grad.shape
    shape = [batch, channels * upscale**2, height // upscale, width // upscale]
    return _empty_channels_last(shape, grad)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.kernel_size, ctx.upscale = inputs[-2:]


def _backward(ctx: Any, grad: Tensor) -> tuple:
    needs_x, needs_residual = ctx.needs_input_grad[:2]
    grad_x = _upsample_blur_adjoint(grad, ctx.kernel_size, ctx.upscale) if needs_x else None
    return grad_x, grad if needs_residual else None, None, None


def _adjoint_backward(ctx: Any, grad: Tensor) -> tuple:
    return _upsample_blur(grad, None, ctx.kernel_size, ctx.upscale), None, None


_DEVICES = ("cpu", "cuda")
_upsample_blur = operation("upsample_blur", _run, _fake, _DEVICES, Autograd(_setup, _backward, again=True))
_upsample_blur_adjoint = operation(
    "upsample_blur_adjoint",
    _run_adjoint,
    _adjoint_fake,
    _DEVICES,
    Autograd(_setup, _adjoint_backward, again=True),
)


def _empty_channels_last(shape: list[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    out: Tensor,
    size: tuple[int, int, int, int],
    kernel_size: int,
    upscale: int,
    adjoint: bool,
) -> None:
    """Calls the extension; `size`: batch, height, width of the small image and channels of the large one."""
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    batch, height, width, channels = size
    arguments = {
        "x": x.data_ptr(),
        "residual": 0 if residual is None else residual.data_ptr(),
        "out": out.data_ptr(),
        "dtype": str(x.dtype).removeprefix("torch."),
        "batch": batch,
        "height": height,
        "width": width,
        "channels": channels,
        "kernel_size": kernel_size,
        "upscale": upscale,
        "adjoint": adjoint,
    }
    if x.is_cuda:
        stream = torch.cuda.current_stream(x.device).cuda_stream
        native.extension().upsample_blur_cuda(**arguments, device=x.device.index, stream=stream)
    else:
        native.extension().upsample_blur_cpu(**arguments, threads=torch.get_num_threads())


def _compiled(x: Tensor, kernel_size: int, upscale: int, residual: Tensor | None) -> Tensor:
    return _upsample_blur(x, residual, kernel_size, upscale)


def _why_not_cuda(x: Tensor, kernel_size: int, upscale: int, residual: Tensor | None) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {x.dtype}"
    return native.why_no_cuda_code(x)


def _why_not_cpu(x: Tensor, kernel_size: int, upscale: int, residual: Tensor | None) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {x.dtype}"
    return native.why_no_cpu_code(x)


_UPSAMPLE_BLUR = Op(
    "upsample_blur",
    upsample_blur_reference,
    (
        Implementation("cuda", _compiled, _why_not_cuda),
        Implementation("cpu", _compiled, _why_not_cpu),
    ),
)
