"""Images per second of training diffusion transformers and of sampling from them.

    python benchmarks/diffusion.py                               SiT-XL/1 and LightningDiT-XL/1 on a GPU
    python benchmarks/diffusion.py --model reg --batch 128       with a class token and a REPA head
    python benchmarks/diffusion.py --only sampling --steps 250 --repeats 1

Four paths from the same random weights, in bfloat16 on CUDA:

    reference            the published form, see published_diffusion.py
    reference, compiled  the same with torch.compile on each block
    fused                ours: vfmvae/diffusion_step.py, activations in the low precision throughout
    fused, compiled      the same with engine.compile

They take turns, and ratios are medians over the turns. First losses must agree, or the command fails. A
training step is forward, backward, clipping, AdamW and the average of the weights, on inputs that are on the
device already. matrix_share is the arithmetic of the step (6 per parameter of a product and token, and
attention; three times a forward) at the rate of a large matrix product, measured in the same run, divided by
the time it took.

Sampling (Euler; no decoder) is unguided, guided at times up to 0.8 alone, or guided always: two passes in
every step. All steps of a kind cost the same, so some are run, and images/s are those of 250; `--steps` must
be a multiple of 5, so that the guided share is that of 250.

On a CPU the model has few of its blocks (--depth), which are all alike, and paths are compiled on demand
(--compiled). peak_memory_bytes of training is what tensors of this path took at most; on a CPU, what a
process of its own took.

The JSON goes to benchmarks/results/diffusion-DEVICE.json unless --output says otherwise, as it is measured.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

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
from diffusion_sides import (
    TINY,
    Model,
    Route,
    Side,
    build,
    build_job,
    configuration,
    flops_per_image,
    our_side,
    published_side,
    published_step,
    random_batch,
)

from vfmvae.diffusion import SIZES, DiffusionTransformer
from vfmvae.diffusion.guidance import Guidance
from vfmvae.diffusion.samplers import time_grid
from vfmvae.diffusion.sampling import Sampling
from vfmvae.diffusion.sampling import run as run_sampling
from vfmvae.training.device import DTYPES, pick_device

Task = Literal["training", "sampling"]
MODELS: dict[str, tuple[Model, ...]] = {
    **{name: (name,) for name in get_args(Model)},
    "both": ("sit", "lightningdit"),
}
GUIDANCE: dict[str, Guidance] = {
    "none": Guidance(),
    "interval": Guidance(4.0, (0.0, 0.8)),
    "always": Guidance(4.0),
}
PUBLISHED_STEPS = 250
BATCH = {"cuda": 64, "cpu": 2}
REPEATS = {"cuda": 5, "cpu": 3}
TRAINING_STEPS = {"cuda": 5, "cpu": 1}
"""In a turn, without waiting in between, as in a run."""
CPU_DEPTH = 4
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
"""Of a first loss, relative to the larger of its size and 1."""


def main() -> None:
    options = read_options()
    if options.memory_of is not None:
        print(resident_peak_bytes(options))
        return
    device = pick_device(options.device)
    ceilings = measure_ceilings(device, DTYPES[options.dtype])
    result = {**provenance(device), "ceilings": ceilings.as_dict(), "rows": []}
    for model in MODELS[options.model]:
        for row in measured(model, options, device, ceilings):
            result["rows"].append(row)
            write_result(options.output, result)
    show(result["rows"], {**provenance(device), **ceilings.as_dict()})


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    # argparse: a fresh GPU machine may not have tyro.
    parser = argparse.ArgumentParser(prog="python benchmarks/diffusion.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", choices=MODELS, default="both")
    parser.add_argument("--size", choices=("tiny", *SIZES), help="by default XL on CUDA, else B")
    parser.add_argument("--depth", type=int, help=f"blocks; by default all on CUDA, else at most {CPU_DEPTH}")
    parser.add_argument("--batch", type=int, help=f"by default {BATCH['cuda']} on CUDA, else {BATCH['cpu']}")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="by default bf16 on CUDA, else fp32")
    parser.add_argument("--only", choices=get_args(Task))
    parser.add_argument("--steps", type=int, default=5, help="of sampling, a multiple of 5 (5)")
    parser.add_argument("--repeats", type=int, help="turns; by default 5 on CUDA, else 3")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="by default on CUDA alone")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out peak memory")
    parser.add_argument("--threads", type=int, help="CPU threads; by default what torch takes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", "--json", type=Path, metavar="FILE")
    parser.add_argument("--memory-of", choices=("reference", "fused"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.steps % 5:
        parser.error(f"--steps is {options.steps}; it must be a multiple of 5")
    kind = pick_device(options.device).type
    defaults = {
        "size": "XL" if kind == "cuda" else "B",
        "batch": BATCH[kind],
        "dtype": "bf16" if kind == "cuda" else "fp32",
        "repeats": REPEATS[kind],
        "compiled": kind == "cuda",
        "output": RESULTS / f"diffusion-{kind}.json",
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.depth is None:
        all_of_them = SIZES.get(options.size, TINY)["depth"]
        options.depth = all_of_them if kind == "cuda" else min(all_of_them, CPU_DEPTH)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def measured(
    name: Model, options: argparse.Namespace, device: torch.device, ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    """The rows of one model; with half the batch where memory ends."""
    done: set[Task] = set()
    while options.batch:
        sides: dict[Route, Side] = {}
        try:
            sides = build(name, options, device)
            for task in get_args(Task):
                if task in done or options.only not in (None, task):
                    continue
                measure = training_rows if task == "training" else sampling_rows
                rows = list(measure(name, sides, options, device, ceilings))
                done.add(task)
                yield from rows
            return
        except torch.OutOfMemoryError:
            print(f"{name}: no memory for {options.batch} images", flush=True)
            options.batch //= 2
        finally:
            sides.clear()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def training_rows(
    name: Model,
    sides: dict[Route, Side],
    options: argparse.Namespace,
    device: torch.device,
    ceilings: Ceilings,
) -> Iterator[dict[str, Any]]:
    check_agreement(sides, TOLERANCE[options.dtype])
    steps = TRAINING_STEPS[device.type]

    def turn(side: Side) -> None:
        for _ in range(steps):
            side.train()

    memory = {path: peak_bytes(path, name, sides, options, device) for path in sides}
    times = race({path: partial(turn, side) for path, side in sides.items()}, device, options.repeats)
    flops = flops_per_image(sides["fused"].model.config)
    for path, taken in times.items():
        rate = options.batch * steps / statistics.median(taken)
        yield {
            **described("training", name, path, sides, options),
            "images_per_second": rate,
            "times_faster_than_reference": ratio(times["reference"], taken),
            "flops_per_image": 3 * flops,
            "matrix_share": 3 * flops * rate / ceilings.matrix_flops,
            "peak_memory_bytes": memory[path],
        }


def sampling_rows(
    name: Model,
    sides: dict[Route, Side],
    options: argparse.Namespace,
    device: torch.device,
    ceilings: Ceilings,
) -> Iterator[dict[str, Any]]:
    config = sides["fused"].model.config
    torch.manual_seed(0)
    noise = torch.randn(options.batch, config.channels, config.latent_size, config.latent_size, device=device)
    labels = torch.randint(config.classes, (options.batch,), device=device)

    def sample(side: Side, guidance: Guidance, steps: int) -> None:
        with side.around():
            run_sampling(Sampling("euler", steps, guidance), side.model, noise, labels)

    for side in sides.values():  # meet both sizes of a batch, which are compiled apart
        sample(side, GUIDANCE["none"], 1)
        sample(side, GUIDANCE["always"], 1)
    pairs = list(product(sides, GUIDANCE))
    runs = {pair: partial(sample, sides[pair[0]], GUIDANCE[pair[1]], options.steps) for pair in pairs}
    times = race(runs, device, options.repeats)
    flops = flops_per_image(config)
    for (path, kind), taken in times.items():
        passes = 1 + guided_share(GUIDANCE[kind], options.steps)
        rate = options.batch / (statistics.median(taken) * PUBLISHED_STEPS / options.steps)
        yield {
            **described("sampling", name, path, sides, options),
            "guided": kind,
            "steps": PUBLISHED_STEPS,
            "steps_measured": options.steps,
            "passes_per_step": passes,
            "images_per_second": rate,
            "times_faster_than_always": ratio(times[path, "always"], taken),
            "times_faster_than_reference_always": ratio(times["reference", "always"], taken),
            "matrix_share": passes * PUBLISHED_STEPS * flops * rate / ceilings.matrix_flops,
        }


def described(
    task: Task, name: Model, path: Route, sides: dict[Route, Side], options: argparse.Namespace
) -> dict[str, Any]:
    model = sides[path].model
    return {
        "task": task,
        "model": name,
        "size": options.size,
        "depth": options.depth,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": model.config.tokens,
        "batch": options.batch,
        "dtype": options.dtype,
        "path": path,
    }


def check_agreement(sides: dict[Route, Side], tolerance: float) -> None:
    """Everybody's first step; leaves with a sentence where ours has other losses than the published form.

    Compiled sides go on from the weights that their own have reached: one step, all of them.
    """
    first = {path: {k: v.item() for k, v in side.train().items()} for path, side in sides.items()}
    for ours, published in (("fused", "reference"), ("fused, compiled", "reference, compiled")):
        for name, expected in first.get(published, {}).items():
            found = first[ours][name]
            if not abs(found - expected) <= tolerance * max(1.0, abs(expected)):
                raise SystemExit(
                    f"the sides do not compute the same: {name} is {expected:.6g} in {published!r} and"
                    f" {found:.6g} in {ours!r}"
                )


def race(
    runs: Mapping[Any, Callable[[], object]], device: torch.device, repeats: int
) -> dict[Any, list[float]]:
    """Seconds of every turn."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median over the turns."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def guided_share(guidance: Guidance, steps: int) -> float:
    """Of the steps, those with two passes."""
    return statistics.mean(guidance.guides(t) for t in time_grid(steps)[:-1])


def peak_bytes(
    path: Route, name: Model, sides: dict[Route, Side], options: argparse.Namespace, device: torch.device
) -> int | None:
    """The most that tensors of one path take in a step, its state included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        sides[path].train()
        other: Route = "reference" if path.startswith("fused") else "fused"
        return torch.cuda.max_memory_allocated(device) - state_bytes(sides[other])
    if path.endswith("compiled") or not options.memory:
        return None  # with a compiler its own memory would be in it
    command = [sys.executable, __file__, "--memory-of", path, "--model", name, "--device", str(device)]
    for option in ("size", "depth", "batch", "dtype", "threads"):
        if getattr(options, option) is not None:
            command += [f"--{option}", str(getattr(options, option))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def state_bytes(side: Side) -> int:
    """Weights, gradients, moments and averages."""
    parameters = list(side.model.parameters())
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None), *side.tensors()]
    return sum(t.numel() * t.element_size() for t in tensors)


def resident_peak_bytes(options: argparse.Namespace) -> int:
    """Of two steps of one side, beyond what this process held before."""
    device, before = pick_device(options.device), _peak_resident_bytes()
    config = configuration(options.model, options, device)
    batch = random_batch(config, device)
    if options.memory_of == "fused":
        side = our_side(build_job(config, batch), batch)
    else:
        weights = DiffusionTransformer(config.diffusion).state_dict()
        side = published_side(published_step(config, batch, weights, device))
        del weights
    for _ in range(2):
        side.train()
    return _peak_resident_bytes() - before


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage knows the peak of the process that started this one, if that is higher
        lines = (line.split() for line in status.read_text().splitlines())
        return next(int(words[1]) * 1024 for words in lines if words[0] == "VmHWM:")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def show(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any]) -> None:
    """A table for each task."""
    title = "{model}-{size}, depth {depth}, batch {batch}, {dtype}"
    training = [
        [
            title.format(**row),
            row["path"],
            f"{row['images_per_second']:.3g}",
            f"{row['times_faster_than_reference']:.2f}x",
            f"{row['matrix_share']:.1%}",
            "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:.0f}",
        ]
        for row in rows
        if row["task"] == "training"
    ]
    sampling = [
        [
            title.format(**row),
            row["path"],
            row["guided"],
            f"{row['images_per_second']:.3g}",
            f"{row['times_faster_than_always']:.2f}x",
            f"{row['times_faster_than_reference_always']:.2f}x",
        ]
        for row in rows
        if row["task"] == "sampling"
    ]
    if training:
        headings = ("", "path", "images/s", "faster than reference", "of the matrix rate", "peak MiB")
        print_table("training", headings, training)
    if sampling:
        headings = ("", "path", "guided", "images/s", "faster than always", "than the reference's always")
        print_table(f"sampling, {PUBLISHED_STEPS} steps", headings, sampling)
    print(one_line(where))


if __name__ == "__main__":
    main()
