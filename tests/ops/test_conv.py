from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_kernel_close, requires_extension
from tests.ops.agreement import assert_agrees
from vfmvae import ops


def test_depthwise_is_a_sum_over_the_window() -> None:
    x, weight, bias = torch.randn(2, 3, 5, 4), torch.randn(3, 1, 3, 3), torch.randn(3)
    noise = torch.randn(5, 4)
    expected = torch.zeros_like(x)
    for row in range(5):
        for column in range(4):
            for i in range(3):
                for j in range(3):
                    r, c = row + i - 1, column + j - 1
                    if 0 <= r < 5 and 0 <= c < 4:
                        expected[:, :, row, column] += x[:, :, r, c] * weight[:, 0, i, j]
    expected += bias[:, None, None] + noise
    torch.testing.assert_close(ops.depthwise_conv2d(x, weight, bias, noise, fused=False), expected)


@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (1, 5, 7, 3), (3, 1, 1, 2)])
@pytest.mark.parametrize("size", [3, 5, 7])
def test_depthwise_agrees(shape: tuple[int, ...], size: int) -> None:
    channels = shape[1]
    inputs = [
        torch.randn(shape),
        torch.randn(channels, 1, size, size),
        torch.randn(channels),
        torch.randn(shape[2:]),
    ]
    assert_agrees(ops.depthwise_conv2d, inputs)
    assert_agrees(ops.depthwise_conv2d, inputs, fused="channels_last")


@requires_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 16, 6, 9),
        (1, 5, 7, 3),
        (3, 33, 1, 1),  # the whole map is smaller than the window
        (2, 48, 2, 1),
        (5, 17, 20, 4),  # more rows than a band has
    ],
    ids=str,
)
def test_compiled_depthwise_gradients(
    shape: tuple[int, ...], size: int, dtype: torch.dtype, poisoned_empty: None
) -> None:
    channels = shape[1]
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight, bias = torch.randn(channels, 1, size, size), torch.randn(channels)

    def run(fused: bool | str, wide: bool = False) -> list[Tensor]:
        inputs = [t.double() if wide else t.clone() for t in (x, weight, bias)]
        y = ops.depthwise_conv2d(*[t.requires_grad_() for t in inputs], fused=fused)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]

    compiled, eager, truth = run("cpu"), run(False), run(False, wide=True)
    for what, *results in zip(
        ("output", "grad of x", "grad of weight", "grad of bias"), compiled, eager, truth, strict=True
    ):
        assert_kernel_close(*results, what)


@requires_extension
def test_depthwise_gradients_of_the_input_alone() -> None:
    x, weight = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)
    y = ops.depthwise_conv2d(x, weight, fused="cpu")
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with ops.input_gradients_only():
        of_x, of_weight = torch.autograd.grad(y.sum(), (x, weight), allow_unused=True, retain_graph=True)
    assert of_weight is None and torch.equal(of_x, expected)
    assert torch.autograd.grad(y.sum(), weight)[0] is not None, "outside of it they are there again"


@requires_extension
def test_the_number_of_threads_does_not_show_in_depthwise_gradients() -> None:
    # Large enough for two threads, and for the rows to be cut into bands.
    x, weight = torch.randn(2, 40, 40, 36), torch.randn(40, 1, 7, 7, requires_grad=True)

    def gradient(threads: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return torch.autograd.grad(ops.depthwise_conv2d(x, weight, fused="cpu").sum(), weight)[0]
        finally:
            torch.set_num_threads(before)

    assert torch.equal(gradient(1), gradient(2))


@requires_extension
def test_a_frozen_weight_gets_no_gradient_and_the_input_does() -> None:
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    weight, bias = torch.randn(4, 1, 3, 3), torch.randn(4, requires_grad=True)
    of_x, of_bias = torch.autograd.grad(ops.depthwise_conv2d(x, weight, bias, fused="cpu").sum(), (x, bias))
    torch.testing.assert_close(of_bias, torch.full((4,), 25.0))
    (expected,) = torch.autograd.grad(ops.depthwise_conv2d(x, weight, fused=False).sum(), x)
    torch.testing.assert_close(of_x, expected)


@requires_extension
def test_the_depthwise_gradient_is_an_operation_that_torch_knows() -> None:
    x, grad = torch.randn(2, 2, 5, 6, 4).permute(0, 1, 4, 2, 3)
    torch.library.opcheck(torch.ops.vfmvae.depthwise_weight_gradient.default, (x, grad, 3))
    weight, bias = torch.randn(2, 1, 3, 3, requires_grad=True), torch.randn(2, requires_grad=True)
    x = torch.randn(2, 2, 5, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.vfmvae.depthwise_conv2d.default, (x, weight, bias, None))


@requires_extension
def test_what_the_compiled_depthwise_refuses_is_said() -> None:
    for x, size, sentence in (
        (torch.randn(1, 2, 4, 4, dtype=torch.float16), 3, "not torch.float16"),
        (torch.randn(1, 2, 4, 4), 9, "kernel sizes 3, 5, 7, not 9"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ops.depthwise_conv2d(x, torch.randn(2, 1, size, size), fused="cpu")


@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (1, 5, 7, 3)])
def test_pointwise_is_a_matrix_product_and_agrees(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(7, shape[1]), torch.randn(7)
    expected = torch.einsum("bchw,dc->bdhw", x, weight) + bias[:, None, None]
    torch.testing.assert_close(ops.pointwise_conv2d(x, weight, bias, fused=False), expected)
    assert_agrees(ops.pointwise_conv2d, [x, weight, bias])


def test_fused_results_stay_channels_last() -> None:
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    for y in (ops.depthwise_conv2d(x, torch.randn(8, 1, 3, 3)), ops.pointwise_conv2d(x, torch.randn(4, 8))):
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_wrong_weights_are_named() -> None:
    x = torch.randn(1, 4, 4, 4)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 1, 2, 2\)"):
        ops.depthwise_conv2d(x, torch.randn(4, 1, 2, 2))
    with pytest.raises(ValueError, match=r"weight has shape \(3, 5\), needed is \[D, 4\]"):
        ops.pointwise_conv2d(x, torch.randn(3, 5))
