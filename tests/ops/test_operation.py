from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vfmvae import ops
from vfmvae.ops.gradients import weight_gradients_wanted
from vfmvae.ops.operation import Autograd, operation

RUNS: list[type] = []


def run(x: Tensor, factor: float) -> Tensor:
    RUNS.append(type(x))
    return x * factor


def fake(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.factor = inputs[1]


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (times(grad, ctx.factor) if weight_gradients_wanted() else None), None


times = operation("times_for_tests", run, fake, ("cpu", "cuda"), Autograd(setup, backward, again=True))


def test_eager_and_registered_operation_are_the_same_function() -> None:
    x = torch.randn(3, requires_grad=True)
    eager, registered = times(x, 2.0), torch.ops.vfmvae.times_for_tests(x, 2.0)
    for y in (eager, registered):
        assert torch.equal(y, 2 * x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert torch.equal(first, torch.full((3,), 2.0))
    torch.library.opcheck(torch.ops.vfmvae.times_for_tests.default, (x, 3.0))


def test_the_backward_can_be_differentiated_where_it_is_made_of_operations() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: times(x, 2.0), x)


def test_a_result_may_be_a_view_in_eager_mode() -> None:
    autograd = Autograd(lambda ctx, inputs, output: None, lambda ctx, grad: (grad.view(2, 3),))
    flat = operation("flat_for_tests", flat_copy, flat_copy, "cpu", autograd, eager=lambda x: x.view(-1))
    x = torch.randn(2, 3, requires_grad=True)
    for function, shared in ((flat, True), (torch.ops.vfmvae.flat_for_tests, False)):
        y = function(x)
        assert (y.data_ptr() == x.data_ptr()) == shared
        (found,) = torch.autograd.grad(y.square().sum(), x)
        assert torch.equal(found, 2 * x)
    torch.library.opcheck(torch.ops.vfmvae.flat_for_tests.default, (x,))


def flat_copy(x: Tensor) -> Tensor:
    return x.new_empty(6).copy_(x.reshape(-1))


def square(x: Tensor) -> Tensor:
    return x * x


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def square_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (2 * grad * ctx.saved_tensors[0],)


def test_a_second_derivative_that_does_not_exist_raises() -> None:
    once = operation("square_for_tests", square, torch.empty_like, "cpu", Autograd(keep, square_backward))
    x = torch.randn(3, requires_grad=True)
    for function in (once, torch.ops.vfmvae.square_for_tests):
        (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        assert torch.equal(first, 2 * x)
        with pytest.raises(RuntimeError, match="square_for_tests can be differentiated once"):
            torch.autograd.grad(first.sum(), x)


def test_compiling_sees_one_node() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def remember(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: times(x, 2.0) + 1, backend=remember, fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
    calls = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [call for call in calls if "times_for_tests" in call] == ["vfmvae.times_for_tests.default"]


def test_tensors_without_memory_do_not_reach_the_compiled_code() -> None:
    RUNS.clear()
    with FakeTensorMode():
        assert times(torch.empty(4, 5), 2.0).shape == (4, 5)
    assert RUNS == []


def test_whoever_looks_on_sees_one_node() -> None:
    graph = make_fx(lambda x: times(x, 2.0) + 1)(torch.ones(2))
    assert "vfmvae.times_for_tests" in graph.code
    assert torch.equal(graph(torch.full((2,), 3.0)), torch.full((2,), 7.0))
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.vfmvae.times_for_tests: lambda *_, **__: 5}
    ) as f:
        times(torch.ones(2), 2.0)
    assert f.get_total_flops() == 5


def test_views_of_negated_numbers_are_made_plain() -> None:
    seen: list[float] = []

    def first_in_memory(x: Tensor) -> Tensor:
        seen.append(ctypes.c_float.from_address(x.data_ptr()).value)
        return x.clone()

    operation("memory_for_tests", first_in_memory, torch.empty_like, "cpu")(torch._neg_view(torch.ones(2)))
    assert seen == [-1.0]


def test_the_dtype_is_what_was_promised_under_autocast() -> None:
    def product(x: Tensor) -> Tensor:
        return x @ x

    def product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0]
        return (grad @ x.t() + x.t() @ grad,)

    autograd = Autograd(keep, product_backward)
    eager = operation("product_for_tests", product, torch.empty_like, "cpu", autograd)
    x = torch.randn(4, 4, requires_grad=True)
    (expected,) = torch.autograd.grad((x @ x).sum(), x)
    for function in (eager, torch.ops.vfmvae.product_for_tests):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(x)
            (found,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y, x @ x)
        torch.testing.assert_close(found, expected)


def test_saved_tensors_are_unpacked_once() -> None:
    once = operation(
        "checkpointed_for_tests", square, torch.empty_like, "cpu", Autograd(keep, square_backward)
    )
    x = torch.randn(3, requires_grad=True)
    for function in (once, torch.ops.vfmvae.checkpointed_for_tests):
        y = checkpoint(function, x, use_reentrant=False)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert torch.equal(first, 2 * x)


def test_gradients_of_inputs_only_holds_within_and_ends_with_an_error() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(KeyError), ops.input_gradients_only():
        (found,) = torch.autograd.grad(times(x, 2.0).sum(), x, allow_unused=True)
        assert found is None
        raise KeyError
    assert weight_gradients_wanted()
    assert torch.autograd.grad(times(x, 2.0).sum(), x)[0] is not None
