"""The kernels of kernels/gated.py against float64, on a GPU or in Triton's interpreter.

tests/ops/test_gated.py runs this file in a process of its own, because Triton chooses the interpreter when
it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_gated.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import assert_kernel_close
from vfmvae.ops import geglu, swiglu, swiglu_halves

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((2, 5, 64), (1, 1), (3, 7, 11), (33,), (2, 2049), (1000, 3))


Function = Callable[..., Tensor]


def plain_geglu(gate: Tensor, value: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * value


def plain_swiglu(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


both_activations = pytest.mark.parametrize(
    ("function", "plain"), [(geglu, plain_geglu), (swiglu, plain_swiglu)], ids=["geglu", "swiglu"]
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_activations
def test_forward_and_backward(
    function: Function, plain: Function, shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None
) -> None:
    gate, value, grad = (torch.randn(shape, device=DEVICE).mul(2).to(dtype) for _ in range(3))

    def run(function: Function, convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        inputs = [convert(t).requires_grad_() for t in (gate, value)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, convert(grad))]

    kernel = run(partial(function, fused="triton"), torch.clone)
    eager = run(plain, torch.clone)
    truth = run(plain, torch.Tensor.double)
    for what, *results in zip(("output", "grad of gate", "grad of value"), kernel, eager, truth, strict=True):
        assert_kernel_close(*results, what)


@both_activations
def test_halves_of_one_tensor_and_transposed_inputs_are_read_in_place(
    function: Function, plain: Function
) -> None:
    both = torch.randn(6, 40, device=DEVICE)
    gate, value = both.chunk(2, dim=1)
    torch.testing.assert_close(function(gate, value, fused="triton"), plain(gate, value))
    gate, value = torch.randn(2, 40, 6, device=DEVICE).transpose(1, 2)
    torch.testing.assert_close(function(gate, value, fused="triton"), plain(gate, value))


@both_activations
def test_backward_accepts_a_gradient_that_is_not_dense(function: Function, plain: Function) -> None:
    gate = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    value = torch.randn(4, 8, device=DEVICE)
    function(gate, value, fused="triton").sum().backward()  # the gradient of a sum is expanded: stride 0
    (expected,) = torch.autograd.grad(plain(gate, value).sum(), gate)
    torch.testing.assert_close(gate.grad, expected)


@both_activations
def test_not_a_number_stays_where_it_is_and_infinity_passes(function: Function, plain: Function) -> None:
    gate = torch.tensor([float("nan"), float("inf"), 1.0, 1.0], device=DEVICE)
    value = torch.tensor([1.0, 2.0, float("nan"), float("-inf")], device=DEVICE)
    out = function(gate, value, fused="triton").tolist()
    assert out[0] != out[0] and out[1] == float("inf") and out[2] != out[2] and out[3] == float("-inf")


@both_activations
def test_empty_tensors(function: Function, plain: Function) -> None:
    empty = torch.empty(0, 8, device=DEVICE)
    assert function(empty, empty, fused="triton").shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 64), (22,), (3, 7, 10)], ids=str)
def test_swiglu_of_halves(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    both = torch.randn(shape, device=DEVICE).mul(2).to(dtype).requires_grad_()
    grad = torch.randn(*shape[:-1], shape[-1] // 2, device=DEVICE).to(dtype)
    of_halves = swiglu_halves(both, fused="triton")
    of_two = swiglu(*both.chunk(2, dim=-1), fused="triton")
    assert torch.equal(of_halves, of_two)
    assert torch.equal(*(torch.autograd.grad(r, both, grad)[0] for r in (of_halves, of_two)))


@pytest.mark.parametrize("name", ["geglu", "swiglu"])
def test_registered_operation(name: str) -> None:
    inputs = [torch.randn(3, 5, device=DEVICE, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(getattr(torch.ops.vfmvae, name).default, inputs)
    backward = [torch.randn(3, 5, device=DEVICE) for _ in range(3)]
    torch.library.opcheck(getattr(torch.ops.vfmvae, f"{name}_backward").default, backward)


def test_registered_operation_of_halves() -> None:
    both = torch.randn(3, 10, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.vfmvae.swiglu_halves.default, (both,))
    backward = torch.randn(3, 5, device=DEVICE), both.detach()
    torch.library.opcheck(torch.ops.vfmvae.swiglu_halves_backward.default, backward)
