"""Normalisations of the decoder: group norm with fp32 statistics, channel RMS norm.

Shapes: x [B, C, H, W]. Results are in x.dtype; statistics are accumulated in float32 (float64 for float64 x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import native, norm_cuda
from vfmvae.ops.arguments import check_maps, check_tensors
from vfmvae.ops.dispatch import Fused, Implementation, Op, always
from vfmvae.ops.operation import Autograd, operation

Activation = Literal["leaky_relu", "gelu", "silu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "gelu": F.gelu,
    "silu": F.silu,
}


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    activation: Activation | None = None,
    style: Tensor | None = None,
    *,
    fused: Fused = True,
) -> Tensor:
    """Group normalisation over C/groups channels and all positions, optionally with style and activation:
    activation(style * (normed x * weight + bias)).

    Args:
        x: [B, C, H, W].
        groups: divides C.
        weight, bias: [C].
        activation: "leaky_relu" (slope 0.2), "gelu" (exact), "silu" or None.
        style: [B, C], a factor per sample and channel, before the activation; float32 whatever x is; or None.

    Returns:
        [B, C, H, W] in x.dtype. The compiled forms can be differentiated once.

    Raises:
        ValueError: groups that do not divide C, an unknown activation, tensors of other shapes or on other
            devices.
    """
    _check(x, groups, weight, bias, activation, style)
    return _GROUP_NORM(fused, x, groups, weight, bias, eps, activation, style)


def _check(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, activation: str | None, style: Tensor | None
) -> None:
    check_maps(x)
    check_groups(x, groups)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
    batch, channels, *_ = x.shape
    check_tensors(
        x, ("weight", weight, (channels,)), ("bias", bias, (channels,)), ("style", style, (batch, channels))
    )


def check_groups(x: Tensor, groups: int) -> None:
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} channels cannot be divided into {groups} groups")


# torch.group_norm, since F.group_norm refuses groups of a single value (batch 1 at 1 x 1 pixel).


def group_norm_reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: Activation | None,
    style: Tensor | None = None,
) -> Tensor:
    wide = _asking_for_a_gradient(x if x.dtype == torch.float64 else x.float(), weight)
    y = torch.group_norm(wide, groups, weight.to(wide.dtype), bias.to(wide.dtype), eps)
    y = (y if style is None else y * style[:, :, None, None].to(wide.dtype)).to(x.dtype)
    return y if activation is None else ACTIVATIONS[activation](y)


def _group_norm_torch(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: Activation | None,
    style: Tensor | None = None,
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu":
        x = _asking_for_a_gradient(x - _group_means(x, groups), weight)
    y = torch.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    y = y.to(x.dtype)  # from that of autocast
    y = y if style is None else y * style[:, :, None, None].to(x.dtype)
    return y if activation is None else ACTIVATIONS[activation](y)


def _asking_for_a_gradient(x: Tensor, weight: Tensor) -> Tensor:
    """x, requiring a gradient if `weight` does: PyTorch 2.11's backward for channels-last memory on the CPU
    crashes where the weight asks for a gradient and the input does not.
    """
    if x.device.type != "cpu" or x.requires_grad or not (weight.requires_grad and torch.is_grad_enabled()):
        return x
    return x.detach().requires_grad_()


@torch.no_grad()
def _group_means(x: Tensor, groups: int) -> Tensor:
    """[B, C, 1, 1], equal within a group; a shift by it changes neither the norm nor its gradients.

    ATen takes the variance of channels-last CPU tensors as E[x^2] - E[x]^2, inexact where means are large.
    """
    batch, channels = x.shape[:2]
    means = x.mean(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32)).view(
        batch, groups, channels // groups
    )
    shift = means.mean(dim=2, keepdim=True).expand_as(means)
    return shift.reshape(batch, channels, 1, 1).to(x.dtype)


def _group_norm_compiled(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: Activation | None,
    style: Tensor | None = None,
) -> Tensor:
    return _norm(x, weight, bias, groups, eps, activation or "none")[0]


def _run_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, channels-last, and mean and 1 / sqrt(variance + eps) [B, groups] in float32."""
    out, mean, rstd = _norm_fake(x, weight, bias, groups, eps, activation)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    native.extension().group_norm_cpu(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        out=out.data_ptr(),
        eps=eps,
        **_sizes(x, groups, activation),
    )
    return out, mean, rstd


def _norm_fake(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    mean = torch.empty((x.shape[0], groups), dtype=torch.float32, device=x.device)
    return torch.empty_like(x, memory_format=torch.channels_last), mean, torch.empty_like(mean)


def _run_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of weight and bias in float32."""
    grad_x, grad_weight, grad_bias = _norm_backward_fake(grad, x, weight, bias, mean, rstd, activation)
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad.to(x.dtype)))
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    native.extension().group_norm_backward_cpu(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        grad=grad.data_ptr(),
        grad_x=grad_x.data_ptr(),
        grad_weight=grad_weight.data_ptr(),
        grad_bias=grad_bias.data_ptr(),
        **_sizes(x, mean.shape[1], activation),
    )
    return grad_x, grad_weight, grad_bias


def _norm_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    of_weight = torch.empty_like(weight, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), of_weight, torch.empty_like(of_weight)


def _sizes(x: Tensor, groups: int, activation: str) -> dict[str, Any]:
    batch, channels, height, width = x.shape
    return {
        "dtype": str(x.dtype).removeprefix("torch."),
        "batch": batch,
        "pixels": height * width,
        "channels": channels,
        "groups": groups,
        "activation": activation,
        "threads": torch.get_num_threads(),
    }


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, ctx.activation = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _norm_autograd(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    found = _norm_backward(grad, *ctx.saved_tensors, ctx.activation)
    gradients = [g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=False)]
    return (*gradients, None, None, None)


_norm_backward = operation("group_norm_backward", _run_norm_backward, _norm_backward_fake, "cpu")
_norm = operation("group_norm", _run_norm, _norm_fake, "cpu", Autograd(_setup_norm, _norm_autograd))


MOST_CHANNELS = {torch.float32: 128, torch.bfloat16: 256}
"""Of the compiled form: with more, PyTorch's is as fast or faster (measured in docs/performance.md)."""


def _why_not_compiled(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: Activation | None,
    style: Tensor | None,
) -> str | None:
    if style is not None:
        return "it takes no style"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {x.dtype}"
    if 0 in x.shape[2:]:
        return "x has no pixels"
    return native.why_no_cpu_code(x)


def _why_not_compiled_first(x: Tensor, *_: object) -> str | None:
    most = MOST_CHANNELS[x.dtype]
    return (
        f"it is slower from {most + 1} channels on, and there are {x.shape[1]}" if x.shape[1] > most else None
    )


def channel_rms_norm(x: Tensor, gamma: Tensor, *, fused: Fused = True) -> Tensor:
    """x / |x| * sqrt(C) * gamma with the norm over channels; x [B, C, H, W], gamma [C].

    Raises:
        ValueError: tensors of other shapes or on other devices.
    """
    check_maps(x)
    check_tensors(x, ("gamma", gamma, (x.shape[1],)))
    return _CHANNEL_RMS_NORM(fused, x, gamma)


def channel_rms_norm_reference(x: Tensor, gamma: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    y = F.normalize(wide, dim=1) * (x.shape[1] ** 0.5 * gamma[:, None, None].to(wide.dtype))
    return y.to(x.dtype)


_GROUP_NORM = Op(
    "group_norm",
    group_norm_reference,
    (
        Implementation("cuda", norm_cuda.group_norm, norm_cuda.why_not),
        Implementation("cpu", _group_norm_compiled, _why_not_compiled, _why_not_compiled_first),
        Implementation("channels_last", _group_norm_torch, always),
    ),
)
_CHANNEL_RMS_NORM = Op("channel_rms_norm", channel_rms_norm_reference)
