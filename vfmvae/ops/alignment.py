"""The alignment loss between latents and foundation-model features ("VF" loss, arXiv 2501.01423).

Shapes: prediction and target [B, N, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import alignment_gemm, native
from vfmvae.ops.dispatch import Fused, Implementation, Op
from vfmvae.ops.operation import Autograd, operation

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW_BYTES = 16
"""Rows that Triton's kernels read are multiples of this, and begin at one."""
WIDEST = 4096
"""Most features that they take."""
SHARED_BYTES = 132 << 10
"""Of a block, for their tiles."""


def vf_alignment_loss(
    prediction: Tensor,
    target: Tensor,
    distance_margin: float = 0.0,
    cosine_margin: float = 0.0,
    distance_weight: float = 1.0,
    cosine_weight: float = 1.0,
    *,
    fused: Fused = True,
) -> Tensor:
    """Distance-matrix plus marginal cosine loss; a scalar in float32 (float64 for float64 input).

    With b = prediction and a = target, each position scaled to unit length:

        distance = mean over (batch, i, j) of relu(|b_i . b_j - a_i . a_j| - distance_margin)
        cosine   = mean over (batch, i) of relu(1 - cosine_margin - a_i . b_i)
        loss     = distance_weight * distance + cosine_weight * cosine

    Args:
        prediction: [B, N, D], projected latents; receives the gradient.
        target: [B, N, D], frozen features.
        fused: "triton" and "gemm" never hold N x N numbers. They compute the gradient with the loss, in
            float32, and keep it [B, N, D] for the backward pass, which scales it and may be called again. A
            target that requires a gradient is for the reference.

    Raises:
        ValueError: shapes or devices that differ, or another number of dimensions.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )
    if prediction.ndim != 3:
        raise ValueError(f"prediction and target have shape {tuple(prediction.shape)}; needed is [B, N, D]")
    if prediction.device != target.device:
        raise ValueError(f"prediction is on {prediction.device}, target on {target.device}")
    return _VF_ALIGNMENT(
        fused, prediction, target, distance_margin, cosine_margin, distance_weight, cosine_weight
    )


def vf_alignment_loss_reference(
    prediction: Tensor,
    target: Tensor,
    distance_margin: float,
    cosine_margin: float,
    distance_weight: float,
    cosine_weight: float,
) -> Tensor:
    if prediction.element_size() < 4:
        prediction, target = prediction.float(), target.float()
    b, a = F.normalize(prediction, dim=-1), F.normalize(target.to(prediction.dtype), dim=-1)
    difference = (b @ b.transpose(1, 2) - a @ a.transpose(1, 2)).abs()  # [B, N, N]
    distance = F.relu(difference - distance_margin).mean()
    cosine = F.relu(1.0 - cosine_margin - (a * b).sum(dim=-1)).mean()
    return distance_weight * distance + cosine_weight * cosine


# The two fused forms are operations of the same signature: the loss, and its gradient if that is asked for.


def _factors(prediction: Tensor, distance_weight: float, cosine_weight: float) -> tuple[float, float]:
    """What the sums of distances and of cosines are multiplied by: the weights of two means."""
    batch, count = prediction.shape[:2]
    return distance_weight / (batch * count * count), cosine_weight / (batch * count)


def _run_gemm(
    prediction: Tensor,
    target: Tensor,
    distance_margin: float,
    cosine_margin: float,
    distance_weight: float,
    cosine_weight: float,
    of_gradient: bool,
) -> tuple[Tensor, Tensor]:
    factors = _factors(prediction, distance_weight, cosine_weight)
    margins = distance_margin, cosine_margin
    loss, gradient = alignment_gemm.alignment(prediction, target, margins, factors, of_gradient)
    return loss, loss.new_empty(0) if gradient is None else gradient


def _run_triton(
    prediction: Tensor,
    target: Tensor,
    distance_margin: float,
    cosine_margin: float,
    distance_weight: float,
    cosine_weight: float,
    of_gradient: bool,
) -> tuple[Tensor, Tensor]:
    from vfmvae.kernels.alignment import alignment

    dtype = torch.promote_types(prediction.dtype, target.dtype)
    b, a = _rows(prediction, dtype), _rows(target, dtype)
    factors = _factors(prediction, distance_weight, cosine_weight)
    distance, cosine, gradient = alignment(b, a, (distance_margin, cosine_margin), factors, of_gradient)
    loss = factors[0] * distance.sum() + factors[1] * cosine.sum()
    return loss, loss.new_empty(0) if gradient is None else gradient


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense, of this dtype, at an address that tiles can be copied from."""
    x = x.to(dtype).contiguous()
    return x.clone() if x.data_ptr() % ROW_BYTES else x


def _fake(
    prediction: Tensor,
    target: Tensor,
    distance_margin: float,
    cosine_margin: float,
    distance_weight: float,
    cosine_weight: float,
    of_gradient: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    shape = prediction.shape if of_gradient else (0,)
    loss = torch.empty((), dtype=dtype, device=prediction.device)
    return loss, torch.empty(shape, dtype=dtype, device=prediction.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(gradient)
    ctx.dtype = inputs[0].dtype


def _run_backward(grad: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Scaled and rounded in one pass."""
    return torch.mul(gradient, grad, out=_backward_fake(grad, gradient, dtype))


def _backward_fake(grad: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(gradient.shape, dtype=dtype, device=gradient.device)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (_alignment_backward(grad, *ctx.saved_tensors, ctx.dtype), *[None] * 6)


_DEVICES = ("cpu", "cuda")
_alignment_backward = operation("vf_alignment_backward", _run_backward, _backward_fake, _DEVICES)
_AUTOGRAD = Autograd(_setup, _backward)
_alignment_gemm = operation("vf_alignment_gemm", _run_gemm, _fake, _DEVICES, _AUTOGRAD)
_alignment_triton = operation("vf_alignment_triton", _run_triton, _fake, _DEVICES, _AUTOGRAD)


def _loss_of(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    def loss(prediction: Tensor, target: Tensor, *numbers: float) -> Tensor:
        of_gradient = torch.is_grad_enabled() and prediction.requires_grad
        return run(prediction, target, *map(float, numbers), of_gradient)[0]

    return loss


def _why_not_gemm(prediction: Tensor, target: Tensor, distance_margin: float, *_: float) -> str | None:
    if prediction.numel() == 0:
        return f"it takes no empty tensors, and the shape is {list(prediction.shape)}"
    if not (prediction.is_floating_point() and target.is_floating_point()):
        return f"it takes floating point numbers, not {prediction.dtype} and {target.dtype}"
    if distance_margin < 0:
        return f"it takes no negative distance margin, and this is {distance_margin}"
    if torch.is_grad_enabled() and target.requires_grad:
        return "it gives no gradient of the target, which requires one"
    return None


def _why_not_triton(prediction: Tensor, target: Tensor, distance_margin: float, *_: float) -> str | None:
    objection = _why_not_gemm(prediction, target, distance_margin)
    if objection is not None:
        return objection
    for dtype in (prediction.dtype, target.dtype):
        if dtype not in TRITON_DTYPES:
            return f"it takes float32, bfloat16 and float16, not {dtype}"
    width, dtype = prediction.shape[2], torch.promote_types(prediction.dtype, target.dtype)
    multiple = ROW_BYTES // dtype.itemsize
    if width % multiple:
        return f"it takes multiples of {multiple} features of {dtype}, not {width}"
    if width > WIDEST:
        return f"it takes {WIDEST} features at most, not {width}"
    absent = native.why_no_triton(prediction)
    if absent is not None or prediction.device.type != "cuda":
        return absent
    return _card_objection(prediction.device.index or 0)


@torch.compiler.assume_constant_result
def _card_objection(device_index: int) -> str | None:
    if not torch.cuda.is_available():
        return None  # a tensor without memory
    card: Any = torch.cuda.get_device_properties(device_index)
    if card.major < 9:
        return f"its tiles are made for Hopper and later cards, and this is sm_{card.major}{card.minor}"
    if card.shared_memory_per_block_optin < SHARED_BYTES:
        return (
            f"its tiles need {SHARED_BYTES >> 10} KiB of shared memory, and a block of this"
            f" sm_{card.major}{card.minor} has {card.shared_memory_per_block_optin >> 10}"
        )
    return None


def _why_not_triton_first(prediction: Tensor, target: Tensor, *_: float) -> str | None:
    if torch.promote_types(prediction.dtype, target.dtype) == torch.float32:
        return "products of float32 are for cuBLAS"
    return None


_VF_ALIGNMENT = Op(
    "vf_alignment_loss",
    vf_alignment_loss_reference,
    (
        Implementation("triton", _loss_of(_alignment_triton), _why_not_triton, _why_not_triton_first),
        Implementation("gemm", _loss_of(_alignment_gemm), _why_not_gemm),
    ),
)
