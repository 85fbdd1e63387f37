"""Every implementation of the operations against their reference and their floor, forward and backward.

    python benchmarks/kernels.py                               the demo's shapes and the full-size ones
    python benchmarks/kernels.py --op group_norm --dtype bf16
    python benchmarks/kernels.py --dtype bf16 --compile        with torch.compile of the reference (CUDA)

The implementations of a case take turns, and ratios to the reference are medians over the turns. "inputs" is
the backward pass that leaves out gradients of weights (the one that measures an adaptive loss weight). The
floor of a pass is the time that its bytes take at the rate of a large copy, or its multiply-adds at that of a
large matrix product (outside of matrix units: at the GPU's clock), whichever is longer; both rates are
measured in the same run. Bytes and FLOPs are those that a pass cannot do without (case.py).

On CUDA full-size shapes have a batch of 8, caches are emptied before every call, only the device's work is
timed, and the reference gets NCHW memory, as published. On a CPU the batch is 1, a call finds in the caches
what its own last one left, and the reference gets the same channels-last tensors as the others.

The JSON goes to benchmarks/results/kernels-DTYPE-DEVICE.json unless --json says otherwise, row by row.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from case import PASSES, Case, Pass, Shape
from cases import OPERATIONS
from common import (
    RESULTS,
    Ceilings,
    Stopwatch,
    measure_ceilings,
    one_line,
    print_table,
    provenance,
    write_result,
)
from torch import Tensor

from vfmvae import ops
from vfmvae.training.device import DTYPES, keep_freed_memory, pick_device

COMPILE = "compile"
"""How the row of torch.compile(reference) is called."""
GPU_BATCH = 8

Runs = dict[Pass, Callable[[], object]]


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
    ceilings = measure_ceilings(device, DTYPES[options.dtype])
    path = options.json or RESULTS / f"kernels-{options.dtype}-{device.type}.json"
    result: dict[str, Any] = {**provenance(device), "dtype": options.dtype}
    result |= {"ceilings": ceilings.as_dict(), "rows": []}
    for row in measured(options, device, ceilings):
        result["rows"].append(row)
        write_result(path, result)
    show(result["rows"], {**provenance(device), **ceilings.as_dict()})


def read_options() -> argparse.Namespace:
    # argparse: a fresh GPU machine may not have tyro.
    parser = argparse.ArgumentParser(prog="python benchmarks/kernels.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", choices=list(OPERATIONS), help="one operation; without it all of them")
    parser.add_argument("--size", choices=("demo", "full", "all"), default="all")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--batch", type=int, help="of full-size shapes; by default 8 on CUDA, else 1")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile of the reference too")
    parser.add_argument("--threads", type=int, help="CPU threads; by default what torch takes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--exercise", metavar="NAME", help="only run this implementation, at odd shapes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.compile and pick_device(options.device).type != "cuda":
        parser.error("--compile is for CUDA: a CPU would compile for minutes")
    return options


def exercise(name: str, device: torch.device) -> None:
    """Forward and backward of one implementation of every operation that has it: for compute-sanitizer."""
    for label, operation in OPERATIONS.items():
        if name not in operation.op.names():
            print(f"{label} has no {name!r}", flush=True)
            continue
        for dtype in DTYPES.values():
            for shape in operation.shapes["odd"]:
                case = operation.build(shape, dtype, device)
                try:
                    for run in prepare(case, name, case.tensors)[0].values():
                        run()
                except ValueError as error:
                    if not is_objection(error):
                        raise
                    print(error)
        print(f"{label} done", flush=True)


def measured(
    options: argparse.Namespace, device: torch.device, ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    """A row per operation, shape and implementation, the largest shapes first."""
    watch, labels = Stopwatch(device), [options.op] if options.op else list(OPERATIONS)
    for size in ("full", "demo") if options.size == "all" else (options.size,):
        for number in range(max(len(OPERATIONS[label].shapes[size]) for label in labels)):
            for label in labels:
                shapes = OPERATIONS[label].shapes[size][::-1]
                if number >= len(shapes):
                    continue
                shape = shapes[number]
                if size == "full":
                    shape = (options.batch or (GPU_BATCH if device.type == "cuda" else 1), *shape[1:])
                of_case = {"op": label, "size": size, "shape": list(shape)}
                for row in measure_case(label, shape, options, watch, ceilings):
                    yield of_case | row


def measure_case(
    label: str, shape: Shape, options: argparse.Namespace, watch: Stopwatch, ceilings: Ceilings
) -> list[dict[str, Any]]:
    """The rows of one operation at one shape; one with an "error" where it could not be measured."""
    operation = OPERATIONS[label]
    torch.manual_seed(0)
    names = operation.op.names() + ([COMPILE] if options.compile else [])
    try:
        case = operation.build(shape, DTYPES[options.dtype], watch.device)
        return list(race(case, names, watch, options.repeats, ceilings))
    except RuntimeError as error:  # out of memory, say: the other cases still count
        return [failed("all", error)]


def is_objection(error: Exception) -> bool:
    """Whether an implementation does not take this device, dtype or shape, and says so (ops/dispatch.py)."""
    return isinstance(error, ValueError) and "cannot be used here" in str(error)


def failed(name: str, error: Exception) -> dict[str, Any]:
    print(f"{name}: {type(error).__name__}: {error}", flush=True)
    return {"implementation": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def race(
    case: Case, names: list[str], watch: Stopwatch, repeats: int, ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    """A row per implementation that takes these arguments, with an "error" where it breaks."""
    cuda = watch.device.type == "cuda"
    runs: dict[str, Runs] = {}
    moved: dict[Pass, float] = {}
    for name in names:
        published = cuda and name in ("reference", COMPILE)
        tensors = [t.contiguous() for t in case.tensors] if published else case.tensors
        try:
            run, y = prepare(case, name, tensors)
            for function in run.values():
                watch.seconds(function)  # kernels are compiled and chosen
        # TritonError is an Exception of its own, and a launch with wrong arguments a TypeError: whatever one
        # implementation raises, the others are measured.
        except Exception as error:
            if not is_objection(error):
                yield failed(name, error)
            continue
        runs[name], moved = run, case.moved_bytes(y)
    times: dict[str, dict[Pass, list[float]]] = {
        name: {part: [] for part in run} for name, run in runs.items()
    }
    for _ in range(repeats):
        for name, run in runs.items():
            for part, function in run.items():
                if not cuda:
                    function()  # or it would find in the cache what another one left
                times[name][part].append(watch.seconds(function))
    for name, parts in times.items():
        row: dict[str, Any] = {"implementation": name}
        for part, taken in parts.items():
            row |= of_pass(part, statistics.median(taken), case, moved[part], ceilings)
            if "reference" in times:
                against = times["reference"][part]
                ratios = [a / b for a, b in zip(against, taken, strict=True)]
                row[f"{part}_times_faster"] = statistics.median(ratios)
        yield row


def of_pass(part: Pass, taken_s: float, case: Case, moved: float, ceilings: Ceilings) -> dict[str, float]:
    floor_s = ceilings.floor_seconds(moved, case.flops[part], case.unit)
    return {
        f"{part}_ms": 1e3 * taken_s,
        f"{part}_bytes": moved,
        f"{part}_flops": case.flops[part],
        f"{part}_floor_ms": 1e3 * floor_s,
        f"{part}_share": floor_s / taken_s,
    }


def prepare(case: Case, name: str, tensors: list[Tensor]) -> tuple[Runs, Tensor]:
    """What each pass calls, and the output; ValueError where the implementation objects."""
    tensors = [t.detach().requires_grad_(case.differentiable) for t in tensors]
    function = compiled(case) if name == COMPILE else partial(case.function, fused=name)
    y = function(*tensors)
    if not case.differentiable:
        return {"forward": partial(function, *tensors)}, y
    grad = torch.randn_like(y)
    runs: Runs = {
        "forward": partial(function, *tensors),
        "inputs": partial(backward, y, tensors[: case.inputs], grad),
        "backward": partial(torch.autograd.grad, y, tensors, grad, retain_graph=True),
    }
    return runs, y


def compiled(case: Case) -> Callable[..., Tensor]:
    """The reference, compiled with all tuning. Without CUDA graphs, which save launches, not device time."""
    torch.compiler.reset()
    # Or a graph could not go backward twice.
    torch._functorch.config.donated_buffer = False

    def reference(*tensors: Tensor) -> Tensor:
        return case.function(*tensors, fused="reference")

    return torch.compile(reference, mode="max-autotune-no-cudagraphs", dynamic=False)


def backward(y: Tensor, inputs: list[Tensor], grad: Tensor) -> object:
    with ops.input_gradients_only():
        return torch.autograd.grad(y, inputs, grad, retain_graph=True)


def show(rows: list[dict[str, Any]], where: dict[str, Any]) -> None:
    cells = []
    for row in sorted(rows, key=lambda row: list(OPERATIONS).index(row["op"])):
        found = [row["error"]] if "error" in row else [cell(row, part) for part in PASSES]
        cells.append([row["op"], "x".join(map(str, row["shape"])), row["implementation"], *found])
    headings = ("", "shape", "by", "forward", "gradients of inputs", "all gradients")
    print_table("ms (times faster than the reference, share of the floor)", headings, cells)
    print(one_line(where))


def cell(row: dict[str, Any], part: Pass) -> str:
    if f"{part}_ms" not in row:
        return ""
    faster = row.get(f"{part}_times_faster", float("nan"))
    return f"{row[f'{part}_ms']:.3f} ({faster:.2f}x, {row[f'{part}_share']:.0%})"


if __name__ == "__main__":
    main()
