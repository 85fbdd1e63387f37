"""The CUDA kernels of group norm without a GPU: run on the CPU with their Python side, compiled by nvcc."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.csrc.host import compile_for_host
from tests.helpers import ROOT, assert_kernel_close, read_ptxas_report
from vfmvae.ops import input_gradients_only, norm_cuda
from vfmvae.ops.norm import ACTIVATIONS, group_norm_reference

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SHAPES = [  # (batch, channels, height, width), groups
    ((2, 128, 7, 9), 32),  # four channels in a group, eight in a vector
    ((1, 16, 37, 23), 4),
    ((2, 6, 5, 7), 3),  # channels that fill no vector
    ((1, 1, 1, 3), 1),
    ((3, 24, 1, 3), 24),
    ((2, 512, 4, 4), 32),
    ((1, 300, 3, 5), 1),  # a group of more channels than a block has threads
    ((1, 2056, 2, 3), 8),  # more channels than a block takes, by vectors
    ((1, 515, 2, 1), 5),  # and one by one
    ((2, 64, 9, 7), 4),  # a group fits into a block, whose threads read several pixels
    ((2, 64, 25, 23), 4),  # and as it is too large for the backward
]
GUARD = 64  # elements around all that is allocated, which must stay as they are
ADDRESSES = "x weight bias style partials"
SIZES = "dtype batch pixels channels groups activation"


class HostExtension:
    """The extension's functions, from the library that the host compiler made."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.tiles.restype = ctypes.c_int64

    def group_norm_tiles(self, **arguments: Any) -> int:
        return self._call("tiles", "batch pixels channels", arguments)

    def group_norm_cuda(self, **arguments: Any) -> None:
        self._call("forward", f"{ADDRESSES} counts table out {SIZES} given_tiles eps", arguments)

    def group_norm_backward_cuda(self, **arguments: Any) -> None:
        gradients = "grad grad_x grad_weight grad_bias grad_style coefficients"
        self._call("backward", f"{ADDRESSES} table {gradients} {SIZES}", arguments)

    def _call(self, function: str, names: str, arguments: dict[str, Any]) -> int:
        assert set(names.split()) == set(arguments)
        kinds = {int: ctypes.c_int64, float: ctypes.c_double}
        values = (arguments[name] for name in names.split())
        return getattr(self.library, function)(
            *(v.encode() if isinstance(v, str) else kinds[type(v)](v) for v in values)
        )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_for_host("group_norm_on_host.cpp", tmp_path_factory.mktemp("csrc"))


@pytest.fixture(autouse=True)
def on_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """norm_cuda with the kernels on the CPU, in memory full of NaN between guards."""
    if "registers" in request.node.name:
        yield
        return
    host = HostExtension(request.getfixturevalue("library"))
    monkeypatch.setattr(norm_cuda, "native", SimpleNamespace(extension=lambda: host))
    monkeypatch.setattr(norm_cuda, "_where", lambda x: {})
    allocated: list[Tensor] = []

    def guarded(shape: Any, dtype: torch.dtype) -> Tensor:
        count = torch.Size([shape] if isinstance(shape, int) else shape).numel()
        allocated.append(torch.full((GUARD + count + GUARD,), float("nan"), dtype=dtype))
        return allocated[-1][GUARD : GUARD + count].view(shape)

    def empty_like(x: Tensor, memory_format: Any = None) -> Tensor:
        if memory_format is None:
            return guarded(x.shape, x.dtype)
        batch, channels, height, width = x.shape
        return guarded((batch, height, width, channels), x.dtype).permute(0, 3, 1, 2)

    monkeypatch.setattr(Tensor, "new_empty", lambda x, shape, dtype: guarded(shape, dtype))
    monkeypatch.setattr(torch, "empty_like", empty_like)
    yield
    for memory in allocated:
        assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all(), "written outside of a tensor"


def norm_and_gradients(norm: Callable[..., Tensor], inputs: list[Tensor], *settings: Any) -> list[Tensor]:
    """The result and the gradients of x, weight, bias and style (if there are four), last the gradient."""
    *inputs, grad = inputs
    own = [t.detach().requires_grad_() for t in inputs]
    groups, eps, activation = settings
    y = norm(own[0], groups, own[1], own[2], eps, activation, own[3] if len(own) == 4 else None)
    return [y.detach(), *torch.autograd.grad(y, own, grad)]


def check(inputs: list[Tensor], groups: int, activation: str | None, eps: float = 1e-5) -> None:
    settings = groups, eps, activation
    ours = norm_and_gradients(norm_cuda.group_norm, inputs, *settings)
    eager = norm_and_gradients(group_norm_reference, inputs, *settings)
    truth = norm_and_gradients(group_norm_reference, [t.double() for t in inputs], *settings)
    batch, _, height, width = inputs[0].shape
    terms = {"weight": batch * height * width, "bias": batch * height * width, "style": height * width}
    for what, *results in zip(("output", "x", "weight", "bias", "style"), ours, eager, truth, strict=False):
        assert_kernel_close(*results, what, terms=terms.get(what, 0))
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype, style: bool, mean: float = 2.0) -> list[Tensor]:
    x, grad = (mean + torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    channels = shape[1]
    styles = [1 + torch.randn(shape[0], channels)] if style else []
    return [x, torch.randn(channels), torch.randn(channels), *styles, grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_indices_forward_and_backward(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    check(random_inputs(shape, dtype, style=False), groups, None)


@pytest.mark.parametrize("style", [False, True])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize(("shape", "groups"), SHAPES[:3], ids=str)
def test_activations_and_style(
    shape: tuple[int, ...], groups: int, activation: str | None, style: bool
) -> None:
    check(random_inputs(shape, torch.float32, style), groups, activation)


@pytest.mark.parametrize("first", [1000.0, 0.0])
def test_large_means(first: float) -> None:
    inputs = random_inputs((2, 16, 40, 40), torch.float32, style=True, mean=1000.0)
    inputs[0][:, :, 0, 0] = first  # what a tile's values are compared with may be unlike them
    inputs[0][:, :, 1] = first
    check(inputs, 4, None)


def test_more_samples_than_the_grid_has_rows() -> None:
    check(random_inputs((1030, 2, 1, 2), torch.float32, style=False), 1, None)


def test_a_group_of_one_value_becomes_the_bias() -> None:
    y = norm_cuda.group_norm(torch.randn(1, 4, 1, 1), 4, torch.ones(4), torch.arange(4.0), 1e-5, None, None)
    torch.testing.assert_close(y.flatten(), torch.arange(4.0))


def test_memory_that_is_not_aligned() -> None:
    memory = torch.randn(1 + 32 * 12)
    x = memory[1:].view(1, 3, 4, 32).permute(0, 3, 1, 2)
    assert x.data_ptr() % 16 != 0
    check([x, torch.randn(32), torch.randn(32), torch.randn(1, 32, 3, 4)], 8, "silu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1e15])
@pytest.mark.parametrize("shape", [(2, 8, 3, 3), (2, 6, 3, 3)], ids=str)
def test_values_that_are_not_finite_spread(shape: tuple[int, ...], value: float) -> None:
    inputs = random_inputs(shape, torch.float32, style=False)
    inputs[0][1, 2, 1, 1] = value
    ours = norm_and_gradients(norm_cuda.group_norm, inputs, 2, 1e-5, "silu")
    reference = norm_and_gradients(group_norm_reference, inputs, 2, 1e-5, "silu")
    for one, other in zip(ours[:2], reference[:2], strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())


def test_a_gradient_that_is_not_finite_spreads() -> None:
    inputs = random_inputs((2, 8, 3, 3), torch.float32, style=False)
    inputs[-1][1, 2, 1, 1] = float("nan")
    grad_x = norm_and_gradients(norm_cuda.group_norm, inputs, 2, 1e-5, None)[1]
    assert grad_x[1, :4].isnan().all() and grad_x[0].isfinite().all() and grad_x[1, 4:].isfinite().all()


def test_given_statistics() -> None:
    x, weight, bias, style, grad = random_inputs((2, 16, 5, 7), torch.float32, style=True)
    pixels = x.permute(0, 2, 3, 1).reshape(2, 35, 16)
    tiles = pixels.split([4, 20, 11], dim=1)
    means = torch.stack([t.mean(1) for t in tiles], 1)
    squares = torch.stack([(t - t.mean(1, keepdim=True)).square().sum(1) for t in tiles], 1)
    partials, counts = torch.stack([means, squares], 2), torch.tensor([4.0, 20.0, 11.0])

    def given(x: Tensor, *settings: Any) -> Tensor:
        return norm_cuda.group_norm_from_partials(x, partials, counts, *settings)

    inputs = [x, weight, bias, style, grad]
    own = norm_and_gradients(norm_cuda.group_norm, inputs, 4, 1e-5, "gelu")
    for one, other in zip(norm_and_gradients(given, inputs, 4, 1e-5, "gelu"), own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_statistics_that_the_depthwise_convolution_leaves(tmp_path: Path) -> None:
    library = ctypes.CDLL(str(compile_for_host("depthwise_conv_on_host.cpp", tmp_path)))
    x, weight = torch.randn(2, 9, 10, 16), 10 * torch.rand(16, 1, 3, 3)  # [B, H, W, C]
    out, partials, counts = (
        torch.empty_like(x),
        torch.full((2, 9, 2, 16), math.nan),
        torch.full((9,), math.nan),
    )
    addresses = [
        x.data_ptr(),
        weight.data_ptr(),
        0,
        0,
        out.data_ptr(),
        partials.data_ptr(),
        counts.data_ptr(),
    ]
    library.run(*map(ctypes.c_void_p, addresses), b"float32", *map(ctypes.c_int64, (2, 9, 10, 16, 3, 0, 4)))
    y = out.permute(0, 3, 1, 2)
    settings = 4, torch.randn(16), torch.randn(16), 1e-5, None, None
    given = norm_cuda.group_norm_from_partials(y, partials, counts, *settings)
    torch.testing.assert_close(given, norm_cuda.group_norm(y, *settings), rtol=1e-5, atol=1e-5)


def test_unwanted_gradients_are_not_computed() -> None:
    x, weight, bias, style, grad = random_inputs((2, 8, 3, 3), torch.float32, style=True)
    own = [t.requires_grad_() for t in (x, weight, bias, style)]
    y = norm_cuda.group_norm(own[0], 2, own[1], own[2], 1e-5, None, own[3])
    with input_gradients_only():
        of_x, of_weight, of_bias, of_style = torch.autograd.grad(y, own, grad, allow_unused=True)
    assert of_weight is None and of_bias is None
    assert of_x.isfinite().all() and of_style.isfinite().all()
    frozen = norm_cuda.group_norm(x, 2, weight.detach(), bias.detach(), 1e-5, None, style.detach())
    assert torch.equal(torch.autograd.grad(frozen, x, grad)[0], of_x)


def test_empty_batch() -> None:
    x, weight, bias, grad = random_inputs((0, 8, 3, 3), torch.float32, style=False)
    y, of_x, of_weight, of_bias = norm_and_gradients(
        norm_cuda.group_norm, [x, weight, bias, grad], 2, 1e-5, None
    )
    assert y.shape == of_x.shape == x.shape
    assert torch.equal(of_weight, torch.zeros(8)) and torch.equal(of_bias, torch.zeros(8))


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("source", "kernels"),
    [
        ("group_norm.cu", 3 * 2 + 1 + 3 * 2 * 4),  # dtypes, vectors, activations
        ("group_norm_backward.cu", 2 + 2 * 3 * 2 * 4),
        ("group_norm_small.cu", 2 * 3 * 4),
    ],
)
def test_registers_and_spills(source: str, kernels: int, tmp_path: Path) -> None:
    target = "arch=compute_90a,code=sm_90a"
    command = [NVCC, "-std=c++17", "-O3", "-cubin", "-gencode", target, "-Xptxas", "-v"]
    report = subprocess.run(
        [*command, str(ROOT / "csrc" / source), "-o", str(tmp_path / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=True,
    )
    found = read_ptxas_report(report.stdout + report.stderr)
    assert len(found) == kernels
    assert [kernel for kernel in found if kernel.spilled] == []
    assert max(kernel.registers for kernel in found) <= 128
