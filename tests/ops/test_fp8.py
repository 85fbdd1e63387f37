"""fp8_linear and quantise_rows: the reference against float64, what is refused, what the kernel needs;
check_fp8.py holds the kernel's numbers.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.helpers import compile_triton_for_hopper, run_python
from tests.ops.fp8_truth import assert_nearest, exact, exact_linear
from vfmvae.ops import fp8_linear, quantise_rows, why_no_fp8

FP8 = torch.float8_e4m3fn


def weights(outputs: int = 32, inputs: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    return quantise_rows(torch.randn(outputs, inputs) / inputs**0.5, fused=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 11), (20,), (2, 2730)], ids=str)
def test_rows_are_the_nearest_float8(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * torch.exp(2 * torch.randn(shape))).to(dtype)
    assert_nearest(x, *quantise_rows(x, fused=False))


@pytest.mark.parametrize("largest", [448.0, 448.00003, 1.75, 1.7500001, 3e38, 2e-38, 1e-44, 0.0])
def test_scales_at_the_edges(largest: float) -> None:
    x = torch.tensor([[largest, -largest / 2, largest / 3]])
    assert_nearest(x, *quantise_rows(x, fused=False))


def test_every_float8_number_stays_itself_and_ties_go_to_even() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8)
    numbers = numbers[numbers.float().isfinite()]
    values, scale = quantise_rows(numbers.float(), fused=False)
    assert scale.item() == 1
    assert torch.equal(values[: len(numbers)].float(), numbers.float())
    # Halfway between 1 and 1.125, 1.125 and 1.25, 416 and 448, and the two smallest.
    ties, even = [1.0625, 1.1875, 432.0, 2**-10, 3 * 2**-10], [1.0, 1.25, 448.0, 0.0, 2**-8]
    values, _ = quantise_rows(torch.tensor([*ties, 448.0]), fused=False)
    assert values[:5].tolist() == even


def test_infinity_and_nan_become_nan_and_leave_other_rows_alone() -> None:
    x = torch.ones(4, 20)
    x[0, 3], x[1, 4], x[2, 5] = float("nan"), float("inf"), float("-inf")
    values, scale = quantise_rows(x, fused=False)
    assert values.float().isnan().nonzero().tolist() == [[0, 3], [1, 4], [2, 5]]
    assert scale.isfinite().all() and torch.equal(exact(values, scale)[3, :20], torch.ones(20).double())
    weight, of_weight = weights(16, 20)
    assert fp8_linear(x, weight, of_weight).isnan().all(dim=1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("inputs", [48, 37])
@pytest.mark.parametrize("bias", [True, False])
def test_reference_is_the_product_of_what_the_float8_numbers_stand_for(bias: bool, inputs: int) -> None:
    x, (weight, scale) = torch.randn(3, 7, inputs), weights(24, inputs)
    shift = torch.randn(24).bfloat16() if bias else None
    out = fp8_linear(x, weight, scale, shift, fused=False)
    truth, terms = exact_linear(x, weight, scale, shift)
    assert out.dtype == torch.bfloat16 and out.shape == (3, 7, 24)
    assert ((out.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-6 * terms).all()


def test_no_worse_than_four_bits_of_a_plain_layer() -> None:
    x, plain = torch.randn(64, 512), torch.randn(256, 512) / 512**0.5
    out = fp8_linear(x, *quantise_rows(plain))
    truth = x.double() @ plain.double().t()
    # Each number is off by up to 2^-4, uniform in a binade: 0.026 of both factors, independent.
    assert 0.03 < (out.double() - truth).norm() / truth.norm() < 0.045


def test_autocast_does_not_round_in_between() -> None:
    x, (weight, scale), bias = torch.randn(5, 48), weights(), torch.randn(32).bfloat16()
    expected = fp8_linear(x, weight, scale, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fp8_linear(x, weight, scale, bias), expected)


def test_torch_multiplies_the_same_numbers() -> None:
    x, (weight, scale) = torch.randn(16, 48), weights()
    values, of_rows = quantise_rows(x)
    found = torch._scaled_mm(values, weight.t(), of_rows, scale.t(), out_dtype=torch.bfloat16)
    torch.testing.assert_close(found, fp8_linear(x, weight, scale), rtol=2**-7, atol=1e-6)


def test_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_fp8.py"),
        env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


# Not marked gpu: benchmarks/gpu_suite.py runs the checks themselves.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernel_on_the_gpu() -> None:
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_fp8.py")


@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
@pytest.mark.parametrize("columns", [64, 1024, 4096, 4304, 8192])
def test_kernel_compiles_for_hopper_without_spills(columns: int, element: str) -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels import fp8
    from vfmvae.kernels.norm import tile

    height, width, warps = tile(8192, columns)
    pointers = {"x_ptr": element, "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    sizes = dict.fromkeys(("rows", "columns", "x_stride", "out_stride"), "i32")
    constants = {"HEIGHT": height, "WIDTH": width}
    resources = compile_triton_for_hopper(fp8._quantise_rows_kernel, pointers | sizes, constants, warps)
    assert resources.spilled == 0 and resources.registers <= 128, resources
    assert resources.shared <= 1024, resources


def test_auto_takes_the_reference_on_the_cpu_and_says_why_when_asked_by_name() -> None:
    x, (weight, scale) = torch.randn(5, 48), weights()
    out = fp8_linear(x, weight, scale)
    assert torch.equal(out, fp8_linear(x, weight, scale, fused=False))
    with pytest.raises(ValueError, match="scaled_mm.*on cpu"):
        fp8_linear(x, weight, scale, fused="scaled_mm")
    with pytest.raises(ValueError, match="scaled_mm.*30 outputs are not a multiple of 16"):
        fp8_linear(x, weight[:30], scale[:30], fused="scaled_mm")
    with pytest.raises(ValueError, match="triton.*(on cpu|not installed)"):
        quantise_rows(x, fused="triton")
    with pytest.raises(ValueError, match="triton.*8193"):
        quantise_rows(torch.ones(1, 8193), fused="triton")


def test_it_compiles_to_one_graph() -> None:
    x, (weight, scale) = torch.randn(5, 48), weights()
    compiled = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, scale), fp8_linear(x, weight, scale))


@pytest.mark.parametrize(("found", "sentence"), [((8, 9), None), ((9, 0), None), ((8, 0), "8.0, below 8.9")])
def test_what_multiplies_float8(
    found: tuple[int, int], sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some card")
    said = why_no_fp8(torch.device("cuda"))
    assert said is None if sentence is None else said is not None and sentence in said
    assert "cpu" in (why_no_fp8(torch.device("cpu")) or "")


X, (WEIGHT, SCALE), BIAS = torch.ones(3, 48), weights(), torch.ones(32, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"x": X.double()}, "x has dtype torch.float64"),
        ({"x": X[:, :32]}, r"x \[3, 32\] does not fit weight \[32, 48\]"),
        ({"weight": WEIGHT.float()}, "needed is [N, K'] torch.float8_e4m3fn"),
        ({"scale": SCALE[:, 0]}, r"scale is \[32\].*needed is \[32, 1\]"),
        ({"bias": BIAS.float()}, r"bias is \[32\] torch.float32; needed is \[32\] bfloat16"),
        ({"x": X.to("meta")}, "lie on cpu, meta"),
        ({"x": X.clone().requires_grad_()}, "x requires gradients"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], sentence: str) -> None:
    arguments = {"x": X, "weight": WEIGHT, "scale": SCALE, "bias": BIAS} | changed
    pattern = sentence if "\\" in sentence else re.escape(sentence)
    with pytest.raises(ValueError, match=pattern):
        fp8_linear(*arguments.values())
