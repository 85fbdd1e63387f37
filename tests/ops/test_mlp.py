from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.agreement import assert_agrees
from vfmvae import ops


def mlp_inputs(batch: int, channels: int, height: int, width: int) -> list[Tensor]:
    hidden = 4 * channels
    return [
        torch.randn(batch, channels, height, width),
        torch.randn(batch, channels, height, width),
        1 + 0.5 * torch.randn(batch, channels),
        torch.randn(hidden, channels),
        torch.randn(hidden),
        torch.randn(channels, hidden) * hidden**-0.5,
        torch.randn(channels),
        torch.randn(channels),
    ]


def test_mlp_is_the_formula_at_every_pixel() -> None:
    residual, x, style, w1, b1, w2, b2, gamma = (t.double() for t in mlp_inputs(2, 3, 2, 2))
    expected = torch.empty_like(x)
    for b in range(2):
        weight = w1 * style[b]
        weight = weight / (weight.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
        for i in range(2):
            for j in range(2):
                hidden = F.gelu(weight @ x[b, :, i, j] + b1)
                expected[b, :, i, j] = residual[b, :, i, j] + gamma * (w2 @ hidden + b2)
    torch.testing.assert_close(
        ops.modulated_mlp(residual, x, style, w1, b1, w2, b2, gamma, fused=False), expected
    )


# More pixels than channels and fewer: the fused form computes the modulation differently.
@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (1, 5, 7, 3), (3, 16, 2, 2), (1, 12, 1, 1)])
def test_mlp_agrees(shape: tuple[int, ...]) -> None:
    assert_agrees(ops.modulated_mlp, mlp_inputs(*shape))


@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (1, 5, 7, 3)])
def test_to_rgb_is_an_einsum_and_agrees(shape: tuple[int, ...]) -> None:
    x, style = torch.randn(shape), torch.randn(shape[:2])
    weight, bias = torch.randn(3, shape[1]), torch.randn(3)
    expected = torch.einsum("bchw,bc,dc->bdhw", x, style, weight) + bias[:, None, None]
    torch.testing.assert_close(ops.modulated_to_rgb(x, style, weight, bias, fused=False), expected)
    assert_agrees(ops.modulated_to_rgb, [x, style, weight, bias])


@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16_keeps_its_dtype_and_is_near(fused: bool) -> None:
    inputs = mlp_inputs(2, 16, 5, 5)
    truth = ops.modulated_mlp(*(t.double() for t in inputs), fused=False)
    low = [t.bfloat16() for t in inputs[:2]] + inputs[2:]
    y = ops.modulated_mlp(*low, fused=fused)
    assert y.dtype == torch.bfloat16
    assert (y.double() - truth).norm() / truth.norm() < 1e-2
    image = ops.modulated_to_rgb(low[1], inputs[2], torch.randn(3, 16), torch.zeros(3), fused=fused)
    assert image.dtype == torch.float32
