"""Images per second and peak memory of a whole training step: the published schedule against ours.

    python benchmarks/step.py                                          64 px, the demo's model
    python benchmarks/step.py --size full --dtype bf16 --repeats 3     the published model, random weights

A step is an update of the discriminator and one of the tokenizer, with every loss that the stage has. Both
sides (published_step.py; vfmvae/train_step.py) start from the same weights and take the same images and
random draws, so their first losses must agree, and on CUDA those of the third step, which is the first that a
graph replays, among ours; the command fails if they do not. Then they take turns, and
ratios are medians over the turns: on a shared machine a slow moment meets both. Peak memory is that of a
process of its own for each side. Equivariance regularisation is off, so that all steps are alike.

The JSON goes to benchmarks/results/step-SIZE-DTYPE-DEVICE.json unless --output says otherwise.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from common import RESULTS, print_table, provenance, seconds, write_result
from published_step import PublishedStep
from torch import Tensor

from vfmvae.config import TrainConfig
from vfmvae.data import open_data
from vfmvae.recipes import NO_EQUIVARIANCE, demo, vfm_vae_siglip2_large
from vfmvae.train_graphs import recorded_steps
from vfmvae.train_job import Job
from vfmvae.train_step import training_step
from vfmvae.training.device import DTYPES, pick_device
from vfmvae.training.engine import EngineConfig

Size = Literal["demo", "full"]
Precision = Literal["fp32", "bf16"]
Variant = Literal["reference", "reference fp32", "ours, plain", "ours", "ours, compiled", "ours, graphs"]
Step = Callable[[Tensor], Mapping[str, Tensor]]

ENGINES: dict[Variant, EngineConfig] = {
    "ours, plain": EngineConfig(deterministic=False),  # with the operations' references
    "ours": EngineConfig(deterministic=False),
    "ours, compiled": EngineConfig(deterministic=False, compile="default"),
    "ours, graphs": EngineConfig(deterministic=False, graphs=True),
}
TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "bf16": 3e-2}
"""Of a first loss, relative to the larger of its size and 1."""
MIB = 2**20


@dataclass
class Options:
    """Measure a training step. Example: python benchmarks/step.py --size full --dtype bf16 --repeats 3"""

    size: Size = "demo"
    """demo: 64 px, `mini` as encoder, discriminator and perceptual network. full: 256 px, SigLIP2-L, DINO
    ViT-S and VGG16, all with random weights."""
    dtype: Precision = "fp32"
    """Of our activations. With bf16 the reference is measured in the published mixture and in float32."""
    batch: int | None = None
    """Images per step; by default 8 (demo) or 1 (full)."""
    repeats: int = 10
    """Turns of each side."""
    threads: int | None = None
    """CPU threads; by default what torch takes."""
    device: str = "auto"
    output: Path | None = None
    compiled: bool = False
    """Measure ours with torch.compile too, which takes minutes before the first step; always so on CUDA."""
    memory: bool = True
    """Measure peak memory too, in a process of its own for each side."""
    memory_of: Variant | None = None
    """Only run two steps of this side, and print how much memory they took, in MiB."""


def main() -> None:
    import tyro  # throughput.py uses this file's functions, also where there is no tyro

    options = tyro.cli(Options, prog="python benchmarks/step.py")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    config = configuration(options.size, options.batch, str(device))
    if options.memory_of is not None:
        print(peak_mib(config, options.memory_of, options.dtype, device))
        return
    sides = variants(options.dtype, device, options.compiled)
    memory = {name: peak_mib_of_a_process(name) for name in sides} if options.memory else {}
    steps = build(config, options.dtype, sides)
    images = photographs(config, device)
    losses = next_losses(steps, images)
    check_agreement(losses, TOLERANCE[options.dtype])
    if device.type == "cuda":  # a graph is recorded in the second step
        ours = {name: step for name, step in steps.items() if name in ENGINES}
        race(ours, images, device, 1)
        third = next_losses(ours, images)
        third = {name: {k: of[k] for k in losses["reference"]} for name, of in third.items()}
        check_agreement(third, 2 * TOLERANCE[options.dtype])
    times = race(steps, images, device, options.repeats)
    result = {
        **provenance(device),
        "size": options.size,
        "dtype": options.dtype,
        "batch": config.batch_size,
        "repeats": options.repeats,
        "images_per_second": {n: config.batch_size / statistics.median(t) for n, t in times.items()},
        "times_faster_than": {n: ratio(t, times["ours"]) for n, t in times.items() if n != "ours"},
        "peak_memory_mib": memory,
        # The other reference has the same model, which has made a step by then.
        "first_losses": {name: losses[name] for name in ("reference", "ours")},
    }
    show(result)
    name = f"step-{options.size}-{options.dtype}-{device.type}.json"
    write_result(options.output or RESULTS / name, result)


def variants(dtype: Precision, device: torch.device, compiled: bool) -> list[Variant]:
    """What is measured."""
    # A CPU may be slower in the published mixture of precisions than in float32 throughout.
    sides: list[Variant] = ["reference", *(["reference fp32"] if dtype == "bf16" else []), "ours"]
    sides.insert(-1, "ours, plain")
    sides += ["ours, compiled"] if compiled or device.type == "cuda" else []
    return [*sides, "ours, graphs"] if device.type == "cuda" else sides


def configuration(size: Size, batch: int | None, device: str) -> TrainConfig:
    """A recipe with its first adversarial stage alone."""
    config, usual = (vfm_vae_siglip2_large(), 1) if size == "full" else (demo(), 8)
    stage = next(stage for stage in config.stages if stage.losses.adversarial)
    return replace(
        config,
        stages=(replace(stage, equivariance=NO_EQUIVARIANCE),),
        batch_size=batch or usual,
        device=device,
        engine=ENGINES["ours"],
    )


def build(config: TrainConfig, dtype: Precision, names: Sequence[Variant]) -> dict[Variant, Step]:
    """For each name a function that does one step of images [B, 3, R, R] uint8 and returns its losses.

    The two precisions of the reference train one model, since a full-size one takes gigabytes.
    """
    pretrained = config.tokenizer.encoder.name == "mini"  # the others are downloads
    steps: dict[Variant, Step] = {}
    if any(name not in ENGINES for name in names):
        published = PublishedStep(config, pretrained)
        steps["reference"] = partial(published, low=DTYPES[dtype])
        steps["reference fp32"] = partial(published, low=torch.float32)
    for name in names:
        if name in ENGINES:
            fused = name != "ours, plain"
            job = Job(replace(config, fused=fused, dtype=dtype, engine=ENGINES[name]), pretrained)
            job.enter_stage(0)
            steps[name] = our_step(job)
    return {name: steps[name] for name in names}


def our_step(job: Job) -> Step:
    """A step of the engine, recorded if its configuration says so."""
    update = recorded_steps(job) or partial(training_step, job)

    def step(images: Tensor) -> Mapping[str, Tensor]:
        job.begin_step()
        losses = update([images], job.weights()).losses
        job.state.step += 1
        return losses

    return step


def photographs(config: TrainConfig, device: torch.device) -> Tensor:
    """The first batch of the embedded photographs, uint8 [B, 3, R, R]."""
    source = open_data(None, "train", config.tokenizer.resolution, config.seed)
    return source.batch(0, config.batch_size)["image"].to(device)


def next_losses(steps: Mapping[Variant, Step], images: Tensor) -> dict[Variant, dict[str, float]]:
    """The losses of the next step of each, unweighted."""
    return {name: {k: v.item() for k, v in step(images).items()} for name, step in steps.items()}


def check_agreement(losses: Mapping[Variant, Mapping[str, float]], tolerance: float) -> None:
    """Leave with a sentence where a loss of ours is not that of the first side."""
    first, *others = losses
    for other in others:
        if other not in ENGINES:  # has the model of the first, which has made a step by then
            continue
        for name, expected in losses[first].items():
            found = losses[other][name]
            if not abs(found - expected) <= tolerance * max(1.0, abs(expected)):
                raise SystemExit(
                    f"the sides do not compute the same: {name} is {expected:.6g} in {first!r} and"
                    f" {found:.6g} in {other!r}"
                )


def race(
    steps: Mapping[Variant, Step], images: Tensor, device: torch.device, repeats: int
) -> dict[Variant, list[float]]:
    """Seconds of every step, the sides taking turns; all have done a step before."""
    times: dict[Variant, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds(lambda: step(images), device))  # noqa: B023
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median over the turns."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_mib(config: TrainConfig, variant: Variant, dtype: Precision, device: torch.device) -> float:
    """The most memory that models and two steps took: on the CPU, beyond what there was before."""
    before = _peak_resident_mib()
    images = photographs(config, device)
    step = build(config, dtype, [variant])[variant]
    for _ in range(2):
        step(images)
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / MIB
    return _peak_resident_mib() - before


def _peak_resident_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)


def peak_mib_of_a_process(variant: Variant) -> float:
    """`peak_mib` of this command's configuration in a fresh process."""
    command = [sys.executable, *sys.argv, "--memory-of", variant]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def show(result: Mapping[str, Any]) -> None:
    title = f"{result['size']}, {result['dtype']}, batch {result['batch']}"
    rows = []
    for name, rate in result["images_per_second"].items():
        factor = result["times_faster_than"].get(name)
        shown = "" if factor is None else f"{factor:.2f}x"
        memory = result["peak_memory_mib"].get(name)
        rows.append([name, f"{rate:.2f}", shown, "" if memory is None else f"{memory:.0f}"])
    print_table(title, ("", "images/s", "ours is faster by", "peak memory (MiB)"), rows)
    where = ("date", "device", "threads", "torch", "python")
    print(", ".join(f"{key} {result[key]}" for key in where))


if __name__ == "__main__":
    main()
