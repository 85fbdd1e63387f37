"""The Triton form of the modulated MLP: what its kernels need, and the choice; check_modulated_mlp.py holds
the kernels' numbers."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import SHARED_LIMIT, Resources, compile_triton_for_hopper, run_python
from vfmvae.ops import mlp, mlp_triton, native

CHECKS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_modulated_mlp.py")


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python(*CHECKS, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


# Not marked gpu: benchmarks/gpu_suite.py runs the checks themselves.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu() -> None:
    run_python(*CHECKS)


def compile_kernel(
    kernel: Any, channels: int, size: Any, element: str = "bf16", **constants: Any
) -> Resources:
    """At E = 4C. The blocks of `first` and `second` are matrices, the other blocks belong to a sample."""
    from vfmvae.kernels.modulated_mlp import padded

    width = padded(channels)
    rows = dict.fromkeys(("first_desc", "second_desc"), str(size.hidden))
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_desc"):
            signature[name] = f"tensordesc<{element}[{rows.get(name, f'1, {size.pixels}')}, {width}]>"
        elif not name.isupper():
            signature[name] = "*fp32" if name.endswith("_ptr") else "i32"
    constants |= {"C": channels, "E": 4 * channels, "BC": width, "BM": size.pixels, "BN": size.hidden}
    constants["GELU"] = "erf" if element == "fp32" else "tanh"
    return compile_triton_for_hopper(kernel, signature, constants, size.warps, size.stages)


KERNELS = {
    "forward": ("modulated_mlp", "_mlp_fwd_kernel", {}),
    "input_grad": ("modulated_mlp_backward", "_mlp_input_grad_kernel", {"OF_SCALE": False}),
    "input_grad_of_scale": ("modulated_mlp_backward", "_mlp_input_grad_kernel", {"OF_SCALE": True}),
    "weight_grad": ("modulated_mlp_backward", "_mlp_weight_grad_kernel", {}),
}


@pytest.mark.parametrize("channels", [256, 128, 64])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_hopper_without_spills(name: str, channels: int) -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels.tuned import CANDIDATES, tile

    module, kernel_name, constants = KERNELS[name]
    kernel = getattr(importlib.import_module(f"vfmvae.kernels.{module}"), kernel_name)
    sizes = [tile(name, channels, 1 << 16, torch.bfloat16), tile(name, channels, 64, torch.bfloat16)]
    sizes += CANDIDATES.get(name, {}).get(channels, ())
    for size in dict.fromkeys(sizes):
        resources = compile_kernel(kernel, channels, size, **constants)
        assert resources.spilled == 0 and resources.shared <= SHARED_LIMIT, (size, resources)


# Kernel -> descriptors by their blocks: of the long side of a product, of a weight, and of the result or
# half of it.
WIDE_KERNELS = {
    "expand": ("_expand_kernel", {"x": "MK", "expand": "NK", "hidden": "MN"}),
    "contract": ("_contract_kernel", {"residual": "MN", "hidden": "MK", "contract": "NK", "out": "MN"}),
    "hidden_grad": (
        "_hidden_grad_kernel",
        {"grad": "MK", "x": "MK", "expand": "NK", "contract": "KN", "grad_z": "MH", "hidden": "MH"},
    ),
}


@pytest.mark.parametrize("name", WIDE_KERNELS)
def test_kernels_for_many_channels_compile_for_hopper_without_spills(name: str) -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels import modulated_mlp_wide
    from vfmvae.kernels.tuned import CANDIDATES, WIDE, tile

    kernel = getattr(modulated_mlp_wide, WIDE_KERNELS[name][0])
    sizes = [tile(name, 512, 4096, torch.bfloat16)]
    sizes += [tile(name, 512, 64, torch.bfloat16)._replace(hidden=64)]
    sizes += CANDIDATES.get(name, {}).get(WIDE, ())
    for size in dict.fromkeys(sizes):
        resources = compile_wide(kernel, WIDE_KERNELS[name][1], size)
        assert resources.spilled == 0 and resources.shared <= SHARED_LIMIT, (size, resources)


def compile_wide(kernel: Any, descriptors: dict[str, str], size: Any) -> Resources:
    sides = {"M": f"1, {size.pixels}", "N": str(size.hidden), "H": str(size.hidden // 2), "K": "64"}
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_desc"):
            one, two = descriptors[name.removesuffix("_desc")]
            signature[name] = f"tensordesc<bf16[{sides[one]}, {sides[two]}]>"
        elif not name.isupper():
            signature[name] = "*fp32" if name.endswith("_ptr") else "i32"
    constants = {"C": 512, "E": 2048, "BM": size.pixels, "BN": size.hidden, "BK": 64}
    constants |= {"GELU": "tanh", "OF_WEIGHTS": True}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return compile_triton_for_hopper(kernel, signature, constants, size.warps, size.stages)


def test_float32_is_taken_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device would do."""
    monkeypatch.setattr(native, "why_no_triton", lambda x: None)
    implementations = {i.name: i.run for i in mlp._MODULATED_MLP.implementations}
    for dtype, first in ((torch.float32, "gemm"), (torch.bfloat16, "triton"), (torch.float16, "triton")):
        arguments = [torch.ones(1, 8, 2, 2, dtype=dtype, device="meta")] * 2 + [torch.ones(8)] * 6
        assert mlp._MODULATED_MLP.choose(True, *arguments) == implementations[first]
        assert mlp._MODULATED_MLP.choose("triton", *arguments) == implementations["triton"]


@pytest.mark.parametrize(
    ("capability", "shared", "objection"),
    [
        ((8, 0), 163, "too large for cards before Hopper, and this is sm_80"),
        ((9, 0), 227, None),
        ((10, 0), 227, None),
        ((10, 3), 227, None),
        ((12, 0), 99, "need 227 KiB of shared memory, and a block of this sm_120 has 99"),
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
        x = torch.empty(1, 8, 2, 2, device="cuda", dtype=torch.bfloat16)
    found = mlp_triton.why_not(x, torch.empty(32, 8))
    assert (found is None) == (objection is None) and (objection is None or objection in str(found))


def test_what_it_refuses_is_said() -> None:
    def refusal(x: torch.Tensor) -> str:
        with pytest.raises(ValueError) as error:
            mlp._MODULATED_MLP.choose("triton", x, x, *[torch.ones(8)] * 6)
        return str(error.value)

    assert "not torch.float64" in refusal(torch.ones(1, 8, 2, 2, dtype=torch.float64))
    assert "multiples of 8 channels of torch.bfloat16, not 12" in refusal(torch.ones(1, 12, 2, 2).bfloat16())
    assert "multiples of 4 channels of torch.float32, not 6" in refusal(torch.ones(1, 6, 2, 2))
