"""Attention by optional packages: flash-attn (versions 2, 3 and 4) and xformers.

Both compute softmax(query key^T / sqrt(d)) value of 16-bit tensors on CUDA, and want [B, N, heads, d].

They are imported when tensors come that they could take. One that is not installed is an objection like any
other; one that is installed and cannot be imported, or fails at a first small problem with such heads, is an
objection that tells the error, and a warning.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger("vfmvae.ops")

DTYPES = (torch.bfloat16, torch.float16)


class Package(NamedTuple):
    """A function for attention, and for which cards (major numbers of their architecture) and heads it is."""

    name: str
    module: str
    function: str
    cards: tuple[int, int]
    largest_head: int


FLASH = (
    Package("flash-attn 3", "flash_attn_interface", "flash_attn_func", (9, 9), 256),
    Package("flash-attn 4", "flash_attn.cute", "flash_attn_func", (9, 10), 128),
    Package("flash-attn 2", "flash_attn", "flash_attn_func", (8, 12), 256),
)
"""In order of preference: 3 is written for Hopper, 4 for Blackwell and Hopper; 2 runs on all since Ampere."""
XFORMERS = (Package("xformers", "xformers.ops", "memory_efficient_attention", (8, 12), 256),)
HEAD_MULTIPLE = 8
"""Rows of 16-bit numbers are read 16 bytes at a time."""


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _run(FLASH, query, key, value)


def xformers_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _run(XFORMERS, query, key, value)


def why_no_flash_attention(query: Tensor) -> str | None:
    return _find(FLASH, query)[1]


def why_no_xformers(query: Tensor) -> str | None:
    return _find(XFORMERS, query)[1]


def _run(packages: tuple[Package, ...], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    package, objection = _find(packages, query)
    assert package is not None, objection  # the caller has asked
    return _call(package, *(_dense_rows(t).transpose(1, 2) for t in (query, key, value))).transpose(1, 2)


def _call(package: Package, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, N, heads, d], as are the arguments."""
    function, _ = _import(package)
    assert function is not None
    options = {}
    if package in FLASH and torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True  # its backward adds up in any order otherwise
    found = function(query, key, value, **options)
    return found[0] if isinstance(found, tuple) else found  # some versions give the log of the sums, too


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _find(packages: tuple[Package, ...], query: Tensor) -> tuple[Package | None, str | None]:
    """The first package that takes the tensor; else None, and why."""
    index = query.device.index or 0
    return _find_for(packages, query.device.type, index, query.dtype, query.shape[-1])


# What follows depends on plain values that are constant in a process: torch.compile does not look into it.


@torch.compiler.assume_constant_result
def _find_for(
    packages: tuple[Package, ...], device_type: str, device_index: int, dtype: torch.dtype, width: int
) -> tuple[Package | None, str | None]:
    return _search(packages, device_type, device_index, dtype, width)


@functools.cache
def _search(
    packages: tuple[Package, ...], device_type: str, device_index: int, dtype: torch.dtype, width: int
) -> tuple[Package | None, str | None]:
    installed = [package for package in packages if _installed(package.module)]
    if not installed:
        return None, f"the package {packages[-1].name.split()[0]} is not installed"
    if device_type != "cuda":
        return None, f"the tensor is on {device_type}, not on a CUDA device"
    if dtype not in DTYPES:
        return None, f"it takes bfloat16 and float16, not {dtype}"
    objections = []
    for package in installed:
        objection = _objection(package, device_index, dtype, width)
        if objection is None:
            return package, None
        if objection not in objections:
            objections.append(objection)
    return None, "; ".join(objections)


def _objection(package: Package, device_index: int, dtype: torch.dtype, width: int) -> str | None:
    if width % HEAD_MULTIPLE or width > package.largest_head:
        heads = f"heads of multiples of {HEAD_MULTIPLE} up to {package.largest_head} numbers"
        return f"{package.name} takes {heads}, not {width}"
    major, minor = torch.cuda.get_device_capability(device_index)
    lowest, highest = package.cards
    if not lowest <= major <= highest:
        return f"{package.name} is not for cards of sm_{major}{minor}"
    return _import(package)[1] or _trial(package, torch.device("cuda", device_index), dtype, width)


def _installed(module: str) -> bool:
    """Whether the module is there, as far as can be told without running its package."""
    return find_spec(module.partition(".")[0]) is not None


@functools.cache
def _import(package: Package) -> tuple[Callable[..., Any] | None, str | None]:
    """The function; else None, and why. The same name holds flash-attn 2 and 4, and either may be alone."""
    try:
        function = getattr(import_module(package.module), package.function, None)
    except ModuleNotFoundError as error:
        if error.name == package.module:
            return None, f"the package {package.name} is not installed"
        return None, _broken(package, "cannot be imported", error)
    except Exception as error:
        return None, _broken(package, "cannot be imported", error)
    if function is None:
        return None, f"the package {package.name} is not installed"
    return function, None


def _trial(package: Package, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """What goes wrong with one small problem: packages may be built for other cards than this one."""
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = torch.ones(3, 1, 128, 1, width, dtype=dtype, device=device).unbind()
        try:
            q.requires_grad_()
            torch.autograd.grad(_call(package, q, k, v).sum(), q)
        except Exception as error:
            return _broken(package, "fails here", error)
    return None


def _broken(package: Package, how: str, error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    sentence = f"{package.name} is installed but {how}: {type(error).__name__}: {line}"
    logger.warning(sentence)
    return sentence
