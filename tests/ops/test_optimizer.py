"""The optimizer's kernels: what they need and refuse; check_optimizer.py and check_optimizer_run.py hold
their numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import compile_triton_for_hopper, run_python
from vfmvae.ops import why_no_adam_average

CHECKS = ("tests/kernels/check_optimizer.py", "tests/kernels/check_optimizer_run.py")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


@pytest.mark.parametrize("checks", CHECKS)
def test_kernels_in_the_interpreter(checks: str) -> None:
    pytest.importorskip("triton")
    run_python(*PYTEST, checks, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


# Not marked gpu: benchmarks/gpu_suite.py runs the checks themselves.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu() -> None:
    run_python(*PYTEST, *CHECKS)


POINTERS = {
    "table_ptr": "*i64",
    "gradients_ptr": "*i64",
    "blocks_ptr": "*i32",
    "numbers_ptr": "*fp32",
    "skip_ptr": "*fp32",
    "weight_ptr": "*fp32",
    "count": "i32",
}


def signature(kernel: Any, constants: dict[str, Any], **types: str) -> dict[str, str]:
    known = POINTERS | types
    return {name: known.get(name, "fp32") for name in kernel.arg_names if name not in constants}


@pytest.mark.parametrize(
    ("gradient", "momentum", "decay"),
    [
        ("float32", False, (False, False)),  # the published recipe
        ("float32", True, (False, False)),
        ("float32", True, (True, False)),
        ("float32", True, (True, True)),
        ("bfloat16", True, (True, True)),
        ("float16", False, (True, False)),
    ],
)
def test_the_update_compiles_for_hopper_without_spills(
    gradient: str, momentum: bool, decay: tuple[bool, bool]
) -> None:
    tl = pytest.importorskip("triton.language")
    from vfmvae.kernels import optimizer

    kernel = optimizer._adam_average_kernel
    constants = {"GRADIENT": getattr(tl, gradient), "MOMENTUM": momentum, "SIZE": optimizer.SIZE}
    constants |= {"DECAYS": decay[0], "DECOUPLED": decay[1]}
    resources = compile_triton_for_hopper(kernel, signature(kernel, constants), constants)
    assert resources.spilled == 0, resources
    assert resources.registers <= 128, resources  # four programs per multiprocessor
    # Whole blocks: 16 elements per thread of each tensor, 16 bytes at once.
    loads = 4 * (3 + momentum) + (4 if gradient == "float32" else 2)
    assert resources.wide == (loads, 16), resources


@pytest.mark.parametrize("rate", ["fp32", "*fp32"])
@pytest.mark.parametrize("decoupled", [True, False])
def test_the_step_count_compiles_for_hopper_without_spills(decoupled: bool, rate: str) -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels import optimizer

    kernel = optimizer._begin_kernel
    constants = {"DECOUPLED": decoupled, "LR_IN_MEMORY": rate == "*fp32", "SIZE": optimizer.TENSORS}
    resources = compile_triton_for_hopper(kernel, signature(kernel, constants, lr=rate), constants)
    assert resources.spilled == 0 and resources.shared == 0, resources


def test_what_cannot_be_updated_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    objection = why_no_adam_average(cpu)
    assert objection is not None and ("on cpu" in objection or "not installed" in objection)
    monkeypatch.setattr("vfmvae.ops.native.why_no_triton", lambda x: None)
    assert why_no_adam_average(cpu, [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(()))]) is None
    for parameter, words in (
        (torch.ones(2, dtype=torch.bfloat16), "float32, not torch.bfloat16"),
        (torch.ones(2, device="meta"), "on cpu and on meta"),
        (torch.ones(4, 6)[:, ::2], r"one of [4, 3] with strides [6, 2]"),
        (torch.ones(1).expand(3), "one of [3] with strides [0]"),
    ):
        objection = why_no_adam_average(cpu, [nn.Parameter(torch.ones(1)), parameter])
        assert objection is not None and words in objection
