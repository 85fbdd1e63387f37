from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.special import ndtr
from torch import Tensor

from tests.helpers import RELATIVE_LIMITS, assert_kernel_close, requires_extension
from tests.ops.agreement import assert_agrees
from vfmvae import ops
from vfmvae.ops import mlp, mlp_cpu, native
from vfmvae.ops.demodulation import demodulation


def mlp_inputs(batch: int, channels: int, height: int, width: int) -> list[Tensor]:
    hidden = 4 * channels
    return [
        torch.randn(batch, channels, height, width),
        torch.randn(batch, channels, height, width),
        1 + 0.5 * torch.randn(batch, channels),
        torch.randn(hidden, channels),
        torch.randn(hidden),
        torch.randn(channels, hidden) * hidden**-0.5,
        torch.randn(channels),
        torch.randn(channels),
    ]


def test_mlp_is_the_formula_at_every_pixel() -> None:
    residual, x, style, w1, b1, w2, b2, gamma = (t.double() for t in mlp_inputs(2, 3, 2, 2))
    expected = torch.empty_like(x)
    for b in range(2):
        weight = w1 * style[b]
        weight = weight / (weight.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
        for i in range(2):
            for j in range(2):
                hidden = F.gelu(weight @ x[b, :, i, j] + b1)
                expected[b, :, i, j] = residual[b, :, i, j] + gamma * (w2 @ hidden + b2)
    torch.testing.assert_close(
        ops.modulated_mlp(residual, x, style, w1, b1, w2, b2, gamma, fused=False), expected
    )


@pytest.mark.parametrize("of", ["style", "weight"])
def test_demodulation_and_its_gradients(of: str) -> None:
    style, weight = torch.randn(3, 5), torch.randn(7, 5)
    style[1] = 0

    def plain(style: Tensor, weight: Tensor) -> Tensor:
        return ((weight * style[:, None]).square().sum(dim=2) + 1e-8).rsqrt()

    inputs, wide = (
        [t.to(dtype).requires_grad_() for t in (style, weight)] for dtype in (None, torch.float64)
    )
    out, truth = demodulation(*inputs), plain(*wide)
    torch.testing.assert_close(out.double(), truth)
    chosen = 0 if of == "style" else 1
    (grad,), (expected,) = (
        torch.autograd.grad((y * y.sin()).sum(), t[chosen]) for y, t in ((out, inputs), (truth, wide))
    )
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)
    with ops.input_gradients_only():
        again = torch.autograd.grad(demodulation(*inputs).sum(), inputs, allow_unused=True)
    assert again[0] is not None and again[1] is None


# More pixels than channels and fewer: the form by matrix products computes the modulation differently.
@pytest.mark.parametrize("fused", [True, "gemm"])
@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (1, 5, 7, 3), (3, 16, 2, 2), (1, 12, 1, 1)])
def test_mlp_agrees(shape: tuple[int, ...], fused: bool | str) -> None:
    assert_agrees(ops.modulated_mlp, mlp_inputs(*shape), fused)


def mlp_and_gradients(
    inputs: list[Tensor], grad: Tensor, fused: bool | str, dtype: torch.dtype | None = None
) -> list[Tensor]:
    own = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    y = ops.modulated_mlp(*own, fused=fused)
    return [y.detach(), *torch.autograd.grad(y, own, grad.to(y.dtype))]


# Channels that fill no vector, tiles and bands of unequal size, one pixel, more samples than bands.
@requires_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 8, 6, 6), (2, 20, 39, 41), (1, 5, 7, 3), (3, 33, 1, 1), (40, 16, 6, 6), (1, 128, 9, 14)]
)
def test_compiled_mlp(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    inputs = [t.to(dtype) if i < 2 else t for i, t in enumerate(mlp_inputs(*shape))]
    grad = torch.randn(shape).to(dtype)
    compiled, eager = mlp_and_gradients(inputs, grad, "cpu"), mlp_and_gradients(inputs, grad, False)
    truth = mlp_and_gradients(inputs, grad, False, torch.float64)
    # Of gamma eager sums over pixels, and the fused forms over products of such sums: other roundings.
    of_gamma = [found.pop() for found in (compiled, eager, truth)]
    assert (of_gamma[0].double() - of_gamma[2]).norm() <= RELATIVE_LIMITS[dtype] * of_gamma[2].norm()
    names = ("output", "residual", "x", "style", "w1", "b1", "w2", "b2")
    for what, *results in zip(names, compiled, eager, truth, strict=True):
        # Of the style: sums over pixels, too, of what passes through the demodulation.
        pixels = shape[2] * shape[3] * (1 if what == "style" else shape[0])
        terms = 0 if what in ("output", "residual", "x") else pixels
        assert_kernel_close(*results, what, terms=terms)


@requires_extension
def test_gelu_is_exact_where_it_is_small_and_where_it_is_large() -> None:
    # One channel, identity weights: the result is gelu(h) for every h.
    h = torch.linspace(-14, 14, 20001)
    one, zero = torch.ones(1), torch.zeros(1)
    x = h.view(1, 1, 1, -1).contiguous()
    y = mlp_cpu.modulated_mlp(
        torch.zeros_like(x), x, one.view(1, 1), one.view(1, 1), one.view(1, 1), zero, one.view(1, 1), zero
    )
    truth = h.double() * torch.from_numpy(ndtr(h.double().numpy()))
    # The square of h is rounded before exp, which costs h^2 / 2 units in the last place far out.
    units = (y.flatten().double() - truth).abs() / (truth.abs() * 2.0**-23 + 1e-30)
    assert (units < 4 + h.square()).all(), f"{units.max():.1f} units at {h[units.argmax()]:.3f}"


@requires_extension
def test_mlp_gradients_of_the_input_alone() -> None:
    inputs = [t.requires_grad_() for t in mlp_inputs(2, 8, 5, 5)]
    y, weights = ops.modulated_mlp(*inputs, fused="cpu"), inputs[3:7]
    expected = torch.autograd.grad(y.sum(), inputs[:3], retain_graph=True)
    with ops.input_gradients_only():
        found = torch.autograd.grad(y.sum(), inputs[:3], retain_graph=True)
        b1, w2 = torch.autograd.grad(y.sum(), (weights[1], weights[2]), allow_unused=True, retain_graph=True)
    assert b1 is None and w2 is None
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert all(g is not None for g in torch.autograd.grad(y.sum(), weights))


@requires_extension
def test_the_number_of_threads_does_not_show_in_the_mlp() -> None:
    inputs, grad = mlp_inputs(2, 24, 40, 40), torch.randn(2, 24, 40, 40)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(mlp_and_gradients(inputs, grad, "cpu")[:3])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@requires_extension
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_spread_in_the_compiled_mlp(value: float) -> None:
    inputs = mlp_inputs(1, 16, 5, 5)
    inputs[1][0, 3, 2, 2] = value
    compiled, reference = (ops.modulated_mlp(*inputs, fused=fused) for fused in ("cpu", False))
    assert torch.equal(compiled.isnan(), reference.isnan())


@requires_extension
def test_an_empty_batch_goes_through_the_compiled_mlp() -> None:
    inputs = [t.requires_grad_() for t in mlp_inputs(0, 8, 4, 4)]
    y = ops.modulated_mlp(*inputs, fused="cpu")
    assert y.shape == (0, 8, 4, 4)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), inputs))


@requires_extension
def test_the_compiled_mlp_is_an_operation_that_torch_knows() -> None:
    residual, x, style, w1, b1, w2, b2, gamma = mlp_inputs(2, 4, 3, 5)
    arguments = (residual, x, style, torch.rand(2, 16), w1, b1, w2, b2)
    torch.library.opcheck(
        torch.ops.vfmvae.modulated_mlp.default, tuple(t.requires_grad_() for t in arguments)
    )
    inputs = [*arguments[:3], *arguments[4:], gamma]
    compiled = torch.compile(ops.modulated_mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), ops.modulated_mlp(*inputs))


@requires_extension
def test_what_the_compiled_mlp_refuses_is_said() -> None:
    with pytest.raises(ValueError, match="not torch.float16"):
        ops.modulated_mlp(*(t.half() for t in mlp_inputs(1, 8, 2, 2)), fused="cpu")


@requires_extension
def test_where_the_compiled_mlp_is_slower_it_is_taken_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    implementations = {i.name: i.run for i in mlp._MODULATED_MLP.implementations}
    monkeypatch.setattr(native, "cpu_multiplies_bfloat16", lambda: True)
    for channels, dtype, first in (
        (128, torch.float32, "cpu"),
        (132, torch.float32, "gemm"),
        (8, torch.bfloat16, "gemm"),
    ):
        inputs = [t.to(dtype) for t in mlp_inputs(1, channels, 2, 2)]
        assert mlp._MODULATED_MLP.choose(True, *inputs) == implementations[first]
        assert mlp._MODULATED_MLP.choose("cpu", *inputs) == implementations["cpu"]
    assert_agrees(ops.modulated_mlp, mlp_inputs(1, 132, 3, 3), "cpu")


@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (1, 5, 7, 3)])
def test_to_rgb_is_an_einsum_and_agrees(shape: tuple[int, ...]) -> None:
    x, style = torch.randn(shape), torch.randn(shape[:2])
    weight, bias = torch.randn(3, shape[1]), torch.randn(3)
    expected = torch.einsum("bchw,bc,dc->bdhw", x, style, weight) + bias[:, None, None]
    torch.testing.assert_close(ops.modulated_to_rgb(x, style, weight, bias, fused=False), expected)
    assert_agrees(ops.modulated_to_rgb, [x, style, weight, bias])


@pytest.mark.parametrize("fused", [True, False, "gemm"])
def test_an_empty_batch(fused: bool | str) -> None:
    shapes = ((0, 8, 4, 3), (0, 8), (3, 8), (3,))
    for function, inputs, channels in (
        (ops.modulated_mlp, mlp_inputs(0, 8, 4, 3), 8),
        (ops.modulated_to_rgb, [torch.randn(s) for s in shapes], 3),
    ):
        own = [t.requires_grad_() for t in inputs]
        y = function(*own, fused=fused)
        assert y.shape == (0, channels, 4, 3)
        for input, grad in zip(own, torch.autograd.grad(y.sum(), own), strict=True):
            assert grad.shape == input.shape and not grad.any()


@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16_keeps_its_dtype_and_is_near(fused: bool) -> None:
    inputs = mlp_inputs(2, 16, 5, 5)
    truth = ops.modulated_mlp(*(t.double() for t in inputs), fused=False)
    low = [t.bfloat16() for t in inputs[:2]] + inputs[2:]
    y = ops.modulated_mlp(*low, fused=fused)
    assert y.dtype == torch.bfloat16
    assert (y.double() - truth).norm() / truth.norm() < 1e-2
    image = ops.modulated_to_rgb(low[1], inputs[2], torch.randn(3, 16), torch.zeros(3), fused=fused)
    assert image.dtype == torch.float32


@pytest.mark.parametrize("fused", [True, False])
def test_tensors_that_do_not_fit_are_named(fused: bool) -> None:
    inputs = mlp_inputs(2, 8, 3, 3)
    for place, wrong, sentence in (
        (0, torch.randn(1, 8, 3, 3), r"residual is \[1, 8, 3, 3\]; for x \[2, 8, 3, 3\] it must be"),
        (2, torch.randn(1, 8), r"style is \[1, 8\]; .* it must be \[2, 8\]"),
        (5, torch.randn(32, 8), r"contract_weight is \[32, 8\]; .* it must be \[8, 32\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ops.modulated_mlp(*inputs[:place], wrong, *inputs[place + 1 :], fused=fused)


@pytest.mark.parametrize("fused", [True, False])
def test_tensors_of_to_rgb_that_do_not_fit_are_named(fused: bool) -> None:
    inputs = [torch.randn(s) for s in ((2, 8, 3, 3), (2, 8), (3, 8), (3,))]
    for place, shape, sentence in (
        (1, (1, 8), r"style is \[1, 8\]; for x \[2, 8, 3, 3\] it must be \[2, 8\]"),
        (2, (3, 4), r"weight is \[3, 4\]; .* it must be \[3, 8\]"),
        (3, (1,), r"bias is \[1\]; .* it must be \[3\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ops.modulated_to_rgb(*inputs[:place], torch.randn(shape), *inputs[place + 1 :], fused=fused)


@pytest.mark.parametrize("fused", [True, False])
def test_a_residual_of_another_dtype_is_converted(fused: bool) -> None:
    residual, *others = mlp_inputs(2, 8, 3, 3)
    y = ops.modulated_mlp(residual.bfloat16(), *others, fused=fused)
    assert torch.equal(y, ops.modulated_mlp(residual.bfloat16().float(), *others, fused=fused))


def test_small_styles_in_float16_are_demodulated() -> None:
    """Their squares, and the epsilon beside them, are 0 in float16."""
    given = [torch.randn(1, 8, 3, 3), torch.randn(1, 8, 3, 3), torch.full((1, 8), 1e-4)]
    given += [torch.randn(32, 8), torch.randn(32), torch.randn(8, 32), torch.randn(8), torch.randn(8)]
    expected = ops.modulated_mlp(*(t.half().double() for t in given), fused=False)
    found = ops.modulated_mlp(*(t.half() for t in given), fused=False)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=5e-2)
