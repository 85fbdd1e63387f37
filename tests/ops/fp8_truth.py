"""What float8_e4m3fn numbers stand for, from the format's definition and in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(values: Tensor, scale: Tensor) -> Tensor:
    """values * scale in float64 on the CPU, by the bits: sign, 4 bits of exponent (bias 7), 3 of mantissa."""
    bits = values.detach().cpu().view(torch.uint8).int()
    sign, exponent, mantissa = 1 - 2 * (bits >> 7), (bits >> 3) & 15, bits & 7
    normal = (1 + mantissa.double() / 8) * torch.exp2(exponent.double() - 7)
    numbers = sign * torch.where(exponent == 0, mantissa.double() * 2**-9, normal)
    return torch.where(bits & 127 == 127, torch.nan, numbers) * scale.cpu().double()


def assert_nearest(x: Tensor, values: Tensor, scale: Tensor) -> None:
    """That `values` are the float8 numbers next to x / scale, and the scale the least one that holds them."""
    columns, x = x.shape[-1], x.cpu().double()
    found = exact(values, scale)
    assert values.shape == (*x.shape[:-1], columns + -columns % 16) and scale.shape == (*x.shape[:-1], 1)
    assert (found[..., columns:] == 0).all() and found.isfinite().all()
    scale = scale.cpu().double()
    # Half of the distance between neighbours at |x|, 2^(exponent - 3), but never below that of subnormals.
    exponent = torch.frexp((x.abs() / scale).clamp_min(2**-6)).exponent - 1
    allowed = torch.exp2(exponent - 4.0) * scale
    assert ((found[..., :columns] - x).abs() <= allowed).all()
    largest = x.abs().amax(-1, keepdim=True)
    assert (torch.frexp(scale).mantissa == 0.5).all(), "scales are powers of two"
    assert (largest <= 448 * scale).all()
    assert ((largest > 448 * scale / 2) | (scale == 2.0**-126)).all(), "a smaller scale would do"


def exact_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x W^T + bias in float64, of x as torch's own cast rounds it; and the sum of all terms' sizes."""
    x = torch.nn.functional.pad(x.cpu().double(), (0, weight.shape[1] - x.shape[-1]))
    step = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True) / 448)))
    rounded = (x / step).float().to(torch.float8_e4m3fn).double() * step
    matrix = exact(weight, scale)
    shift = 0 if bias is None else bias.cpu().double()
    return rounded @ matrix.t() + shift, rounded.abs() @ matrix.abs().t()
