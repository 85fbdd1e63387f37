"""Group norm on CUDA at the decoder's sizes, and as an operation; more in tests/csrc/test_group_norm.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import assert_kernel_close, requires_extension
from vfmvae import ops
from vfmvae.ops import norm_cuda
from vfmvae.ops.norm import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # (batch, channels, height, width), groups
    ((2, 128, 256, 256), 32),
    ((1, 128, 131, 97), 32),
    ((2, 256, 64, 64), 32),
    ((8, 512, 8, 8), 32),
    ((3, 512, 16, 16), 32),
    ((4, 512, 32, 32), 32),  # too large for one kernel backward, in float32 forward too
    ((1, 512, 128, 128), 32),
    ((2, 300, 20, 30), 1),
    ((2, 514, 9, 13), 2),
    ((1, 2056, 7, 5), 8),
    ((1030, 6, 1, 2), 3),
]


def norm_and_gradients(inputs: list[Tensor], groups: int, activation: Any, fused: bool | str) -> list[Tensor]:
    """The result and the gradients of x, weight, bias and style, from these and the result's gradient."""
    own = [t.detach().requires_grad_() for t in inputs[:-1]]
    y = ops.group_norm(own[0], groups, own[1], own[2], 1e-5, activation, own[3], fused=fused)
    return [y.detach(), *torch.autograd.grad(y, own, inputs[-1])]


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 2.0) -> list[Tensor]:
    channels = shape[1]
    x, grad = torch.randn(2, *shape, device="cuda").unbind()
    weight, bias = torch.randn(2, channels, device="cuda").unbind()
    style = 1 + torch.randn(shape[0], channels, device="cuda")
    x, grad = (t.contiguous(memory_format=torch.channels_last).to(dtype) for t in (mean + x, grad))
    return [x, weight, bias, style, grad]


def check(inputs: list[Tensor], groups: int, activation: str | None) -> None:
    ours = norm_and_gradients(inputs, groups, activation, "cuda")
    eager = norm_and_gradients(inputs, groups, activation, False)
    truth = norm_and_gradients([t.double() for t in inputs], groups, activation, False)
    batch, _, height, width = inputs[0].shape
    terms = {"weight": batch * height * width, "bias": batch * height * width, "style": height * width}
    for what, *results in zip(("output", "x", "weight", "bias", "style"), ours, eager, truth, strict=True):
        assert_kernel_close(*results, what, terms=terms.get(what, 0))
    again = norm_and_gradients(inputs, groups, activation, "cuda")
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True)), "not deterministic"


@requires_extension
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_sizes_of_the_decoder(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, poisoned_empty: None
) -> None:
    check(random_inputs(shape, dtype), groups, None)


@requires_extension
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATIONS])
@pytest.mark.parametrize("shape", [(2, 512, 8, 8), (2, 128, 70, 33), (2, 33, 15, 17)], ids=str)
def test_activations(
    shape: tuple[int, ...], activation: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    check(random_inputs(shape, dtype), 32 if shape[1] % 32 == 0 else 3, activation)


@requires_extension
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 128, 64, 64), (2, 512, 8, 8)], ids=str)
def test_large_means(shape: tuple[int, ...]) -> None:
    check(random_inputs(shape, torch.float32, mean=1000.0), 32, None)


@requires_extension
@pytest.mark.gpu
def test_memory_that_is_not_aligned() -> None:
    inputs = random_inputs((1, 32, 3, 4), torch.float32)
    memory = torch.randn(1 + 32 * 12, device="cuda")
    inputs[0] = memory[1:].view(1, 3, 4, 32).permute(0, 3, 1, 2)
    assert inputs[0].data_ptr() % 16 != 0
    check(inputs, 8, "silu")


@requires_extension
@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB")
    x = torch.randn(2, 64, 256, 256, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 64, device="cuda").unbind()
    expected = ops.group_norm(x, 16, weight, bias, fused="cuda")
    many = torch.empty(520, 64, 256, 256, device="cuda", dtype=x.dtype, memory_format=torch.channels_last)
    many.zero_()[-2:] = x
    torch.testing.assert_close(ops.group_norm(many, 16, weight, bias, fused="cuda")[-2:], expected)


@requires_extension
@pytest.mark.gpu
def test_the_operations_are_known_to_torch() -> None:
    x, weight, bias, style, grad = random_inputs((2, 6, 4, 3), torch.float32)
    for tensor in (x, weight, bias, style):
        tensor.requires_grad_()
    known = torch.ops.vfmvae
    for arguments in (
        (x, weight, bias, style, None, None, 3, 1e-5, "gelu"),
        (x, weight, bias, None, None, None, 3, 1e-5, "none"),
    ):
        torch.library.opcheck(known.group_norm_cuda.default, arguments)
    table = known.group_norm_cuda(*arguments)[1].detach()
    inputs = [grad, *(t.detach() for t in (x, weight, bias, style)), table, 3, "silu"]
    for wanted in ((True, True), (False, False)):
        torch.library.opcheck(known.group_norm_cuda_backward.default, (*inputs, *wanted))

    def norm(x: Tensor, *others: Tensor) -> Tensor:
        return ops.group_norm(x, 3, *others[:2], style=others[2])

    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    own = (x, weight, bias, style)
    gradients = [torch.autograd.grad(f(*own).sin().sum(), own) for f in (compiled, norm)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_shapes_without_a_gpu() -> None:
    """What torch.compile sees, with tensors that have no memory."""
    with FakeTensorMode():
        x = torch.empty(2, 6, 4, 3, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight, style = torch.empty(6, device="cuda"), torch.empty(2, 6, device="cuda", requires_grad=True)
        y, table = torch.ops.vfmvae.group_norm_cuda(x, weight, weight, style, None, None, 3, 1e-5, "silu")
        assert y.shape == x.shape and y.dtype == x.dtype and y.requires_grad and not table.requires_grad
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert norm_cuda.group_norm(x, 3, weight, weight, 1e-5, None, None).shape == x.shape
        backward = torch.ops.vfmvae.group_norm_cuda_backward
        for of_weights, of_style in ((True, False), (False, True)):
            found = backward(y, x, weight, weight, style, table, 3, "silu", of_weights, of_style)
            assert found[0].shape == x.shape and found[0].dtype == x.dtype
            sizes = 6 * of_weights, 6 * of_weights, 12 * of_style
            assert tuple(t.numel() for t in found[1:]) == sizes


def test_what_it_refuses_is_said() -> None:
    weight = torch.ones(4)
    for x, sentence in (
        (torch.randn(1, 4, 2, 2), "the tensor is on cpu, not on a CUDA device"),
        (torch.randn(1, 4, 2, 2, dtype=torch.float64), "not torch.float64"),
        (torch.randn(1, 4, 0, 2), "x has no channels or no pixels"),
        (torch.randn(1, 4, 2, 2, device="meta"), "weight is on cpu, x on meta"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ops.group_norm(x, 2, weight, weight, fused="cuda")
