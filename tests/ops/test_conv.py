from __future__ import annotations

import pytest
import torch

from tests.ops.agreement import assert_agrees
from vfmvae import ops


def test_depthwise_is_a_sum_over_the_window() -> None:
    x, weight, bias = torch.randn(2, 3, 5, 4), torch.randn(3, 1, 3, 3), torch.randn(3)
    noise = torch.randn(5, 4)
    expected = torch.zeros_like(x)
    for row in range(5):
        for column in range(4):
            for i in range(3):
                for j in range(3):
                    r, c = row + i - 1, column + j - 1
                    if 0 <= r < 5 and 0 <= c < 4:
                        expected[:, :, row, column] += x[:, :, r, c] * weight[:, 0, i, j]
    expected += bias[:, None, None] + noise
    torch.testing.assert_close(ops.depthwise_conv2d(x, weight, bias, noise, fused=False), expected)


@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (1, 5, 7, 3), (3, 1, 1, 2)])
@pytest.mark.parametrize("size", [3, 5, 7])
def test_depthwise_agrees(shape: tuple[int, ...], size: int) -> None:
    channels = shape[1]
    inputs = [
        torch.randn(shape),
        torch.randn(channels, 1, size, size),
        torch.randn(channels),
        torch.randn(shape[2:]),
    ]
    assert_agrees(ops.depthwise_conv2d, inputs)


@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (1, 5, 7, 3)])
def test_pointwise_is_a_matrix_product_and_agrees(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(7, shape[1]), torch.randn(7)
    expected = torch.einsum("bchw,dc->bdhw", x, weight) + bias[:, None, None]
    torch.testing.assert_close(ops.pointwise_conv2d(x, weight, bias, fused=False), expected)
    assert_agrees(ops.pointwise_conv2d, [x, weight, bias])


def test_fused_results_stay_channels_last() -> None:
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    for y in (ops.depthwise_conv2d(x, torch.randn(8, 1, 3, 3)), ops.pointwise_conv2d(x, torch.randn(4, 8))):
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_wrong_weights_are_named() -> None:
    x = torch.randn(1, 4, 4, 4)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 1, 2, 2\)"):
        ops.depthwise_conv2d(x, torch.randn(4, 1, 2, 2))
    with pytest.raises(ValueError, match=r"weight has shape \(3, 5\), needed is \[D, 4\]"):
        ops.pointwise_conv2d(x, torch.randn(3, 5))
