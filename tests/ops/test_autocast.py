"""Operations under torch.autocast, and with weights of other dtypes than the input: results keep the dtypes
that the operations promise, and all gradients come out.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import requires_extension
from vfmvae import ops
from vfmvae.ops.demodulation import demodulation
from vfmvae.tokenizer.decoder_blocks import ConvNeXtLayer, Upsample

LIMIT = 2e-2  # of bfloat16, after several roundings


def set_fused(module: nn.Module, fused: bool) -> None:
    for part in module.modules():
        if hasattr(part, "fused"):
            part.fused = fused


def with_gradients(module: nn.Module, inputs: list[Tensor], autocast: bool) -> list[Tensor]:
    own = [t.detach().requires_grad_() for t in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = module(*own)
    weights = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=weights, dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [*own, *module.parameters()], grad)]


@requires_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["convnext", "upsample", "upsample_norm_after"])
def test_modules_of_the_decoder_under_autocast(name: str, fused: bool, dtype: torch.dtype) -> None:
    inputs = [torch.randn(2, 16, 9, 8), torch.randn(2, 6)]
    if name == "convnext":
        module: nn.Module = ConvNeXtLayer(16, 5, 6)
        nn.init.normal_(module.gamma)
    else:
        module = Upsample(16, 8, 3, norm_after=name.endswith("after"))
        inputs.pop()
    inputs[0] = inputs[0].to(dtype)
    set_fused(module, fused)
    found = with_gradients(module, inputs, autocast=True)
    set_fused(module, False)
    truth = with_gradients(module.double(), [t.double() for t in inputs], autocast=False)
    assert found[0].dtype == dtype
    names = [
        "output",
        *(f"input {i}" for i in range(len(inputs))),
        *(n for n, _ in module.named_parameters()),
    ]
    largest = max(t.norm() for t in truth[1:])
    for what, one, exact in zip(names, found, truth, strict=True):
        # Of a bias before a norm the gradient is nothing but rounding.
        size = exact.norm().clamp_min(1e-2 * largest)
        assert (one.double() - exact).norm() <= LIMIT * size, what


@requires_extension
@pytest.mark.parametrize("fused", ["cpu", "channels_last", False])
def test_depthwise_under_autocast_keeps_its_dtype(fused: bool | str) -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 16, 9, 9), (16, 1, 5, 5), (16,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.depthwise_conv2d(x, weight, bias, fused=fused)
        assert y.dtype == torch.float32
        found = torch.autograd.grad(y.square().sum(), (x, weight, bias))
    expected = torch.autograd.grad(
        ops.depthwise_conv2d(x, weight, bias, fused=False).square().sum(), (x, weight, bias)
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and (one - other).norm() <= LIMIT * other.norm()


@requires_extension
def test_a_gradient_of_another_dtype_is_converted() -> None:
    x, grad = torch.randn(2, 2, 8, 5, 5).unbind()
    expected = torch.ops.vfmvae.depthwise_weight_gradient(x, grad.bfloat16().float(), 3)
    assert torch.equal(torch.ops.vfmvae.depthwise_weight_gradient(x, grad.bfloat16(), 3), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_demodulation_of_mixed_dtypes(autocast: bool) -> None:
    style, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        scale = demodulation(style, weight)
    wide = [t.detach().float().requires_grad_() for t in (style, weight)]
    expected = demodulation(*wide)
    torch.testing.assert_close(scale, expected)
    found = torch.autograd.grad(scale.sin().sum(), (style, weight))
    assert [g.dtype for g in found] == [torch.float32, torch.bfloat16]
    of_style, of_weight = torch.autograd.grad(expected.sin().sum(), wide)
    torch.testing.assert_close(found[0], of_style)
    torch.testing.assert_close(found[1], of_weight.bfloat16())
    assert demodulation(style.double(), weight).dtype == torch.float64
    assert torch.ops.vfmvae.demodulation(style.to("meta"), weight.to("meta")).dtype == torch.float32


@requires_extension
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True, "cpu", "gemm"])
@pytest.mark.parametrize("side", [2, 6])
def test_weights_of_bfloat16_beside_a_style_of_float32(
    fused: bool | str, dtype: torch.dtype, autocast: bool, side: int
) -> None:
    residual, x = torch.randn(2, 2, 8, side, side).to(dtype).unbind()
    shapes = ((32, 8), (32,), (8, 32), (8,), (8,))
    inputs = [residual, x, 1 + 0.5 * torch.randn(2, 8), *(torch.randn(s).bfloat16() for s in shapes)]
    own = [t.clone().requires_grad_() for t in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = ops.modulated_mlp(*own, fused=fused)
    found = torch.autograd.grad(y, own, torch.ones_like(y))
    assert [g.dtype for g in (y, *found)] == [dtype, *(t.dtype for t in inputs)]
    wide = [t.double().requires_grad_() for t in inputs]
    exact = ops.modulated_mlp(*wide, fused=False)
    truth = torch.autograd.grad(exact, wide, torch.ones_like(exact))
    for i, (one, other) in enumerate(zip((y, *found), (exact, *truth), strict=True)):
        assert (one.double() - other).norm() <= LIMIT * other.norm(), i


@pytest.mark.parametrize("fused", [False, True])
def test_an_image_is_of_float32_under_autocast(fused: bool) -> None:
    x, style, weight, bias = (torch.randn(s) for s in ((2, 8, 3, 3), (2, 8), (3, 8), (3,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.modulated_to_rgb(x, style, weight, bias, fused=fused).dtype == torch.float32
        assert ops.pointwise_conv2d(x, weight, bias, fused=fused).dtype == torch.float32
