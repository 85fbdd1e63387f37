from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_kernel_close, requires_extension
from tests.ops.agreement import assert_agrees
from vfmvae import ops


def random_inputs(shape: tuple[int, ...], size: int, bias: float = 0.0) -> list[Tensor]:
    """x, weight and bias of the convolution, noise, weight and bias of the norm, style."""
    batch, channels, height, width = shape
    return [
        torch.randn(shape),
        torch.randn(channels, 1, size, size),
        bias + torch.randn(channels),
        torch.randn(height, width),
        torch.randn(channels),
        torch.randn(channels),
        torch.randn(batch, channels),
    ]


def run(*inputs: Tensor, groups: int, fused: bool | str) -> Tensor:
    return ops.depthwise_group_norm(*inputs[:4], groups, *inputs[4:6], 1e-5, inputs[6], fused=fused)


@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize(("shape", "groups"), [((2, 8, 6, 5), 2), ((1, 6, 4, 9), 3)])
def test_is_one_operation_after_the_other(shape: tuple[int, ...], groups: int, size: int) -> None:
    inputs = random_inputs(shape, size)
    assert_agrees(lambda *inputs, fused: run(*inputs, groups=groups, fused=fused), inputs)
    for fused in (True, False):
        y = ops.depthwise_conv2d(*inputs[:3], fused=fused)
        expected = ops.group_norm(y, groups, *inputs[4:6], fused=fused)
        found = ops.depthwise_group_norm(*inputs[:3], None, groups, *inputs[4:6], fused=fused)
        assert torch.equal(found, expected)


@requires_extension
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "groups", "size"),
    [
        ((1, 128, 256, 256), 32, 7),
        ((2, 128, 41, 67), 32, 7),
        ((8, 512, 8, 8), 32, 5),
        ((8, 512, 32, 32), 32, 7),
        ((2, 30, 13, 9), 5, 3),
    ],
    ids=str,
)
def test_statistics_of_the_convolution_serve_the_norm(
    shape: tuple[int, ...], groups: int, size: int, dtype: torch.dtype, poisoned_empty: None
) -> None:
    inputs = [t.cuda() for t in random_inputs(shape, size, bias=50.0)]  # far from the deviation
    inputs[0] = inputs[0].to(dtype)
    grad = torch.randn(shape, device="cuda").to(dtype)

    def with_gradients(fused: bool | str, dtype: torch.dtype | None = None) -> list[Tensor]:
        own = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        y = run(*own, groups=groups, fused=fused)
        return [y.detach(), *torch.autograd.grad(y, own, grad.to(dtype or grad.dtype))]

    ours, eager, truth = with_gradients("cuda"), with_gradients(False), with_gradients(False, torch.float64)
    names = ("output", "x", "conv weight", "conv bias", "noise", "weight", "bias", "style")
    for what, one, other, exact in zip(names, ours, eager, truth, strict=True):
        if what == "conv bias" or (what == "noise" and groups == 1):
            continue  # what the norm takes away again: nothing but rounding
        if dtype == torch.float32:
            error = (one.double() - exact).norm() / exact.norm()
            assert error < 1e-4, f"{what}: relative error {error:.2e}"  # a mean of 50 costs two digits
        else:
            pixels = shape[0] * shape[2] * shape[3]
            assert_kernel_close(one, other, exact, what, terms=0 if what in ("output", "x") else pixels)
    again = with_gradients("cuda")
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True)), "not deterministic"


def test_wrong_arguments_are_named() -> None:
    x, weight, bias, noise, *norm = random_inputs((1, 6, 4, 4), 3)
    for arguments, groups, sentence in (
        (
            (x, weight[:, :, :, :2], bias, noise),
            3,
            r"conv_weight is \[6, 1, 3, 2\]; it must be \[C, 1, k, k\]",
        ),
        ((x, weight, bias[:3], noise), 3, r"conv_bias is \[3\]; for x .* must be \[6\]"),
        ((x, weight, bias, noise[:2]), 3, r"noise is \[2, 4\]; for x .* must be \[4, 4\]"),
        ((x, weight, bias, noise), 4, "6 channels cannot be divided into 4 groups"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ops.depthwise_group_norm(*arguments, groups, *norm[:2])
