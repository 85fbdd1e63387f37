"""Devices, dtypes and precision: what can be used, and the sentence for what cannot."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import run_python
from vfmvae.training.device import compute_dtype, device_name, pick_device, set_precision, slow_on_cpu


def test_auto_takes_cuda_where_there_is_one() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["meta", "gpu", "cuda:99", "cpu:x", ""])
def test_devices_that_cannot_be_used_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}' cannot be used: .+; try --device cpu"):
        pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="device 'cuda' cannot be used"):
        pick_device("cuda")


def test_auto_computes_in_bfloat16_on_cuda_alone() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert compute_dtype("auto", cuda) is torch.bfloat16
    assert compute_dtype("auto", cpu) is None
    assert compute_dtype("bf16", cpu) is torch.bfloat16
    assert compute_dtype("fp32", cuda) is None
    assert compute_dtype("fp16", cpu) is compute_dtype("fp16", cuda) is torch.float16


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype is 'tf32'; it must be one of auto, fp32, bf16, fp16"):
        compute_dtype("tf32", torch.device("cpu"))


@pytest.mark.parametrize(
    ("capabilities", "width", "slow"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "AVX512", False),
        ({"avx512_bf16": False, "amx_bf16": True}, "AVX512", False),
        ({"avx512_bf16": False, "amx_bf16": False}, "AVX512", True),
        ({"avx512_bf16": False, "amx_bf16": False}, "AVX2", True),
        ({}, "AVX2", True),
        ({}, "AVX512", False),
    ],
)
def test_a_cpu_without_instructions_for_it_is_slow_in_half_precision(
    capabilities: dict[str, bool], width: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpu = torch.device("cpu")
    sentence = slow_on_cpu(torch.bfloat16, cpu)
    assert (sentence is not None) == slow
    if sentence is not None:
        assert sentence == (
            "this CPU has no instructions for bfloat16 (AVX512-BF16 or AMX-BF16), so this is slower than"
            " --dtype fp32"
        )
    assert slow_on_cpu(torch.float32, cpu) is slow_on_cpu(None, cpu) is None
    assert slow_on_cpu(torch.bfloat16, torch.device("cuda")) is None
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert slow_on_cpu(torch.bfloat16, cpu) is None


def test_the_cpu_is_named_with_its_threads() -> None:
    assert device_name(torch.device("cpu")).endswith(f", {torch.get_num_threads()} thread")


@pytest.fixture
def precision_restored() -> Iterator[None]:
    """PyTorch's settings of this process as they were before the test."""
    cudnn = torch.backends.cudnn
    matmul, tf32 = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    flags = cudnn.deterministic, cudnn.benchmark
    algorithms = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.set_float32_matmul_precision(matmul)
    cudnn.allow_tf32 = tf32
    cudnn.deterministic, cudnn.benchmark = flags
    torch.use_deterministic_algorithms(algorithms)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@pytest.mark.usefixtures("precision_restored")
@pytest.mark.parametrize("deterministic", [True, False])
def test_float32_is_float32_whatever_was_set_before(deterministic: bool) -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    set_precision(deterministic=deterministic)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cuda.matmul.allow_tf32 is False
        assert torch.backends.cudnn.allow_tf32 is False
    # The newer settings agree; "none" is IEEE.
    assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
    assert torch.backends.cudnn.conv.fp32_precision in ("ieee", "none")


@pytest.mark.usefixtures("precision_restored")
def test_repeatable_or_fastest() -> None:
    set_precision(deterministic=True)
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled(), "an operation without such a form may run"
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    set_precision(deterministic=False)
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("precision_restored")
@pytest.mark.gpu
def test_products_and_convolutions_on_a_gpu_are_exact_to_float32() -> None:
    set_precision(deterministic=True)
    a, b = torch.randn(2, 512, 512, device="cuda")
    exact = a.double() @ b.double()
    assert ((a @ b) - exact).norm() / exact.norm() < 1e-6  # TF32: 3e-4
    x, weight = torch.randn(2, 64, 32, 32, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    exact = F.conv2d(x.double(), weight.double())
    assert (F.conv2d(x, weight) - exact).norm() / exact.norm() < 1e-6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again() -> None:
    # Pages that the system hands out are counted as faults, in a process of its own.
    program = """
import resource, torch
from vfmvae.training.device import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.empty(40 << 18).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
assert keep_freed_memory()
faults()
print(given_back, faults())
"""
    given_back, kept = map(int, run_python("-c", program).split()[-2:])
    assert kept < given_back / 10
