"""The exact GELU, x Phi(x), and its slope, inside other kernels.

FORM says how Phi, the normal distribution function, is computed:

    "erf"      to the last digits of float32: (1 + erf(x / sqrt(2))) / 2
    "tanh"     for 16-bit results: (1 + tanh(p(x))) / 2, where p fits the exact Phi to 5e-5 (the best p of
               two terms is off by 4e-4), and tanh is one instruction of the GPU with 11 good bits
    "sigmoid"  the same with exp and a division, for where that instruction is missing

erf takes about 25 instructions. With 128 channels a hidden number costs the matrix units as long as 16
instructions take, so erf would take longer than both products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def gelu_form(dtype: torch.dtype, on_gpu: bool) -> str:
    if dtype == torch.float32:
        return "erf"
    return "tanh" if on_gpu else "sigmoid"


@triton.jit
def normal_cdf(x, FORM: tl.constexpr):
    if FORM == "erf":
        return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
    # Past |x| = 6 Phi is 0 or 1; the bound keeps p growing with x there.
    square = tl.minimum(x * x, 36.0)
    p = x * (0.797507884 + square * (0.0370056465 - square * 3.51516886e-4))
    if FORM == "tanh":
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [p], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 + 0.5 * tanh
    return 1.0 / (1.0 + tl.exp(-2.0 * p))


@triton.jit
def gelu(x, FORM: tl.constexpr):
    return x * normal_cdf(x, FORM)


@triton.jit
def gelu_and_slope(x, FORM: tl.constexpr):
    """gelu(x) and d gelu(x) / dx = Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)."""
    cdf = normal_cdf(x, FORM)
    density = tl.exp2(x * x * -0.7213475204444817 - 1.3257480647361593)
    return x * cdf, cdf + x * density
