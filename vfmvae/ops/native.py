"""What can run here besides plain PyTorch: the compiled extension `vfmvae._C` and Triton.

Both are looked for at the first use of an operation, never at import. Their absence is an objection in
words; an installed package that fails to import is a fault of the installation, and its error is raised.
"""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

REBUILD = 'install the repository with "pip install -e ." (python -m vfmvae.doctor says what was built)'


@functools.cache
def extension() -> ModuleType:
    """The module `vfmvae._C`; callers have asked `why_no_extension` first."""
    return import_module("vfmvae._C")


def why_no_cpu_code(x: Tensor) -> str | None:
    """Why the extension's C++ code cannot take x, or None."""
    return _cpu_objection(x.device.type)


@torch.compiler.assume_constant_result
def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor multiplies matrices of bfloat16 faster than those of float32 (AVX512-BF16)."""
    return _not_built() is None and extension().cpu_multiplies_bfloat16()


def why_no_cuda_code(x: Tensor) -> str | None:
    """Why the extension's CUDA code cannot take x, or None."""
    return _cuda_objection(x.device.type, x.device.index)


def why_no_triton(x: Tensor) -> str | None:
    """Why Triton cannot take x, or None. Triton's interpreter (TRITON_INTERPRET=1) takes CPU tensors."""
    return _triton_objection(x.device.type)


# The next three depend on plain values that are constant in a process: torch.compile does not look into them.


@torch.compiler.assume_constant_result
def _cpu_objection(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"the tensor is on {device_type}, not on the CPU"
    return _not_built()


@torch.compiler.assume_constant_result
def _cuda_objection(device_type: str, device_index: int | None) -> str | None:
    if device_type != "cuda":
        return f"the tensor is on {device_type}, not on a CUDA device"
    return _not_built() or _not_runnable(device_index or 0)


@torch.compiler.assume_constant_result
def _triton_objection(device_type: str) -> str | None:
    if not _has_triton():
        return "the package triton is not installed"
    if device_type == "cuda" or (device_type == "cpu" and import_module("triton").knobs.runtime.interpret):
        return None
    return f"the tensor is on {device_type}, not on a CUDA device"


@functools.cache
def _not_built() -> str | None:
    return f"vfmvae._C is not built: {REBUILD}" if find_spec("vfmvae._C") is None else None


@functools.cache
def _not_runnable(device_index: int) -> str | None:
    if not extension().with_cuda:
        return f"vfmvae._C was built without CUDA: with nvcc on the path, {REBUILD}"
    return extension().cuda_objection(device_index) or None


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
