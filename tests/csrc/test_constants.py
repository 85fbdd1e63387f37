"""Constants of the CUDA code that Python repeats, read out of the sources."""

from __future__ import annotations

import re

from tests.helpers import ROOT
from vfmvae.ops import conv, norm_cuda

CSRC = ROOT / "csrc"


def constant(file: str, name: str) -> int:
    """The value of `constexpr int name = ...;`: a number, or a product of such constants."""
    found = re.search(rf"constexpr int {name} = ([^;]+);", (CSRC / file).read_text())
    assert found, f"{name} is not in {file}"
    value = 1
    for factor in found[1].split("*"):
        value *= int(factor) if factor.strip().isdigit() else constant(file, factor.strip())
    return value


def rows(file: str, enum: str) -> int:
    """The value of the last name of an enum, which counts the others."""
    found = re.search(rf"enum {enum} {{([^}}]+)}};", (CSRC / file).read_text())
    assert found, f"{enum} is not in {file}"
    return len(found[1].split(",")) - 1


def test_tiles_of_the_depthwise_convolution() -> None:
    assert constant("depthwise_conv.cuh", "kChannels") == conv.CHANNELS_OF_BLOCK
    assert constant("depthwise_conv.cuh", "kTileWidth") == conv.COLUMNS_OF_BLOCK
    assert constant("depthwise_conv.cuh", "kSpan") == conv.COLUMNS_OF_THREAD


def test_kernel_sizes_of_the_depthwise_convolution() -> None:
    sources = (CSRC / "depthwise_conv.cuh").read_text() + (CSRC / "depthwise_conv.cu").read_text()
    compiled = {int(size) for size in re.findall(r"kernel_size == (\d)", sources)}
    assert compiled == set(conv.COMPILED_KERNEL_SIZES) == set(conv.RESIDENT_BLOCKS)


def test_tables_and_limits_of_group_norm() -> None:
    assert rows("group_norm.cuh", "TableRow") == norm_cuda.TABLE_ROWS
    assert rows("group_norm.cuh", "CoefficientRow") == norm_cuda.COEFFICIENT_ROWS
    limit = re.search(r"channels <= int64_t\{1\} << (\d+)", (CSRC / "group_norm.cuh").read_text())
    assert limit and 1 << int(limit[1]) == norm_cuda.MOST_CHANNELS
