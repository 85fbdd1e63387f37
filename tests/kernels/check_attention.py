"""The kernels of kernels/attention.py against float64, on a GPU or in Triton's interpreter.

tests/ops/test_attention_triton.py runs this file in a process of its own, because Triton chooses the
interpreter when it is first imported. By hand:
TRITON_INTERPRET=1 python -m pytest tests/kernels/check_attention.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.helpers import RELATIVE_LIMITS, assert_kernel_close, bfloat16_products_in_the_interpreter
from vfmvae import ops

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# [B, heads, N, d]: one token, odd lengths, more than one tile, heads that fill no power of two.
SHAPES = [(1, 1, 1, 16), (2, 3, 9, 32), (1, 2, 130, 40), (1, 1, 65, 128), (2, 2, 64, 5)]
# Encoder, fusion (mean), decoder (null key) and the discriminator's backbone at full size, and an odd one.
FULL = [
    (2, 16, 1024, 64),
    (2, 12, 256, 64),
    (1, 8, 1024, 64),
    (3, 6, 197, 64),
    (2, 16, 256, 32),
    (1, 3, 777, 96),
]


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    with nullcontext() if ON_GPU else bfloat16_products_in_the_interpreter():
        yield


def attention_inputs(shape: tuple[int, ...], dtype: torch.dtype, null: bool) -> list[Tensor]:
    """query, key and value as views of one matrix product's result; null key and value in float32."""
    batch, heads, length, width = shape
    qkv = torch.randn(batch, length, 3, heads, width, device=DEVICE).to(dtype)
    tensors = [*qkv.permute(2, 0, 3, 1, 4)]
    if null:
        tensors += torch.randn(2, heads, width, device=DEVICE).unbind()
    return tensors


def run(
    inputs: list[Tensor], head_mean: bool, grad: Tensor, fused: bool | str, to: torch.dtype | None = None
) -> list[Tensor]:
    own = [t.detach().to(to or t.dtype).requires_grad_() for t in inputs]
    out = ops.attention(*own, head_mean=head_mean, fused=fused)
    return [out.detach(), *torch.autograd.grad(out, own, grad.to(out.dtype))]


def compare(shape: tuple[int, ...], dtype: torch.dtype, null: bool, head_mean: bool) -> None:
    batch, heads, length, width = shape
    inputs = attention_inputs(shape, dtype, null)
    size = (batch, length, width) if head_mean else (batch, heads, length, width)
    grad = torch.randn(size, device=DEVICE).to(dtype)
    kernel = run(inputs, head_mean, grad, "triton")
    eager = run(inputs, head_mean, grad, False)
    truth = run(inputs, head_mean, grad, False, torch.float64)
    names = ("output", "query", "key", "value", "null key", "null value")
    for what, *results in zip(names, kernel, eager, truth, strict=False):
        if what in ("query", "key") and length == 1 and not null:
            continue  # of a softmax over one key: nothing but rounding
        if what.startswith("null"):  # float32, but no more exact than the numbers that it is computed from
            assert {t.dtype for t in results[:2]} == {torch.float32}
            results = [*(t.to(dtype) for t in results[:2]), results[2]]
            # Of each query one number, whose own logit is a sum of `width` products.
            assert_kernel_close(*results, what, terms=batch * length * width)
        elif what == "output" or dtype != torch.float32:
            assert_kernel_close(*results, what)
        else:  # differences of numbers some times larger, and added up in another order than eager's
            error = (results[0].double() - results[2]).norm() / results[2].norm()
            assert error <= RELATIVE_LIMITS[dtype], f"{what}: relative error {error:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_mean", [False, True], ids=["each", "mean"])
@pytest.mark.parametrize("null", [False, True], ids=["plain", "null"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients(
    shape: tuple[int, ...], null: bool, head_mean: bool, dtype: torch.dtype, poisoned_empty: None
) -> None:
    compare(shape, dtype, null, head_mean)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("head_mean", [False, True], ids=["each", "mean"])
@pytest.mark.parametrize("null", [False, True], ids=["plain", "null"])
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_full_sizes(
    shape: tuple[int, ...], null: bool, head_mean: bool, dtype: torch.dtype, poisoned_empty: None
) -> None:
    compare(shape, dtype, null, head_mean)


@pytest.mark.parametrize("head_mean", [False, True])
def test_repeated_runs_give_the_same_bits(head_mean: bool) -> None:
    shape = (2, 8, 300, 64) if ON_GPU else (1, 2, 70, 16)
    inputs = attention_inputs(shape, torch.float16, null=True)
    grad = torch.randn(shape[:1] + shape[2:] if head_mean else shape, device=DEVICE).half()
    one, two = (run(inputs, head_mean, grad, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_layouts_do_not_matter() -> None:
    shape = (2, 3, 17, 16)
    inputs = attention_inputs(shape, torch.float32, null=True)
    grad = torch.randn(shape, device=DEVICE)
    expected = run(inputs, False, grad, "triton")
    other = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in inputs]  # d is not dense
    for tensors, g in ((other, grad), (inputs, grad.transpose(1, 2).contiguous().transpose(1, 2))):
        found = run(tensors, False, g, "triton")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for head_mean in (False, True):  # a gradient of stride 0
        own = [t.detach().requires_grad_() for t in inputs]
        totals = [ops.attention(*own, head_mean=head_mean, fused=fused).sum() for fused in ("triton", False)]
        for one, two in zip(*(torch.autograd.grad(t, own) for t in totals), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_the_result_of_a_token_lies_together() -> None:
    out = ops.attention(*attention_inputs((2, 3, 5, 16), torch.float16, null=False), fused="triton")
    assert out.transpose(1, 2).is_contiguous()


def test_without_gradients_the_result_is_the_same() -> None:
    inputs = attention_inputs((1, 2, 20, 16), torch.float32, null=True)
    for head_mean in (False, True):
        own = [t.detach().requires_grad_() for t in inputs]
        kept = ops.attention(*own, head_mean=head_mean, fused="triton")
        with torch.no_grad():
            assert torch.equal(ops.attention(*own, head_mean=head_mean, fused="triton"), kept)


def test_gradients_of_inputs_alone() -> None:
    inputs = [t.detach().requires_grad_() for t in attention_inputs((2, 2, 9, 16), torch.float32, null=True)]
    out = ops.attention(*inputs, fused="triton").square().sum()
    expected = torch.autograd.grad(out, inputs[:3], retain_graph=True)
    with ops.input_gradients_only():
        found = torch.autograd.grad(out, inputs[:3], retain_graph=True)
        (none,) = torch.autograd.grad(out, inputs[3], allow_unused=True)
    assert none is None and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("head_mean", [False, True])
def test_what_is_not_finite_spreads_as_in_the_reference(which: str, value: float, head_mean: bool) -> None:
    inputs = [t.clone() for t in attention_inputs((2, 2, 70, 16), torch.float32, null=True)]
    inputs[("query", "key", "value").index(which)][1, 1, 66, 3] = value
    grad = torch.randn(2, 70, 16) if head_mean else torch.randn(2, 2, 70, 16)
    found, expected = (run(inputs, head_mean, grad.to(DEVICE), fused) for fused in ("triton", False))
    for name, one, two in zip(("output", "query", "key", "value"), found, expected, strict=False):
        assert torch.equal(one.isfinite(), two.isfinite()), name
        finite = two.isfinite()
        torch.testing.assert_close(one[finite], two[finite], rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    inputs = attention_inputs((1, 2, 40, 16), torch.float32, null=True)
    inputs = [100 * t if i in (0, 1, 3) else t for i, t in enumerate(inputs)]
    grad = torch.randn(1, 2, 40, 16, device=DEVICE)
    found, truth = run(inputs, False, grad, "triton"), run(inputs, False, grad, False, torch.float64)
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-2, atol=1e-2)
    assert all(t.isfinite().all() for t in found)


def test_an_empty_batch() -> None:
    inputs = [t.detach().requires_grad_() for t in attention_inputs((0, 2, 4, 16), torch.float32, null=True)]
    for head_mean in (False, True):
        out = ops.attention(*inputs, head_mean=head_mean, fused="triton")
        assert out.shape == ((0, 4, 16) if head_mean else (0, 2, 4, 16))
        assert all(not g.any() for g in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("head_mean", [False, True])
@pytest.mark.parametrize("null", [False, True])
def test_registered_operation(null: bool, head_mean: bool) -> None:
    inputs = [t.detach().requires_grad_() for t in attention_inputs((2, 3, 5, 16), torch.float32, null)]
    given = [*inputs, *([] if null else [None, None])]
    operation = torch.ops.vfmvae.attention.default
    torch.library.opcheck(operation, (*given, head_mean, True))
    own = [None if t is None else t.detach() for t in given]
    torch.library.opcheck(operation, (*own, head_mean, False))
    out, sums, each = operation(*own, head_mean, True)
    kept = (each if head_mean else out, sums)
    backward = (torch.randn_like(out), *own, *kept, head_mean)
    for of_null in {False, null}:
        torch.library.opcheck(torch.ops.vfmvae.attention_backward.default, (*backward, of_null))
