from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from tests.helpers import COMPILED, DEVICES, assert_kernel_close, requires_extension
from tests.ops.agreement import assert_agrees
from vfmvae import ops
from vfmvae.ops.norm import _GROUP_NORM, ACTIVATIONS


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


@pytest.mark.parametrize("activation", [None, "silu"])
def test_style_multiplies_what_enters_the_activation(activation: str | None) -> None:
    x, weight, bias, style = torch.randn(2, 8, 3, 5), torch.randn(8), torch.randn(8), torch.randn(2, 8)

    def norm(x: Tensor, weight: Tensor, bias: Tensor, style: Tensor, fused: bool) -> Tensor:
        return ops.group_norm(x, 4, weight, bias, 1e-5, activation, style, fused=fused)

    assert_agrees(norm, [x, weight, bias, style])
    plain = ops.group_norm(x, 4, weight, bias, fused=False) * style[:, :, None, None]
    expected = plain if activation is None else ACTIVATIONS[activation](plain)
    torch.testing.assert_close(norm(x, weight, bias, style, False), expected)


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


def norm_and_gradients(
    inputs: list[Tensor],
    groups: int,
    activation: str | None,
    fused: bool | str,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The result and the gradients of x, weight and bias, from x, weight, bias and the result's gradient."""
    x, weight, bias, grad = (t if dtype is None else t.to(dtype) for t in inputs)
    own = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = ops.group_norm(own[0], groups, *own[1:], activation=activation, fused=fused)
    return [y.detach(), *torch.autograd.grad(y, own, grad)]


# Channels that fill no vector, several tiles of pixels, tiles of unequal size, a single pixel.
COMPILED_SHAPES = [((2, 8, 6, 6), 4), ((1, 20, 37, 23), 5), ((3, 16, 40, 31), 4), ((2, 126, 1, 1), 2)]


@requires_extension
@pytest.mark.parametrize(("device", "dtype"), COMPILED)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize(("shape", "groups"), COMPILED_SHAPES)
def test_compiled_group_norm(
    shape: tuple[int, ...],
    groups: int,
    activation: str | None,
    device: str,
    dtype: torch.dtype,
    poisoned_empty: None,
) -> None:
    x, grad = (2 + torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    inputs = [t.to(device) for t in (x, torch.randn(shape[1]), torch.randn(shape[1]), grad)]
    compiled = norm_and_gradients(inputs, groups, activation, device)
    eager = norm_and_gradients(inputs, groups, activation, False)
    truth = norm_and_gradients(inputs, groups, activation, False, torch.float64)
    for what, *results in zip(("output", "x", "weight", "bias"), compiled, eager, truth, strict=True):
        terms = shape[0] * shape[2] * shape[3] if what in ("weight", "bias") else 0
        assert_kernel_close(*results, what, terms=terms)


@requires_extension
def test_the_number_of_threads_does_not_show_in_group_norm() -> None:
    inputs = [torch.randn(2, 24, 64, 64), torch.randn(24), torch.randn(24), torch.randn(2, 24, 64, 64)]
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(norm_and_gradients(inputs, 3, "silu", "cpu"))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@requires_extension
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e15])
def test_values_that_are_not_finite_spread_in_compiled_group_norm(
    value: float, activation: str | None, device: str
) -> None:
    x = torch.randn(2, 8, 3, 3)
    x[1, 2, 1, 1] = value
    inputs = [t.to(device) for t in (x, torch.ones(8), torch.zeros(8), torch.randn(2, 8, 3, 3))]
    compiled = norm_and_gradients(inputs, 4, activation, device)
    reference = norm_and_gradients(inputs, 4, activation, False)
    for ours, theirs in zip(compiled[:2], reference[:2], strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


@requires_extension
@pytest.mark.parametrize("fused", [True, False, "cpu", "channels_last"])
def test_group_norm_of_an_empty_batch(fused: bool | str) -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((0, 8, 4, 4), 8, 8))
    y = ops.group_norm(x, 2, weight, bias, fused=fused)
    assert y.shape == x.shape and not any(g.any() for g in torch.autograd.grad(y.sum(), (x, weight, bias)))


@requires_extension
def test_compiled_group_norm_is_an_operation_that_torch_knows() -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 6, 4, 3), 6, 6))
    torch.library.opcheck(torch.ops.vfmvae.group_norm.default, (x, weight, bias, 3, 1e-5, "gelu"))
    compiled = torch.compile(lambda *a: ops.group_norm(a[0], 3, *a[1:]), backend="aot_eager", fullgraph=True)
    eager = ops.group_norm(x, 3, weight, bias)
    gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (compiled(x, weight, bias), eager)]
    torch.testing.assert_close(*gradients)


@requires_extension
def test_what_compiled_group_norm_refuses_is_said() -> None:
    for x, sentence in (
        (torch.randn(1, 4, 2, 2, dtype=torch.float16), "not torch.float16"),
        (torch.randn(1, 4, 0, 2), "x has no pixels"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ops.group_norm(x, 2, torch.ones(x.shape[1]), torch.zeros(x.shape[1]), fused="cpu")


@requires_extension
def test_where_compiled_group_norm_is_slower_it_is_taken_by_name_only() -> None:
    runs = {i.name: i.run for i in _GROUP_NORM.implementations}
    for channels, dtype, first in (
        (128, torch.float32, "cpu"),
        (132, torch.float32, "channels_last"),
        (256, torch.bfloat16, "cpu"),
        (260, torch.bfloat16, "channels_last"),
    ):
        x, ones = torch.randn(1, channels, 2, 2).to(dtype), torch.ones(channels)
        for fused, expected in ((True, first), ("cpu", "cpu")):
            assert _GROUP_NORM.choose(fused, x, 2, ones, ones, 1e-5, None, None) == runs[expected]
        y, other = (ops.group_norm(x, 2, ones, ones, fused=fused) for fused in ("cpu", False))
        torch.testing.assert_close(y, other)


def test_wrong_arguments_are_named() -> None:
    norm = functools.partial(ops.group_norm, torch.randn(1, 6, 2, 2))
    for groups in (4, 0, -3):
        with pytest.raises(ValueError, match=f"6 channels cannot be divided into {groups} groups"):
            norm(groups, torch.ones(6), torch.zeros(6))
    with pytest.raises(ValueError, match=r"weight is \[3\]; for x \[1, 6, 2, 2\] it must be \[6\]"):
        norm(3, torch.ones(3), torch.zeros(6))
    with pytest.raises(ValueError, match=r"style is \[6\]; for x .* it must be \[1, 6\]"):
        norm(3, torch.ones(6), torch.zeros(6), style=torch.ones(6))
    with pytest.raises(ValueError, match="activation 'relu' is unknown; known: leaky_relu, gelu, silu"):
        norm(3, torch.ones(6), torch.zeros(6), activation="relu")
