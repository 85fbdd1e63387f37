"""The kernels of kernels/gated.py against float64, on a GPU or in Triton's interpreter.

tests/ops/test_gated.py runs this file in a process of its own, because Triton chooses the interpreter when
it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_gated.py
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import assert_kernel_close
from vfmvae.ops import geglu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((2, 5, 64), (1, 1), (3, 7, 11), (33,), (2, 2049), (1000, 3))


def plain(gate: Tensor, value: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    gate, value, grad = (torch.randn(shape, device=DEVICE).mul(2).to(dtype) for _ in range(3))

    def run(function, convert) -> list[Tensor]:
        inputs = [convert(t).requires_grad_() for t in (gate, value)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, convert(grad))]

    kernel = run(lambda a, b: geglu(a, b, fused="triton"), torch.clone)
    eager = run(plain, torch.clone)
    truth = run(plain, torch.Tensor.double)
    for what, *results in zip(("output", "grad of gate", "grad of value"), kernel, eager, truth, strict=True):
        assert_kernel_close(*results, what)


def test_halves_of_one_tensor_and_transposed_inputs_are_read_in_place() -> None:
    both = torch.randn(6, 40, device=DEVICE)
    gate, value = both.chunk(2, dim=1)
    torch.testing.assert_close(geglu(gate, value, fused="triton"), plain(gate, value))
    gate, value = torch.randn(2, 40, 6, device=DEVICE).transpose(1, 2)
    torch.testing.assert_close(geglu(gate, value, fused="triton"), plain(gate, value))


def test_backward_accepts_a_gradient_that_is_not_dense() -> None:
    gate = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    value = torch.randn(4, 8, device=DEVICE)
    geglu(gate, value, fused="triton").sum().backward()  # the gradient of a sum is expanded: stride 0
    (expected,) = torch.autograd.grad(plain(gate, value).sum(), gate)
    torch.testing.assert_close(gate.grad, expected)


def test_not_a_number_stays_where_it_is_and_infinity_passes() -> None:
    gate = torch.tensor([float("nan"), float("inf"), 1.0, 1.0], device=DEVICE)
    value = torch.tensor([1.0, 2.0, float("nan"), float("-inf")], device=DEVICE)
    out = geglu(gate, value, fused="triton").tolist()
    assert out[0] != out[0] and out[1] == float("inf") and out[2] != out[2] and out[3] == float("-inf")


def test_empty_tensors() -> None:
    empty = torch.empty(0, 8, device=DEVICE)
    assert geglu(empty, empty, fused="triton").shape == (0, 8)


def test_registered_operation() -> None:
    inputs = [torch.randn(3, 5, device=DEVICE, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(torch.ops.vfmvae.geglu.default, inputs)
    backward = [torch.randn(3, 5, device=DEVICE) for _ in range(3)]
    torch.library.opcheck(torch.ops.vfmvae.geglu_backward.default, backward)
