from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.agreement import assert_agrees
from vfmvae import ops


def layers(width: int, qkv: int, skip: int) -> list[Tensor]:
    affine = [1 + 0.1 * torch.randn(width), torch.randn(width)]
    return [
        *affine,
        torch.randn(qkv, width),
        torch.randn(qkv),
        *affine,
        torch.randn(skip, width),
        torch.randn(skip),
    ]


def project(x: Tensor, *parts: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    return ops.fusion_projection(x, ops.NormedLinear(*parts[:4]), ops.NormedLinear(*parts[4:]), fused=fused)


def test_projection_is_the_formula_at_every_token() -> None:
    x, parts = torch.randn(1, 2, 6).double(), [p.double() for p in layers(6, 9, 4)]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    qkv, skip = project(x, *parts, fused=False)
    for result, (weight, bias, matrix, offset) in ((qkv, parts[:4]), (skip, parts[4:])):
        for token in range(2):
            expected = matrix @ (normed[0, token] * weight + bias) + offset
            torch.testing.assert_close(result[0, token], expected)


@pytest.mark.parametrize("shape", [(2, 16, 12), (1, 3, 7)])
def test_projection_agrees(shape: tuple[int, ...]) -> None:
    assert_agrees(project, [torch.randn(shape), *layers(shape[2], 3 * shape[2], 5)])
