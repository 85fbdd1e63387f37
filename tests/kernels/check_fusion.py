"""The fused forms of vfmvae/ops/fusion.py, and kernels/norm.py under them, against float64, on a GPU or in
Triton's interpreter.

tests/ops/test_fusion.py runs this file in a process of its own, because Triton chooses the interpreter when
it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_fusion.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import RELATIVE_LIMITS
from vfmvae import ops
from vfmvae.ops.gated import geglu_halves

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# x [B, N, C], rows of both weights: one token, one channel, odd sizes, a row that fills a program.
SIZES = [((1, 1, 8), 24, 5), ((2, 3, 1), 2, 2), ((3, 7, 13), 39, 4), ((2, 33, 64), 64, 64)]
SIZES += [((1, 3, 4099), 3, 2)]
FULL = [((4, 1024, 1024), 3072, 64), ((4, 256, 768), 2304, 64), ((4, 256, 32), 1536, 512)]
NAMES = ("x", "norm weight 1", "norm bias 1", "weight 1", "bias 1")
NAMES += ("norm weight 2", "norm bias 2", "weight 2", "bias 2")
Function = Callable[..., tuple[Tensor, ...]]


def inputs_of(shape: tuple[int, ...], first: int, second: int, dtype: torch.dtype) -> list[Tensor]:
    channels = shape[-1]
    tensors = [torch.randn(shape).mul(3).add(1)]
    for width in (first, second):
        tensors += [1 + 0.3 * torch.randn(channels), 0.3 * torch.randn(channels)]
        tensors += [torch.randn(width, channels) / channels**0.5, torch.randn(width)]
    return [tensors[0].to(DEVICE, dtype), *(t.to(DEVICE) for t in tensors[1:])]


def projection(*tensors: Tensor, fused: bool | str) -> tuple[Tensor, ...]:
    return ops.fusion_projection(
        tensors[0], ops.NormedLinear(*tensors[1:5]), ops.NormedLinear(*tensors[5:]), fused=fused
    )


def gated(*tensors: Tensor, fused: bool | str) -> tuple[Tensor, ...]:
    gate, value = ops.NormedLinear(*tensors[1:5]), ops.NormedLinear(*tensors[5:])
    return (ops.normed_geglu(tensors[0], gate, value, fused=fused),)


def with_gradients(
    function: Function, inputs: list[Tensor], fused: bool | str, dtype: torch.dtype | None = None
) -> list[Tensor]:
    own = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    results = function(*own, fused=fused)
    draws = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=draws).to(inputs[0].dtype).to(DEVICE, r.dtype) for r in results]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, own, grads)]


def compare(function: Function, inputs: list[Tensor]) -> None:
    """By norms: products of folded weights round otherwise than eager's, and the largest of many errors may
    exceed twice eager's by chance.
    """
    runs = [with_gradients(function, inputs, "triton"), with_gradients(function, inputs, False)]
    runs.append(with_gradients(function, inputs, False, torch.float64))
    outputs, dtype = len(runs[0]) - len(inputs), inputs[0].dtype
    chain = 2 if function is gated else 1  # of roundings between products
    sums = max(inputs[0].numel() // inputs[0].shape[0], len(inputs[3])) ** 0.25  # as in tests/helpers.py
    for number, (found, plain, exact) in enumerate(zip(*runs, strict=True)):
        what = NAMES[number - outputs] if number >= outputs else f"output {number}"
        assert found.dtype == plain.dtype and found.shape == exact.shape and found.isfinite().all(), what
        size = exact.norm()
        error, of_plain = ((t.double() - exact).norm() for t in (found, plain))
        if size < 1e-9:  # behind the norm of a single channel
            assert error <= 1e-4, what
            continue
        assert error <= chain * RELATIVE_LIMITS[dtype] * size, f"{what}: relative error {error / size:.3g}"
        allowed = 2 * of_plain + torch.finfo(dtype).eps * sums * size
        assert error <= allowed, f"{what}: error {error / size:.3g} of the norm, allowed {allowed / size:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_projection_and_gradients(
    size: tuple[tuple[int, ...], int, int], dtype: torch.dtype, poisoned_empty: None
) -> None:
    compare(projection, inputs_of(*size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "width"), [((1, 1, 8), 3), ((2, 9, 13), 40), ((2, 33, 64), 128)], ids=str)
def test_gated_and_gradients(
    shape: tuple[int, ...], width: int, dtype: torch.dtype, poisoned_empty: None
) -> None:
    compare(gated, inputs_of(shape, width, width, dtype))


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("size", FULL, ids=str)
def test_full_size(size: tuple[tuple[int, ...], int, int], poisoned_empty: None) -> None:
    compare(projection, inputs_of(*size, torch.bfloat16))


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
def test_full_size_gated(poisoned_empty: None) -> None:
    compare(gated, inputs_of((4, 1024, 64), 128, 128, torch.bfloat16))
    compare(gated, inputs_of((4, 256, 512), 1024, 1024, torch.bfloat16))


def test_one_norm_for_gate_and_value_gets_the_sum_of_both_gradients() -> None:
    x, *parts = inputs_of((2, 9, 12), 10, 10, torch.float32)
    own = [t.requires_grad_() for t in (parts[0], parts[1])]
    found = []
    for fused in ("triton", False):
        layers = [ops.NormedLinear(*own, *parts[i : i + 2]) for i in (2, 6)]
        y = ops.normed_geglu(x, *layers, fused=fused)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), own)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_large_means_are_subtracted_first() -> None:
    x, *parts = inputs_of((2, 5, 64), 12, 12, torch.float32)
    tensors = [x * 0.1 + 1000, *parts]
    exact = projection(*(t.double() for t in tensors), fused=False)
    for y, truth in zip(projection(*tensors, fused="triton"), exact, strict=True):
        assert (y - truth).abs().max() < 1e-2  # x itself is known to 6e-5 / 0.3 of a deviation


def test_both_results_are_views_of_one_product() -> None:
    tensors = inputs_of((2, 5, 16), 12, 4, torch.float32)
    first, second = projection(*tensors, fused="triton")
    assert first.stride() == second.stride() == (80, 16, 1)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_layouts_of_x_and_of_the_gradient_do_not_matter() -> None:
    x, *parts = inputs_of((2, 5, 16), 12, 4, torch.float32)
    wide = torch.zeros(2, 5, 40, device=DEVICE)
    wide[..., 3:19] = x
    expected = projection(x, *parts, fused="triton")
    for other in (wide[..., 3:19], x.transpose(1, 2).contiguous().transpose(1, 2)):
        for a, b in zip(projection(other, *parts, fused="triton"), expected, strict=True):
            torch.testing.assert_close(a, b)
    own = x.clone().requires_grad_()
    sums = [sum(y.sum() for y in projection(own, *parts, fused=f)) for f in ("triton", False)]
    found, truth = (torch.autograd.grad(s, own)[0] for s in sums)  # gradients of stride 0
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


def test_gradients_of_inputs_alone_and_of_weights_alone() -> None:
    tensors = [t.requires_grad_() for t in inputs_of((2, 5, 16), 12, 4, torch.float32)]

    def loss(*own: Tensor) -> Tensor:
        return sum(y.square().sum() for y in projection(*own, fused="triton"))

    expected = torch.autograd.grad(loss(*tensors), tensors)
    with ops.input_gradients_only():
        found = torch.autograd.grad(loss(*tensors), tensors, allow_unused=True)
    assert torch.equal(found[0], expected[0]) and found[1:] == (None,) * 8
    found = torch.autograd.grad(loss(tensors[0].detach(), *tensors[1:]), tensors[1:])
    assert all(torch.equal(a, b) for a, b in zip(found, expected[1:], strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_in_their_token(value: float) -> None:
    tensors = inputs_of((2, 5, 16), 12, 12, torch.float32)
    tensors[0][1, 2, 3] = value
    for function in (projection, gated):
        for y in function(*tensors, fused="triton"):
            assert y[1, 2].isnan().all()
            y[1, 2] = 0
            assert y.isfinite().all()


def test_an_empty_batch() -> None:
    tensors = [t.requires_grad_() for t in inputs_of((0, 5, 16), 12, 12, torch.float32)]
    for function in (projection, gated):
        results = function(*tensors, fused="triton")
        assert all(r.shape == (0, 5, 12) for r in results)
        assert all(not g.any() for g in torch.autograd.grad([r.sum() for r in results], tensors))


def test_weights_of_bfloat16_beside_float32() -> None:
    x, *parts = inputs_of((2, 5, 16), 12, 4, torch.bfloat16)
    own = [t.bfloat16().requires_grad_() for t in parts]
    results = projection(x, *own, fused="triton")
    found = torch.autograd.grad([r.sum() for r in results], own)
    assert all(t.dtype == torch.bfloat16 for t in (*results, *found))


def test_registered_operations() -> None:
    x, *layers = (t.requires_grad_() for t in inputs_of((2, 5, 8), 6, 4, torch.float32))
    torch.library.opcheck(torch.ops.vfmvae.normed_linears.default, (x, *layers, 1e-5))
    x, *layers = (t.detach() for t in (x, *layers))
    y, *kept = torch.ops.vfmvae.normed_linears(x, *layers, 1e-5)
    weights = [*layers[:3], *layers[4:7]]
    for asked in ((True, True), (True, False), (False, True)):
        arguments = (torch.randn_like(y), *kept, *weights, *asked)
        torch.library.opcheck(torch.ops.vfmvae.normed_linears_backward.default, arguments)
    both = torch.randn(3, 10, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.vfmvae.geglu_halves.default, (both,))
    backward = torch.randn(3, 5, device=DEVICE), both.detach()
    torch.library.opcheck(torch.ops.vfmvae.geglu_halves_backward.default, backward)


def test_halves_are_read_and_their_gradients_written_in_place(poisoned_empty: None) -> None:
    both = torch.randn(3, 7, 22, device=DEVICE, requires_grad=True)
    grad = torch.randn(3, 7, 11, device=DEVICE)
    y, expected = geglu_halves(both), ops.geglu(*both.chunk(2, dim=-1), fused=False)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(r, both, grad)[0] for r in (y, expected)))
    line = torch.randn(10, device=DEVICE, requires_grad=True)
    (found,) = torch.autograd.grad(geglu_halves(line).sum(), line)
    assert found.isfinite().all()
