"""The kernels of kernels/modulation.py against float64, on a GPU or in Triton's interpreter.

tests/ops/test_modulation.py runs this file in a process of its own, because Triton chooses the interpreter
when it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_modulation.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_kernel_close
from vfmvae import ops

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One number, one token, one channel, odd sizes, several parts of a sample and tiles of channels.
SHAPES = [(1, 1, 1), (1, 1, 8), (2, 3, 1), (3, 7, 13), (1, 70, 144), (2, 33, 64), (1, 17, 1152)]
FULL = [(4, 257, 1152), (2, 256, 768), (1, 1025, 1792), (32, 257, 1024), (2, 3, 4096)]
NAMES = ("output", "x", "shift", "scale", "weight")
Function = Callable[..., Tensor]


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """x, shift, scale, weight, branch; shift and scale are columns of one tensor of `dtype`."""
    batch, _, channels = shape
    x, branch = torch.randn(2, *shape, device=DEVICE).mul(2).add(0.5).to(dtype).unbind()
    rows = torch.randn(batch, 6 * channels, device=DEVICE).to(dtype).chunk(6, dim=1)
    return [x, rows[1], rows[2], 1 + 0.3 * torch.randn(channels, device=DEVICE), branch]


def with_gradients(
    function: Function, inputs: Sequence[Tensor | None], fused: bool | str, dtype: torch.dtype | None = None
) -> list[Tensor]:
    own = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    y = function(*own, fused=fused)
    draws = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=draws).to(inputs[0].dtype).to(DEVICE, y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in own if t is not None], grad)]


def compare(function: Function, inputs: Sequence[Tensor | None], names: Sequence[str]) -> None:
    kernel = with_gradients(function, inputs, "triton")
    eager = with_gradients(function, inputs, False)
    truth = with_gradients(function, inputs, False, torch.float64)
    batch, tokens, channels = inputs[0].shape
    for what, *results in zip(names, kernel, eager, truth, strict=True):
        terms = {"output": 0, "x": 0, "branch": 0, "weight": batch * tokens}.get(what, tokens)
        if what == "x" and channels == 1 and "scale" in names:  # of a norm of a single number
            assert results[0].abs().max() <= 1e-2
        else:
            assert_kernel_close(*results, what, terms=terms)


def compare_norm(
    shape: tuple[int, ...], dtype: torch.dtype, norm: str, shifted: bool, weighted: bool
) -> None:
    x, shift, scale, weight, _ = inputs_of(shape, dtype)
    given = [x, shift if shifted else None, scale, weight if weighted else None]
    names = [n for n, t in zip(NAMES, [x, *given], strict=True) if t is not None]
    compare(partial(ops.norm_modulate, norm=norm), given, names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_modulate(norm: str, shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    compare_norm(shape, dtype, norm, shifted=norm == "layer", weighted=norm == "rms")
    compare_norm(shape, dtype, norm, shifted=norm == "rms", weighted=norm == "layer")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_residual(shape: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    x, gate, _, _, branch = inputs_of(shape, dtype)
    compare(ops.gated_residual, [x, gate, branch], ("output", "x", "gate", "branch"))


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_full_size(shape: tuple[int, ...], poisoned_empty: None) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        compare_norm(shape, dtype, "layer", shifted=True, weighted=False)
        compare_norm(shape, dtype, "rms", shifted=False, weighted=True)
        x, gate, _, _, branch = inputs_of(shape, dtype)
        compare(ops.gated_residual, [x, gate, branch], ("output", "x", "gate", "branch"))


def test_one_tensor_may_be_shift_and_scale() -> None:
    x, shift, *_ = inputs_of((2, 3, 8), torch.float32)
    y = ops.norm_modulate(x, shift, shift, fused="triton")
    torch.testing.assert_close(y, ops.norm_modulate(x, shift, shift, fused=False))


def test_rows_of_other_dtypes_get_gradients_of_their_own(poisoned_empty: None) -> None:
    x, shift, scale, weight, branch = inputs_of((2, 5, 12), torch.float32)
    given = [x.bfloat16(), shift.bfloat16(), scale, weight.bfloat16()]
    kernel, eager = (with_gradients(ops.norm_modulate, given, fused) for fused in ("triton", False))
    given = [x, scale.bfloat16(), branch.bfloat16()]
    kernel += with_gradients(ops.gated_residual, given, "triton")
    eager += with_gradients(ops.gated_residual, given, False)
    for one, other in zip(kernel, eager, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2)


def test_large_means_are_subtracted_first() -> None:
    x, shift, scale, *_ = inputs_of((2, 5, 96), torch.float32)
    x = x * 0.1 + 1000
    y = ops.norm_modulate(x, shift, scale, fused="triton")
    exact = ops.norm_modulate(x.double(), shift.double(), scale.double(), fused=False)
    assert (y - exact).abs().max() < 2e-2  # x itself is known to 6e-5 / 0.2 of a deviation


def test_layouts_do_not_matter() -> None:
    x, shift, scale, weight, branch = inputs_of((2, 5, 16), torch.float32)
    wide = torch.zeros(2, 9, 40, device=DEVICE)
    inside = wide[:, 2:7, 3:19].copy_(x)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    expected = with_gradients(ops.norm_modulate, [x, shift, scale, weight], "triton")
    residual = with_gradients(ops.gated_residual, [x, scale, branch], "triton")
    for other in (inside, transposed):
        y = ops.norm_modulate(other, shift, scale.t().contiguous().t(), weight, fused="triton")
        assert torch.equal(y, expected[0])
        assert torch.equal(ops.gated_residual(other, scale, branch, fused="triton"), residual[0])
        y = ops.gated_residual(x, scale, other, fused="triton")
        torch.testing.assert_close(y, ops.gated_residual(x, scale, x, fused=False))
    for function, given in ((ops.norm_modulate, (x, shift, scale)), (ops.gated_residual, (x, scale, branch))):
        own = [t.detach().requires_grad_() for t in given]
        sums = (function(*own, fused=fused).sum() for fused in ("triton", False))  # gradients of stride 0
        for one, other in zip(*(torch.autograd.grad(s, own) for s in sums), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_do_not_change_from_run_to_run() -> None:
    x, shift, scale, weight, branch = inputs_of((2, 70, 40), torch.bfloat16)
    for function, given in (
        (ops.norm_modulate, (x, shift, scale, weight)),
        (ops.gated_residual, (x, scale, branch)),
    ):
        runs = [with_gradients(function, given, "triton") for _ in range(3)]
        for one in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(one, runs[0], strict=True))


@pytest.mark.parametrize("name", ["norm_modulate", "gated_residual"])
def test_only_what_is_asked_for_is_computed(name: str, poisoned_empty: None) -> None:
    x, shift, scale, weight, branch = inputs_of((2, 19, 16), torch.float32)
    given = [x, shift, scale, weight] if name == "norm_modulate" else [x, scale, branch]
    function = partial(getattr(ops, name), fused="triton")
    own = [t.detach().requires_grad_() for t in given]
    expected = torch.autograd.grad(function(*own).square().sum(), own)
    for wanted in range(1, 1 << len(own)):
        chosen = [bool(wanted >> i & 1) for i in range(len(own))]
        part = [t.detach().requires_grad_(c) for t, c in zip(given, chosen, strict=True)]
        function(*part).square().sum().backward()
        for t, exact, c in zip(part, expected, chosen, strict=True):
            assert torch.equal(t.grad, exact) if c else t.grad is None


def test_weights_have_no_gradient_where_only_inputs_do() -> None:
    own = [t.requires_grad_() for t in inputs_of((2, 3, 8), torch.float32)[:4]]
    own[1], own[2] = (t.detach().requires_grad_() for t in own[1:3])
    y = ops.norm_modulate(*own, fused="triton")
    with ops.input_gradients_only():
        found = torch.autograd.grad(y.sum(), own, allow_unused=True)
    assert found[3] is None and all(g is not None for g in found[:3])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_values_that_are_not_finite_stay_in_their_token(norm: str, value: float) -> None:
    x, shift, scale, _, branch = inputs_of((2, 5, 12), torch.float32)
    x[1, 2, 3] = value
    y = ops.norm_modulate(x, shift, scale, norm=norm, fused="triton")
    assert y[1, 2, 3].isnan() and (norm == "rms" and value > 0 or y[1, 2].isnan().all())
    y[1, 2] = 0
    assert y.isfinite().all()
    y = ops.gated_residual(x, scale, branch, fused="triton")
    assert not y[1, 2, 3].isfinite() and y.isfinite().sum() == y.numel() - 1


def test_not_a_number_in_a_gradient_reaches_the_sums() -> None:
    own = [t.detach().requires_grad_() for t in inputs_of((2, 5, 12), torch.float32)]
    grad = torch.ones(2, 5, 12, device=DEVICE)
    grad[1, 2, 3] = float("nan")
    y = ops.norm_modulate(*own[:4], fused="triton")
    _, of_shift, of_scale, of_weight = torch.autograd.grad(y, own[:4], grad)
    y = ops.gated_residual(own[0], own[2], own[4], fused="triton")
    (of_gate,) = torch.autograd.grad(y, own[2], grad)
    for rows in (of_shift, of_scale, of_gate):
        assert rows[1, 3].isnan() and rows.isnan().sum() == 1
    assert of_weight[3].isnan() and of_weight.isnan().sum() == 1


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)], ids=str)
def test_empty_batches(shape: tuple[int, ...]) -> None:
    x, shift, scale, weight, branch = inputs_of(shape, torch.float32)
    for function, given in (
        (ops.norm_modulate, (x, shift, scale, weight)),
        (ops.gated_residual, (x, scale, branch)),
    ):
        y, *found = with_gradients(function, given, "triton")
        assert y.shape == shape and all(not g.any() for g in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(dtype: torch.dtype) -> None:
    x, shift, scale, weight, branch = inputs_of((2, 5, 12), dtype)
    for function, given in (
        (ops.norm_modulate, (x, shift, scale, weight)),
        (ops.gated_residual, (x, scale, branch)),
    ):
        expected = with_gradients(function, given, "triton")
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found = with_gradients(function, given, "triton")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_registered_operations() -> None:
    x, shift, scale, weight, branch = (t.detach().clone() for t in inputs_of((2, 5, 8), torch.float32))
    own = [t.clone().requires_grad_() for t in (x, shift, scale, weight, branch)]
    norm = torch.ops.vfmvae.norm_modulate.default
    torch.library.opcheck(norm, (*own[:4], True, 1e-6, x.dtype))
    torch.library.opcheck(norm, (own[0], None, own[2], None, False, 1e-6, x.dtype))
    backward = torch.ops.vfmvae.norm_modulate_backward.default
    table = torch.rand(2, 2, 5, device=DEVICE)
    for asked in ((True, True, True, True), (False, False, True, False), (True, False, False, False)):
        given = (torch.randn_like(x), x, scale, weight, table, *asked, torch.float32)
        torch.library.opcheck(backward, given)
    torch.library.opcheck(torch.ops.vfmvae.gated_residual.default, (own[0], own[2], own[4]))
    for asked in ((True, True), (True, False), (False, True)):
        given = (torch.randn_like(x), scale, branch, *asked)
        torch.library.opcheck(torch.ops.vfmvae.gated_residual_backward.default, given)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_float32_tokens_give_16_bit_results_and_gradients_of_both(norm: str, poisoned_empty: None) -> None:
    x, shift, scale, weight, _ = inputs_of((2, 5, 12), torch.float32)
    given = [x, shift.bfloat16(), scale.bfloat16(), weight]
    op = partial(ops.norm_modulate, norm=norm, dtype=torch.bfloat16)
    kernel, eager = (with_gradients(op, given, fused) for fused in ("triton", False))
    for one, other in zip(kernel, eager, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2)
