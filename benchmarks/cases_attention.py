"""Attention: plain as in the encoder, with the mean over heads as in the fusion, with a null key."""

from __future__ import annotations

import torch
from case import Case, Operation, Shape, flops
from torch import Tensor

from vfmvae import ops
from vfmvae.ops.attention import _ATTENTION

ENCODER: dict[str, list[Shape]] = {  # [B, heads, N, d]; the last at full size is the discriminator's backbone
    "demo": [(8, 4, 64, 32)],
    "full": [(1, 16, 1024, 64), (1, 6, 197, 64)],
    "odd": [(1, 3, 77, 40), (3, 2, 130, 128)],
}
FUSION: dict[str, list[Shape]] = {
    "demo": [(8, 4, 64, 32)],
    "full": [(1, 16, 1024, 64), (1, 12, 256, 64)],
    "odd": ENCODER["odd"],
}
DECODER: dict[str, list[Shape]] = {
    "demo": [(8, 8, 64, 8)],
    "full": [(1, 8, 1024, 64), (1, 8, 256, 64), (1, 8, 64, 64)],
    "odd": ENCODER["odd"],
}


def _case(shape: Shape, dtype: torch.dtype, device: torch.device, null: bool, head_mean: bool) -> Case:
    batch, heads, length, width = shape
    qkv = torch.randn(batch, length, 3, heads, width, device=device).to(dtype)
    tensors = [*qkv.permute(2, 0, 3, 1, 4)]
    if null:
        tensors += torch.randn(2, heads, width, device=device).unbind()

    def attend(*inputs: Tensor, fused: bool | str) -> Tensor:
        return ops.attention(*inputs, head_mean=head_mean, fused=fused)

    # Two products forward; backward five: of the logits again, and four gradients.
    work = flops(4 * batch * heads * length**2 * width, 2.5, 2.5)
    return Case(attend, tensors, 3, work, "matrix", reads=tuple(range(len(tensors))))


def plain(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    return _case(shape, dtype, device, null=False, head_mean=False)


def mean(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    return _case(shape, dtype, device, null=False, head_mean=True)


def null_key(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    return _case(shape, dtype, device, null=True, head_mean=False)


OPERATIONS = {
    "attention": Operation(_ATTENTION, plain, ENCODER),
    "attention_head_mean": Operation(_ATTENTION, mean, FUSION),
    "attention_null_key": Operation(_ATTENTION, null_key, DECODER),
}
