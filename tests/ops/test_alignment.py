"""vf_alignment_loss: the formula, the form by blocks and its memory, what the kernels need;
check_alignment.py holds the kernels' numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from tests.helpers import (
    DEVICES,
    Resources,
    assert_kernel_close,
    compile_triton_for_hopper,
    run_python,
)
from vfmvae import ops
from vfmvae.ops import alignment, alignment_gemm, native

CHECKS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_alignment.py")


def test_loss_is_the_formula_over_all_pairs() -> None:
    b, a = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double()
    distance = cosine = 0.0
    for n in range(2):
        for i in range(3):
            cosine += max(0.0, 1 - 0.2 - F.cosine_similarity(a[n, i], b[n, i], dim=0).item()) / 6
            for j in range(3):
                own = F.cosine_similarity(b[n, i], b[n, j], dim=0)
                other = F.cosine_similarity(a[n, i], a[n, j], dim=0)
                distance += max(0.0, (own - other).abs().item() - 0.1) / 18
    for fused in (True, False, "gemm"):
        loss = ops.vf_alignment_loss(b, a, 0.1, 0.2, 2.0, 0.5, fused=fused)
        assert loss.item() == pytest.approx(2.0 * distance + 0.5 * cosine, abs=1e-12)


def test_loss_is_zero_for_scaled_copies_and_does_not_see_length() -> None:
    a = torch.randn(2, 4, 6).double()
    assert ops.vf_alignment_loss(3 * a, a).item() == pytest.approx(0.0, abs=1e-12)


def test_half_precision_is_computed_in_float32() -> None:
    a = torch.randn(1, 4, 6)
    for fused in (True, False):
        assert ops.vf_alignment_loss(a.bfloat16(), a, fused=fused).dtype == torch.float32


def test_shapes_must_match() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        ops.vf_alignment_loss(torch.randn(1, 4, 6), torch.randn(1, 4, 5))
    with pytest.raises(ValueError, match=r"needed is \[B, N, D\]"):
        ops.vf_alignment_loss(torch.randn(4, 6), torch.randn(4, 6))
    with pytest.raises(ValueError, match="prediction is on cpu, target on meta"):
        ops.vf_alignment_loss(torch.randn(1, 4, 6), torch.randn(1, 4, 6, device="meta"))


# One position; one block; blocks that do not divide; several samples in a part and several parts.
SHAPES = [(1, 1, 8), (2, 5, 3), (1, 130, 40), (3, 300, 16), (70, 33, 5)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_give_loss_and_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, poisoned_empty: None
) -> None:
    p = torch.randn(shape)
    p, t = (x.to(device, dtype) for x in (p, p + torch.randn(shape)))
    found = []
    for fused, to in (("gemm", dtype), (False, dtype), (False, torch.float64)):
        own = p.detach().to(to, copy=True).requires_grad_()
        loss = ops.vf_alignment_loss(own, t.to(to), 0.1037, 0.3, 3.0, 0.5, fused=fused)
        found.append((loss.detach(), torch.autograd.grad(loss, own, torch.full_like(loss, 1.7))[0]))
    terms = shape[0] * shape[1] ** 2
    for what, *results in zip(("loss", "gradient"), *found, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(results[0], results[2])
        else:
            assert_kernel_close(*results, what, terms=terms)


def test_the_samples_of_a_part_and_the_rows_of_a_block() -> None:
    for count in (1, 64, 128, 129, 256, 1000, 1024, 4096, 5000, 1 << 21):
        samples, rows = alignment_gemm.blocks(count)
        assert samples >= 1 and 1 <= rows <= count
        assert samples * rows * count <= max(alignment_gemm.ELEMENTS, count)


@pytest.mark.parametrize("margins", [(0.0, 0.0), (0.13, 0.4), (3.0, 2.0)])
def test_gradient_by_finite_differences(margins: tuple[float, float]) -> None:
    p, t = torch.randn(2, 5, 3).double().requires_grad_(), torch.randn(2, 5, 3).double()
    assert torch.autograd.gradcheck(lambda x: ops.vf_alignment_loss(x, t, *margins, fused="gemm"), p)
    if margins[0] > 2:  # nothing is that far apart
        assert not torch.autograd.grad(ops.vf_alignment_loss(p, t, *margins, fused="gemm"), p)[0].any()


def test_rows_without_length() -> None:
    p, t = torch.randn(1, 6, 4).double(), torch.randn(1, 6, 4).double()
    p[0, 1], p[0, 2], t[0, 3] = 0.0, p[0, 2] * 1e-14, 0.0
    found = []
    for fused in ("gemm", False):
        own = p.clone().requires_grad_()
        loss = ops.vf_alignment_loss(own, t, 0.1, 0.2, fused=fused)
        found.append((loss, torch.autograd.grad(loss, own)[0]))
    torch.testing.assert_close(*found)


def test_a_backward_may_be_called_again_but_not_differentiated() -> None:
    p, t = torch.randn(1, 9, 4, requires_grad=True), torch.randn(1, 9, 4)
    loss = ops.vf_alignment_loss(p, t, 0.1, 0.2, fused="gemm")
    first, second = (torch.autograd.grad(loss, p, retain_graph=True)[0] for _ in range(2))
    (doubled,) = torch.autograd.grad(2 * loss, p, retain_graph=True)
    assert torch.equal(first, second) and torch.equal(doubled, 2 * first)
    (gradient,) = torch.autograd.grad(loss * loss, p, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("of_target", [False, True])
def test_values_that_are_not_finite_reach_the_loss(value: float, of_target: bool) -> None:
    p, t = torch.randn(2, 150, 8), torch.randn(2, 150, 8)
    (t if of_target else p)[1, 140, 3] = value
    p.requires_grad_()
    loss = ops.vf_alignment_loss(p, t, 0.1, 0.5, fused="gemm")
    (gradient,) = torch.autograd.grad(loss, p)
    assert loss.isnan() and gradient[0].isfinite().all() and not gradient[1].isfinite().all()


def test_without_a_gradient_none_is_computed() -> None:
    p, t = torch.randn(1, 300, 64, requires_grad=True), torch.randn(1, 300, 64)
    expected = ops.vf_alignment_loss(p, t, 0.1, fused="gemm")
    with torch.no_grad():
        alone = ops.vf_alignment_loss(p, t, 0.1, fused="gemm")
    assert torch.equal(alone, expected.detach()) and not alone.requires_grad
    arguments = (p, t, 0.1, 0.0, 1.0, 1.0)
    assert torch.ops.vfmvae.vf_alignment_gemm(*arguments, False)[1].shape == (0,)


def test_registered_operation() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        p, t = torch.randn(2, 9, 4).to(dtype), torch.randn(2, 9, 4)
        numbers = (0.1, 0.5, 1.0, 1.0)
        operation = torch.ops.vfmvae.vf_alignment_gemm.default
        torch.library.opcheck(operation, (p.requires_grad_(), t, *numbers, True))
        torch.library.opcheck(operation, (p.detach(), t, *numbers, False))
        backward = torch.ops.vfmvae.vf_alignment_backward.default
        torch.library.opcheck(backward, (torch.tensor(2.0), torch.randn(2, 9, 4), dtype))


def peak_bytes(count: int, fused: bool | str) -> int:
    """The most memory that loss and gradient hold at a time, beside the inputs: of every allocation."""
    p, t = torch.randn(1, count, 1024, requires_grad=True), torch.randn(1, count, 1024)
    ops.vf_alignment_loss(p[:, :2], t[:, :2]).backward()  # what a first call sets up
    p.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        ops.vf_alignment_loss(p, t, 0.25, 0.5, fused=fused).backward()
    results: Any = record.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert held == 4 * p.numel(), "what is left is the gradient"
    return most


def test_memory_at_4096_tokens_is_less_than_a_quarter_of_the_dense_forms() -> None:
    assert peak_bytes(4096, "gemm") < peak_bytes(4096, False) / 4


def test_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    one, two = peak_bytes(2048, True), peak_bytes(4096, True)
    assert two < 2.1 * one


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "fused"), [(torch.bfloat16, "triton"), (torch.float32, "gemm")])
def test_memory_on_a_gpu(dtype: torch.dtype, fused: str) -> None:
    p, t = (torch.randn(1, 4096, 1024, device="cuda", dtype=dtype) for _ in range(2))
    p.requires_grad_()
    peaks = []
    for form in (fused, False):
        ops.vf_alignment_loss(p, t, 0.25, 0.5, fused=form).backward()
        p.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.vf_alignment_loss(p, t, 0.25, 0.5, fused=form).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        p.grad = None
    assert peaks[0] < peaks[1] / 4, peaks


@pytest.mark.gpu
@pytest.mark.parametrize("fused", ["triton", "gemm"])
def test_the_step_does_not_wait_for_the_gpu(fused: str) -> None:
    p, t = (torch.randn(2, 64, 64, device="cuda") for _ in range(2))
    p.requires_grad_()
    ops.vf_alignment_loss(p, t, 0.25, 0.5, fused=fused).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.vf_alignment_loss(p, t, 0.25, 0.5, fused=fused).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python(*CHECKS, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


# Not marked gpu: benchmarks/gpu_suite.py runs the checks themselves.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu() -> None:
    run_python(*CHECKS)


def compile_kernel(
    kernel: Any, element: str, width: int, warps: int, stages: int, **constants: Any
) -> Resources:
    from vfmvae.kernels import alignment as kernels

    dtype = torch.float32 if element == "fp32" else torch.bfloat16
    size = kernels.tile(dtype)
    blocks = {"signs_desc": f"{size.side}, {size.depth}", "unit_desc": f"1, {size.depth}, {size.side}"}
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_desc"):
            signature[name] = f"tensordesc<{element}[{blocks.get(name, f'1, {size.side}, {size.depth}')}]>"
        elif name.endswith("_ptr"):
            own = name in ("b_ptr", "a_ptr", "unit_ptr", "signs_ptr")
            signature[name] = f"*{element}" if own else "*fp32"
        elif not name.isupper():
            number = name in ("margin", "distance_factor", "cosine_factor")
            signature[name] = "fp32" if number else "i32"
    constants |= {"D": width, "T": size.side, "BK": size.depth, "PRECISION": kernels.precision(dtype)}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return compile_triton_for_hopper(kernel, signature, constants, warps, stages)


@pytest.mark.parametrize("element", ["bf16", "fp32"])
@pytest.mark.parametrize("width", [1024, 1152, 64])
def test_kernels_compile_for_hopper_without_spills(width: int, element: str) -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels import alignment as kernels

    size = kernels.FLOAT32 if element == "fp32" else kernels.HALF
    by_rows = kernels.row_block(width)
    warps = by_rows.pop("num_warps")
    products = (size.warps, size.stages)
    for kernel, launch, constants, registers in (
        (kernels._similarity_kernel, products, {"OF_GRADIENT": True}, 224),
        (kernels._similarity_kernel, products, {"OF_GRADIENT": False}, 224),
        (kernels._gradient_kernel, products, {}, 128),
        (kernels._lengths_kernel, (warps, 3), {"OF_GRADIENT": True, **by_rows}, 96),
        (kernels._finish_kernel, (warps, 3), by_rows, 96),
    ):
        resources = compile_kernel(kernel, element, width, *launch, **constants)
        assert resources.spilled == 0 and resources.registers <= registers, resources
        assert resources.shared <= alignment.SHARED_BYTES, resources


def refusal(p: Tensor, t: Tensor, fused: str = "triton", margin: float = 0.0) -> str:
    with pytest.raises(ValueError, match="cannot be used here") as error:
        ops.vf_alignment_loss(p, t, margin, fused=fused)
    return str(error.value)


def test_what_it_refuses_is_said() -> None:
    x = torch.ones(1, 4, 8)
    assert "not torch.float64" in refusal(x.double(), x.double())
    assert "not torch.float64" in refusal(x, x.double())
    assert "multiples of 8 features of torch.bfloat16, not 12" in refusal(
        *[torch.ones(1, 4, 12).bfloat16()] * 2
    )
    assert "multiples of 4 features of torch.float32, not 6" in refusal(*[torch.ones(1, 4, 6)] * 2)
    assert "4096 features at most, not 4104" in refusal(*[torch.ones(1, 1, 4104)] * 2)
    for fused in ("triton", "gemm"):
        assert "no gradient of the target" in refusal(x, torch.ones(1, 4, 8, requires_grad=True), fused)
        assert "negative distance margin, and this is -0.5" in refusal(x, x, fused, -0.5)
        assert "no empty tensors, and the shape is [0, 4, 8]" in refusal(x[:0], x[:0], fused)
        assert "not torch.int64" in refusal(x.long(), x, fused)


def test_what_the_fused_forms_refuse_the_reference_computes() -> None:
    p, t = torch.randn(1, 4, 8), torch.randn(1, 4, 8, requires_grad=True)
    ops.vf_alignment_loss(p, t).backward()
    assert t.grad is not None and t.grad.any()
    with torch.no_grad():
        assert ops.vf_alignment_loss(p, t, -0.5) > ops.vf_alignment_loss(p, t)


def test_float32_is_taken_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device would do."""
    monkeypatch.setattr(native, "why_no_triton", lambda x: None)
    by_name = {i.name: i.run for i in alignment._VF_ALIGNMENT.implementations}
    for dtype, first in ((torch.float32, "gemm"), (torch.bfloat16, "triton"), (torch.float16, "triton")):
        arguments = (torch.ones(1, 4, 8, dtype=dtype), torch.ones(1, 4, 8, dtype=dtype), 0.0, 0.0, 1.0, 1.0)
        assert alignment._VF_ALIGNMENT.choose(True, *arguments) == by_name[first]
        assert alignment._VF_ALIGNMENT.choose("triton", *arguments) == by_name["triton"]


@pytest.mark.parametrize(
    ("capability", "shared", "objection"),
    [
        ((8, 0), 163, "made for Hopper and later cards, and this is sm_80"),
        ((9, 0), 227, None),
        ((10, 0), 227, None),
        ((12, 0), 99, "need 132 KiB of shared memory, and a block of this sm_120 has 99"),
    ],
)
def test_cards_with_too_little_shared_memory_are_refused(
    capability: tuple[int, int], shared: int, objection: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = capability
    card = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=shared << 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(native, "why_no_triton", lambda x: None)
    with FakeTensorMode():
        x = torch.empty(1, 4, 8, device="cuda", dtype=torch.bfloat16)
    found = alignment._why_not_triton(x, x, 0.0)
    assert (found is None) == (objection is None) and (objection is None or objection in str(found))
