"""The shim that runs CUDA kernels on the CPU: shared memory, barriers, shuffles, asynchronous copies."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.csrc.host import compile_for_host


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_for_host("shim_on_host.cpp", tmp_path_factory.mktemp("csrc"))


def test_a_block_reduction(library: Path) -> None:
    x, out = torch.randn(1000), torch.full((11,), float("nan"))
    ctypes.CDLL(str(library)).run(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), len(x))
    expected = torch.nn.functional.pad(x, (0, 11 * 96 - 1000)).view(11, 96).square().sum(1)
    torch.testing.assert_close(out, expected)


def test_a_deadlock_is_an_error(library: Path) -> None:
    program = f"import ctypes; ctypes.CDLL({str(library)!r}).run_into_deadlock()"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.returncode != 0 and "wait at different barriers" in process.stderr
