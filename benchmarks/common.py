"""Shared by the benchmarks: timing, what the machine can do at most, and where a number comes from."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch

RESULTS = Path(__file__).parent / "results"
Unit = Literal["matrix", "fma"]
"""What does the arithmetic: the units for matrix products, or those for single multiply-adds."""


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int, warmup: int = 2) -> float:
    """Median time of one call, the device's work included."""
    times = [seconds(run, device) for _ in range(warmup + repeats)]
    return statistics.median(times[warmup:])


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


class Stopwatch:
    """Times short calls: on CUDA the device's work alone, with empty caches; elsewhere `seconds`.

    The L2 cache is overwritten first, and the device then sleeps while Python queues the call's kernels, so
    that they run without gaps. In a training step the queue is as full.
    """

    FLUSHED_BYTES = 256 * 2**20
    SLEEP_CYCLES = 2_000_000  # about a millisecond

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.flushed = torch.empty(self.FLUSHED_BYTES, dtype=torch.int8, device=device)

    def seconds(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            return seconds(run, self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(self.SLEEP_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def median_seconds(self, run: Callable[[], object], repeats: int, warmup: int = 2) -> float:
        times = [self.seconds(run) for _ in range(warmup + repeats)]
        return statistics.median(times[warmup:])


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached or can reach in the run that a result comes from."""

    copy_bytes_per_second: float
    """Read and written by a large copy."""
    matrix_flops: float
    """Of a large product of random matrices, in the dtype of the benchmark; a multiply-add is two."""
    fma_flops: float
    """float32, outside of matrix units: a GPU's cores times its clock, else of a float32 matrix product."""

    def floor_seconds(self, moved_bytes: float, flops: float, unit: Unit) -> float:
        """The least time for so many bytes and so many operations, which overlap at best."""
        rate = self.matrix_flops if unit == "matrix" else self.fma_flops
        return max(moved_bytes / self.copy_bytes_per_second, flops / rate)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    cuda, watch = device.type == "cuda", Stopwatch(device)
    source = torch.ones(2**30 if cuda else 2**26, dtype=torch.int8, device=device)
    copied = watch.median_seconds(partial(torch.empty_like(source).copy_, source), repeats=10 if cuda else 5)

    def product_rate(dtype: torch.dtype) -> float:
        side = 8192 if cuda else 1024
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        taken = watch.median_seconds(partial(torch.mm, a, b), repeats=10 if cuda else 3, warmup=1)
        return 2 * side**3 / taken

    matrix = product_rate(dtype)
    fma = _fma_peak(device) if cuda else None
    if fma is None:
        fma = matrix if dtype == torch.float32 else product_rate(torch.float32)
    return Ceilings(2 * source.numel() / copied, matrix, fma)


def _fma_peak(device: torch.device) -> float | None:
    """Cores times highest clock; None where the clock is not to be had."""
    properties = torch.cuda.get_device_properties(device)
    cores = 64 if (properties.major, properties.minor) == (8, 0) else 128
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        clock_hz = 1e6 * float(answer.split()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None
    return 2.0 * cores * properties.multi_processor_count * clock_hz


def provenance(device: torch.device) -> dict[str, Any]:
    """Date, device and versions."""
    cuda = device.type == "cuda"
    where = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if cuda:
        where |= {"cuda": torch.version.cuda, "triton": _triton_version()}
    return where


def one_line(where: Mapping[str, Any]) -> str:
    """Provenance and ceilings for a reader."""
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in where.items())


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """By rich if it is there, else in columns of plain text: a fresh GPU machine may not have it."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [headings, *rows]
        widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
        print(title)
        for line in lines:
            print("  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=False)).rstrip())
        return
    table = Table(*headings, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=150, markup=False).print(table)


def write_result(path: Path, result: Mapping[str, Any] | list[dict[str, Any]]) -> None:
    """In one go: whoever is ended while writing leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
