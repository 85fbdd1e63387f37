"""geglu and swiglu: the references, the choice, and what the kernels need; check_gated.py holds the kernels'
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tests.helpers import compile_triton_for_hopper, run_python
from tests.ops.agreement import assert_agrees
from vfmvae.ops import geglu, swiglu, swiglu_halves


def test_reference_is_the_published_formula() -> None:
    gate, value = torch.randn(2, 100, dtype=torch.float64)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    expected = 0.5 * gate * (1 + torch.tanh(inner)) * value
    torch.testing.assert_close(geglu(gate, value, fused=False), expected)
    silu = gate / (1 + torch.exp(-gate))
    torch.testing.assert_close(swiglu(gate, value, fused=False), silu * value)
    torch.testing.assert_close(swiglu_halves(torch.cat([gate, value]), fused=False), silu * value)


def test_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_gated.py"),
        env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


# Not marked gpu: benchmarks/gpu_suite.py runs the checks themselves.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernel_on_the_gpu() -> None:
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_gated.py")


@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("columns", [1024, 2048, 3072, 64])
def test_kernels_compile_for_hopper_without_spills(columns: int, activation: str, element: str) -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels import gated
    from vfmvae.kernels.common import matrix_tile

    height, width, _ = matrix_tile(4096, columns)
    for kernel in (gated._gated_fwd_kernel, gated._gated_bwd_kernel):
        sizes = {name: "i32" for name in kernel.arg_names if name.endswith(("rows", "columns", "_stride"))}
        pointers = {name: element for name in kernel.arg_names if name.endswith("_ptr")}
        constants = {"HEIGHT": height, "WIDTH": width, "ACTIVATION": activation}
        resources = compile_triton_for_hopper(kernel, pointers | sizes, constants)
        assert resources.spilled == 0, resources
        assert resources.shared == 0, resources
        assert resources.registers <= 128, resources


@pytest.mark.parametrize("function", [geglu, swiglu])
def test_auto_takes_the_reference_on_the_cpu_and_says_why_when_asked_by_name(
    function: Callable[..., torch.Tensor],
) -> None:
    gate, value = torch.randn(2, 3, 4)
    assert torch.equal(function(gate, value, fused=True), function(gate, value, fused=False))
    with pytest.raises(ValueError, match="triton.*(on cpu|not installed)"):
        function(gate, value, fused="triton")
    with pytest.raises(ValueError, match="float64"):
        function(gate.double(), value.double(), fused="triton")


def test_gradients_on_the_cpu() -> None:
    assert_agrees(swiglu, [*torch.randn(2, 3, 4)])
    assert_agrees(swiglu_halves, [torch.randn(3, 8)])


@pytest.mark.parametrize(
    ("gate", "value", "sentence"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), r"\[2, 3\].*\[2, 4\]"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "float32.*float64"),
        (torch.ones(2), torch.ones(2, device="meta"), "cpu.*meta"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(gate: torch.Tensor, value: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        geglu(gate, value)
    with pytest.raises(ValueError, match=sentence):
        swiglu(gate, value)


def test_an_odd_number_of_channels_has_no_halves() -> None:
    with pytest.raises(ValueError, match=r"both is \[2, 3\]"):
        swiglu_halves(torch.ones(2, 3))
