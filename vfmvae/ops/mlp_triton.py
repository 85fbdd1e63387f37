"""The modulated MLP by Triton kernels, as an operation that torch knows.

    demodulated_mlp(residual, x, demodulation, expand, expand_bias, contract, contract_bias, gamma)
        = residual + gamma * (contract gelu(demodulation * (expand x) + expand_bias) + contract_bias)

    residual, x [B, C, H, W]; demodulation [B, E]; expand [E, C], expand_bias [E];
    contract [C, E], contract_bias, gamma [C]                     ->  [B, C, H, W], channels-last, in x.dtype

x comes times style: in a ConvNeXt layer the norm before multiplies by it (vfmvae/ops/convnext.py), and all
samples share the weights. Products take x.dtype and sum in float32. Only the arguments are kept for the
backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.gradients import weight_gradients_wanted
from vfmvae.ops.operation import Autograd, operation

SHARED_BYTES = 227 << 10
"""Of a block, on the cards that the tiles are made for: sm_90, sm_100, sm_103. On sm_120 it has 99 KiB."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW_BYTES = 16
"""Rows of channels are multiples of this, or the hardware that copies tiles cannot read them."""


def why_not(x: Tensor, expand: Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {x.dtype}"
    multiple = ROW_BYTES // x.element_size()
    for what, count in (("channels", x.shape[1]), ("hidden units", expand.shape[0])):
        if count % multiple:
            return f"it takes multiples of {multiple} {what} of {x.dtype}, not {count}"
    absent = native.why_no_triton(x)
    if absent is not None or x.device.type != "cuda":
        return absent
    return _card_objection(x.device.index or 0)


def why_not_first(x: Tensor) -> str | None:
    return "products of float32 are faster by cuBLAS" if x.dtype == torch.float32 else None


@torch.compiler.assume_constant_result
def _card_objection(device_index: int) -> str | None:
    if not torch.cuda.is_available():
        return None  # a tensor without memory
    card: Any = torch.cuda.get_device_properties(device_index)
    if card.major < 9:
        return f"its tiles are too large for cards before Hopper, and this is sm_{card.major}{card.minor}"
    if card.shared_memory_per_block_optin < SHARED_BYTES:
        return (
            f"its tiles need {SHARED_BYTES >> 10} KiB of shared memory, and a block of this"
            f" sm_{card.major}{card.minor} has {card.shared_memory_per_block_optin >> 10}"
        )
    return None


def _fake(
    residual: Tensor,
    x: Tensor,
    demodulation: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    contract: Tensor,
    contract_bias: Tensor,
    gamma: Tensor,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _run(
    residual: Tensor,
    x: Tensor,
    demodulation: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    contract: Tensor,
    contract_bias: Tensor,
    gamma: Tensor,
) -> Tensor:
    from vfmvae.kernels.modulated_mlp import mlp_fwd
    from vfmvae.kernels.modulated_mlp_wide import wide_fwd
    from vfmvae.kernels.tuned import MOST_CHANNELS

    out = torch.empty_like(x, memory_format=torch.channels_last)
    if x.numel() == 0:
        return out
    dtype, residual, x, into = x.dtype, _pixels(residual), _pixels(x), _pixels(out)
    first, last_bias = _dense(expand, dtype), _plain(contract_bias * gamma)
    if x.shape[2] > MOST_CHANNELS["forward"]:
        second, run = _product(contract, gamma[:, None], dtype), wide_fwd
    else:
        second, run = _product(contract.t(), gamma, dtype), mlp_fwd
    run(residual, x, _plain(demodulation), first, second, _plain(expand_bias), last_bias, into)
    return out


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    demodulation: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    contract: Tensor,
    contract_bias: Tensor,
    gamma: Tensor,
    of_weights: bool,
) -> list[Tensor]:
    """Gradients of x, demodulation and, if `of_weights`, of the others in order; float32 but for x."""
    asked = (demodulation, expand, expand_bias, contract, contract_bias, gamma)[: 6 if of_weights else 1]
    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    return [of_x, *(torch.empty(t.shape, dtype=torch.float32, device=x.device) for t in asked)]


def _run_backward(
    grad: Tensor,
    x: Tensor,
    demodulation: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    contract: Tensor,
    contract_bias: Tensor,
    gamma: Tensor,
    of_weights: bool,
) -> list[Tensor]:
    from vfmvae.kernels.tuned import MOST_CHANNELS

    if x.numel() == 0:
        found = _backward_fake(
            grad, x, demodulation, expand, expand_bias, contract, contract_bias, gamma, of_weights
        )
        return [t.zero_() for t in found]
    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    grad, x = _pixels(grad.to(x.dtype)), _pixels(x)
    most = MOST_CHANNELS["weights" if of_weights else "inputs"]
    run = wide_gradients if x.shape[2] > most else fused_gradients
    given = _plain(demodulation), _dense(expand, x.dtype), _plain(expand_bias), contract, gamma
    found = run(grad, x, *given, of_weights, _pixels(of_x))
    if not of_weights:
        return [of_x, *found]
    *found, of_scaled, of_scaled_bias = found
    of_contract = _product(of_scaled, gamma[:, None], torch.float32)
    of_gamma = (of_scaled * contract).sum(1).addcmul_(of_scaled_bias, contract_bias)
    return [of_x, *found, of_contract, _plain(of_scaled_bias * gamma), of_gamma]


def fused_gradients(
    grad: Tensor,
    x: Tensor,
    demodulation: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    contract: Tensor,
    gamma: Tensor,
    of_weights: bool,
    of_x: Tensor,
) -> list[Tensor]:
    """Fills of_x; returns the other gradients, last of gamma * contract and gamma * contract_bias.

    Tensors are as _run_backward hands them over.
    """
    from vfmvae.kernels.modulated_mlp_backward import mlp_input_grad, mlp_weight_grad

    given = (grad, x, demodulation, expand, expand_bias, _product(contract.t(), gamma, x.dtype))
    sums = mlp_input_grad(*given, of_x, of_scale=not of_weights)
    if not of_weights:
        return [sums]
    found = mlp_weight_grad(*given)
    return [found.demodulation, found.first, found.first_bias, found.second.t(), sums]


def wide_gradients(
    grad: Tensor,
    x: Tensor,
    demodulation: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    contract: Tensor,
    gamma: Tensor,
    of_weights: bool,
    of_x: Tensor,
) -> list[Tensor]:
    """The same for more channels."""
    from vfmvae.kernels.modulated_mlp_wide import hidden_grad

    given = (grad, x, demodulation, expand, expand_bias, _product(contract, gamma[:, None], x.dtype))
    grad_z, of_demodulation, for_weights = hidden_grad(*given, of_weights)
    torch.mm(grad_z.flatten(0, 1), expand, out=of_x.flatten(0, 1))
    if for_weights is None:
        return [of_demodulation]
    hidden, of_expand_bias = for_weights
    of_expand, of_contract = _sum_of_products(grad_z, x), _sum_of_products(grad, hidden)
    of_contract_bias = grad.sum((0, 1), dtype=torch.float32)
    return [of_demodulation, of_expand, of_expand_bias, of_contract, of_contract_bias]


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """a [B, P, M] and b [B, P, N] -> the sum of a b^T over samples and pixels, [M, N] in float32."""
    a, b = a.flatten(0, 1).t(), b.flatten(0, 1)
    if a.dtype != torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    of_weights = any(needs[3:]) and weight_gradients_wanted()
    found: list[Tensor | None] = [*_mlp_backward(grad, *ctx.saved_tensors, of_weights)]
    found += [None] * (len(needs) - 1 - len(found))
    kept = [g if need else None for g, need in zip(found, needs[1:], strict=True)]
    return (grad if needs[0] else None, *kept)


def _pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] as dense [B, H W, C], at an address that tiles can be copied from."""
    x = x.contiguous(memory_format=torch.channels_last)
    if x.data_ptr() % ROW_BYTES:
        x = x.clone(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).view(batch, height * width, channels)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """In one pass, at an address that tiles can be copied from."""
    if weight.dtype == dtype and weight.is_contiguous() and weight.data_ptr() % ROW_BYTES == 0:
        return weight
    return torch.empty(weight.shape, dtype=dtype, device=weight.device).copy_(weight)


def _product(weight: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * factor, dense and rounded to dtype once, in one pass."""
    return torch.mul(weight, factor, out=torch.empty(weight.shape, dtype=dtype, device=weight.device))


_DEVICES = ("cpu", "cuda")
_mlp_backward = operation("demodulated_mlp_backward", _run_backward, _backward_fake, _DEVICES)
demodulated_mlp = operation("demodulated_mlp", _run, _fake, _DEVICES, Autograd(_setup, _backward))
