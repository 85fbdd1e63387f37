"""The kernels of kernels/qk_norm_rope.py against float64, on a GPU or in Triton's interpreter.

tests/ops/test_qk_norm_rope.py runs this file in a process of its own, because Triton chooses the interpreter
when it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_qk_norm_rope.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_kernel_close
from vfmvae import ops

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("query", "key", "value", "qkv", "query weight", "query bias", "key weight", "key bias")


class Case(NamedTuple):
    """Batch, tokens, heads and their width; the norms' kinds, "" for none, "+" behind one with a bias."""

    batch: int
    tokens: int
    heads: int
    width: int
    query: str
    key: str
    rotated: bool


CASES = [
    Case(1, 1, 1, 2, "rms", "layer+", True),  # one token, one pair
    Case(2, 5, 3, 6, "layer+", "layer+", True),
    Case(1, 3, 2, 5, "rms+", "layer", False),  # an odd width
    Case(2, 33, 2, 64, "layer+", "rms", True),  # two tiles of tokens
    Case(1, 17, 2, 72, "rms", "rms", True),  # a width that is no power of two
    Case(1, 17, 3, 8, "", "", True),
    Case(2, 7, 2, 12, "layer", "", False),
    Case(2, 7, 2, 12, "", "rms", True),
]
FULL = [
    Case(4, 257, 16, 72, "layer+", "layer+", True),
    Case(32, 257, 16, 72, "rms", "rms", True),
    Case(2, 1024, 12, 64, "rms", "rms", False),
    Case(2, 256, 14, 128, "", "", True),
]


class Inputs(NamedTuple):
    qkv: Tensor
    affine: list[Tensor | None]
    """Weight and bias of the queries, then of the keys."""
    rotation: tuple[Tensor, Tensor] | None


def inputs_of(case: Case, dtype: torch.dtype) -> Inputs:
    shape = (case.batch, case.tokens, 3 * case.heads * case.width)
    qkv = torch.randn(shape, device=DEVICE).mul(2).add(0.5).to(dtype)
    affine: list[Tensor | None] = []
    for kind in (case.query, case.key):
        affine.append(1 + 0.3 * torch.randn(case.width, device=DEVICE) if kind else None)
        affine.append(torch.randn(case.width, device=DEVICE) if kind.endswith("+") else None)
    if not case.rotated:
        return Inputs(qkv, affine, None)
    angles = torch.randn(case.tokens, case.width // 2, device=DEVICE).repeat_interleave(2, dim=1)
    angles[0] = 0  # a class token
    return Inputs(qkv, affine, (angles.cos(), angles.sin()))


def run(
    case: Case, qkv: Tensor, affine: Sequence[Tensor | None], rotation: object, fused: bool | str
) -> tuple[Tensor, ...]:
    norms = [
        ops.QKNorm(*affine[i : i + 2], 1e-6, kind.rstrip("+")) if kind else None
        for i, kind in ((0, case.query), (2, case.key))
    ]
    return ops.qk_norm_rope(qkv, case.heads, *norms, rotation, fused=fused)


def with_gradients(
    case: Case, inputs: Inputs, fused: bool | str, dtype: torch.dtype | None = None
) -> list[Tensor]:
    own = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
        for t in (inputs.qkv, *inputs.affine)
    ]
    results = run(case, own[0], own[1:], inputs.rotation, fused)
    draws = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=draws).to(inputs.qkv.dtype).to(DEVICE, r.dtype) for r in results]
    found = torch.autograd.grad(results, [t for t in own if t is not None], grads)
    return [*(r.detach() for r in results), *found]


def compare(case: Case, dtype: torch.dtype) -> None:
    inputs = inputs_of(case, dtype)
    kernel, eager = (with_gradients(case, inputs, fused) for fused in ("triton", False))
    truth = with_gradients(case, inputs, False, torch.float64)
    there = [True] * 4 + [t is not None for t in inputs.affine]
    names = [n for n, is_there in zip(NAMES, there, strict=True) if is_there]
    for what, *results in zip(names, kernel, eager, truth, strict=True):
        sums = what.endswith(("weight", "bias"))
        assert_kernel_close(*results, what, terms=case.batch * case.tokens * case.heads if sums else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients(case: Case, dtype: torch.dtype, poisoned_empty: None) -> None:
    compare(case, dtype)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("case", FULL, ids=str)
def test_full_size(case: Case, poisoned_empty: None) -> None:
    compare(case, torch.bfloat16)
    compare(case, torch.float32)


BOTH = Case(2, 5, 3, 6, "layer+", "rms+", True)


def test_the_value_is_a_view() -> None:
    inputs = inputs_of(BOTH, torch.float32)
    value = run(BOTH, *inputs, "triton")[2]
    assert value.untyped_storage().data_ptr() == inputs.qkv.untyped_storage().data_ptr()


def test_layouts_of_the_projection_and_of_gradients_do_not_matter() -> None:
    inputs = inputs_of(BOTH, torch.float32)
    expected = with_gradients(BOTH, inputs, "triton")
    wide = torch.zeros(2, 8, 70, device=DEVICE)
    for other in (
        wide[:, 2:7, 3:57].copy_(inputs.qkv),
        inputs.qkv.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        found = with_gradients(BOTH, inputs._replace(qkv=other), "triton")
        for one, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(one, exact)
    # As attention gives them: [B, N, heads, d] in memory, and expanded.
    for convert in (
        lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
        lambda g: g[..., :1].expand(g.shape),
    ):
        found = []
        for fused in ("triton", False):
            qkv = inputs.qkv.clone().requires_grad_()
            results = run(BOTH, qkv, inputs.affine, inputs.rotation, fused)
            grads = [
                convert(torch.randn(r.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE))
                for r in results
            ]
            found.append(torch.autograd.grad(results, qkv, grads)[0])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_weights_of_bfloat16_beside_float32(poisoned_empty: None) -> None:
    inputs = inputs_of(BOTH, torch.float32)
    inputs = inputs._replace(affine=[t.bfloat16() for t in inputs.affine])
    kernel, eager = (with_gradients(BOTH, inputs, fused) for fused in ("triton", False))
    for one, other in zip(kernel, eager, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_only_what_is_asked_for_is_computed(poisoned_empty: None) -> None:
    inputs = inputs_of(BOTH, torch.float32)
    given = [inputs.qkv, *inputs.affine]
    own = [t.clone().requires_grad_() for t in given]
    total = sum(r.square().sum() for r in run(BOTH, own[0], own[1:], inputs.rotation, "triton"))
    expected = torch.autograd.grad(total, own)
    for wanted in range(1, 1 << 5):
        chosen = [bool(wanted >> i & 1) for i in range(5)]
        part = [t.clone().requires_grad_(c) for t, c in zip(given, chosen, strict=True)]
        results = run(BOTH, part[0], part[1:], inputs.rotation, "triton")
        sum(r.square().sum() for r in results).backward()
        for t, exact, c in zip(part, expected, chosen, strict=True):
            assert torch.equal(t.grad, exact) if c else t.grad is None
    with ops.input_gradients_only():
        total = sum(r.square().sum() for r in run(BOTH, own[0], own[1:], inputs.rotation, "triton"))
        found = torch.autograd.grad(total, own, allow_unused=True)
    assert torch.equal(found[0], expected[0]) and found[1:] == (None,) * 4


def test_one_result_alone_has_a_gradient() -> None:
    inputs = inputs_of(BOTH, torch.float32)
    for which in range(3):
        found = []
        for fused in ("triton", False):
            qkv = inputs.qkv.clone().requires_grad_()
            result = run(BOTH, qkv, inputs.affine, inputs.rotation, fused)[which]
            found.append(torch.autograd.grad(result.square().sum(), qkv)[0])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_gradients_do_not_change_from_run_to_run() -> None:
    inputs = inputs_of(BOTH, torch.bfloat16)
    runs = [with_gradients(BOTH, inputs, "triton") for _ in range(3)]
    for one in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, runs[0], strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_in_their_head(value: float) -> None:
    qkv, affine, rotation = inputs_of(BOTH, torch.float32)
    qkv.view(2, 5, 3, 3, 6)[1, 2, 0, 1, 4] = value
    query, key, _ = run(BOTH, qkv, affine, rotation, "triton")
    assert query[1, 1, 2].isnan().all() and key.isfinite().all()
    query[1, 1, 2] = 0
    assert query.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_empty_batches(shape: tuple[int, int]) -> None:
    case = BOTH._replace(batch=shape[0], tokens=shape[1], rotated=False)
    query, key, value, *found = with_gradients(case, inputs_of(case, torch.float32), "triton")
    assert query.shape == key.shape == value.shape == (shape[0], 3, shape[1], 6)
    assert all(not g.any() for g in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(dtype: torch.dtype) -> None:
    inputs = inputs_of(BOTH, dtype)
    expected = with_gradients(BOTH, inputs, "triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = with_gradients(BOTH, inputs, "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_registered_operations() -> None:
    qkv, affine, (cos, sin) = inputs_of(BOTH, torch.float32)
    own = [t.clone().requires_grad_() for t in (qkv, *affine)]
    norms = ("layer", "rms", 1e-6, 1e-6)
    operation = torch.ops.vfmvae.qk_norm_rope.default
    torch.library.opcheck(operation, (own[0], 3, *own[1:], cos, sin, *norms))
    torch.library.opcheck(operation, (own[0], 3, *(None,) * 6, "", "", 0.0, 0.0))
    grads = [torch.randn(2, 3, 5, 6, device=DEVICE) for _ in range(3)]
    backward = torch.ops.vfmvae.qk_norm_rope_backward.default
    for of_qkv, of_weights in ((True, [True] * 4), (True, [False] * 4)):
        given = (*grads, qkv, affine[0], affine[2], cos, sin, *norms, of_qkv, of_weights)
        torch.library.opcheck(backward, given)


def test_compiled() -> None:
    """By the registered operation, whose value is no view."""
    inputs = inputs_of(BOTH, torch.float32)
    expected = with_gradients(BOTH, inputs, "triton")
    own = [t.clone().requires_grad_() for t in (inputs.qkv, *inputs.affine)]
    compiled = torch.compile(
        lambda *t: run(BOTH, t[0], t[1:], inputs.rotation, "triton"), backend="aot_eager"
    )
    results = compiled(*own)
    draws = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=draws).to(DEVICE) for r in results]
    found = [*results, *torch.autograd.grad(results, own, grads)]
    for one, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(one, exact)
