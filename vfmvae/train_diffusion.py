"""Train a diffusion transformer on a tokenizer's latents.

    python -m vfmvae.train_diffusion --fused                             the demo: drawn shapes, on a CPU
    python -m vfmvae.train_diffusion --fused --recipe vfm_vae_reg_xl --latents latents    from `vfmvae encode`
    python -m vfmvae.train_diffusion --run-dir runs/diffusion_demo --resume               go on after a stop
    torchrun --nproc-per-node 8 -m vfmvae.train_diffusion ...                             several GPUs

A run folder holds config.json, metrics.jsonl, checkpoints/, model.safetensors (averaged weights, with the
latents' statistics) and samples.png; `vfmvae.load(run folder)` gives the model, `vfmvae sample` pictures. One
step is in diffusion_step.py, what it works on in diffusion_job.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vfmvae.cli import command, usage
from vfmvae.data import Images
from vfmvae.diffusion.files import HASH
from vfmvae.diffusion_config import DiffusionConfig
from vfmvae.diffusion_evaluation import DiffusionEvaluation, evaluate
from vfmvae.diffusion_inputs import ImageInputs
from vfmvae.diffusion_job import DiffusionJob
from vfmvae.diffusion_plan import describe
from vfmvae.diffusion_step import diffusion_step
from vfmvae.model_files import write_state
from vfmvae.train_arguments import DIFFUSION, parse_training
from vfmvae.training.device import device_name, pick_device, slow_on_cpu
from vfmvae.training.distributed import rank, world_size
from vfmvae.training.figures import write_samples
from vfmvae.training.job import StepResult
from vfmvae.training.run import Run, carry_out, leaving_early, run_place
from vfmvae.training.run_folder import RunFolder


def train(config: DiffusionConfig, folder: RunFolder, console: Console) -> None:
    """Train from the folder's newest checkpoint, or from the start, to the last step; see `carry_out`."""
    config.log.check_available()
    with usage():
        pick_device(config.device)
    with run_place(config, folder, console) as speaking:
        with leaving_early(folder, speaking):
            run = DiffusionRun(config, folder, speaking)
        carry_out(run)


class DiffusionRun(Run[DiffusionJob, DiffusionEvaluation]):
    """The run of a diffusion transformer."""

    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, folder: RunFolder, console: Console) -> None:
        self.started = time.perf_counter()
        super().__init__(DiffusionJob(config), folder, console)

    def restore(self) -> bool:
        """Also compares latents and tokenizer with what the run began with."""
        found = super().restore()
        self.job.check_tokenizer()
        self.job.take_statistics()
        return found

    def step(self, batch: Any) -> StepResult:
        return diffusion_step(self.job, batch)

    def measure(self) -> DiffusionEvaluation:
        return evaluate(self.job)

    def write_picture(self, found: DiffusionEvaluation) -> Path | None:
        """Samples of the averaged weights, if there is what decodes them."""
        if found.samples is None:
            return None
        return write_samples(self.folder.path, self.position.seen_images, found.samples)

    def write_weights(self) -> None:
        weights = self.job.ema.export()
        metadata = {HASH: self.job.source.tokenizer_hash or ""}
        if rank() == 0:
            self.folder.write(self.folder.model, lambda path: write_state(weights, path, metadata))

    def announce(self) -> None:
        """What trains and how large it is; on what device, in what dtype, with what operations."""
        job, config, engine = self.job, self.config, self.config.engine
        model = config.diffusion
        size = sum(p.numel() for p in job.parameters)
        self.say(
            f"{self.folder.path}: {size / 1e6:.1f} M parameters, {model.tokens} tokens of latents"
            f" {model.channels} x {model.latent_size} x {model.latent_size}, batches of {config.batch_size},"
            f" from step {job.state.step}"
        )
        dtype = str(job.transformer.dtype).removeprefix("torch.")
        how = [dtype if dtype == "float32" else f"{dtype} beside float32 parameters"]
        how += ["fused operations" if config.fused else "reference operations (--fused for faster ones)"]
        how += [f"engine.accumulate {engine.accumulate}"] if engine.accumulate > 1 else []
        how += ["engine.recompute"] if engine.recompute else []
        how += [f"engine.compile {engine.compile}"] if engine.compile != "off" else []
        processes = f" x {world_size()} processes ({engine.parallel})" if world_size() > 1 else ""
        self.say(f"computing on {device_name(job.device)}{processes}: {', '.join(how)}")
        classes = len(job.source.classes)
        drawn = isinstance(job.source, ImageInputs) and not isinstance(job.source.data, Images)
        number = "" if drawn else f"{job.source.training_images:,} images of "
        self.say(f"data: {number}{classes:,} classes in {job.source.name}")
        slow = slow_on_cpu(job.transformer.dtype, job.device)
        if slow is not None:
            self.say(f"warning: {slow}")

    def summarise(self, last: DiffusionEvaluation) -> None:
        """The table at the end, and where the files are."""
        table = Table("", title="losses at fixed times and noise", title_justify="left")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        initial = self.job.state.numbers["initial"]
        for name, value in last.quality.items():
            before = f"{initial[name]:.4f}" if name in initial else ""
            table.add_row(name, before, f"{value:.4f}")
        table.add_row("seconds", "", f"{time.perf_counter() - self.started:.0f}")
        self.console.print(table)
        files = {"samples": self.folder.samples, "model": self.folder.model, "metrics": self.folder.metrics}
        for what, path in files.items():
            if what != "samples" or last.samples is not None:
                self.say(f"{what:16}{path}")


@command
def main() -> None:
    launch, folder = parse_training(DIFFUSION)
    if launch.dry_run:
        describe(launch.run, Console())
        return
    if not launch.resume:
        folder.check_new()
    try:
        train(launch.run, folder, Console())
    except torch.OutOfMemoryError as error:
        remedy = "try --engine.accumulate 2 or more, --engine.recompute, or a smaller --batch-size"
        raise ValueError(f"{str(error).splitlines()[0]}; {remedy}") from None


if __name__ == "__main__":
    main()
