"""Rows of OPERATIONS (cases.py) for the elementwise chains of diffusion transformers."""

from __future__ import annotations

import math

import torch
from case import Case, Operation, Shape, activations, flops
from torch import Tensor

from vfmvae import ops
from vfmvae.ops.gated import _SWIGLU_HALVES
from vfmvae.ops.modulation import _GATED_RESIDUAL, _NORM_MODULATE
from vfmvae.ops.qk_norm_rope import _QK_NORM_ROPE

TOKENS: dict[str, list[Shape]] = {  # [B, N, C] of B, and of XL with a class token
    "demo": [(8, 64, 128)],
    "full": [(1, 256, 768), (1, 257, 1152)],
    "odd": [(1, 7, 12), (3, 33, 40)],
}
HEADS: dict[str, list[Shape]] = {  # [B, N, heads, d] of the same
    "demo": [(8, 64, 4, 32)],
    "full": [(1, 256, 12, 64), (1, 257, 16, 72)],
    "odd": [(1, 7, 2, 6), (3, 33, 4, 10)],
}
HIDDEN: dict[str, list[Shape]] = {  # [B, N, hidden numbers] of their MLPs
    "demo": [(8, 64, 340)],
    "full": [(1, 256, 2048), (1, 257, 3072)],
    "odd": [(1, 7, 12), (3, 33, 40)],
}


def norm_modulate(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Layer norm; shift and scale are columns of one tensor, as a block's linear layer gives them."""
    batch, _, channels = shape
    shift, scale = torch.randn(batch, 2 * channels, device=device).to(dtype).chunk(2, dim=1)
    tensors = [activations(shape, dtype, device), shift, scale]
    return Case(ops.norm_modulate, tensors, 3, flops(10 * math.prod(shape)), "fma", reads=(0, 2))


def gated_residual(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    batch, _, channels = shape
    gate = torch.randn(batch, channels, device=device).to(dtype)
    tensors = [activations(shape, dtype, device), gate, activations(shape, dtype, device)]
    work = flops(2 * math.prod(shape))
    return Case(ops.gated_residual, tensors, 3, work, "fma", reads=(1, 2), passed_on=(0,))


def qk_norm_rope(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """RMS norms and a rotation. The three results in one tensor, whose copy is in the time of every
    implementation. The floor counts reads of the value that only this copy needs.
    """
    batch, tokens, heads, width = shape
    angles = torch.randn(tokens, width // 2, device=device).repeat_interleave(2, dim=1)
    rotation = angles.cos(), angles.sin()

    def prepare(qkv: Tensor, query: Tensor, key: Tensor, fused: bool | str) -> Tensor:
        norms = (ops.QKNorm(weight, None, 1e-6, "rms") for weight in (query, key))
        return torch.stack(ops.qk_norm_rope(qkv, heads, *norms, rotation, fused=fused))

    qkv = activations((batch, tokens, 3 * heads * width), dtype, device)
    tensors = [qkv, *(1 + 0.1 * torch.randn(2, width, device=device)).unbind()]
    work = flops(12 * qkv.numel())
    tables = 2 * angles.numel() * angles.element_size()
    return Case(prepare, tensors, 1, work, "fma", reads=(0, 1, 2), constant_bytes=tables)


def swiglu_halves(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    both = activations((*shape[:2], 2 * shape[2]), dtype, device)
    return Case(ops.swiglu_halves, [both], 1, flops(12 * math.prod(shape), 2), "fma", reads=(0,))


OPERATIONS = {
    "norm_modulate": Operation(_NORM_MODULATE, norm_modulate, TOKENS),
    "gated_residual": Operation(_GATED_RESIDUAL, gated_residual, TOKENS),
    "qk_norm_rope": Operation(_QK_NORM_ROPE, qk_norm_rope, HEADS),
    "swiglu_halves": Operation(_SWIGLU_HALVES, swiglu_halves, HIDDEN),
}
