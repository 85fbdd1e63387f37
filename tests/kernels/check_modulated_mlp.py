"""The kernels of the modulated MLP against float64, on a GPU or in Triton's interpreter.

tests/ops/test_mlp_triton.py runs this file in a process of its own, because Triton chooses the interpreter
when it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_modulated_mlp.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.helpers import RELATIVE_LIMITS, assert_kernel_close, bfloat16_products_in_the_interpreter
from vfmvae import ops

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LOW = (torch.bfloat16, torch.float16)
NAMES = ("output", "residual", "x", "style", "w1", "b1", "w2", "b2", "gamma")

# One pixel, pixels that fill no tile, channels that fill no tile, more samples than one, several parts.
SMALL = [(1, 8, 1, 1), (2, 16, 5, 7), (3, 24, 4, 3), (2, 40, 9, 16), (1, 16, 37, 41)]
FULL = [(2, 128, 48, 48), (1, 256, 33, 31), (8, 128, 24, 24), (2, 96, 40, 40), (1, 64, 64, 65)]


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


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_result_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    compare(shape, dtype)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_larger_maps(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    compare(shape, dtype)


@pytest.mark.parametrize("hidden", [8, 17, 100])
def test_any_number_of_hidden_units(hidden: int, poisoned_empty: None) -> None:
    compare((2, 16, 4, 5), torch.bfloat16, hidden)
