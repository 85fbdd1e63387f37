"""Attention by Triton: what its kernels need, and what it refuses; check_attention.py holds the numbers."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import Resources, compile_triton_for_hopper, run_python
from vfmvae import ops
from vfmvae.ops import attention_triton, native

CHECKS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_attention.py")
SMALLEST_SHARED_LIMIT = 99 << 10
"""Bytes of shared memory that a block may have on any card from sm_80 on."""
KERNELS = {
    "forward": ("attention", "_attention_fwd_kernel"),
    "head_mean": ("attention", "_attention_mean_fwd_kernel"),
    "query_grad": ("attention_backward", "_attention_query_grad_kernel"),
    "key_grad": ("attention_backward", "_attention_key_grad_kernel"),
}
FLOAT32 = ("sums", "products", "null_key", "null_value", "of_null_key", "of_null_value")
# Heads' width and tokens: encoder, fusion and decoder, the discriminator's backbone, decompression; the
# widest heads; an odd size.
SIZES = [(64, 1024), (64, 197), (32, 256), (128, 1024), (40, 77)]


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python(*CHECKS, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


# Not marked gpu: benchmarks/gpu_suite.py runs the checks themselves.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu() -> None:
    run_python(*CHECKS)


def compile_kernel(name: str, width: int, length: int, groups: int, dtype: torch.dtype) -> Resources:
    from vfmvae.kernels.attention import constants, tile

    module, kernel_name = KERNELS[name]
    kernel = getattr(importlib.import_module(f"vfmvae.kernels.{module}"), kernel_name)
    given = constants(tile(name, width, length, groups, dtype), width, length, name == "key_grad")
    warps, stages = given.pop("num_warps"), given.pop("num_stages")
    given |= {"NULL": True, "KEEP": True, "OF_NULL": True}
    element = "*fp32" if dtype == torch.float32 else "*bf16"

    def kind(argument: str) -> str:
        if not argument.endswith("_ptr"):
            return "fp32" if argument in ("scale", "of_logit", "of_value") else "i32"
        return "*fp32" if argument.removesuffix("_ptr") in FLOAT32 else element

    constant: dict[str, Any] = {key: value for key, value in given.items() if key in kernel.arg_names}
    signature = {argument: kind(argument) for argument in kernel.arg_names if argument not in constant}
    return compile_triton_for_hopper(kernel, signature, constant, warps, stages)


@pytest.mark.parametrize(("width", "length"), SIZES)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_hopper_without_spills(name: str, width: int, length: int) -> None:
    pytest.importorskip("triton")
    for groups in (1, 1 << 16):  # which the smaller tiles are for, and the larger
        resources = compile_kernel(name, width, length, groups, torch.bfloat16)
        assert resources.spilled == 0 and resources.shared <= SMALLEST_SHARED_LIMIT, (groups, resources)
    if width == 64:
        resources = compile_kernel(name, width, length, 1, torch.float32)
        assert resources.spilled == 0 and resources.shared <= SMALLEST_SHARED_LIMIT, resources


@pytest.mark.parametrize(
    ("capability", "objection"), [((7, 5), "cards from sm_80 on, and this is sm_75"), ((9, 0), None)]
)
def test_older_cards_are_refused(
    capability: tuple[int, int], objection: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(native, "why_no_triton", lambda x: None)
    with FakeTensorMode():
        query = torch.empty(1, 1, 2, 16, device="cuda", dtype=torch.bfloat16)
    found = attention_triton.why_not(query)
    assert (found is None) == (objection is None) and (objection is None or objection in str(found))


@pytest.mark.parametrize(
    ("query", "key", "sentence"),
    [
        (torch.ones(1, 1, 2, 16).double(), torch.ones(1, 1, 2, 16).double(), "not torch.float64"),
        (torch.ones(1, 1, 2, 136), torch.ones(1, 1, 2, 136), "at most 128 numbers, not 136"),
        (torch.ones(1, 1, 2, 16), torch.ones(1, 1, 3, 16), "as many keys as queries, not 3 for 2"),
        (torch.ones(1, 1, 2, 16), torch.ones(1, 1, 2, 16), "on cpu|not installed"),
    ],
)
def test_what_it_refuses_is_said(query: torch.Tensor, key: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"'triton' cannot be used here.*({sentence})"):
        ops.attention(query, key, key, fused="triton")


@pytest.mark.gpu
def test_what_computes_attention_on_a_gpu() -> None:
    found = ops.attention_choices(torch.device("cuda"), torch.bfloat16, torch.bfloat16)
    assert found["fusion"][0] == "triton" and found["decoder"][0] == "triton"
    assert found["encoder"][0] != "triton", "libraries are faster without null key and mean"
