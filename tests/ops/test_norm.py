from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from tests.ops.agreement import assert_agrees
from vfmvae import ops
from vfmvae.ops.norm import ACTIVATIONS


def test_group_norm_has_zero_mean_and_unit_variance_per_group() -> None:
    x = 3 + 2 * torch.randn(2, 6, 5, 3, dtype=torch.float64)
    y = ops.group_norm(x, 2, torch.ones(6).double(), torch.zeros(6).double(), eps=0.0, fused=False)
    groups = y.view(2, 2, -1)
    torch.testing.assert_close(groups.mean(dim=2), torch.zeros(2, 2).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(groups.var(dim=2, unbiased=False), torch.ones(2, 2).double())


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize(("shape", "groups"), [((2, 8, 6, 6), 4), ((1, 6, 7, 3), 3), ((3, 4, 1, 2), 1)])
def test_group_norm_agrees(shape: tuple[int, ...], groups: int, activation: str | None) -> None:
    def norm(x: Tensor, weight: Tensor, bias: Tensor, fused: bool) -> Tensor:
        return ops.group_norm(x, groups, weight, bias, activation=activation, fused=fused)

    assert_agrees(norm, [torch.randn(shape), torch.randn(shape[1]), torch.randn(shape[1])])


@pytest.mark.parametrize("fused", [True, False])
def test_a_weight_can_learn_where_the_input_asks_for_no_gradient(fused: bool) -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    ops.group_norm(x, 2, weight, bias, fused=fused).square().sum().backward()
    expected = 2 * ops.group_norm(x.double(), 2, torch.ones(8).double(), torch.zeros(8).double(), fused=False)
    normed = expected / 2
    assert weight.grad is not None and bias.grad is not None
    torch.testing.assert_close(weight.grad, (expected * normed).sum((0, 2, 3)).float())
    torch.testing.assert_close(bias.grad, expected.sum((0, 2, 3)).float(), atol=1e-4, rtol=1e-4)
    frozen = ops.group_norm(x, 2, weight.detach(), bias.detach(), fused=fused)
    assert not frozen.requires_grad, "and nothing asks for one where all is frozen"


def test_a_large_mean_does_not_hide_the_variance() -> None:
    x = 100 + torch.randn(2, 8, 16, 16)
    assert_agrees(lambda x, fused: ops.group_norm(x, 2, torch.ones(8), torch.zeros(8), fused=fused), [x])


def test_a_group_of_one_value_becomes_the_bias() -> None:
    for fused in (True, False):
        y = ops.group_norm(torch.randn(1, 4, 1, 1), 4, torch.ones(4), torch.arange(4.0), fused=fused)
        torch.testing.assert_close(y.flatten(), torch.arange(4.0), atol=1e-4, rtol=0)


def test_statistics_of_half_precision_are_float32() -> None:
    # A mean of 100 with unit spread: 16-bit sums would lose the spread.
    x = 100 + torch.randn(1, 4, 64, 64)
    x16 = x.to(torch.bfloat16)
    ones, zeros = torch.ones(4), torch.zeros(4)
    truth = ops.group_norm(x16.double(), 1, ones.double(), zeros.double(), fused=False)
    for fused in (True, False):
        y = ops.group_norm(x16, 1, ones, zeros, fused=fused)
        assert y.dtype == torch.bfloat16
        assert (y.double() - truth).norm() / truth.norm() < 5e-3


def test_channel_rms_norm_has_length_root_c_and_agrees() -> None:
    x, gamma = torch.randn(2, 9, 3, 4), torch.randn(9)
    y = ops.channel_rms_norm(x, torch.ones(9), fused=False)
    torch.testing.assert_close(y.norm(dim=1), torch.full((2, 3, 4), 3.0))
    assert_agrees(ops.channel_rms_norm, [x, gamma])


def test_wrong_arguments_are_named() -> None:
    norm = functools.partial(ops.group_norm, torch.randn(1, 6, 2, 2))
    with pytest.raises(ValueError, match="6 channels cannot be divided into 4 groups"):
        norm(4, torch.ones(6), torch.zeros(6))
    with pytest.raises(ValueError, match="activation 'relu' is unknown; known: leaky_relu, gelu, silu"):
        norm(3, torch.ones(6), torch.zeros(6), activation="relu")
