"""Images per second and peak memory of encode, decode and the full training step, at two sizes.

    python benchmarks/throughput.py                              everything, on whatever device there is
    python benchmarks/throughput.py --config full --json rows.json

Three paths, all with random weights:

    reference  the published formulation and schedule (published_step.py): per-sample weights, NCHW, the
               published mixture of precisions, the generator run twice in a step; on a CPU without the
               setting by which our processes keep memory that they free
    compile    the same with torch.compile on the blocks of encoder and decoder and on the perceptual network
    fused      ours; "graphs" is the same with the whole step as a CUDA graph (training step, CUDA)

ceiling_share is the time that the arithmetic of the task takes at the rate of a large matrix product, or its
parameters at that of a large copy, whichever is longer, divided by the time it took; both rates are measured
in the same run. The arithmetic is what the task cannot do without: a step runs encoder and decoder once.

The JSON is a list of rows, written as they are measured. What there is no time for, or what does not fit, is
said. On a CPU each path has a process of its own, since memory is measured by what the process held at most,
and runs twice, in turns with the others: other programs only slow it down, so the faster run counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from common import (
    RESULTS,
    Ceilings,
    measure_ceilings,
    one_line,
    print_table,
    provenance,
    seconds,
    write_result,
)
from published_step import PublishedStep
from step import Precision, Size, configuration, our_step
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import vfmvae.train_job as train_job
from vfmvae.config import TrainConfig
from vfmvae.losses.perceptual import LPIPS
from vfmvae.train_job import Job
from vfmvae.training.device import DTYPES, pick_device
from vfmvae.training.regions import compile_blocks, decoder_blocks, encoder_blocks

Route = Literal["fused", "reference", "compile", "graphs"]
Task = Literal["step", "decode", "encode"]
TASKS: tuple[Task, ...] = ("step", "decode", "encode")
FLOPS: dict[Size, dict[Task, float]] = {
    "demo": {"step": 3.28e9, "decode": 0.302e9, "encode": 0.206e9},
    "full": {"step": 2.72e12, "decode": 0.388e12, "encode": 0.761e12},
}
"""Per image, a multiply-add as two: what `count_flops` finds."""
BATCH: dict[str, dict[Size, int]] = {"cuda": {"full": 8, "demo": 64}, "cpu": {"full": 1, "demo": 8}}
SLOW_S = 4.0
"""A call that takes longer on a CPU is measured once, without a warm-up."""
LEAST_S = 15.0
"""With less time left no path is begun."""


class Side(NamedTuple):
    """One path at one size."""

    size: Size
    route: Route


def main() -> int:
    """0, or 1 if a path failed for another reason than memory or time."""
    options = read_options()
    end, fine = time.monotonic() + 60 * options.minutes, True
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    options.dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    options.json = options.json or RESULTS / f"throughput-{device.type}.json"
    if options.side is not None:
        size, route = options.side.split("/")
        ceilings = Ceilings(*map(float, options.ceilings.split(",")))
        return int(not measure(Side(size, route), options, device, ceilings))
    ceilings = measure_ceilings(device, DTYPES[options.dtype])
    write_result(options.json, [])
    order = sides(options.config, device.type)
    if device.type == "cpu" and Side("full", "compile") in order:
        print("full, compile: not measured, a CPU compiles the full-size model for minutes", flush=True)
        order.remove(Side("full", "compile"))
    for number, side in enumerate(order * (2 if device.type == "cpu" else 1)):
        left_s = end - time.monotonic()
        if left_s < LEAST_S:
            again = "" if number < len(order) else " a second time"
            print(
                f"{side.size}, {side.route}: not measured{again}, the {options.minutes:g} minutes are over",
                flush=True,
            )
        elif device.type == "cpu":
            fine &= measure_in_a_process(side, options, ceilings, left_s)
        else:
            fine &= measure(side, options, device, ceilings)
    show(json.loads(options.json.read_text()), {**provenance(device), **ceilings.as_dict()})
    return int(not fine)


def read_options() -> argparse.Namespace:
    # argparse: a fresh GPU machine may not have tyro.
    parser = argparse.ArgumentParser(prog="python benchmarks/throughput.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", choices=("demo", "full", "all"), default="all")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of activations; bf16 on CUDA, else fp32")
    parser.add_argument(
        "--batch", type=int, help="by default 8 and 64 (full, demo) on CUDA, 1 and 8 on a CPU"
    )
    parser.add_argument("--minutes", type=float, default=7.0, help="no path goes on for longer (7)")
    parser.add_argument("--threads", type=int, help="CPU threads; by default what torch takes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # this process measures SIZE/PATH alone
    parser.add_argument("--ceilings", help=argparse.SUPPRESS)
    return parser.parse_args()


def sides(config: str, device: str) -> list[Side]:
    """What to measure, most important first; on a CPU the quick ones first."""
    routes: list[Route] = ["fused", "reference"]
    sizes: list[Size] = ["full", "demo"] if device == "cuda" else ["demo", "full"]
    order = [Side(size, route) for size in sizes for route in routes]
    order += [Side("full", "graphs"), Side("demo", "graphs")] if device == "cuda" else []
    order += [Side("demo", "compile"), Side("full", "compile")]
    return [side for side in order if config in (side.size, "all")]


def measure_in_a_process(side: Side, options: argparse.Namespace, ceilings: Ceilings, limit_s: float) -> bool:
    """`measure` in a process of its own, which adds its rows to the same file."""
    command = [sys.executable, __file__, "--side", "/".join(side), "--dtype", options.dtype]
    command += ["--ceilings", ",".join(map(str, ceilings.as_dict().values()))]
    command += ["--json", str(options.json), "--device", options.device]
    for name in ("batch", "threads"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    try:
        return subprocess.run(command, check=False, timeout=limit_s).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{side.size}, {side.route}: ended, the {options.minutes:g} minutes are over", flush=True)
        return True


def measure(side: Side, options: argparse.Namespace, device: torch.device, ceilings: Ceilings) -> bool:
    """Adds the rows of one side to the file, with half the batch where memory ends; False if it fails."""
    fine, before = True, peak_bytes(device)
    where = provenance(device)
    where |= {"device": str(device), "device_name": where["device"]}
    batch = options.batch or BATCH[device.type][side.size]
    # On a CPU only the most that a process ever held is known, so the task that needs most comes last.
    remaining = list(TASKS if device.type == "cuda" else TASKS[::-1])
    if side.route == "graphs":
        remaining = ["step"]
    while remaining:
        try:
            models = build(side, options.dtype, device, batch)
            while remaining:
                row = measure_task(remaining[0], models, side, device, ceilings)
                peak = peak_bytes(device) - (before if device.type == "cpu" else 0)
                row |= {"dtype": options.dtype, "batch": batch, "peak_memory_bytes": peak}
                print(one_line(row), flush=True)
                add_row(options.json, {**row, **where, **ceilings.as_dict()})
                remaining.pop(0)
        except torch.OutOfMemoryError:
            print(f"{side.size}, {side.route}, {remaining[0]}: no memory for {batch} images", flush=True)
            batch //= 2
            remaining = remaining if batch else []
        except RuntimeError as error:  # of a compiler or a kernel: the other paths are measured
            print(f"{side.size}, {side.route}, {remaining[0]}: {type(error).__name__}: {error}", flush=True)
            fine, remaining = False, []
        models = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return fine


class Models(NamedTuple):
    """What one side runs."""

    job: Job
    runs: dict[Task, Callable[[], object]]
    batch: int


def build(side: Side, dtype: Precision, device: torch.device, batch: int) -> Models:
    """The models of one side with random weights, and one call of each task."""
    config = configuration(side.size, batch, str(device))
    images = random_images(config, device)
    pretrained = side.size == "demo"  # the full-size networks are downloads
    if side.route in ("fused", "graphs"):
        engine = replace(config.engine, graphs=side.route == "graphs")
        job = Job(replace(config, fused=True, dtype=dtype, engine=engine), pretrained)
        job.enter_stage(0)
        step, decode = partial(our_step(job), images), job.tokenizer.decode
    else:
        with patch.object(train_job, "keep_freed_memory"):  # which is ours
            published = PublishedStep(config, pretrained)
        job = published.job
        step = partial(published, images, low=DTYPES[dtype])
        published.low = DTYPES[dtype]
        decode = partial(published.decode, job.tokenizer, multiscale=False)
        if side.route == "compile":
            compile_reference(job)
    size = config.tokenizer.resolution // config.tokenizer.downsample
    latents = torch.randn(batch, config.tokenizer.latent_channels, size, size, device=device)
    runs: dict[Task, Callable[[], object]] = {
        "step": step,
        "decode": partial(decode, latents),
        "encode": partial(job.tokenizer.encode, images),
    }
    return Models(job, runs, batch)


def compile_reference(job: Job) -> None:
    """torch.compile of what takes the reference's time, block by block as our engine does."""
    tokenizer = job.tokenizer
    compile_blocks([*encoder_blocks(tokenizer.encoder), *decoder_blocks(tokenizer)], "default")
    network = job.perceptual.vgg if isinstance(job.perceptual, LPIPS) else job.perceptual
    if isinstance(network, nn.Module):
        compile_blocks([network], "default")


def random_images(config: TrainConfig, device: torch.device) -> Tensor:
    size = config.tokenizer.resolution
    return torch.randint(0, 256, (config.batch_size, 3, size, size), dtype=torch.uint8, device=device)


def measure_task(
    task: Task, models: Models, side: Side, device: torch.device, ceilings: Ceilings
) -> dict[str, Any]:
    tokenizer = models.job.tokenizer
    tokenizer.train(task == "step")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.set_grad_enabled(task == "step"):
        taken_s = call_seconds(models.runs[task], device, first_is_slow=side.route == "compile")
    tokenizer.zero_grad(set_to_none=True)
    floor_s = ceilings.floor_seconds(
        parameter_bytes(models.job, task), models.batch * FLOPS[side.size][task], "matrix"
    )
    return {
        "name": task,
        "config": side.size,
        "path": side.route,
        "images_per_second": models.batch / taken_s,
        "ceiling_share": floor_s / taken_s,
    }


def call_seconds(run: Callable[[], object], device: torch.device, first_is_slow: bool = False) -> float:
    """The median of up to ten calls, in about five seconds, after a warm-up; slow ones on a CPU are one."""
    last = seconds(run, device)
    if device.type == "cpu" and last > SLOW_S and not first_is_slow:
        return last
    for _ in range(3 if device.type == "cuda" else 1):  # CUDA graphs are recorded in the second and third
        last = seconds(run, device)
    repeats = max(3, min(10, int(5 / last)))
    return statistics.median(seconds(run, device) for _ in range(repeats))


def parameter_bytes(job: Job, task: Task) -> float:
    """What every call must read and write of the parameters: Adam, the gradient and the average of weights
    take nine words of each trained one, all others are read once."""
    tokenizer = job.tokenizer
    parts = {
        "encode": (tokenizer.encoder, tokenizer.fusion),
        "decode": (tokenizer.decompress, tokenizer.decoder),
    }
    modules: tuple[nn.Module, ...] = parts.get(task, (tokenizer,))
    words = 9 if task == "step" else 1
    return sum(
        p.numel() * p.element_size() * (words if p.requires_grad else 1)
        for m in modules
        for p in m.parameters()
    )


def peak_bytes(device: torch.device) -> int:
    """The most memory that was taken: on CUDA since it was last reset, else since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def count_flops(size: Size) -> dict[Task, float]:
    """Operations per image of the matrix products and convolutions of our schedule, on a CPU."""
    config = replace(configuration(size, 1, "cpu"), fused=False, dtype="fp32")
    job = Job(config, pretrained=size == "demo")
    job.enter_stage(0)
    images = random_images(config, torch.device("cpu"))
    with torch.no_grad():
        latents = job.tokenizer.encode(images).mode()
    runs: dict[Task, Callable[[], object]] = {
        "step": partial(our_step(job), images),
        "decode": partial(job.tokenizer.decode, latents),
        "encode": partial(job.tokenizer.encode, images),
    }
    counted: dict[Task, float] = {}
    for task, run in runs.items():
        with torch.set_grad_enabled(task == "step"), sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
            run()
        counted[task] = counter.flops
    return counted


class _Counter(TorchDispatchMode):
    """torch's FlopCounterMode without its module hooks, which torch.autograd.grad cannot have."""

    flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if packet is torch.ops.aten.convolution_backward:  # torch's own count takes one group
            grad, _, weight, *_, wanted = args
            self.flops += 2 * grad.numel() * weight[0].numel() * sum(wanted[:2])
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the file, or put it in the place of a slower one of the same."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for number, other in enumerate(rows):
        if all(other[name] == row[name] for name in ("config", "name", "path", "batch")):
            rows[number] = max(other, row, key=lambda r: r["images_per_second"])
            break
    else:
        rows.append(row)
    write_result(path, rows)


def show(rows: list[dict[str, Any]], where: dict[str, Any]) -> None:
    """Each task's paths and how much faster ours is than each."""
    lines = []
    for row in rows:
        fused = rate_of(rows, row["config"], row["name"], "fused")
        ratio = f"{fused / row['images_per_second']:.2f}x" if fused and row["path"] != "fused" else ""
        cells = [f"{row['images_per_second']:.3g}", ratio, f"{row['peak_memory_bytes'] / 2**20:.0f}"]
        what = f"{row['config']}, {row['name']}, batch {row['batch']}, {row['dtype']}"
        lines.append([what, row["path"], *cells, f"{row['ceiling_share']:.1%}"])
    headings = ("", "path", "images/s", "fused is faster by", "peak memory (MiB)", "of the ceiling")
    print_table("images/s", headings, lines)
    print(one_line(where))


def rate_of(rows: list[dict[str, Any]], size: str, task: str, route: str) -> float | None:
    found = (r for r in rows if (r["config"], r["name"], r["path"]) == (size, task, route))
    return next((row["images_per_second"] for row in found), None)


if __name__ == "__main__":
    sys.exit(main())
