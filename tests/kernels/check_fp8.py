"""The kernel of kernels/fp8.py, on a GPU or in Triton's interpreter, and on a GPU the product of its results.

tests/ops/test_fp8.py runs this file in a process of its own, because Triton chooses the interpreter when it
is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_fp8.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.helpers import float8_casts_in_the_interpreter
from tests.ops.fp8_truth import assert_nearest, exact, exact_linear
from vfmvae.ops import fp8_linear, quantise_rows

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((2, 5, 64), (1, 1), (3, 7, 11), (33,), (2, 2049), (1000, 3), (2, 4304))


@pytest.fixture(autouse=True)
def rounding() -> Iterator[None]:
    with nullcontext() if ON_GPU else float8_casts_in_the_interpreter():
        yield


def spread(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random numbers of many sizes, rows far apart."""
    x = torch.randn(shape, device=DEVICE) * torch.exp(2 * torch.randn(shape, device=DEVICE))
    return (x * torch.exp(torch.randn(*shape[:-1], 1, device=DEVICE))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_the_nearest_float8(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = spread(shape, dtype)
    values, scale = quantise_rows(x, fused="triton")
    assert_nearest(x, values, scale)
    expected = quantise_rows(x, fused=False)
    assert torch.equal(values.view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("largest", [448.0, 448.00003, 1.75, 1.7500001, 3e38, 2e-38, 1e-44, 0.0])
def test_scales_at_the_edges(largest: float) -> None:
    x = torch.tensor([[largest, -largest / 2, largest / 3]], device=DEVICE)
    values, scale = quantise_rows(x, fused="triton")
    assert_nearest(x, values, scale)
    assert torch.equal(scale, quantise_rows(x, fused=False)[1])


def test_every_float8_number_stays_itself_and_ties_go_to_even() -> None:
    numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values.unique()
    between = (numbers[1:] + numbers[:-1]) / 2
    for x in (numbers, torch.cat([between, numbers[-1:]])):
        values, scale = quantise_rows(x[None], fused="triton")
        assert scale.item() == 1
        assert torch.equal(values[0, : len(x)].float(), x.to(torch.float8_e4m3fn).float())


def test_infinity_and_nan_become_nan_and_leave_other_rows_alone() -> None:
    x = torch.ones(4, 20, device=DEVICE)
    x[0, 3], x[1, 4], x[2, 5] = float("nan"), float("inf"), float("-inf")
    values, scale = quantise_rows(x, fused="triton")
    assert values.float().isnan().nonzero().tolist() == [[0, 3], [1, 4], [2, 5]]
    assert scale.isfinite().all() and torch.equal(exact(values, scale)[3, :20], torch.ones(20).double())


def test_strided_rows_and_empty_tensors() -> None:
    x = torch.randn(6, 40, device=DEVICE)
    for view in (x.chunk(2, dim=1)[1], x.t(), x[:0]):
        values, scale = quantise_rows(view, fused="triton")
        expected = quantise_rows(view.clone(memory_format=torch.contiguous_format), fused=False)
        assert torch.equal(values.float(), expected[0].float()) and torch.equal(scale, expected[1])


def test_registered_operation() -> None:
    torch.library.opcheck(torch.ops.vfmvae.quantise_rows.default, [torch.randn(3, 5, 20, device=DEVICE)])


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: the product is PyTorch's")
@pytest.mark.parametrize("sizes", [(1, 16, 16), (77, 1024, 3072), (1000, 4304, 1152), (64, 2730, 1024)])
def test_product(sizes: tuple[int, int, int]) -> None:
    rows, inputs, outputs = sizes
    x, bias = spread((rows, inputs), torch.bfloat16), torch.randn(outputs, device=DEVICE).bfloat16()
    weight, scale = quantise_rows(torch.randn(outputs, inputs, device=DEVICE) / inputs**0.5)
    for of_layer in (bias, None):
        out = fp8_linear(x, weight, scale, of_layer, fused="scaled_mm")
        truth, terms = exact_linear(x, weight, scale, of_layer)
        # One rounding to bfloat16, and Hopper's sums of products, which keep 14 bits of the largest.
        assert ((out.double().cpu() - truth).abs() <= 2**-8 * truth.abs() + 2**-13 * terms).all()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: the product is PyTorch's")
def test_compiled_product() -> None:
    x = torch.randn(3, 50, 64, device=DEVICE)
    weight, scale = quantise_rows(torch.randn(48, 64, device=DEVICE))

    def layer(x: Tensor) -> Tensor:
        return fp8_linear(x, weight, scale).float().tanh()

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-2, atol=1e-2)
