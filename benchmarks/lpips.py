"""LPIPS forward and backward, plain against ours, and where the time goes.

    python benchmarks/lpips.py --threads 1                256 px, batch 1, float32
    python benchmarks/lpips.py --threads 1 --dtype bf16   worth it where the processor multiplies bfloat16

The plain form is the published one: float32, NCHW memory, the distance by separate operations. Ours computes
in channels-last memory and the given dtype, with the fused distance. Both keep no graph of the target, and
both get the same random weights, on which the time does not depend. The two take turns; the ratio is a median
over turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Stopwatch, one_line, print_table, provenance, write_result
from published_step import PlainPerceptual
from torch import Tensor

from vfmvae.losses.perceptual import LPIPS, VGG16
from vfmvae.training.device import DTYPES, keep_freed_memory, pick_device

KINDS = {  # of work, by what the names of PyTorch's operations contain; the first that fits
    "convolutions": ("conv",),
    "distance": ("lpips", "norm", "mul", "sub", "div", "square", "pow", "where", "sum", "mean"),
    "ReLU and pooling": ("relu", "threshold", "pool"),
    "copies": ("copy", "clone", "fill", "zero"),
}


def main() -> None:
    options = read_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    vgg = VGG16()
    plain = PlainPerceptual(LPIPS(copy.deepcopy(vgg)).to(device).to(memory_format=torch.contiguous_format))
    networks = {"plain": plain, "ours": LPIPS(vgg, DTYPES[options.dtype]).to(device)}
    shape = (options.batch, 3, options.pixels, options.pixels)
    target, prediction = (torch.rand(shape, device=device) * 2 - 1 for _ in range(2))
    prediction.requires_grad_()

    def step_of(network: torch.nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(network(prediction, target).mean(), prediction)

    steps = {name: step_of(network) for name, network in networks.items()}
    watch = Stopwatch(device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.repeats + 1):
        for name, step in steps.items():
            taken = watch.seconds(step)
            if turn > 0:  # the first is to warm up
                times[name].append(taken)
    ratio = statistics.median(a / b for a, b in zip(times["plain"], times["ours"], strict=True))
    result: dict[str, Any] = {**provenance(device), "dtype": options.dtype, "shape": list(shape)}
    result |= {f"{name}_ms": 1e3 * statistics.median(taken) for name, taken in times.items()}
    result |= {"times_faster": ratio}
    result |= {f"{name}_shares": shares(step, device) for name, step in steps.items()}
    write_result(options.json or RESULTS / f"lpips-{options.dtype}-{device.type}.json", result)
    show(result)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/lpips.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of ours")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads; by default what torch takes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def shares(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Share of each kind of work in the time of one step's operations."""
    on_device, activity = device.type == "cuda", torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if on_device else [activity.CPU]
    with torch.profiler.profile(activities=activities) as seen:
        step()
    taken = dict.fromkeys((*KINDS, "others"), 0.0)
    for event in seen.key_averages():
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        name = event.key.lower()
        kinds = (kind for kind, parts in KINDS.items() if any(part in name for part in parts))
        taken[next(kinds, "others")] += own
    total = sum(taken.values())
    return {kind: time / total for kind, time in taken.items()}


def show(result: dict[str, Any]) -> None:
    names = ("plain", "ours")
    rows = [
        [
            name,
            f"{result[f'{name}_ms']:.1f}",
            *(f"{share:.0%}" for share in result[f"{name}_shares"].values()),
        ]
        for name in names
    ]
    title = f"LPIPS forward and backward; ours is {result['times_faster']:.2f} times faster"
    print_table(title, ("", "ms", *result["ours_shares"]), rows)
    print(one_line({key: value for key, value in result.items() if not isinstance(value, dict)}))


if __name__ == "__main__":
    main()
