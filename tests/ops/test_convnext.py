from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import RELATIVE_LIMITS, assert_kernel_close, requires_extension
from tests.ops.agreement import assert_agrees
from vfmvae import ops
from vfmvae.ops import convnext, mlp_triton

NAMES = ("output", "x", "conv", "conv bias", "noise", "norm", "norm bias", "style", "w1", "b1", "w2", "b2")


def layer_inputs(shape: tuple[int, ...], size: int = 7) -> list[Tensor]:
    """In the order of the operation's arguments, without groups."""
    batch, channels, height, width = shape
    hidden = 4 * channels
    return [
        torch.randn(shape),
        torch.randn(channels, 1, size, size),
        torch.randn(channels),
        torch.randn(height, width),
        1 + 0.5 * torch.randn(channels),
        torch.randn(channels),
        1 + 0.5 * torch.randn(batch, channels),
        torch.randn(hidden, channels),
        torch.randn(hidden),
        torch.randn(channels, hidden) * hidden**-0.5,
        torch.randn(channels),
        torch.randn(channels),
    ]


def run(*inputs: Tensor | None, groups: int, fused: bool | str = True) -> Tensor:
    return ops.modulated_convnext(*inputs[:4], groups, *inputs[4:], fused=fused)


@pytest.mark.parametrize(("shape", "groups"), [((2, 8, 6, 5), 2), ((1, 6, 9, 4), 3)])
def test_is_one_operation_after_the_other(shape: tuple[int, ...], groups: int) -> None:
    inputs = layer_inputs(shape, 3)
    x, conv, norm, style, weights = inputs[0], inputs[1:4], inputs[4:6], inputs[6], inputs[7:]
    for fused in (True, False):
        y = ops.depthwise_group_norm(x, *conv, groups, *norm, fused=fused)
        expected = ops.modulated_mlp(x, y, style, *weights, fused=fused)
        assert torch.equal(run(*inputs, groups=groups, fused=fused), expected)
    for name in (True, "separate"):
        assert_agrees(lambda *own, fused: run(*own, groups=groups, fused=fused), inputs, name)


def test_conv_bias_and_noise_may_be_none() -> None:
    inputs = layer_inputs((2, 8, 5, 5))
    zeros = [torch.zeros_like(t) for t in inputs[2:4]]
    for fused in (True, False):
        found = run(*inputs[:2], None, None, *inputs[4:], groups=2, fused=fused)
        torch.testing.assert_close(found, run(*inputs[:2], *zeros, *inputs[4:], groups=2, fused=fused))


def with_gradients(
    inputs: list[Tensor], grad: Tensor, groups: int, fused: bool | str, dtype: torch.dtype | None = None
) -> list[Tensor]:
    own = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    y = run(*own, groups=groups, fused=fused)
    return [y.detach(), *torch.autograd.grad(y, own, grad.to(y.dtype))]


def on_gpu(shape: tuple[int, ...], size: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    inputs = [t.cuda() for t in layer_inputs(shape, size)]
    inputs[0] = inputs[0].to(dtype).contiguous(memory_format=torch.channels_last)
    return inputs, torch.randn(shape, device="cuda").to(dtype)


# Hidden numbers in registers in both passes, in the forward alone, in neither; samples of one pixel column.
@requires_extension
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "groups", "size", "dtype"),
    [
        ((2, 128, 41, 67), 32, 7, torch.bfloat16),
        ((1, 64, 33, 1), 16, 7, torch.bfloat16),
        ((2, 256, 30, 30), 32, 7, torch.bfloat16),
        ((3, 512, 16, 16), 32, 5, torch.bfloat16),
        ((2, 64, 20, 20), 16, 7, torch.float16),
    ],
    ids=str,
)
def test_the_norm_modulates(
    shape: tuple[int, ...], groups: int, size: int, dtype: torch.dtype, poisoned_empty: None
) -> None:
    inputs, grad = on_gpu(shape, size, dtype)
    ours, eager = (with_gradients(inputs, grad, groups, fused) for fused in ("triton", False))
    truth = with_gradients(inputs, grad, groups, False, torch.float64)
    for what, one, other, exact in zip((*NAMES, "gamma"), ours, eager, truth, strict=True):
        if what == "conv bias":
            continue  # what the norm takes away again: nothing but rounding
        if what in ("output", "x"):
            assert_kernel_close(one, other, exact, what)
            continue
        assert one.isfinite().all() and one.dtype == other.dtype, what
        error, of_eager = ((t.double() - exact).norm() / exact.norm() for t in (one, other))
        limit = max(RELATIVE_LIMITS[dtype], 2 * of_eager)  # small sums of large numbers lose digits in eager
        assert error <= limit, f"{what}: relative error {error:.2e}, of eager {of_eager:.2e}"
    again = with_gradients(inputs, grad, groups, "triton")
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True)), "not deterministic"
    assert torch.equal(run(*inputs, groups=groups), ours[0])  # the choice of True


@requires_extension
@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 256])
def test_gradients_of_inputs_alone(channels: int, poisoned_empty: None) -> None:
    inputs, grad = on_gpu((2, channels, 21, 22), 7, torch.bfloat16)
    expected = with_gradients(inputs, grad, 16, "triton")
    own = [t.requires_grad_() for t in inputs]
    y = run(*own, groups=16, fused="triton")
    with ops.input_gradients_only():
        of_x, of_style, of_w1 = torch.autograd.grad(y, (own[0], own[6], own[7]), grad, allow_unused=True)
    assert of_w1 is None
    for ours, theirs in ((of_x, expected[1]), (of_style, expected[7])):
        assert (ours.double() - theirs.double()).norm() <= 1e-2 * theirs.double().norm()


@requires_extension
@pytest.mark.gpu
def test_a_value_that_is_not_a_number_stays_in_its_sample() -> None:
    inputs, _ = on_gpu((2, 64, 9, 9), 7, torch.bfloat16)
    inputs[0][1, 3, 2, 2] = float("nan")
    y = run(*inputs, groups=1, fused="triton")
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_what_it_refuses_is_said() -> None:
    inputs = layer_inputs((1, 8, 4, 4))
    with pytest.raises(ValueError, match="implementation 'triton' cannot be used here"):
        run(*inputs, groups=2, fused="triton")
    inputs[0] = inputs[0].double()
    with pytest.raises(ValueError, match="not torch.float64"):
        run(*inputs, groups=2, fused="triton")


def test_float32_goes_one_operation_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device would do."""
    monkeypatch.setattr(mlp_triton.native, "why_no_triton", lambda x: None)
    monkeypatch.setattr(convnext.conv_norm, "why_not_cuda", lambda *_: None)
    implementations = {i.name: i.run for i in convnext._MODULATED_CONVNEXT.implementations}
    conv, norm = convnext._Conv(torch.ones(8, 1, 3, 3), None, None), (2, torch.ones(8), torch.ones(8), 1e-5)
    weights = convnext._MLP(torch.ones(32, 8), *[torch.ones(8)] * 4)
    for dtype, first in ((torch.float32, "separate"), (torch.bfloat16, "triton"), (torch.float16, "triton")):
        x = torch.ones(1, 8, 4, 4, dtype=dtype, device="meta")
        arguments = (x, torch.ones(1, 8), conv, convnext._Norm(*norm), weights)
        assert convnext._MODULATED_CONVNEXT.choose(True, *arguments) == implementations[first]


@pytest.mark.parametrize("fused", [True, False])
def test_wrong_arguments_are_named(fused: bool) -> None:
    inputs = layer_inputs((2, 8, 4, 4))
    for place, wrong, groups, sentence in (
        (3, torch.randn(3, 4), 2, r"noise is \[3, 4\]; .* must be \[4, 4\]"),
        (6, torch.randn(1, 8), 2, r"style is \[1, 8\]; .* must be \[2, 8\]"),
        (9, torch.randn(32, 8), 2, r"contract_weight is \[32, 8\]; .* must be \[8, 32\]"),
        (0, inputs[0], 3, "8 channels cannot be divided into 3 groups"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(*inputs[:place], wrong, *inputs[place + 1 :], groups=groups, fused=fused)
