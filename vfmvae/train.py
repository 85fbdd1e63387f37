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

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vfmvae.cli import command, usage
from vfmvae.config import TrainConfig
from vfmvae.data import worker_deaths
from vfmvae.data.dali import why_not as why_not_dali
from vfmvae.data.quarantine import Quarantine
from vfmvae.encoders.base import feature_dtype
from vfmvae.model_files import write_state
from vfmvae.ops import attention_choices
from vfmvae.serialization import to_json
from vfmvae.train_arguments import parse_arguments
from vfmvae.train_graphs import recorded_steps
from vfmvae.train_job import Job
from vfmvae.train_plan import describe
from vfmvae.train_step import training_step
from vfmvae.training.checkpoint import Checkpoints
from vfmvae.training.device import device_name, pick_device, slow_on_cpu
from vfmvae.training.distributed import (
    any_rank,
    barrier,
    gather_lists,
    launcher,
    lost_processes,
    process_group,
    rank,
    world_size,
)
from vfmvae.training.evaluation import Evaluation
from vfmvae.training.figures import write_figure
from vfmvae.training.logging import Position, TrainingLog
from vfmvae.training.run_folder import RunFolder
from vfmvae.training.run_lock import run_lock
from vfmvae.training.safety import StopRequest
from vfmvae.training.trackers import Tracker, open_trackers

MOST_SAID = 5
"""Images that cannot be read, of one step, that are named on the screen; the list has all."""
HEADINGS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "mini_distance": "distance of mini's features",
}


def train(config: TrainConfig, folder: RunFolder, console: Console) -> None:
    """Train from the folder's newest checkpoint, or from the start, to the last step.

    Ctrl-C or SIGTERM ends the step, saves a checkpoint and exits with 130 or 0.
    """
    config.log.check_available()
    with usage():
        device = pick_device(config.device)
    with process_group(device), only_run_in(folder, console):
        run = Run(config, folder, console if rank() == 0 else Console(quiet=True))
        try:
            with lost_processes(), worker_deaths():
                run.begin()
                stopped_by = run.go()
        except BaseException:
            with suppress(OSError):  # what went wrong first is the cause
                run.checkpoints.close()
            raise
        run.checkpoints.close()
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by if stopped_by == signal.SIGINT else 0)


def only_run_in(folder: RunFolder, console: Console) -> AbstractContextManager[None]:
    """Keeps a second run out of a folder where one trains; the process of rank 0 sees to it."""
    if rank() != 0:
        return nullcontext()
    return run_lock(folder.path, lambda sentence: console.print(sentence, soft_wrap=True, markup=False))


class Run:
    """A job and its folder: the loop around the training step."""

    def __init__(self, config: TrainConfig, folder: RunFolder, console: Console) -> None:
        self.config = config
        self.folder = folder
        self.console = console
        self.started = time.perf_counter()
        self.job = Job(config)
        self.recorded = recorded_steps(self.job)
        self.checkpoints = Checkpoints(folder.checkpoints, config.keep_checkpoints)
        self.rollbacks_since_save = 0
        images = len(self.job.data) + len(self.job.held_out)
        self.quarantine = Quarantine(folder.quarantine if rank() == 0 else None, images, config.max_broken)

    @property
    def position(self) -> Position:
        step = self.job.state.step
        return Position(step, step * self.config.batch_size, self.job.stage.name)

    def begin(self) -> None:
        """Take the folder, and the newest checkpoint in it; a run without one leaves that of its beginning,
        for a rollback or a kill before the next.
        """
        resumed = self.restore()
        job = self.job
        self.compare_data()
        if rank() == 0:
            self.folder.begin(to_json(self.config), job.state.step, self.position.seen_images)
        barrier()
        self.announce()
        if "initial" not in job.state.numbers:
            job.state.numbers["initial"] = job.evaluate().quality
        if not resumed:
            self.checkpoints.save(job.state)
            self.checkpoints.wait()  # data workers must not be forked beside a thread that writes

    def compare_data(self) -> None:
        """Say so if the data set is not the one that the checkpoint was trained on."""
        if self.config.data is None:
            return
        before = self.job.state.numbers.get("data")
        found = self.job.state.numbers["data"] = {"images": len(self.job.data), "keys": self.job.data_keys()}
        if before is not None and before != found:
            self.say(
                f"warning: {self.config.data} has changed since the checkpoint, from {before['images']:,} to"
                f" {found['images']:,} training images or in their names: the order of this epoch is another,"
                f" so some of its images come twice and some not at all"
            )

    def restore(self) -> bool:
        """Take up the newest intact checkpoint and the stage it is from; returns whether there was one."""
        stored = self.checkpoints.newest()
        if stored is None:
            self.job.enter_stage(0)
            return False
        for sentence in stored.damaged:
            self.say(f"warning: {sentence}")
        self.job.check_position(stored.step, stored.numbers["stage"])
        self.job.enter_stage(stored.numbers["stage"])
        self.checkpoints.load(stored, self.job.state)
        return True

    def go(self) -> int | None:
        """Train to the end, or until a signal, whose number is returned."""
        job, config, begun_at = self.job, self.config, self.job.state.step
        trackers: Sequence[Tracker] = ()
        if rank() == 0:
            seen = self.position.seen_images
            trackers = open_trackers(config.log, self.folder.path, seen, asdict(config))
        log = TrainingLog(
            self.folder.metrics,
            self.console,
            self.position,
            job.plan.steps * config.batch_size,
            config.log_every,
            job.device,
            trackers,
            main=rank() == 0,
        )
        patient = world_size() > 1
        with log, StopRequest(lambda: self.say("stopping after this step"), patient) as stop:
            if begun_at == 0:
                log.evaluation(self.position, job.state.numbers["initial"])
            log.skips_in_a_row = job.skips_in_a_row()
            while not self.advance(log, stop):
                self.roll_back()
                log.rewind(self.position, job.skips_in_a_row())
            finished = job.state.step == job.plan.steps
            if finished:
                last = self.evaluate(log) if job.state.step > begun_at else job.evaluate()
                if any_rank(bool(job.faults))[0]:
                    self.note_faults(log)
            self.save()
            self.checkpoints.wait()
        if not finished:
            command = self.folder.resume_command(launcher())
            self.say(f"stopped after step {job.state.step}; go on with: {command}")
            return stop.signal
        self.summarise(last)
        return None

    def advance(self, log: TrainingLog, stop: StopRequest) -> bool:
        """Train until the end or a signal (True), or until too many steps in a row were skipped (False)."""
        job, config = self.job, self.config
        with closing(job.batches(job.state.step)) as batches:
            while (batch := self.next_batch(batches, log)) is not None:
                # Processes must stop at the same step.
                stopped, broken = any_rank(bool(stop.signal), bool(job.faults))
                if broken:
                    self.note_faults(log)
                if stopped:
                    break
                rates = job.begin_step()
                log.enter_stage(job.stage.name)
                step = self.recorded or partial(training_step, job)
                result = step(batch, job.weights())
                job.state.step += 1
                means = log.step(self.position, result.losses, rates, result.skipped)
                if means is not None and log.skips_in_a_row >= config.safety.max_skips:
                    return False
                if self.evaluation_due():
                    self.evaluate(log)
                # A rollback must not return into a row of skipped steps.
                if self.due(config.checkpoint_every) and not job.skips_in_a_row():
                    with log.paused():
                        self.save()
        return True

    def next_batch(self, batches: Iterator[list[Tensor]], log: TrainingLog) -> list[Tensor] | None:
        """This process's images of the next step; None after the last one."""
        with self.keeping(log), worker_deaths():
            return next(batches, None)

    def note_faults(self, log: TrainingLog) -> None:
        """List the images of all ranks that could not be read; ValueError if they are too many.

        Every rank knows of them and stops, so the last step can be saved.
        """
        new = self.quarantine.add(gather_lists(self.job.take_faults()))
        for fault in new[:MOST_SAID]:
            self.say(f"warning: {fault.key}: {fault.reason}")
        if len(new) > MOST_SAID:
            self.say(f"warning: and {len(new) - MOST_SAID} more; all are listed in {self.folder.quarantine}")
        try:
            self.quarantine.check()
        except ValueError:
            self.keep(log)
            raise

    @contextmanager
    def keeping(self, log: TrainingLog) -> Iterator[None]:
        """Around what reads images between two steps: where that fails, what is done is saved first.

        In several processes saving is a collective, and the others do not know of it.
        """
        try:
            yield
        except (ValueError, OSError):
            if world_size() == 1:
                self.keep(log)
            raise

    def keep(self, log: TrainingLog) -> None:
        """Save the last complete step, if that is possible, and say how to go on."""
        step = self.job.state.step
        with suppress(OSError):  # what went wrong first is the cause
            log.end_interval()
            self.save()
            self.checkpoints.wait()
        if self.checkpoints.last_step == step:
            command = self.folder.resume_command(launcher())
            self.say(f"step {step} is saved; when the cause below is mended, go on with: {command}")

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; the end is taken care of."""
        step = self.job.state.step
        return bool(every) and step % every == 0 and step < self.job.plan.steps

    def evaluation_due(self) -> bool:
        """Whether this step has passed a multiple of the images between evaluations."""
        every, batch = self.config.evaluate_every, self.config.batch_size
        step = self.job.state.step
        return (
            bool(every) and step * batch // every > (step - 1) * batch // every and step < self.job.plan.steps
        )

    def roll_back(self) -> None:
        """Return to the last checkpoint, with other random draws, or give up."""
        job, config = self.job, self.config
        step, rollbacks = job.state.step, job.state.numbers.get("rollbacks", 0)
        trouble = f"{config.safety.max_skips} steps in a row up to step {step} were skipped"
        remedy = "lower the learning rate, or use --dtype fp32"
        if self.rollbacks_since_save == config.safety.max_rollbacks or not self.restore():
            raise FloatingPointError(
                f"{trouble}, because their gradients were not finite or exploded; {remedy}"
            )
        self.rollbacks_since_save += 1
        job.state.numbers["rollbacks"] = rollbacks + 1
        self.say(f"warning: {trouble}; going back to the checkpoint of step {job.state.step}")

    def evaluate(self, log: TrainingLog) -> Evaluation:
        """Measure and show the averaged weights on held-out images."""
        with self.keeping(log), log.paused():
            found = self.job.evaluate()
            log.evaluation(self.position, found.quality)
            if rank() == 0:
                seen = self.position.seen_images
                path = write_figure(self.folder.path, seen, found.images, found.reconstructions)
                log.picture(self.position, path)
        return found

    def save(self) -> None:
        """Write the averaged weights as model.safetensors, and a checkpoint, unless this step has one."""
        job = self.job
        if self.checkpoints.last_step == job.state.step:
            return
        job.synchronise_statistics()
        # First, or a run that is killed after its last checkpoint would never write them.
        weights = job.ema.export()
        if rank() == 0:
            self.folder.write(self.folder.model, lambda path: write_state(weights, path))
        self.checkpoints.save(job.state)
        self.rollbacks_since_save = 0

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
        how += ["fused operations" if config.fused else "reference operations"]
        how += [f"engine.accumulate {engine.accumulate}"] if engine.accumulate > 1 else []
        how += ["engine.recompute"] if engine.recompute else []
        how += [f"engine.compile {engine.compile}"] if engine.compile != "off" else []
        how += ["engine.fp8_encoder"] if engine.fp8_encoder else []
        how += ["engine.graphs"] if engine.graphs else []
        processes = f" x {world_size()} processes ({engine.parallel})" if world_size() > 1 else ""
        self.say(f"computing on {device_name(job.device)}{processes}: {', '.join(how)}")
        self.say(f"data: {self.data()}")
        self.say(f"attention: {self.attention()}")
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

    def say(self, sentence: str) -> None:
        self.console.print(sentence, highlight=False, soft_wrap=True, markup=False)


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
