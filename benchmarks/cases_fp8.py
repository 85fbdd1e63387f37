"""Linear layers in float8, as of a frozen encoder: the tokens' numbers made float8, and the whole layer."""

from __future__ import annotations

import math

import torch
from case import Case, Operation, Shape, activations, flops
from torch import Tensor

from vfmvae import ops
from vfmvae.ops.fp8 import _FP8_LINEAR, _QUANTISE_ROWS

ROWS: dict[str, list[Shape]] = {  # [B, N, K]
    "demo": [(8, 64, 128)],
    "full": [(1, 1024, 1024), (1, 1024, 4096)],
    "odd": [(1, 7, 12), (3, 33, 40)],
}
LAYERS: dict[str, list[Shape]] = {  # [B, N, K, outputs]; at full size qkv, proj, fc1 and fc2
    "demo": [(8, 64, 128, 384)],
    "full": [(1, 1024, 1024, 1024), (1, 1024, 1024, 3072), (1, 1024, 1024, 4096), (1, 1024, 4096, 1024)],
    "odd": [(1, 7, 12, 16), (3, 33, 40, 48)],
}


def quantise_rows(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    def values(x: Tensor, fused: bool | str) -> Tensor:
        return ops.quantise_rows(x, fused=fused)[0]

    work = flops(3 * math.prod(shape))
    return Case(values, [activations(shape, dtype, device)], 1, work, "fma", differentiable=False)


def fp8_linear(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    *of_x, outputs = shape
    weight, scale = ops.quantise_rows(torch.randn(outputs, of_x[-1], device=device) / of_x[-1] ** 0.5)
    bias = torch.randn(outputs, device=device).bfloat16()

    def layer(x: Tensor, fused: bool | str) -> Tensor:
        return ops.fp8_linear(x, weight, scale, bias, fused=fused)

    x, work = activations(tuple(of_x), dtype, device), flops(2 * math.prod(shape))
    constant = weight.numel() + 4 * scale.numel() + 2 * bias.numel()
    return Case(layer, [x], 1, work, "matrix", constant_bytes=constant, differentiable=False)


OPERATIONS = {
    "quantise_rows": Operation(_QUANTISE_ROWS, quantise_rows, ROWS),
    "fp8_linear": Operation(_FP8_LINEAR, fp8_linear, LAYERS),
}
