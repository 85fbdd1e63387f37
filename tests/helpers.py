"""Shared by the tests: how close is close, memory full of NaN, compiled kernels, other processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]

requires_extension = pytest.mark.skipif(find_spec("vfmvae._C") is None, reason="vfmvae._C is not built")

# For parametrize; conftest.py skips what is marked gpu where there is none.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# The compiled operations: implementation, which is also the device's name, and dtype.
COMPILED = [
    *(pytest.param("cpu", dtype, marks=requires_extension) for dtype in (torch.float32, torch.bfloat16)),
    *(
        pytest.param("cuda", dtype, marks=[requires_extension, pytest.mark.gpu])
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
]
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a block may have on sm_90."""

# Largest relative error ||out - truth|| / ||truth|| of an implementation, whatever PyTorch's own error is.
RELATIVE_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float64: 1e-12}


def assert_kernel_close(
    out: Tensor, eager: Tensor, truth: Tensor, what: str = "output", terms: int = 0
) -> None:
    """Asserts that a kernel is about as exact as plain PyTorch in the same precision.

    Each error may be twice the largest one of `eager` plus one rounding of the element itself, as eager may
    happen to be exact; and the relative error of all has an absolute limit. No tolerance is chosen by hand.

    Sums over pixels and samples, as gradients of weights are, are added in another order than eager's, and
    the largest error of a few such sums is a matter of luck. With `terms` each may be off by what adding so
    many numbers costs: partial sums grow to the size of the result, or sqrt(terms) times that of a term where
    these cancel, and every addition rounds one by up to eps / 2; roundings are independent, so over sqrt(n)
    blocks of sqrt(n) terms - PyTorch's sums and ours are nested so, or deeper - their sum is of the order of
    eps / 2 * terms**(1/4) times the root mean square of the results.

    The largest error of fewer than a hundred results is luck as well, and GPUs divide, take roots and powers
    to within a few roundings: each of so few may be off by four of float32.

    Args:
        out: the kernel's result.
        eager: the reference's result from the same inputs in the same dtype.
        truth: the reference's result from the same inputs in float64.
        terms: how many products each element is the sum of, for gradients of weights; 0 for other results.
    """
    assert out.dtype == eager.dtype, f"{what}: {out.dtype}, but PyTorch gives {eager.dtype}"
    assert out.shape == eager.shape == truth.shape, f"{what}: {out.shape}, {eager.shape}, {truth.shape}"
    assert truth.dtype == torch.float64, "the truth is computed in float64"
    assert torch.isfinite(truth).all(), "the criterion is for finite values"
    missing = (~torch.isfinite(out)).nonzero()
    assert len(missing) == 0, (
        f"{what}: {len(missing)} elements are not finite, first at {missing[0].tolist()}"
    )
    error = (out.double() - truth).abs()
    eager_error = (eager.double() - truth).abs().max()
    precision = torch.finfo(out.dtype)
    allowed = 2 * eager_error + precision.eps * truth.abs() + precision.tiny
    if terms:
        allowed += precision.eps * terms**0.25 * truth.square().mean().sqrt()
    if out.numel() < 100:
        allowed += 4 * torch.finfo(torch.float32).eps * truth.abs().max().clamp_min(1.0)
    place = torch.unravel_index((error - allowed).argmax(), error.shape)
    where, (wrong, limit) = [int(i) for i in place], (float(t[place]) for t in (error, allowed))
    assert wrong <= limit, f"{what}: error {wrong:.3g} at {where}, allowed {limit:.3g}"
    relative = error.norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny)
    limit = RELATIVE_LIMITS[out.dtype]
    assert relative <= limit, f"{what}: relative error {relative:.3g} above {limit:.3g}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty, torch.empty_like and Tensor.new_empty give memory full of NaN (integers: the largest)."""

    def poison(function: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            fresh = function(*args, **kwargs)
            if fresh.is_floating_point():
                return fresh.fill_(float("nan"))
            return fresh if fresh.dtype == torch.bool else fresh.fill_(torch.iinfo(fresh.dtype).max)

        return poisoned

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


@contextmanager
def bfloat16_products_in_the_interpreter() -> Iterator[None]:
    """Triton's interpreter keeps bfloat16 as 16-bit integers, and tl.dot multiplies those."""
    import numpy as np
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    with mock.patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield


@contextmanager
def float8_casts_in_the_interpreter() -> Iterator[None]:
    """Triton's interpreter cuts digits off where a GPU rounds, and makes numbers of NaN; PyTorch rounds."""
    from triton.language import float8e4nv, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (float32, float8e4nv):
            return plain(self, source, target, rounding_mode)
        rounded = torch.from_numpy(source.data.copy()).to(torch.float8_e4m3fn)
        return TensorHandle(rounded.view(torch.uint8).numpy(), float8e4nv)

    with mock.patch.object(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp):
        yield


class Resources(NamedTuple):
    """What one compiled kernel needs. Bytes, except for registers (per thread)."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    wide: tuple[int, int] = (0, 0)
    """Of a Triton kernel: how often a thread reads, and writes, 16 bytes of global memory at once."""


def read_ptxas_report(report: str) -> list[Resources]:
    """The kernels in the output of `ptxas -v`."""
    found = []
    for entry in report.split("Compiling entry function")[1:]:
        numbers = {}
        for name, pattern in {
            "registers": r"Used (\d+) registers",
            "stores": r"(\d+) bytes spill stores",
            "loads": r"(\d+) bytes spill loads",
            "shared": r"(\d+) bytes smem",
        }.items():
            match = re.search(pattern, entry)
            numbers[name] = int(match[1]) if match else 0
        kernel = re.search(r"'(\S+)'", entry)
        assert kernel is not None and numbers["registers"] > 0, f"not a report of ptxas: {entry[:200]}"
        spilled = numbers["stores"] + numbers["loads"]
        found.append(Resources(kernel[1], numbers["registers"], spilled, numbers["shared"]))
    return found


def compile_triton_for_hopper(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
) -> Resources:
    """Compiles a Triton kernel for sm_90 without a GPU.

    Args:
        kernel: the function under triton.jit.
        signature: argument name -> "*bf16", "i32", "tensordesc<bf16[64, 128]>", ...; pointers and sizes are
            taken as multiples of 16.
        constants: the values of the tl.constexpr arguments.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    types = {name: types[name] for name in kernel.arg_names}
    multiples_of_16 = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(types.values())
        if kind != "constexpr" and not kind.startswith("tensordesc")
    }
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=multiples_of_16,
    )
    target = GPUTarget("cuda", 90, 32)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    spilled = usage["STACK"] + usage["LOCAL"]
    wide = tuple(compiled.asm["ptx"].count(f"{access}.global.v4.b32") for access in ("ld", "st"))
    return Resources(compiled.metadata.name, usage["REG"], spilled, compiled.metadata.shared, wide)


def run_python(*arguments: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """Runs this interpreter in a process of its own and returns its output; fails the test where it fails."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert process.returncode == 0, f"python {' '.join(arguments)}: {process.returncode}\n{process.stdout}"
    return process.stdout
