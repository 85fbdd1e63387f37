"""The CUDA kernels of ssim without a GPU: run on the CPU with their Python side, compiled by nvcc."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.csrc.host import compile_for_host
from tests.helpers import ROOT, read_ptxas_report
from tests.ops.structural import check_against_float64, pair
from vfmvae.ops import ssim_compiled

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SHAPES = [  # a tile has 22 x 32 positions
    (2, 3, 40, 50),
    (1, 1, 11, 11),
    (1, 3, 11, 75),
    (3, 1, 33, 12),
    (1, 2, 32, 42),  # a tile of positions, exactly
    (1, 5, 22, 32),  # a tile of pixels, exactly
    (2, 1, 33, 43),
    (1, 1, 55, 107),
]
GUARD = 64  # elements around all that is allocated, which must stay as they are
MAPS = "map_p map_q"
FORWARD = f"a b {MAPS} map_a map_b partials out a_strides b_strides"
GRADIENT = f"grad image other map {MAPS} out image_strides other_strides out_strides"
SIZES = "dtype batch channels height width"


class HostExtension:
    """The extension's functions for the CPU, but from the CUDA kernels that the host compiler made."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.partials.restype = ctypes.c_int64

    def ssim_cpu(self, threads: int, **arguments: Any) -> None:
        count = self._call("partials", "channels height width", arguments)
        partials = torch.empty(arguments["batch"] * count)
        arguments["partials"] = partials.data_ptr()
        self._call("forward", f"{FORWARD} {SIZES} data_range", arguments, complete=True)

    def ssim_gradient_cpu(self, threads: int, **arguments: Any) -> None:
        self._call("gradient", f"{GRADIENT} {SIZES}", arguments, complete=True)

    def _call(self, function: str, names: str, arguments: dict[str, Any], complete: bool = False) -> int:
        assert not complete or set(names.split()) == set(arguments)
        kinds = {int: ctypes.c_int64, float: ctypes.c_double, tuple: ctypes.c_int64 * 4}
        values = (arguments[name] for name in names.split())
        return getattr(self.library, function)(
            *(
                v.encode() if isinstance(v, str) else kinds[type(v)](*(v if isinstance(v, tuple) else (v,)))
                for v in values
            )
        )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_for_host("ssim_on_host.cpp", tmp_path_factory.mktemp("csrc"))


@pytest.fixture
def on_host(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ops.ssim's compiled form with the CUDA kernels on the CPU, in memory full of NaN between guards."""
    host = HostExtension(library)
    monkeypatch.setattr(
        ssim_compiled,
        "native",
        SimpleNamespace(
            extension=lambda: host, why_no_cpu_code=lambda x: None, why_no_cuda_code=lambda x: None
        ),
    )
    allocated: list[Tensor] = []

    def guarded(shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        count = torch.Size([shape] if isinstance(shape, int) else shape).numel()
        allocated.append(torch.full((GUARD + count + GUARD,), float("nan"), dtype=dtype))
        return allocated[-1][GUARD : GUARD + count].view(shape)

    def guarded_like(x: Tensor) -> Tensor:
        strides = torch.ops.aten.empty_like(x).stride()
        return guarded(x.numel(), x.dtype).as_strided(x.shape, strides, GUARD)

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(torch, "empty_like", guarded_like)
    yield
    for memory in allocated:
        assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all(), "written outside of a tensor"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_indices_forward_and_both_gradients(
    on_host: None, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        a, b = (x.contiguous(memory_format=layout) for x in pair(shape, dtype))
        check_against_float64(a, b, ssim_compiled.ssim)
    check_against_float64(a, b.contiguous(), ssim_compiled.ssim)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["90a"])
def test_registers_and_spills(architecture: str, tmp_path: Path) -> None:
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    source = str(ROOT / "csrc" / "ssim.cu")
    command = [NVCC, "-std=c++17", "-O3", "-cubin", "-gencode", target, "-Xptxas", "-v", source]
    report = subprocess.run(
        [*command, "-o", str(tmp_path / "kernel.cubin")], capture_output=True, text=True, check=True
    )
    kernels = read_ptxas_report(report.stdout + report.stderr)
    assert len(kernels) == 3 * 2 + 1, "statistics and gradient per dtype, and the mean"
    assert [kernel for kernel in kernels if kernel.spilled] == []
    assert max(kernel.registers for kernel in kernels) <= 72
    assert max(kernel.shared for kernel in kernels) <= 31 * 1024, "seven blocks to a multiprocessor"
