from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import COMPILED, DEVICES, assert_kernel_close, requires_extension
from tests.ops.agreement import assert_agrees
from vfmvae import ops
from vfmvae.ops.conv import _DEPTHWISE, depthwise_conv2d_reference, depthwise_conv2d_with_statistics


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
@pytest.mark.parametrize(("device", "dtype"), COMPILED)
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 16, 6, 9),
        (1, 5, 7, 3),
        (3, 33, 1, 1),  # the whole map is smaller than the window
        (2, 48, 2, 1),
        (5, 17, 20, 4),  # more rows than a band has
        (2, 72, 33, 40),  # several tiles and groups of channels
        (1, 128, 70, 64),
        (8, 512, 8, 8),
    ],
    ids=str,
)
def test_compiled_depthwise_and_its_gradients(
    shape: tuple[int, ...], size: int, device: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    channels = shape[1]
    x, grad = torch.randn(2, *shape, device=device).to(dtype)
    weight, bias = torch.randn(channels, 1, size, size), torch.randn(channels)
    noise = torch.randn(shape[2:])
    parameters = [t.to(device) for t in (weight, bias, noise)]

    def run(fused: bool | str, wide: bool = False) -> list[Tensor]:
        inputs = [t.double() if wide else t.clone() for t in (x, *parameters)]
        y = ops.depthwise_conv2d(*[t.requires_grad_() for t in inputs], fused=fused)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]

    compiled, eager, truth = run(device), run(False), run(False, wide=True)
    assert compiled[0].is_contiguous(memory_format=torch.channels_last)
    names = ("output", "grad of x", "grad of weight", "grad of bias", "grad of noise")
    pixels = shape[0] * shape[2] * shape[3]
    terms = (0, 0, pixels, pixels, shape[0] * channels)
    for what, count, *results in zip(names, terms, compiled, eager, truth, strict=True):
        assert_kernel_close(*results, what, terms=count)


@requires_extension
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("shape", [(8, 128, 256, 256), (1, 136, 131, 97), (8, 512, 32, 32)], ids=str)
def test_depthwise_at_full_size(
    shape: tuple[int, ...], size: int, dtype: torch.dtype, poisoned_empty: None
) -> None:
    x, grad = torch.randn(2, *shape, device="cuda").to(dtype)
    weight = torch.randn(shape[1], 1, size, size, device="cuda", requires_grad=True)
    bias = torch.randn(shape[1], device="cuda", requires_grad=True)

    def run(fused: bool | str) -> list[Tensor]:
        own = x.detach().requires_grad_()
        y = ops.depthwise_conv2d(own, weight, bias, fused=fused)
        return [y.detach(), *torch.autograd.grad(y, (own, weight, bias), grad)]

    results = run("cuda")
    # The truth channel by channel group, as float64 needs much memory.
    for first in range(0, shape[1], 64):
        part = slice(first, first + 64)
        wide = [t.detach()[:, part].double().requires_grad_() for t in (x,)]
        wide += [t.detach()[part].double().requires_grad_() for t in (weight, bias)]
        y = depthwise_conv2d_reference(*wide, None)
        truth = [y.detach(), *torch.autograd.grad(y, wide, grad[:, part].double())]
        for i, (result, expected) in enumerate(zip(results, truth, strict=True)):
            own = result[:, part] if i < 2 else result[part]
            error = (own.double() - expected).norm() / expected.norm()
            limit = 1e-5 if result.dtype == torch.float32 else 4e-3  # weight and bias stay float32
            assert error <= limit, f"result {i}, channels from {first}: relative error {error:.2e}"
    again = run("cuda")
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True)), "not deterministic"


@requires_extension
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize(
    "shape", [(2, 16, 6, 9), (2, 72, 33, 40), (3, 5, 20, 4), (1, 128, 256, 256)], ids=str
)
def test_statistics_of_the_depthwise_output(
    shape: tuple[int, ...], size: int, dtype: torch.dtype, poisoned_empty: None
) -> None:
    channels = shape[1]
    x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(channels, 1, size, size, device="cuda", requires_grad=True)
    bias = torch.full((channels,), 50.0, device="cuda", requires_grad=True)  # far from the deviation
    y, partials, counts = depthwise_conv2d_with_statistics(x, weight, bias)
    plain = ops.depthwise_conv2d(x, weight, bias, fused="cuda")
    assert torch.equal(y, plain) and not partials.requires_grad and not counts.requires_grad

    assert counts.sum() == shape[2] * shape[3]
    means, deviations = partials.double().unbind(2)
    weights = counts.double()[:, None]
    mean = (means * weights).sum(1) / weights.sum()
    variance = (deviations + (means - mean[:, None]).square() * weights).sum(1) / weights.sum()
    torch.testing.assert_close(mean, y.double().mean((2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance, y.double().var((2, 3), correction=0), rtol=1e-4, atol=1e-7)

    grad = torch.randn_like(y)
    inputs = (x, weight, bias)
    pairs = zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@requires_extension
@pytest.mark.parametrize(("device", "dtype"), COMPILED)
@pytest.mark.parametrize("channels", [8, 5])
def test_values_that_are_not_finite_spread(channels: int, device: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(1, channels, 9, 12, device=device), torch.randn(channels, 1, 5, 5, device=device)
    x[0, 2, 4, 3], x[0, 3, 8, 11] = float("nan"), float("inf")
    y, reference = (ops.depthwise_conv2d(x.to(dtype), weight, fused=fused) for fused in (device, False))
    assert torch.equal(y.isnan(), reference.isnan()) and torch.equal(y.isinf(), reference.isinf())
    assert not y.isfinite().all()


@requires_extension
@pytest.mark.parametrize("device", DEVICES)
def test_depthwise_of_an_empty_batch(device: str) -> None:
    x = torch.empty(0, 8, 4, 4, device=device, requires_grad=True)
    weight = torch.randn(8, 1, 3, 3, device=device, requires_grad=True)
    y = ops.depthwise_conv2d(x, weight, fused=device)
    of_x, of_weight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == of_x.shape == x.shape and torch.equal(of_weight, torch.zeros_like(weight))


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
def test_the_compiled_depthwise_is_chosen_for_gradients_of_weight_and_bias_alone() -> None:
    runs = {i.name: i.run for i in _DEPTHWISE.implementations}
    x = torch.randn(1, 4, 5, 5, requires_grad=True)

    def chosen(of_weight: bool, of_bias: bool) -> str:
        weight = torch.randn(4, 1, 3, 3, requires_grad=of_weight)
        run = _DEPTHWISE.choose(True, x, weight, torch.randn(4, requires_grad=of_bias), None)
        return "channels_last" if run == runs["channels_last"] else "compiled"

    assert chosen(True, False) == chosen(False, True) == "compiled"
    assert chosen(False, False) == "channels_last"
    with torch.no_grad():
        assert chosen(True, True) == "channels_last"


@requires_extension
def test_x_is_kept_for_gradients_of_weight_and_bias_alone() -> None:
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    weight, bias = torch.randn(4, 1, 3, 3), torch.randn(4)
    frozen = ops.depthwise_conv2d(x, weight, bias, fused="cpu")
    assert [None if t is None else t.shape for t in frozen.grad_fn.saved_tensors] == [None, weight.shape]
    for learning in (weight, bias):
        learning.requires_grad_()
        y = ops.depthwise_conv2d(x, weight, bias, fused="cpu")
        assert y.grad_fn.saved_tensors[0] is not None
        learning.requires_grad_(False)


@requires_extension
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_bias_gets_its_gradient_in_its_own_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, weight = torch.randn(2, 4, 5, 7), torch.randn(4, 1, 3, 3).to(dtypes[0]).requires_grad_()
    bias = torch.randn(4).to(dtypes[1]).requires_grad_()
    y = ops.depthwise_conv2d(x, weight, bias, fused="cpu")
    (found,) = torch.autograd.grad(y, bias, torch.full_like(y, 1.2345))
    torch.testing.assert_close(found, torch.full((4,), 70 * 1.2345).to(dtypes[1]))


@requires_extension
@pytest.mark.parametrize("device", DEVICES)
def test_the_depthwise_operations_are_known_to_torch(device: str) -> None:
    known = torch.ops.vfmvae
    x, grad = torch.randn(2, 2, 5, 6, 4, device=device).permute(0, 1, 4, 2, 3)
    torch.library.opcheck(known.depthwise_weight_gradient.default, (x, grad, 3))
    weight = torch.randn(2, 1, 3, 3, device=device, requires_grad=True)
    bias = torch.randn(2, device=device, requires_grad=True)
    noise = torch.randn(5, 6, device=device, requires_grad=True)
    x = torch.randn(2, 2, 5, 6, device=device, requires_grad=True)
    torch.library.opcheck(known.depthwise_input_gradient.default, (x.detach(), weight.detach()))
    torch.library.opcheck(known.depthwise_conv2d.default, (x, weight, bias, None))
    torch.library.opcheck(known.depthwise_conv2d.default, (x, weight, None, noise))
    torch.library.opcheck(known.depthwise_conv2d.default, (x, weight.detach(), bias.detach(), None))
    if device == "cuda":
        torch.library.opcheck(known.depthwise_conv2d_with_statistics.default, (x, weight, bias, noise))


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
    with pytest.raises(ValueError, match=r"noise is \[1, 4\]; for x .* it must be \[4, 4\]"):
        ops.depthwise_conv2d(x, torch.randn(4, 1, 3, 3), noise=torch.randn(1, 4))
    with pytest.raises(ValueError, match=r"weight is \[4, 1, 2, 2\]; it must be \[C, 1, k, k\] with k odd"):
        ops.depthwise_conv2d(x, torch.randn(4, 1, 2, 2))
    with pytest.raises(ValueError, match=r"weight is \[3, 5\]; for x .* it must be \[3, 4\]"):
        ops.pointwise_conv2d(x, torch.randn(3, 5))
    for fused in (True, False):
        with pytest.raises(ValueError, match=r"bias is \[1\]; for x .* it must be \[4\]"):
            ops.depthwise_conv2d(x, torch.randn(4, 1, 3, 3), torch.randn(1), fused=fused)
        with pytest.raises(ValueError, match=r"bias is \[1\]; for x .* it must be \[3\]"):
            ops.pointwise_conv2d(x, torch.randn(3, 4), torch.randn(1), fused=fused)
