"""The modulated MLP in compiled C++: pixels go through in tiles, so that hidden numbers never reach memory.

    modulated_mlp(residual, x, style, demodulation, expand, expand_bias, contract, contract_bias)
        = residual + contract gelu(demodulation * (expand (style * x)) + expand_bias) + contract_bias

    residual, x [B, C, H, W]; style [B, C]; demodulation [B, E]; expand [E, C], expand_bias [E];
    contract [C, E], contract_bias [C], these six in float32      ->  [B, C, H, W], channels-last, in x.dtype

The backward pass computes hidden numbers again. Sums are in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.gradients import weight_gradients_wanted
from vfmvae.ops.operation import Autograd, operation

MOST_CHANNELS = 128
"""Of float32. With more, weights leave the cache and PyTorch's matrix products are faster (measured in
docs/performance.md)."""

WEIGHTS = ("style", "demodulation", "expand", "expand_bias", "contract", "contract_bias")


def why_not(residual: Tensor, x: Tensor, *_: Tensor) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {x.dtype}"
    return native.why_no_cpu_code(x)


def why_not_first(residual: Tensor, x: Tensor, *_: Tensor) -> str | None:
    if x.dtype == torch.bfloat16 and native.cpu_multiplies_bfloat16():
        return "this processor multiplies matrices of bfloat16 faster than it does"
    if x.dtype == torch.float32 and x.shape[1] > MOST_CHANNELS:
        return f"it is slower from {MOST_CHANNELS + 1} channels on, and there are {x.shape[1]}"
    return None


def _fake(
    residual: Tensor,
    x: Tensor,
    style: Tensor,
    demodulation: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    contract: Tensor,
    contract_bias: Tensor,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    style: Tensor,
    demodulation: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    contract: Tensor,
    contract_bias: Tensor,
    of_weights: bool,
) -> list[Tensor]:
    """Gradients of x, style, demodulation and, if `of_weights`, of the others in order; float32 but for x."""
    inputs = (style, demodulation, expand, expand_bias, contract, contract_bias)
    asked = inputs if of_weights else inputs[:2]
    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    return [of_x, *(torch.empty(t.shape, dtype=torch.float32, device=x.device) for t in asked)]


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    of_weights = any(needs[4:]) and weight_gradients_wanted()
    found: list[Tensor | None] = [*_mlp_backward(grad, *ctx.saved_tensors, of_weights)]
    found += [None] * (len(WEIGHTS) + 1 - len(found))
    kept = [g if need else None for g, need in zip(found, needs[1:], strict=True)]
    return (grad if needs[0] else None, *kept)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _run(
    residual: Tensor,
    x: Tensor,
    style: Tensor,
    demodulation: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    contract: Tensor,
    contract_bias: Tensor,
) -> Tensor:
    x, residual = _channels_last(x), _channels_last(residual)
    weights = _plain(style, demodulation, expand, expand_bias, contract, contract_bias)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    native.extension().modulated_mlp_cpu(
        x=x.data_ptr(),
        residual=residual.data_ptr(),
        out=out.data_ptr(),
        **_addresses(weights),
        **_sizes(x, expand),
    )
    return out


def _run_backward(
    grad: Tensor,
    x: Tensor,
    style: Tensor,
    demodulation: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    contract: Tensor,
    contract_bias: Tensor,
    of_weights: bool,
) -> list[Tensor]:
    x, grad = _channels_last(x), _channels_last(grad.to(x.dtype))
    found = _backward_fake(
        grad, x, style, demodulation, expand, expand_bias, contract, contract_bias, of_weights
    )
    weights = _plain(style, demodulation, expand, expand_bias, contract, contract_bias)
    addresses = dict.fromkeys((f"grad_{name}" for name in WEIGHTS), 0)
    addresses |= {f"grad_{n}": t.data_ptr() for n, t in zip(("x", *WEIGHTS), found, strict=False)}
    native.extension().modulated_mlp_backward_cpu(
        x=x.data_ptr(), grad=grad.data_ptr(), **_addresses(weights), **addresses, **_sizes(x, expand)
    )
    return found


def _plain(*weights: Tensor) -> list[Tensor]:
    return [t.float().contiguous() for t in weights]


def _addresses(weights: list[Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in zip(WEIGHTS, weights, strict=True)}


def _sizes(x: Tensor, expand: Tensor) -> dict[str, Any]:
    batch, channels, height, width = x.shape
    return {
        "dtype": str(x.dtype).removeprefix("torch."),
        "batch": batch,
        "pixels": height * width,
        "channels": channels,
        "hidden": expand.shape[0],
        "threads": torch.get_num_threads(),
    }


_mlp_backward = operation("modulated_mlp_backward", _run_backward, _backward_fake, "cpu")
modulated_mlp = operation("modulated_mlp", _run, _fake, "cpu", Autograd(_setup, _backward))
