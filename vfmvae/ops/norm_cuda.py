"""Group norm on CUDA (csrc/group_norm.cu, csrc/group_norm_backward.cu) as an operation torch knows.

Shapes: x and results [B, C, H, W], channels-last; weight and bias [C]; style [B, C]. What reaches the kernels
beside x is float32, and so are all sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.gradients import weight_gradients_wanted
from vfmvae.ops.operation import Autograd, operation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TABLE_ROWS, COEFFICIENT_ROWS = 5, 4  # enum TableRow and CoefficientRow in csrc/group_norm.cuh
MOST_CHANNELS = 1 << 20


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str | None,
    style: Tensor | None,
) -> Tensor:
    return _norm(x, weight, bias, style, None, None, groups, eps, activation or "none")[0]


def group_norm_from_partials(
    x: Tensor,
    partials: Tensor,
    counts: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str | None,
    style: Tensor | None,
) -> Tensor:
    """Group norm of an x whose statistics were taken where it was written, so that it is read once.

    Args:
        partials: [B, T, 2, C] float32: mean of each channel over the pixels of each of T tiles, and the sum
            of squared deviations from it.
        counts: [T] float32, pixels in each tile.

    The gradient of x holds what passes through the statistics; none is sent to partials.
    """
    return _norm(x, weight, bias, style, partials, counts, groups, eps, activation or "none")[0]


def why_not(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str | None,
    style: Tensor | None,
) -> str | None:
    if x.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {x.dtype}"
    if 0 in x.shape[1:]:
        return "x has no channels or no pixels"
    if x.shape[1] > MOST_CHANNELS:
        return f"it takes at most {MOST_CHANNELS} channels, not {x.shape[1]}"
    return native.why_no_cuda_code(x)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    style: Tensor | None,
    partials: Tensor | None,
    counts: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The result, and the table [B, TABLE_ROWS, C] float32 that the backward needs of the statistics."""
    out, table = _fake(x, weight, bias, style, partials, counts, groups, eps, activation)
    x = _channels_last(x)
    given_tiles = 0
    if partials is not None and counts is not None:
        partials, counts, given_tiles = partials.contiguous(), counts.contiguous(), partials.shape[1]
    else:
        partials = _workspace(x)
        counts = x.new_empty(partials.shape[1], dtype=torch.float32)
    constants = _constants(weight, bias, style)
    native.extension().group_norm_cuda(
        x=x.data_ptr(),
        **_addresses(constants),
        partials=partials.data_ptr(),
        counts=counts.data_ptr(),
        table=table.data_ptr(),
        out=out.data_ptr(),
        **_sizes(x, groups, activation),
        given_tiles=given_tiles,
        eps=eps,
        **_where(x),
    )
    return out, table


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    style: Tensor | None,
    partials: Tensor | None,
    counts: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    table = x.new_empty((x.shape[0], TABLE_ROWS, x.shape[1]), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), table


def _run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    style: Tensor | None,
    table: Tensor,
    groups: int,
    activation: str,
    of_weights: bool,
    of_style: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, and in float32 of weight, bias and style; empty where they are not asked for."""
    found = _backward_fake(grad, x, weight, bias, style, table, groups, activation, of_weights, of_style)
    x, grad = _channels_last(x), _channels_last(grad.to(x.dtype))
    partials = _workspace(x)
    coefficients = x.new_empty((x.shape[0], COEFFICIENT_ROWS, x.shape[1]), dtype=torch.float32)
    constants = _constants(weight, bias, style)
    of_x, weight_gradient, bias_gradient, style_gradient = found
    native.extension().group_norm_backward_cuda(
        x=x.data_ptr(),
        **_addresses(constants),
        partials=partials.data_ptr(),
        table=table.data_ptr(),
        grad=grad.data_ptr(),
        grad_x=of_x.data_ptr(),
        grad_weight=weight_gradient.data_ptr() if of_weights else 0,
        grad_bias=bias_gradient.data_ptr() if of_weights else 0,
        grad_style=style_gradient.data_ptr() if of_style else 0,
        coefficients=coefficients.data_ptr(),
        **_sizes(x, groups, activation),
        **_where(x),
    )
    return found


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    style: Tensor | None,
    table: Tensor,
    groups: int,
    activation: str,
    of_weights: bool,
    of_style: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels = x.shape[:2]
    of_weight = x.new_empty(channels if of_weights else 0, dtype=torch.float32)
    of_style_too = x.new_empty((batch, channels) if of_style else 0, dtype=torch.float32)
    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    return of_x, of_weight, torch.empty_like(of_weight), of_style_too


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, style, _, _, ctx.groups, _, ctx.activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, style, output[1])


def _autograd(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    of_weights = any(needs[1:3]) and weight_gradients_wanted()
    x, weight, bias, style, table = ctx.saved_tensors
    found = _norm_backward(
        grad, x, weight, bias, style, table, ctx.groups, ctx.activation, of_weights, needs[3]
    )
    wanted = (needs[0], needs[1] and of_weights, needs[2] and of_weights, needs[3])
    gradients = [g if want else None for g, want in zip(found, wanted, strict=True)]
    return (*gradients, None, None, None, None, None)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _workspace(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    tiles = native.extension().group_norm_tiles(batch=batch, pixels=height * width, channels=channels)
    return x.new_empty((batch, tiles, 2, channels), dtype=torch.float32)


def _constants(weight: Tensor, bias: Tensor, style: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.float().contiguous() for t in (weight, bias, style)]


def _addresses(constants: list[Tensor | None]) -> dict[str, int]:
    addresses = [0 if t is None else t.data_ptr() for t in constants]
    return dict(zip(("weight", "bias", "style"), addresses, strict=True))


def _sizes(x: Tensor, groups: int, activation: str) -> dict[str, Any]:
    batch, channels, height, width = x.shape
    return {
        "dtype": str(x.dtype).removeprefix("torch."),
        "batch": batch,
        "pixels": height * width,
        "channels": channels,
        "groups": groups,
        "activation": activation,
    }


def _where(x: Tensor) -> dict[str, int]:
    return {"device": x.device.index, "stream": torch.cuda.current_stream(x.device).cuda_stream}


_norm_backward = operation("group_norm_cuda_backward", _run_backward, _backward_fake, "cuda")
_norm = operation("group_norm_cuda", _run, _fake, "cuda", Autograd(_setup, _autograd))
