"""The CUDA kernels of depthwise_conv2d without a GPU: run on the CPU, and their registers from nvcc."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.csrc.host import compile_for_host
from tests.helpers import ROOT, assert_kernel_close, read_ptxas_report
from vfmvae.ops.conv import depthwise_conv2d_reference

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SHAPES = [  # batch, channels, height, width, rows of a strip
    (2, 8, 5, 8, 5),  # whole spans, aligned
    (1, 72, 9, 16, 4),  # two groups of channels, strips of unequal length
    (2, 64, 10, 20, 3),  # two tiles beside each other, the second with one span
    (1, 16, 13, 36, 13),
    (1, 3, 7, 6, 3),  # neither whole spans nor aligned
    (2, 65, 4, 9, 2),
    (1, 1, 1, 1, 1),
    (3, 8, 1, 2, 1),
    (1, 8, 19, 1, 8),
]
GUARD = 64  # elements around every output that must stay as they are


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """NaN of this shape, and the memory around it."""
    count = torch.Size(shape).numel()
    memory = torch.full((GUARD + count + GUARD,), float("nan"), dtype=dtype)
    return memory[GUARD : GUARD + count].view(shape), memory


def assert_guards(*memories: Tensor) -> None:
    for memory in memories:
        assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all(), "written outside of an output"


@pytest.fixture(scope="module")
def forward(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """(x, weight, bias, noise, strip_rows, flipped) -> out, partials, counts."""
    library = compile_for_host("depthwise_conv_on_host.cpp", tmp_path_factory.mktemp("csrc"))
    run = ctypes.CDLL(str(library)).run
    run.restype = None
    run.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_char_p] + [ctypes.c_int64] * 4 + [ctypes.c_int] * 3

    def kernel(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        noise: Tensor | None = None,
        strip_rows: int = 4,
        flipped: bool = False,
        statistics: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, channels, height, width = x.shape
        x = x.contiguous(memory_format=torch.channels_last)
        tiles = -(-height // strip_rows) * -(-width // 4)
        out, out_memory = guarded((batch, height, width, channels), x.dtype)
        partials, partials_memory = guarded((batch, tiles, 2, channels), torch.float32)
        counts, counts_memory = guarded((tiles,), torch.float32)
        run(
            *map(address, (x, weight, bias, noise, out)),
            *(map(address, (partials, counts)) if statistics else (0, 0)),
            str(x.dtype).removeprefix("torch.").encode(),
            *(batch, height, width, channels, weight.shape[-1], flipped, strip_rows),
        )
        assert_guards(out_memory, partials_memory, counts_memory)
        return out.permute(0, 3, 1, 2), partials, counts

    return kernel


@pytest.fixture(scope="module")
def gradient(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    """(x, grad, size, strip_rows, parts) -> [k*k + 1, C]."""
    library = compile_for_host("depthwise_conv_gradient_on_host.cpp", tmp_path_factory.mktemp("csrc"))
    run = ctypes.CDLL(str(library)).run
    run.restype = None
    run.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_char_p] + [ctypes.c_int64] * 4 + [ctypes.c_int] * 3

    def kernel(x: Tensor, grad: Tensor, size: int, strip_rows: int, parts: int) -> Tensor:
        batch, channels, height, width = x.shape
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        partials, partials_memory = guarded((parts, size * size + 1, channels), torch.float32)
        out, out_memory = guarded((size * size + 1, channels), torch.float32)
        run(
            *map(address, (x, grad, partials, out)),
            str(x.dtype).removeprefix("torch.").encode(),
            *(batch, height, width, channels, size, strip_rows, parts),
        )
        assert_guards(partials_memory, out_memory)
        return out

    return kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_and_bias_gradient(
    gradient: Callable[..., Tensor], shape: tuple, size: int, dtype: torch.dtype
) -> None:
    *shape, strip_rows = shape
    x, grad = torch.randn(2, *shape).to(dtype)

    def reference(dtype: torch.dtype) -> Tensor:
        weight = torch.zeros(shape[1], 1, size, size, dtype=dtype, requires_grad=True)
        bias = torch.zeros(shape[1], dtype=dtype, requires_grad=True)
        y = depthwise_conv2d_reference(x.to(dtype), weight, bias, None)
        of_weight, of_bias = torch.autograd.grad(y, (weight, bias), grad.to(dtype))
        return torch.cat([of_weight.flatten(1).t(), of_bias[None]])

    for parts in (1, 3, 20):  # 20: some have no tile
        out = gradient(x, grad, size, strip_rows, parts)
        terms = shape[0] * shape[2] * shape[3]
        assert_kernel_close(out, reference(torch.float32), reference(torch.float64), terms=terms)


def test_many_parts_are_added(gradient: Callable[..., Tensor]) -> None:
    x = torch.randn(40, 8, 3, 4)
    out = gradient(x, x, 3, 4, 40)
    torch.testing.assert_close(out[4], x.square().sum((0, 2, 3)))
    torch.testing.assert_close(out[9], x.sum((0, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(
    forward: Callable[..., tuple[Tensor, ...]], shape: tuple, size: int, dtype: torch.dtype
) -> None:
    *shape, strip_rows = shape
    x, grad = torch.randn(2, *shape).to(dtype)
    weight, bias, noise = torch.randn(shape[1], 1, size, size), torch.randn(shape[1]), torch.randn(shape[2:])

    for own_bias, own_noise, flipped in ((bias, None, False), (bias, noise, False), (None, None, True)):
        turned = weight.flip(2, 3) if flipped else weight
        own = grad if flipped else x
        out, _, _ = forward(own, weight, own_bias, own_noise, strip_rows, flipped, statistics=False)
        eager = depthwise_conv2d_reference(own, turned, own_bias, own_noise)
        wide = [None if t is None else t.double() for t in (own, turned, own_bias, own_noise)]
        assert_kernel_close(out, eager, depthwise_conv2d_reference(*wide))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_the_output(
    forward: Callable[..., tuple[Tensor, ...]], shape: tuple, dtype: torch.dtype
) -> None:
    *shape, strip_rows = shape
    batch, channels, height, width = shape
    x, weight, bias = (
        torch.randn(shape).to(dtype),
        torch.randn(channels, 1, 3, 3),
        torch.full((channels,), 50.0),
    )
    out, partials, counts = forward(x, weight, bias, None, strip_rows)
    assert torch.equal(out, forward(x, weight, bias, None, strip_rows, statistics=False)[0])
    tile = 0
    for top in range(0, height, strip_rows):
        for left in range(0, width, 4):
            values = out[:, :, top : top + strip_rows, left : left + 4].double().flatten(2)
            mean = values.mean(2)
            assert counts[tile] == values.shape[2]
            torch.testing.assert_close(partials[:, tile, 0].double(), mean, rtol=1e-6, atol=0)
            deviations = (values - mean[:, :, None]).square().sum(2)
            torch.testing.assert_close(partials[:, tile, 1].double(), deviations, rtol=1e-5, atol=1e-6)
            tile += 1
    assert tile == len(counts)


@pytest.mark.parametrize("channels", [8, 5])
def test_values_that_are_not_finite_spread(forward: Callable[..., tuple[Tensor, ...]], channels: int) -> None:
    x, weight = torch.randn(1, channels, 9, 12), torch.randn(channels, 1, 3, 3)
    x[0, 2, 4, 3], x[0, 3, 8, 11] = float("nan"), float("inf")
    out, partials, _ = forward(x, weight, strip_rows=3)
    reference = depthwise_conv2d_reference(x, weight, None, None)
    assert torch.equal(out.isnan(), reference.isnan()) and torch.equal(out.isinf(), reference.isinf())
    tiles = reference.isfinite().view(channels, 3, 3, 3, 4).all(4).all(2).permute(1, 2, 0)
    assert torch.equal(partials[0].isfinite().all(1), tiles.reshape(9, channels))


def test_memory_that_is_not_aligned(forward: Callable[..., tuple[Tensor, ...]]) -> None:
    memory = torch.randn(1 + 64 * 32)
    x = memory[1:].view(1, 8, 8, 32).permute(0, 3, 1, 2)
    assert x.data_ptr() % 16 != 0 and x.is_contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 1, 5, 5)
    torch.testing.assert_close(forward(x, weight)[0], depthwise_conv2d_reference(x, weight, None, None))


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["90a"])
@pytest.mark.parametrize(
    ("source", "count"), [("depthwise_conv.cu", 3 * 3 * 3), ("depthwise_conv_gradient.cu", 3 * 3 * 2 + 1)]
)
def test_registers_and_spills(source: str, count: int, architecture: str, tmp_path: Path) -> None:
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [NVCC, "-std=c++17", "-O3", "-cubin", "-gencode", target, "-Xptxas", "-v"]
    report = subprocess.run(
        [*command, str(ROOT / "csrc" / source), "-o", str(tmp_path / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=True,
    )
    kernels = read_ptxas_report(report.stdout + report.stderr)
    assert len(kernels) == count
    assert [kernel for kernel in kernels if kernel.spilled] == []
    # The kernels for aligned pixels; the general ones may need more.
    fast = [kernel for kernel in kernels if re.search(r"Li\dELb1E", kernel.kernel)]
    assert len(fast) >= 9
    assert max(kernel.registers for kernel in fast) <= 128, "two blocks of 256 threads on a multiprocessor"
