"""The tests' own tools: the criterion must fail for kernels that are wrong, and the poison must be seen."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import Resources, assert_kernel_close, read_ptxas_report, run_python


def results(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A float64 result and the same rounded to dtype."""
    truth = torch.randn(40, 30, dtype=torch.float64)
    return truth, truth.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kernel_as_exact_as_pytorch_passes(dtype: torch.dtype) -> None:
    truth, eager = results(dtype)
    assert_kernel_close(eager.clone(), eager, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_element_fails_and_is_named(dtype: torch.dtype) -> None:
    truth, eager = results(dtype)
    out = eager.clone()
    out[7, 11] += 0.1
    with pytest.raises(AssertionError, match=r"result: error .* at \[7, 11\]"):
        assert_kernel_close(out, eager, truth, "result")


def test_a_small_error_everywhere_fails_even_where_pytorch_is_bad() -> None:
    truth, eager = results(torch.float32)
    eager[0, 0] += 1  # PyTorch's largest error is large, so the largest error alone allows much
    with pytest.raises(AssertionError, match="relative error"):
        assert_kernel_close(truth.float() * 1.001, eager, truth)


def test_a_small_element_may_not_be_as_wrong_as_a_large_one_and_a_sum_may() -> None:
    truth = torch.ones(100, dtype=torch.float64)
    truth[0], truth[1] = 1000, 1e-3
    eager = truth.float()
    truth = eager.double()  # eager is exact
    out = eager.clone()
    out[0] += 6e-5  # one rounding of itself
    assert_kernel_close(out, eager, truth)
    out[1] += 6e-5
    with pytest.raises(AssertionError, match=r"error .* at \[1\]"):
        assert_kernel_close(out, eager, truth)
    assert_kernel_close(out, eager, truth, terms=4096)
    out[1] += 6e-4
    with pytest.raises(AssertionError, match=r"error .* at \[1\]"):
        assert_kernel_close(out, eager, truth, terms=4096)


def test_elements_that_were_never_written_fail(poisoned_empty: None) -> None:
    truth, eager = results(torch.float32)
    out = torch.empty_like(eager)
    out[1:] = eager[1:]
    with pytest.raises(AssertionError, match=r"30 elements are not finite, first at \[0, 0\]"):
        assert_kernel_close(out, eager, truth)
    assert torch.empty(3, dtype=torch.int64).tolist() == [2**63 - 1] * 3
    assert torch.empty(2, dtype=torch.bool).shape == (2,)


def test_dtype_and_shape_must_match() -> None:
    truth, eager = results(torch.float32)
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_kernel_close(eager.bfloat16(), eager, truth)
    with pytest.raises(AssertionError, match="30, 40"):
        assert_kernel_close(eager.T, eager, truth)


def test_spills_are_read_from_the_compiler() -> None:
    report = (
        "ptxas info : Compiling entry function '_Z3fooi' for 'sm_90a'\n"
        "  16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info : Used 56 registers, used 1 barriers, 4096 bytes smem, 16 bytes stack\n"
    )
    assert read_ptxas_report(report) == [Resources("_Z3fooi", 56, 20, 4096)]


def test_a_program_that_fails_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="broken on purpose"):
        run_python("-c", "raise SystemExit('broken on purpose')")


def test_few_results_may_be_off_by_a_few_roundings_and_no_more() -> None:
    """Where eager happens to be exact, as it may be of a few."""
    truth = torch.linspace(0.5, 1.0, 10, dtype=torch.float64)
    eager = truth.float()
    assert_kernel_close(eager + 4e-7, eager, eager.double())
    with pytest.raises(AssertionError, match="allowed"):
        assert_kernel_close(eager + 1e-6, eager, eager.double())
    many = eager.repeat(20)
    with pytest.raises(AssertionError, match="allowed"):
        assert_kernel_close(many + 4e-7, many, many.double())
