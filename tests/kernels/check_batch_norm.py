"""The kernels of kernels/batch_norm.py against float64, on a GPU or in Triton's interpreter.

tests/ops/test_batch_norm.py runs this file in a process of its own, because Triton chooses the interpreter
when it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_batch_norm.py
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import assert_kernel_close
from vfmvae import ops

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Shape and groups: one number per channel, one position, several images and groups, more numbers than a tile,
# two parts, maps.
SHAPES = [
    ((1, 5, 1), 1),
    ((8, 3, 1), 2),
    ((6, 9, 19), 2),
    ((2, 2, 2500), 1),
    ((6, 20, 41), 3),
    ((3, 1, 6001), 1),
    ((4, 6, 5, 7), 2),
]
FULL = [((16, 384, 196), 2), ((8, 512, 32, 32), 1), ((16, 128, 64, 64), 2)]


def norm_inputs(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> list[Tensor]:
    x = torch.randn(shape, device=DEVICE).mul(2).add(0.5)
    x = x.to(dtype).movedim(1, -1).contiguous().movedim(-1, 1) if last else x.to(dtype)
    return [x, 1 + 0.5 * torch.randn(shape[1], device=DEVICE), torch.randn(shape[1], device=DEVICE)]


def compare(shape: tuple[int, ...], groups: int, dtype: torch.dtype, last: bool, slope: float = 0.2) -> None:
    inputs = norm_inputs(shape, dtype, last)
    before = ops.local_batch_norm(inputs[0].double(), groups, *(t.double() for t in inputs[1:]), fused=False)
    # Where the leaky ReLU has its corner, rounding chooses the slope.
    grad = torch.randn(shape, device=DEVICE).masked_fill_(before.abs() < 1e-4, 0).to(dtype)

    def run(fused: bool | str, to: torch.dtype | None = None) -> list[Tensor]:
        own = [t.detach().to(to or t.dtype).requires_grad_() for t in inputs]
        y = ops.local_batch_norm(own[0], groups, *own[1:], slope=slope, fused=fused)
        return [y.detach(), *torch.autograd.grad(y, own, grad.to(y.dtype))]

    kernel, eager, truth = run("triton"), run(False), run(False, torch.float64)
    terms = grad[:, 0].numel()
    for what, *results in zip(("output", "x", "weight", "bias"), kernel, eager, truth, strict=True):
        if what == "x" and terms == groups:  # of a single number: the gradient is zero
            assert results[0].abs().max() <= 1e-4
        else:
            assert_kernel_close(*results, what, terms=0 if what in ("output", "x") else terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_result_and_gradients(
    shape: tuple[int, ...], groups: int, last: bool, dtype: torch.dtype, poisoned_empty: None
) -> None:
    compare(shape, groups, dtype, last)


def test_many_parts(poisoned_empty: None) -> None:
    compare((2, 17, 70000) if ON_GPU else (2, 17, 3000), 1, torch.float32, last=True)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), FULL, ids=str)
def test_full_size(shape: tuple[int, ...], groups: int, last: bool, poisoned_empty: None) -> None:
    compare(shape, groups, torch.bfloat16, last)
    compare(shape, groups, torch.float32, last, slope=1.0)


def test_large_means_are_subtracted_first() -> None:
    x, weight, bias = norm_inputs((4, 6, 700), torch.float32, last=True)
    x = x * 0.1 + 1000
    y = ops.local_batch_norm(x, 2, weight, bias, fused="triton")
    exact = ops.local_batch_norm(x.double(), 2, weight.double(), bias.double(), fused=False)
    assert (y - exact).abs().max() < 1e-2  # x itself is known to 6e-5 / 0.2 of a deviation


def test_layouts_of_x_and_of_the_gradient_do_not_matter() -> None:
    x, weight, bias = norm_inputs((4, 6, 35), torch.float32, last=False)
    slices = torch.empty(4, 12, 50, device=DEVICE)[:, ::2, 3:38].copy_(x)
    grad = torch.randn_like(x)
    found = []
    for own in (x, slices, x.transpose(1, 2).contiguous().transpose(1, 2)):
        own = own.detach().requires_grad_()
        for g in (grad, grad.transpose(1, 2).contiguous().transpose(1, 2)):
            y = ops.local_batch_norm(own, 2, weight, bias, slope=0.2, fused="triton")
            found.append((y.detach(), *torch.autograd.grad(y, own, g)))
    for one in found[1:]:
        for a, b in zip(one, found[0], strict=True):
            torch.testing.assert_close(a, b)
    own = x.detach().requires_grad_()
    sums = [ops.local_batch_norm(own, 2, weight, bias, slope=0.2, fused=f).sum() for f in ("triton", False)]
    torch.testing.assert_close(*(torch.autograd.grad(s, own)[0] for s in sums))  # a gradient of stride 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_in_their_group_and_channel(value: float) -> None:
    x, weight, bias = norm_inputs((4, 3, 10), torch.float32, last=False)
    x[1, 2, 4] = value
    y = ops.local_batch_norm(x, 2, weight, bias, slope=0.2, fused="triton")
    assert y[:2, 2].isnan().all() and y[:2, :2].isfinite().all() and y[2:].isfinite().all()


def test_a_gradient_penalty_differentiates_twice() -> None:
    inputs = norm_inputs((4, 5, 9), torch.float32, last=False)

    def second(fused: bool | str, dtype: torch.dtype) -> list[Tensor]:
        own = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = ops.local_batch_norm(own[0], 2, *own[1:], slope=0.2, fused=fused)
        of_x, of_weight = torch.autograd.grad(F.softplus(y).sum(), own[:2], create_graph=True)
        return [*torch.autograd.grad(of_x.square().sum() + of_weight.square().sum(), own)]

    for found, eager, truth in zip(
        second("triton", torch.float32),
        second(False, torch.float32),
        second(False, torch.float64),
        strict=True,
    ):
        assert_kernel_close(found, eager, truth, terms=36)


def test_gradients_of_inputs_alone() -> None:
    x, weight, bias = (t.requires_grad_() for t in norm_inputs((4, 5, 9), torch.float32, last=False))
    y = ops.local_batch_norm(x, 2, weight, bias, fused="triton")
    (expected,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    with ops.input_gradients_only():
        (found,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        none = torch.autograd.grad(y.square().sum(), (weight, bias), allow_unused=True)
    assert torch.equal(found, expected) and none == (None, None)


def test_an_empty_batch() -> None:
    x, weight, bias = (t.requires_grad_() for t in norm_inputs((0, 5, 9), torch.float32, last=False))
    y = ops.local_batch_norm(x, 1, weight, bias, fused="triton")
    assert y.shape == (0, 5, 9)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), (x, weight, bias)))


def test_registered_operation() -> None:
    x, weight, bias = (t.requires_grad_() for t in norm_inputs((4, 5, 9), torch.float32, last=True))
    torch.library.opcheck(torch.ops.vfmvae.local_batch_norm.default, (x, weight, bias, 2, 1e-5, 0.2))
    backward = [t.detach() for t in (torch.randn_like(x), x, weight, bias)]
    table = torch.rand(2, 2, 5, device=DEVICE)
    torch.library.opcheck(torch.ops.vfmvae.local_batch_norm_backward.default, (*backward, table, 0.2))
