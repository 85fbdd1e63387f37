"""The kernels of the modulated MLP against float64, on a GPU or in Triton's interpreter.

tests/ops/test_mlp_triton.py runs this file in a process of its own, because Triton chooses the interpreter
when it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_modulated_mlp.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tests.helpers import RELATIVE_LIMITS, assert_kernel_close, bfloat16_products_in_the_interpreter
from vfmvae import ops
from vfmvae.kernels.gelu import gelu_and_slope

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
NAMES = ("output", "residual", "x", "style", "w1", "b1", "w2", "b2", "gamma")

# One pixel, pixels that fill no tile, channels that fill no tile, more samples than one, several parts.
SMALL = [(1, 8, 1, 1), (2, 16, 5, 7), (3, 24, 4, 3), (2, 40, 9, 16), (1, 16, 37, 41)]
LARGE = [(2, 128, 48, 48), (1, 256, 33, 31), (8, 128, 24, 24), (2, 96, 40, 40), (1, 64, 64, 65)]
# More channels than one kernel takes: in the backward alone, and in both passes.
WIDE_SMALL = [(2, 136, 4, 5), (2, 264, 3, 7), (3, 320, 9, 1)]
WIDE_LARGE = [(2, 512, 33, 31), (3, 512, 8, 8), (1, 384, 20, 20)]


def cases(shapes: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Every dtype; on a GPU, where each case compiles kernels for seconds, two of them for one shape only."""
    found = [(shape, torch.bfloat16) for shape in shapes]
    others = shapes[1:2] if ON_GPU else shapes
    return found + [(shape, dtype) for shape in others for dtype in (torch.float16, torch.float32)]


@pytest.fixture(autouse=True)
def bfloat16_products() -> Iterator[None]:
    with nullcontext() if ON_GPU else bfloat16_products_in_the_interpreter():
        yield


def mlp_inputs(shape: tuple[int, ...], dtype: torch.dtype, hidden: int | None = None) -> list[Tensor]:
    batch, channels, _, _ = shape
    hidden = hidden or 4 * channels
    tensors = [
        torch.randn(shape),
        torch.randn(shape),
        1 + 0.5 * torch.randn(batch, channels),
        torch.randn(hidden, channels),
        torch.randn(hidden),
        torch.randn(channels, hidden) * hidden**-0.5,
        torch.randn(channels),
        torch.randn(channels),
    ]
    return [t.to(DEVICE, dtype if i < 2 else torch.float32) for i, t in enumerate(tensors)]


def result_and_gradients(
    inputs: list[Tensor], grad: Tensor, fused: bool | str, dtype: torch.dtype | None = None
) -> list[Tensor]:
    own = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    y = ops.modulated_mlp(*own, fused=fused)
    return [y.detach(), *torch.autograd.grad(y, own, grad.to(y.dtype))]


def compare(shape: tuple[int, ...], dtype: torch.dtype, hidden: int | None = None) -> None:
    inputs = mlp_inputs(shape, dtype, hidden)
    grad = torch.randn(shape).to(DEVICE, dtype)
    kernel, eager = result_and_gradients(inputs, grad, "triton"), result_and_gradients(inputs, grad, False)
    truth = result_and_gradients(inputs, grad, False, torch.float64)
    for what, found, plain, exact in zip(NAMES, kernel, eager, truth, strict=True):
        if what in ("output", "residual", "x"):
            assert_kernel_close(found, plain, exact, what)
        else:
            assert_norm_close(found, plain, exact, dtype, what)


def assert_norm_close(found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, what: str) -> None:
    """For gradients of weights. They are sums in another order than eager's, and of gamma of other products:
    the largest of a few errors may exceed twice eager's by chance, their norm may not."""
    assert found.dtype == plain.dtype and found.shape == exact.shape and torch.isfinite(found).all(), what
    size = exact.norm()
    error, of_plain = ((t.double() - exact).norm() for t in (found, plain))
    assert error <= RELATIVE_LIMITS[dtype] * size, f"{what}: relative error {error / size:.3g}"
    allowed = 2 * of_plain + torch.finfo(dtype).eps * size
    assert error <= allowed, f"{what}: error {error / size:.3g} of the norm, allowed {allowed / size:.3g}"


@pytest.mark.parametrize(("shape", "dtype"), cases(SMALL), ids=str)
def test_result_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    compare(shape, dtype)


@pytest.mark.parametrize(("shape", "dtype"), cases(WIDE_SMALL), ids=str)
def test_many_channels(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    compare(shape, dtype, hidden=136)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("shape", LARGE + WIDE_LARGE, ids=str)
def test_larger_maps(shape: tuple[int, ...], poisoned_empty: None) -> None:
    compare(shape, torch.bfloat16)


@pytest.mark.parametrize("hidden", [8, 24, 136])
def test_any_number_of_hidden_units(hidden: int, poisoned_empty: None) -> None:
    compare((2, 16, 4, 5), torch.bfloat16, hidden)


def test_layouts_of_the_inputs_and_of_the_gradient_do_not_matter() -> None:
    inputs = mlp_inputs((2, 16, 5, 6), torch.bfloat16)
    plain = result_and_gradients(inputs, torch.ones(2, 16, 5, 6, device=DEVICE), "triton")
    last = [t.contiguous(memory_format=torch.channels_last) for t in inputs[:2]]
    # An address that is no multiple of 16 bytes, and a gradient whose strides are 0.
    odd = torch.empty(last[1].numel() + 1, dtype=torch.bfloat16, device=DEVICE)[1:]
    last[1] = odd.view(2, 5, 6, 16).permute(0, 3, 1, 2).copy_(last[1])
    own = [t.detach().requires_grad_() for t in (*last, *inputs[2:])]
    y = ops.modulated_mlp(*own, fused="triton")
    for one, two in zip(plain, [y, *torch.autograd.grad(y.sum(), own)], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("channels", [16, 40, 136, 264])
def test_gradients_of_inputs_alone(channels: int, poisoned_empty: None) -> None:
    dtype = torch.bfloat16
    inputs = [t.requires_grad_() for t in mlp_inputs((2, channels, 12, 13), dtype, 136)]
    grad = torch.randn(inputs[1].shape).to(DEVICE, dtype)
    y, weights = ops.modulated_mlp(*inputs, fused="triton"), inputs[3:7]
    with ops.input_gradients_only():
        found = torch.autograd.grad(y, inputs[:3], grad, retain_graph=True)
        b1, w2 = torch.autograd.grad(y, (weights[1], weights[2]), grad, allow_unused=True, retain_graph=True)
    assert b1 is None and w2 is None
    assert all(g is not None for g in torch.autograd.grad(y, weights, grad))
    eager = result_and_gradients(inputs, grad, False)[1:4]
    truth = result_and_gradients(inputs, grad, False, torch.float64)[1:4]
    for what, ours, plain, exact in zip(NAMES[1:], found, eager, truth, strict=False):
        assert_norm_close(ours, plain, exact, dtype, what)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_spread_to_their_pixel(value: float) -> None:
    inputs = mlp_inputs((2, 16, 5, 5), torch.bfloat16)
    inputs[1][0, 3, 2, 2] = value
    kernel, reference = (ops.modulated_mlp(*inputs, fused=fused) for fused in ("triton", False))
    assert torch.equal(kernel.isnan(), reference.isnan())


def test_a_style_that_is_not_a_number_stays_in_its_sample() -> None:
    inputs = mlp_inputs((2, 16, 3, 3), torch.bfloat16)
    inputs[2][1, 3] = float("nan")
    y = ops.modulated_mlp(*inputs, fused="triton")
    assert y[0].isfinite().all() and y[1].isnan().all()


@pytest.mark.parametrize("form", ["erf", "sigmoid", *(["tanh"] if ON_GPU else [])])
def test_gelu_and_its_slope(form: str) -> None:
    x = torch.cat([torch.linspace(-14, 14, 4093), torch.tensor([-1e30, 1e30, float("inf")])]).to(DEVICE)
    value, slope = torch.empty_like(x), torch.empty_like(x)
    _gelu_kernel[(1,)](x, value, slope, SIZE=len(x), FORM=form)
    exact = x.double().requires_grad_()
    truth = F.gelu(exact)
    (true_slope,) = torch.autograd.grad(truth[:-1].sum(), exact)
    limit = {"erf": 3e-7, "sigmoid": 6e-5, "tanh": 6e-4}[form]
    assert ((value - truth)[:-1].abs() <= limit * exact[:-1].abs().clamp(1, 14)).all()
    assert ((slope - true_slope)[:-1].abs() <= limit).all()
    assert value[-1] == float("inf")


@triton.jit
def _gelu_kernel(x_ptr, value_ptr, slope_ptr, SIZE: tl.constexpr, FORM: tl.constexpr):
    at = tl.arange(0, SIZE)
    value, slope = gelu_and_slope(tl.load(x_ptr + at), FORM)
    tl.store(value_ptr + at, value)
    tl.store(slope_ptr + at, slope)


def test_an_empty_batch() -> None:
    inputs = [t.requires_grad_() for t in mlp_inputs((0, 8, 4, 4), torch.bfloat16)]
    y = ops.modulated_mlp(*inputs, fused="triton")
    assert y.shape == (0, 8, 4, 4)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), inputs))


@pytest.mark.parametrize("channels", [8, 264])
def test_registered_operation(channels: int) -> None:
    residual, x, _, *weights = mlp_inputs((2, channels, 3, 5), torch.bfloat16, 32)
    arguments = (residual, x, torch.rand(2, 32, device=DEVICE), *weights)
    torch.library.opcheck(
        torch.ops.vfmvae.demodulated_mlp.default, tuple(t.requires_grad_() for t in arguments)
    )
    saved = tuple(t.detach() for t in arguments[1:])
    for of_weights in (True, False):
        backward = (torch.randn_like(saved[0]), *saved, of_weights)
        torch.library.opcheck(torch.ops.vfmvae.demodulated_mlp_backward.default, backward)
