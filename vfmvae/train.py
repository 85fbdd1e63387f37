"""Train a tokenizer.

    python -m vfmvae.train --fused                         the demo: embedded photographs, minutes on a CPU
    python -m vfmvae.train --fused --data PATH             a folder of images instead
    python -m vfmvae.train --run-dir runs/demo --resume    go on after a stop
    torchrun --nproc-per-node 8 -m vfmvae.train ...        several GPUs

A run folder holds config.json, metrics.jsonl, checkpoints/, model.safetensors (averaged weights) and
reconstructions.png; `vfmvae.load(run folder)` gives the tokenizer. One step is in train_step.py, what it
works on in train_job.py.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vfmvae.cli import command, usage
from vfmvae.config import TrainConfig
from vfmvae.data.dali import why_not as why_not_dali
from vfmvae.data.drawn import Drawn
from vfmvae.diffusion.files import save_transformer
from vfmvae.encoders.base import feature_dtype
from vfmvae.model_files import write_state
from vfmvae.ops import attention_choices
from vfmvae.tokenizer.files import tokenizer_hash
from vfmvae.train_arguments import parse_arguments
from vfmvae.train_graphs import recorded_steps
from vfmvae.train_job import Job
from vfmvae.train_plan import describe
from vfmvae.train_step import training_step
from vfmvae.training.device import device_name, pick_device, slow_on_cpu
from vfmvae.training.distributed import rank, world_size
from vfmvae.training.evaluation import Evaluation
from vfmvae.training.figures import write_figure
from vfmvae.training.job import StepResult
from vfmvae.training.joint import NAME as JOINT
from vfmvae.training.joint import CollapseAlarm
from vfmvae.training.run import Run, carry_out, leaving_early, run_place
from vfmvae.training.run_folder import RunFolder

HEADINGS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "mini_distance": "distance of mini's features",
}


def train(config: TrainConfig, folder: RunFolder, console: Console) -> None:
    """Train from the folder's newest checkpoint, or from the start, to the last step; see `carry_out`."""
    config.log.check_available()
    with usage():
        pick_device(config.device)
    with run_place(config, folder, console) as speaking:
        with leaving_early(folder, speaking):
            run = TokenizerRun(config, folder, speaking)
        carry_out(run)


class TokenizerRun(Run[Job, Evaluation]):
    """The run of a tokenizer."""

    config: TrainConfig

    def __init__(self, config: TrainConfig, folder: RunFolder, console: Console) -> None:
        self.started = time.perf_counter()
        super().__init__(Job(config), folder, console)
        self.recorded = recorded_steps(self.job)
        self.alarm: CollapseAlarm | None = None

    def restore(self) -> bool:
        """Also compares the initial weights, and begins the watch over the latents of a joint run."""
        found = super().restore()
        self.job.check_initial()
        if self.job.joint is not None:
            if not found:
                self.job.begin_joint()
            self.alarm = CollapseAlarm(self.job.state.numbers.setdefault("most_of_latents", {}))
        return found

    def watch(self, means: dict[str, float]) -> None:
        for warning in self.alarm.check(means) if self.alarm is not None else ():
            self.say(warning)

    def step(self, batch: list[Tensor]) -> StepResult:
        weights = self.job.weights()
        return self.recorded(batch, weights) if self.recorded else training_step(self.job, batch, weights)

    def measure(self) -> Evaluation:
        return self.job.evaluate()

    def write_picture(self, found: Evaluation) -> Path:
        """Held-out images above their reconstructions."""
        seen = self.position.seen_images
        return write_figure(self.folder.path, seen, found.images, found.reconstructions)

    def write_weights(self) -> None:
        self.job.synchronise_statistics()
        weights = self.job.ema.export()
        if rank() == 0:
            self.folder.write(self.folder.model, lambda path: write_state(weights, path))
        self.write_joint()

    def write_joint(self) -> None:
        """The averaged diffusion transformer of a joint run, as a saved model in a folder of its own."""
        joint = self.job.joint
        if joint is None or rank() != 0:
            return
        (companion,) = (c for c in self.job.companions if c.name == JOINT)
        with self.job.ema.applied():
            of_tokenizer = tokenizer_hash(self.job.tokenizer)
        stage = {"path": joint.config.path, "time": asdict(joint.config.time)}
        with companion.average.applied():
            joint.take_statistics()
            save_transformer(joint.transformer, self.folder.path / JOINT, of_tokenizer, [stage])

    def announce(self) -> None:
        """What trains and how large it is; on what device, in what dtype, with what operations."""
        job, config, engine = self.job, self.config, self.config.engine
        trained = sum(p.numel() for p in job.tokenizer.parameters() if p.requires_grad)
        self.say(
            f"{self.folder.path}: {trained / 1e6:.1f} M trained parameters, {config.tokenizer.resolution} px,"
            f" batches of {config.batch_size}, from step {job.state.step}"
        )
        dtype = str(job.tokenizer.dtype).removeprefix("torch.")
        how = [dtype if dtype == "float32" else f"{dtype} beside float32 parameters"]
        how += ["fused operations" if config.fused else "reference operations (--fused for faster ones)"]
        how += [f"engine.accumulate {engine.accumulate}"] if engine.accumulate > 1 else []
        how += ["engine.recompute"] if engine.recompute else []
        how += [f"engine.compile {engine.compile}"] if engine.compile != "off" else []
        how += ["engine.fp8_encoder"] if engine.fp8_encoder else []
        how += ["engine.graphs"] if engine.graphs else []
        processes = f" x {world_size()} processes ({engine.parallel})" if world_size() > 1 else ""
        self.say(f"computing on {device_name(job.device)}{processes}: {', '.join(how)}")
        self.say(f"data: {self.data()}")
        self.say(f"attention: {self.attention()}")
        for warning in config.warnings(world_size()):
            self.say(f"warning: {warning}")
        slow = slow_on_cpu(job.tokenizer.dtype, job.device)
        if slow is not None:
            self.say(f"warning: {slow}")
        if job.perceptual is not None and config.perceptual.network != "lpips-vgg":
            self.say(f"the perceptual loss compares features of {config.perceptual.network}; it is not LPIPS")

    def data(self) -> str:
        """What is read, and by what."""
        job, config = self.job, self.config
        if config.data is None:
            return "crops of the embedded photographs"
        if isinstance(job.data, Drawn):
            return f"drawn {config.data} of {len(job.data.classes)} classes"
        classes = len(job.data.classes)
        by = "DALI" if job.data_backend == "dali" else "Pillow"
        objection = why_not_dali(job.data, job.device) if config.data_backend == "auto" else None
        return (
            f"{len(job.data):,} images{f' of {classes:,} classes' if classes > 1 else ''} in {config.data},"
            f" {len(job.held_out):,} held out, decoded by {by}{f' ({objection})' if objection else ''}"
        )

    def attention(self) -> str:
        """Which implementation computes it where, and why none that would come before."""
        device, tokenizer = self.job.device, self.job.tokenizer
        encoder_dtype = feature_dtype(device, tokenizer.encoder.always_bfloat16)
        found = attention_choices(device, tokenizer.dtype, encoder_dtype)
        if not self.config.fused:
            found |= {"fusion": ("reference", {}), "decoder": ("reference", {})}
        where: dict[str, list[str]] = {}
        for use, (name, refused) in found.items():
            reasons = "; ".join(f"{other}: {objection}" for other, objection in refused.items())
            where.setdefault(f"{name} ({reasons})" if reasons else name, []).append(use)
        return "; ".join(f"{', '.join(uses)} by {choice}" for choice, uses in where.items())

    def summarise(self, last: Evaluation) -> None:
        """The table at the end, and where the files are."""
        table = Table("", title="held-out images", title_justify="left")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        initial = self.job.state.numbers["initial"]
        for name, value in last.quality.items():
            digits = 2 if name == "psnr" else 3
            table.add_row(HEADINGS[name], f"{initial[name]:.{digits}f}", f"{value:.{digits}f}")
        table.add_row("seconds", "", f"{time.perf_counter() - self.started:.0f}")
        self.console.print(table)
        files = {
            "reconstructions": self.folder.figure,
            "tokenizer": self.folder.model,
            "metrics": self.folder.metrics,
        }
        for what, path in files.items():
            self.say(f"{what:16}{path}")


@command
def main() -> None:
    launch, folder = parse_arguments()
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
