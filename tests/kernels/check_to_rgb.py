"""The kernels of kernels/to_rgb.py against float64, on a GPU or in Triton's interpreter.

tests/ops/test_to_rgb.py runs this file in a process of its own, because Triton chooses the interpreter when
it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_to_rgb.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import RELATIVE_LIMITS, assert_kernel_close
from vfmvae import ops

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One pixel, channels that fill no vector, more than one chunk of channels, several parts, odd sizes.
SHAPES = [(1, 8, 1, 1), (2, 16, 5, 7), (3, 13, 4, 3), (1, 300, 3, 5), (2, 32, 37, 41), (1, 1, 6, 9)]
FULL = [(2, 128, 256, 256), (2, 512, 64, 64), (1, 256, 127, 129)]


def rgb_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    tensors = [torch.randn(shape), 1 + 0.5 * torch.randn(shape[:2]), torch.randn(3, shape[1]), torch.randn(3)]
    return [tensors[0].to(DEVICE, dtype), *(t.to(DEVICE) for t in tensors[1:])]


def compare(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = rgb_inputs(shape, dtype)
    grad = torch.randn(shape[0], 3, *shape[2:], device=DEVICE)

    def run(fused: bool | str, to: torch.dtype | None = None) -> list[Tensor]:
        own = [t.detach().to(to or t.dtype).requires_grad_() for t in inputs]
        y = ops.modulated_to_rgb(*own, fused=fused)
        return [y.detach(), *torch.autograd.grad(y, own, grad.to(y.dtype))]

    kernel, eager, truth = run("triton"), run(False), run(False, torch.float64)
    for what, *results in zip(("output", "x", "style", "weight", "bias"), kernel, eager, truth, strict=True):
        if what in ("output", "x"):
            assert_kernel_close(*results, what)
        else:  # sums in another order than eager's
            error = (results[0].double() - results[2]).norm() / results[2].norm()
            assert error <= RELATIVE_LIMITS[torch.float32], f"{what}: relative error {error:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    compare(shape, dtype)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_larger_maps(shape: tuple[int, ...], poisoned_empty: None) -> None:
    compare(shape, torch.bfloat16)


def test_layouts_of_x_and_of_the_gradient_do_not_matter() -> None:
    x, *rest = rgb_inputs((2, 16, 5, 6), torch.float32)
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    plain = x.clone().requires_grad_()
    images = [ops.modulated_to_rgb(t, *rest, fused="triton") for t in (last, plain)]
    assert torch.equal(*images) and images[0].stride() == images[1].stride()
    grad = torch.randn_like(images[0], memory_format=torch.contiguous_format)
    (one,) = torch.autograd.grad(images[0], last, grad)
    (two,) = torch.autograd.grad(images[1], plain, grad.contiguous(memory_format=torch.channels_last))
    assert torch.equal(one, two)
    images = [ops.modulated_to_rgb(last, *rest, fused=fused).sum() for fused in ("triton", False)]
    torch.testing.assert_close(*(torch.autograd.grad(i, last)[0] for i in images))  # a gradient of stride 0


def test_gradients_of_inputs_alone() -> None:
    x, style, weight, bias = (t.requires_grad_() for t in rgb_inputs((2, 16, 5, 5), torch.float32))
    image = ops.modulated_to_rgb(x, style, weight, bias, fused="triton")
    expected = torch.autograd.grad(image.sum(), (x, style), retain_graph=True)
    with ops.input_gradients_only():
        found = torch.autograd.grad(image.sum(), (x, style), retain_graph=True)
        (none,) = torch.autograd.grad(image.sum(), weight, allow_unused=True)
    assert none is None and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_spread_to_their_pixel(value: float) -> None:
    x, *rest = rgb_inputs((2, 16, 5, 5), torch.float32)
    x[1, 3, 2, 2] = value
    image = ops.modulated_to_rgb(x, *rest, fused="triton")
    assert (~image.isfinite()).nonzero().tolist() == [[1, k, 2, 2] for k in range(3)]


def test_an_empty_batch() -> None:
    inputs = [t.requires_grad_() for t in rgb_inputs((0, 8, 4, 4), torch.float32)]
    image = ops.modulated_to_rgb(*inputs, fused="triton")
    assert image.shape == (0, 3, 4, 4)
    assert all(not g.any() for g in torch.autograd.grad(image.sum(), inputs))


def test_registered_operation() -> None:
    inputs = [t.requires_grad_() for t in rgb_inputs((2, 8, 3, 5), torch.float32)]
    torch.library.opcheck(torch.ops.vfmvae.modulated_to_rgb.default, inputs)
    backward = (torch.randn(2, 3, 3, 5, device=DEVICE), *(t.detach() for t in inputs[:3]))
    for of_weights in (True, False):
        torch.library.opcheck(torch.ops.vfmvae.modulated_to_rgb_backward.default, (*backward, of_weights))
