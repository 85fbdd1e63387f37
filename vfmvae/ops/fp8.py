"""Linear layers in float8_e4m3fn (Micikevicius et al., arXiv 2209.05433) for weights that do not train.

Activations and weights are float8 with a scale for each token and for each output, so that one large token,
which vision transformers have, does not cost the others their digits. Scales are powers of two: applying one
is exact, and a number's only error is the rounding of the cast, 2^-4 of it at most (and 2^-10 scale below
2^-6 scale). All implementations therefore give the same float8 numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.dispatch import Fused, Implementation, Op
from vfmvae.ops.operation import operation

FP8 = torch.float8_e4m3fn
MULTIPLE = 16
"""Both sides of a weight must be multiples of this: a condition of the GPU's product."""
MOST_COLUMNS = 8192
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 9)
"""The first that multiplies float8 (Ada; Hopper is 9.0)."""


def quantise_rows(x: Tensor, *, fused: Fused = True) -> tuple[Tensor, Tensor]:
    """x as float8 with one scale for each row: x is about values * scale.

    Args:
        x: [..., K] in float32, bfloat16 or float16. float16 and bfloat16 need not be widened first.
        fused: "triton" is one pass.

    Returns:
        values: [..., K'] float8_e4m3fn, K' = K rounded up to a multiple of 16, zeros beyond K. The nearest to
            x / scale, ties to even; nothing is clamped, as the largest of a row is at most 448 scales. NaN
            stays NaN, and infinity, which the format lacks, becomes NaN.
        scale: [..., 1] float32, the least power of two that holds the row, at least 2^-126; with NaN or
            infinity in the row, some finite one.

    Raises:
        ValueError: for another dtype, or no dimension.
    """
    if x.dtype not in FLOATS:
        raise ValueError(f"x has dtype {x.dtype}; it must be one of {', '.join(map(str, FLOATS))}")
    if x.ndim == 0:
        raise ValueError("x has no dimension; it must be [..., K]")
    return _QUANTISE_ROWS(fused, x)


def quantise_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    x = F.pad(x.float(), (0, -x.shape[-1] % MULTIPLE))
    # The exponent of 448 = 1.75 * 2^8 is taken off; the sum carries where the mantissa is above 1.75.
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    exponent = (((largest.view(torch.int32) + 0x1FFFFF) >> 23) - 8).clamp_min(1)
    scale, inverse = ((e << 23).view(torch.float32) for e in (exponent, 254 - exponent))
    scaled = x * inverse
    return scaled.where(scaled.abs() <= 448, torch.nan).to(FP8), scale


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, fused: Fused = True
) -> Tensor:
    """x W^T + bias with x and W in float8: `quantise_rows` of x, times a weight that it gave before.

    Sums are float32, and scaled and rounded once.

    Args:
        x: [..., K] in float32, bfloat16 or float16.
        weight: [N, K'] float8_e4m3fn; K' is K rounded up to a multiple of 16.
        scale: [N, 1] float32.
        bias: [N] in bfloat16, or none.
        fused: "scaled_mm" is two kernels, of which PyTorch's product wants N to be a multiple of 16 and a GPU
            of compute capability 8.9 or later. The reference multiplies what the float8 numbers stand for.

    Returns:
        [..., N] bfloat16. A row of x with NaN or infinity is NaN.

    Raises:
        ValueError: where shapes, dtypes or devices do not fit, and for an x that asks for gradients: there
            are none.
    """
    _check(x, weight, scale, bias)
    return _FP8_LINEAR(fused, x, weight, scale, bias)


def fp8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    values, of_rows = quantise_rows_reference(x)
    # Under autocast, as encoders are, the sum would be rounded before the bias is added.
    with torch.autocast(x.device.type, enabled=False):
        out = F.linear(values.float() * of_rows, weight.float() * scale)
        return (out if bias is None else out + bias).bfloat16()


def why_no_fp8(device: torch.device) -> str | None:
    """Why matrices of float8 cannot be multiplied on `device`, or None."""
    if device.type != "cuda":
        return f"{device.type} has no units for float8; it takes a GPU of compute capability 8.9 or later"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, below 8.9"
    return None


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"x has dtype {x.dtype}; it must be one of {', '.join(map(str, FLOATS))}")
    if weight.dtype != FP8 or weight.ndim != 2:
        raise ValueError(f"weight is {list(weight.shape)} {weight.dtype}; needed is [N, K'] {FP8}")
    outputs, inputs = weight.shape
    if x.ndim == 0 or x.shape[-1] + -x.shape[-1] % MULTIPLE != inputs:
        raise ValueError(
            f"x {list(x.shape)} does not fit weight {list(weight.shape)}: K' must be the last of x, rounded"
            f" up to a multiple of {MULTIPLE}"
        )
    if scale.shape != (outputs, 1) or scale.dtype != torch.float32:
        raise ValueError(f"scale is {list(scale.shape)} {scale.dtype}; needed is [{outputs}, 1] float32")
    if bias is not None and (bias.shape != (outputs,) or bias.dtype != torch.bfloat16):
        raise ValueError(f"bias is {list(bias.shape)} {bias.dtype}; needed is [{outputs}] bfloat16")
    devices = {t.device for t in (x, weight, scale, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"x, weight, scale and bias lie on {', '.join(sorted(map(str, devices)))}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x requires gradients, and fp8_linear has none; use a linear layer in bfloat16")


def _run(x: Tensor) -> tuple[Tensor, Tensor]:
    from vfmvae.kernels.fp8 import quantise_rows

    values, scale = _fake(x)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    quantise_rows(rows, values.view(-1, values.shape[-1]), scale)
    return values, scale


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    width = x.shape[-1] + -x.shape[-1] % MULTIPLE
    values = torch.empty(*x.shape[:-1], width, dtype=FP8, device=x.device)
    return values, torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)


def _scaled_mm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    values, of_rows = _QUANTISE_ROWS(True, x.detach())
    out = torch._scaled_mm(
        values.flatten(0, -2),
        weight.t(),
        of_rows.flatten(0, -2),
        scale.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
    )
    return out.unflatten(0, x.shape[:-1])


_quantise_rows_triton = operation("quantise_rows", _run, _fake, ("cpu", "cuda"))


def _why_not_triton(x: Tensor) -> str | None:
    if not 1 <= x.shape[-1] <= MOST_COLUMNS:
        return f"a row has {x.shape[-1]} numbers; it takes 1 to {MOST_COLUMNS}, which registers hold"
    return native.why_no_triton(x) or (_why_no_units(x.device.index) if x.is_cuda else None)


def _why_not_scaled_mm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> str | None:
    if weight.shape[0] % MULTIPLE:
        return f"{weight.shape[0]} outputs are not a multiple of {MULTIPLE}"
    if x.ndim < 2 or x.numel() == 0:
        return f"it takes matrices with elements, not {list(x.shape)}"
    return f"the tensor is on {x.device.type}" if not x.is_cuda else _why_no_units(x.device.index)


@torch.compiler.assume_constant_result
def _why_no_units(index: int | None) -> str | None:
    return why_no_fp8(torch.device("cuda", index or 0))


_QUANTISE_ROWS = Op(
    "quantise_rows",
    quantise_rows_reference,
    (Implementation("triton", _quantise_rows_triton, _why_not_triton),),
)
_FP8_LINEAR = Op(
    "fp8_linear", fp8_linear_reference, (Implementation("scaled_mm", _scaled_mm, _why_not_scaled_mm),)
)
