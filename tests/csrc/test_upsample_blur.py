"""The CUDA kernel of upsample_blur without a GPU: its indices on the CPU, its registers from nvcc."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.csrc.host import compile_for_host
from tests.helpers import ROOT, assert_kernel_close, read_ptxas_report
from vfmvae.ops.resample import upsample_blur_reference

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SHAPES = [  # batch, channels of the output, height, width
    (2, 8, 5, 7),
    (1, 3, 4, 6),
    (1, 1, 1, 1),
    (2, 4, 1, 9),
    (3, 5, 9, 1),
    (1, 16, 2, 2),
    (1, 132, 2, 19),
    (2, 8, 70, 3),
]
GUARD = 64  # elements around every output that must stay as they are


@pytest.fixture(scope="module")
def host_kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    """The kernel, compiled by the host compiler: (x, kernel_size, upscale, residual, adjoint) -> out."""
    library = compile_for_host("upsample_blur_on_host.cpp", tmp_path_factory.mktemp("csrc"))
    run = ctypes.CDLL(str(library)).run
    run.restype = None
    integers = [ctypes.c_int64] * 4 + [ctypes.c_int] * 3
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, *integers]

    def kernel(x: Tensor, kernel_size: int, upscale: int, residual: Tensor | None, adjoint: bool) -> Tensor:
        batch, channels, height, width = x.shape
        if adjoint:
            shape = batch, channels * upscale**2, height // upscale, width // upscale
        else:
            shape = batch, channels // upscale**2, height * upscale, width * upscale
        small, large = (shape, x.shape) if adjoint else (x.shape, shape)
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        count = x.numel()
        memory = torch.full((GUARD + count + GUARD,), float("nan"), dtype=x.dtype)
        out = memory[GUARD : GUARD + count]
        run(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            str(x.dtype).removeprefix("torch.").encode(),
            *(batch, small[2], small[3], large[1], kernel_size, upscale, adjoint),
        )
        assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all(), "written outside of the output"
        return out.view(batch, shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)

    return kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upscale", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_indices_forward_and_adjoint(
    host_kernel: Callable[..., Tensor], shape: tuple, kernel_size: int, upscale: int, dtype: torch.dtype
) -> None:
    batch, channels, height, width = shape
    x = torch.randn(batch, channels * upscale**2, height, width).to(dtype)
    residual, grad = torch.randn(2, batch, channels, height * upscale, width * upscale).to(dtype)

    def reference(x: Tensor, residual: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        out = upsample_blur_reference(x, kernel_size, upscale, residual)
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    eager = reference(x.clone(), residual, grad)
    truth = reference(x.double(), residual.double(), grad.double())
    out = host_kernel(x, kernel_size, upscale, residual, adjoint=False)
    assert_kernel_close(out, eager[0], truth[0])
    adjoint = host_kernel(grad, kernel_size, upscale, None, adjoint=True)
    assert_kernel_close(adjoint, eager[1], truth[1], "gradient")
    without = host_kernel(x, kernel_size, upscale, None, adjoint=False)
    assert torch.equal(
        host_kernel(x, kernel_size, upscale, torch.zeros_like(residual), adjoint=False), without
    )


def test_memory_that_is_not_aligned(host_kernel: Callable[..., Tensor]) -> None:
    shape = (1, 32, 3, 4)
    memory = torch.randn(1 + 32 * 12)
    x = memory[1:].view(1, 3, 4, 32).permute(0, 3, 1, 2)
    assert x.data_ptr() % 16 != 0 and x.shape == shape
    out = host_kernel(x, 3, 2, None, adjoint=False)
    torch.testing.assert_close(out, upsample_blur_reference(x, 3, 2))


def test_more_images_than_the_grid_has_blocks(host_kernel: Callable[..., Tensor]) -> None:
    x = torch.randn(65_537, 1, 1, 1)
    torch.testing.assert_close(host_kernel(x, 3, 1, x, adjoint=False), 2 * x)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["90a"])
def test_registers_and_spills(architecture: str, tmp_path: Path) -> None:
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    source = str(ROOT / "csrc" / "upsample_blur.cu")
    command = [NVCC, "-std=c++17", "-O3", "-cubin", "-gencode", target, "-Xptxas", "-v", source]
    report = subprocess.run(
        [*command, "-o", str(tmp_path / "kernel.cubin")], capture_output=True, text=True, check=True
    )
    kernels = read_ptxas_report(report.stdout + report.stderr)
    assert len(kernels) == 3 * 3 * 2 * 2 * 2, "dtypes, kernel sizes, factors, vectors, directions"
    assert [kernel for kernel in kernels if kernel.spilled] == []
    assert max(kernel.registers for kernel in kernels) <= 128
