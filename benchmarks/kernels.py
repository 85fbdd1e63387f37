"""Every implementation of the decoder's operations against their reference, forward and backward.

    python benchmarks/kernels.py                               the demo's shapes and the full-size ones
    python benchmarks/kernels.py --op group_norm --dtype bf16

The implementations of a case take turns, and ratios to the reference are medians over the turns. "inputs" is
the backward pass that leaves out gradients of weights (the one that measures an adaptive loss weight). Bytes
and FLOPs are what the forward pass cannot do without: every tensor once, a multiply-add as two.

The JSON goes to benchmarks/results/kernels-DTYPE-DEVICE.json unless --json says otherwise.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, provenance, seconds, write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vfmvae import ops
from vfmvae.ops.conv import _DEPTHWISE
from vfmvae.ops.mlp import _MODULATED_MLP
from vfmvae.ops.norm import _GROUP_NORM
from vfmvae.ops.resample import _UPSAMPLE_BLUR
from vfmvae.training.device import DTYPES, keep_freed_memory, pick_device

NAMES = {
    "depthwise_conv2d": _DEPTHWISE.names(),
    "group_norm": _GROUP_NORM.names(),
    "modulated_mlp": _MODULATED_MLP.names(),
    "upsample_blur": _UPSAMPLE_BLUR.names(),
}
SHAPES = {  # [B, C, H, W] of the decoder's blocks
    "demo": [(8, 64, 8, 8), (8, 64, 16, 16), (8, 32, 32, 32), (8, 16, 64, 64)],
    "full": [(1, 512, 32, 32), (1, 512, 64, 64), (1, 256, 128, 128), (1, 128, 256, 256)],
    "odd": [(1, 12, 5, 7), (3, 24, 9, 33)],
}


class Case(NamedTuple):
    """One operation at one shape. `inputs` are those that come before weights in `tensors`."""

    function: Callable[..., Tensor]
    tensors: list[Tensor]
    inputs: int
    flops: float


def read_options() -> argparse.Namespace:
    # argparse: on a fresh GPU machine tyro may be missing.
    parser = argparse.ArgumentParser(prog="python benchmarks/kernels.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", choices=list(NAMES), help="one operation; without it all of them")
    parser.add_argument("--size", choices=("demo", "full", "all"), default="all")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads; by default what torch takes")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--exercise", metavar="NAME", help="run this implementation once at odd shapes, that is all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    if options.exercise is not None:
        exercise(options.exercise, device)
        return
    if device.type == "cpu":
        keep_freed_memory()  # as a training run does
    path = options.json or RESULTS / f"kernels-{options.dtype}-{device.type}.json"
    rows: list[dict[str, Any]] = []
    for row in measured(options, device):
        rows.append(row)
        write_result(path, {**provenance(device), "dtype": options.dtype, "rows": rows})
    show(rows, provenance(device))


def exercise(name: str, device: torch.device) -> None:
    """Forward and backward of one implementation of every operation that has it: for compute-sanitizer."""
    for op, names in NAMES.items():
        for dtype in DTYPES.values() if name in names else ():
            for shape in SHAPES["odd"]:
                case = build(op, shape, dtype, device)
                tensors = [t.requires_grad_() for t in case.tensors]
                try:
                    y = case.function(*tensors, fused=name)
                except ValueError as objection:
                    print(objection)
                    continue
                torch.autograd.grad(y, tensors, torch.randn_like(y))
        print(op, "done" if name in names else f"has no {name!r}", flush=True)


def measured(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    sizes = ("demo", "full") if options.size == "all" else (options.size,)
    for op in [options.op] if options.op else NAMES:
        for size in sizes:
            for shape in SHAPES[size]:
                case = build(op, shape, DTYPES[options.dtype], device)
                for row in race(case, NAMES[op], device, options.repeats):
                    yield {"op": op, "size": size, "shape": list(shape), **row}


def build(op: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    torch.manual_seed(0)
    batch, channels, _, _ = shape
    pixels = math.prod(shape) // channels

    def activations() -> Tensor:
        x = torch.randn(shape, device=device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, device=device)

    if op == "depthwise_conv2d":
        tensors = [activations(), numbers(channels, 1, 7, 7), numbers(channels)]
        return Case(ops.depthwise_conv2d, tensors, 1, 2 * 49 * pixels * channels)
    if op == "group_norm":
        groups = max(1, min(32, channels // 4))
        tensors = [activations(), numbers(channels), numbers(channels)]

        def norm(x: Tensor, weight: Tensor, bias: Tensor, fused: bool | str) -> Tensor:
            return ops.group_norm(x, groups, weight, bias, fused=fused)

        return Case(norm, tensors, 1, 8 * pixels * channels)
    if op == "upsample_blur":
        return Case(partial(ops.upsample_blur, kernel_size=5), [activations()], 1, 20 * pixels * channels)
    hidden = 4 * channels
    tensors = [activations(), activations(), numbers(batch, channels), numbers(hidden, channels)]
    tensors += [numbers(hidden), numbers(channels, hidden), numbers(channels), numbers(channels)]
    return Case(ops.modulated_mlp, tensors, 3, 4 * pixels * channels * hidden)


def race(case: Case, names: list[str], device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """A row per implementation that takes these arguments; the reference comes last."""
    tensors = [t.requires_grad_() for t in case.tensors]
    runs: dict[str, dict[str, Callable[[], object]]] = {}
    for name in names:
        try:
            y = case.function(*tensors, fused=name)
        except ValueError:  # its objection to this device, dtype or shape
            continue
        grad = torch.randn_like(y)
        runs[name] = {
            "forward": partial(case.function, *tensors, fused=name),
            "inputs": partial(backward, y, tensors[: case.inputs], grad),
            "backward": partial(torch.autograd.grad, y, tensors, grad, retain_graph=True),
        }
    times: dict[str, dict[str, list[float]]] = {n: {part: [] for part in run} for n, run in runs.items()}
    for _ in range(repeats):
        for name, run in runs.items():
            for part, function in run.items():
                function()  # or it would find in the cache what another one left
                times[name][part].append(seconds(function, device))
    moved = sum(t.numel() * t.element_size() for t in case.tensors) + y.numel() * y.element_size()
    for name, parts in times.items():
        row: dict[str, Any] = {"implementation": name, "bytes": moved, "flops": case.flops}
        for part, taken_s in parts.items():
            row[f"{part}_ms"] = 1e3 * statistics.median(taken_s)
            against = times["reference"][part]
            row[f"{part}_times_faster"] = statistics.median(
                a / b for a, b in zip(against, taken_s, strict=True)
            )
        yield row


def backward(y: Tensor, inputs: list[Tensor], grad: Tensor) -> object:
    with ops.input_gradients_only():
        return torch.autograd.grad(y, inputs, grad, retain_graph=True)


def show(rows: list[dict[str, Any]], where: dict[str, object]) -> None:
    table = Table(title="ms (times faster than the reference)", title_justify="left")
    for heading in ("", "shape", "by", "forward", "gradients of inputs", "all gradients", "GFLOP/s", "GB/s"):
        table.add_column(heading)
    for row in rows:
        cells = [
            f"{row[f'{part}_ms']:.2f} ({row[f'{part}_times_faster']:.2f}x)"
            for part in ("forward", "inputs", "backward")
        ]
        rates = [f"{row[key] / row['forward_ms'] / 1e6:.1f}" for key in ("flops", "bytes")]
        shape = "x".join(map(str, row["shape"]))
        table.add_row(row["op"], shape, row["implementation"], *cells, *rates)
    console = Console(width=150)
    console.print(table)
    console.print(
        ", ".join(f"{key} {value}" for key, value in where.items()), highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
