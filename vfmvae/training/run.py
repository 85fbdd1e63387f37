"""The loop around a training step, whatever it trains: checkpoints, evaluations, signals, faults, rollbacks.

A run has a job (the models, what trains them, and where the run is) and a folder. What differs between
tokenizers and diffusion models are the job and the methods at the end of `Run`.
"""

from __future__ import annotations

import math
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

from rich.console import Console

from vfmvae.data import worker_deaths
from vfmvae.data.quarantine import Quarantine
from vfmvae.serialization import to_json
from vfmvae.training.checkpoint import Checkpoints
from vfmvae.training.device import pick_device
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
from vfmvae.training.job import Job, StepResult
from vfmvae.training.logging import Position, TrainingLog
from vfmvae.training.run_config import RunConfig
from vfmvae.training.run_folder import RunFolder
from vfmvae.training.run_lock import run_lock
from vfmvae.training.safety import STOP_SIGNALS, StopRequest
from vfmvae.training.trackers import Tracker, open_trackers

MOST_SAID = 5
"""Images that cannot be read, of one step, that are named on the screen; the list has all."""


J = TypeVar("J", bound=Job)


class Evaluated(Protocol):
    """The result of an evaluation."""

    @property
    def quality(self) -> dict[str, float]: ...


E = TypeVar("E", bound=Evaluated)


def carry_out(run: Run) -> None:
    """Train from the folder's newest checkpoint, or from the start, to the last step.

    Ctrl-C or SIGTERM ends the step, saves a checkpoint and exits with 130 or 0.
    """
    try:
        # From here on: reading a checkpoint and the first evaluation take minutes at full size.
        stopping = StopRequest(run.announce_stop, patient=world_size() > 1)
        with stopping as stop, lost_processes(), worker_deaths():
            run.begin()
            stopped_by = run.go(stop)
    except BaseException:
        with suppress(OSError):  # what went wrong first is the cause
            run.checkpoints.close()
        if not run.going:
            for tracker in run.trackers:
                tracker.close(failed=True)
        raise
    run.checkpoints.close()
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by if stopped_by == signal.SIGINT else 0)


@contextmanager
def run_place(config: RunConfig, folder: RunFolder, console: Console) -> Iterator[Console]:
    """The processes of a run, and its folder for it alone; gives the console that may speak."""
    with process_group(pick_device(config.device)), only_run_in(folder, console):
        yield console if rank() == 0 else Console(quiet=True)


@contextmanager
def leaving_early(folder: RunFolder, console: Console) -> Iterator[None]:
    """While a job is built, which takes minutes at full size, Ctrl-C or SIGTERM says how to go on, and exits
    with 130 or 0 at once, since nothing can be lost.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        sentence = "stopped before the first step; nothing was written"
        if any(folder.checkpoints.glob("*")):
            sentence = f"stopped before the first step; go on with: {folder.resume_command(launcher())}"
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)
        raise SystemExit(128 + number if number == signal.SIGINT else 0)

    before = {number: signal.signal(number, leave) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def only_run_in(folder: RunFolder, console: Console) -> AbstractContextManager[None]:
    """Keeps a second run out of a folder where one trains; the process of rank 0 sees to it."""
    if rank() != 0:
        return nullcontext()
    return run_lock(folder.path, lambda sentence: console.print(sentence, soft_wrap=True, markup=False))


class Run(ABC, Generic[J, E]):
    """A job and its folder: the loop around the training step."""

    def __init__(self, job: J, folder: RunFolder, console: Console) -> None:
        config = job.config
        self.job = job
        self.config = config
        self.folder = folder
        self.console = console
        self.checkpoints = Checkpoints(folder.checkpoints, config.keep_checkpoints)
        self.rollbacks_since_save = 0
        self.trackers: Sequence[Tracker] = ()
        """Closed by the log, once it has them."""
        self.going = False
        """Whether the log is open and steps may be done."""
        listed = folder.quarantine if rank() == 0 else None
        self.quarantine = Quarantine(listed, job.images, config.max_broken)

    @property
    def position(self) -> Position:
        step = self.job.state.step
        return Position(step, step * self.config.batch_size, self.job.stage_name)

    def begin(self) -> None:
        """Take the folder, and the newest checkpoint in it; a run without one leaves that of its beginning,
        for a rollback or a kill before the next.
        """
        resumed = self.restore()
        job = self.job
        self.compare_data()
        if rank() == 0:
            # First, as a login may be missing: the folder is not taken then.
            seen = self.position.seen_images
            self.trackers = open_trackers(self.config.log, self.folder.path, seen, asdict(self.config))
            self.folder.begin(to_json(self.config), job.state.step, self.position.seen_images)
        barrier()
        self.announce()
        if "initial" not in job.state.numbers:
            job.state.numbers["initial"] = quality = self.measure().quality
            bad = [f"{name} {value}" for name, value in quality.items() if math.isnan(value)]
            if bad:
                raise ValueError(
                    f"the evaluation before the first step gives {', '.join(bad)}: the data, or the models"
                    f" that the run begins with, hold values that are not finite"
                )
        if not resumed:
            self.checkpoints.save(job.state)
            self.checkpoints.wait()  # data workers must not be forked beside a thread that writes

    def compare_data(self) -> None:
        """Say so if the data set is not the one that the checkpoint was trained on."""
        found = self.job.data_identity()
        if found is None:
            return
        before = self.job.state.numbers.get("data")
        now = self.job.state.numbers["data"] = {"images": found.images, "keys": found.keys}
        if before is not None and before != now:
            self.say(
                f"warning: {found.name} has changed since the checkpoint, from {before['images']:,} to"
                f" {found.images:,} training images or in their names: the order of this epoch is another,"
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

    def go(self, stop: StopRequest) -> int | None:
        """Train to the end, or until a signal, whose number is returned."""
        job, config, begun_at = self.job, self.config, self.job.state.step
        log = TrainingLog(
            self.folder.metrics,
            self.console,
            self.position,
            job.steps * config.batch_size,
            config.log_every,
            job.device,
            self.trackers,
            main=rank() == 0,
        )
        self.going = True
        with log:
            if begun_at == 0:
                log.evaluation(self.position, job.state.numbers["initial"])
            log.skips_in_a_row = job.skips_in_a_row()
            while not self.advance(log, stop):
                self.roll_back(log.trouble)
                log.rewind(self.position, job.skips_in_a_row())
            finished = job.state.step == job.steps
            if finished:
                last = self.evaluate(log) if job.state.step > begun_at else self.measure()
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
                log.enter_stage(job.stage_name)
                result = self.step(batch)
                job.state.step += 1
                means = log.step(self.position, result.losses, rates, result.skips)
                if means is not None:
                    self.watch(means)
                if means is not None and log.skips_in_a_row >= config.safety.max_skips:
                    return False
                if self.evaluation_due():
                    self.evaluate(log)
                # A rollback must not return into a row of skipped steps.
                if self.due(config.checkpoint_every) and not job.skips_in_a_row():
                    with log.paused():
                        self.save()
        return True

    def next_batch(self, batches: Iterator[Any], log: TrainingLog) -> Any:
        """This process's part of the next step's batch; None after the last one."""
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
        return bool(every) and step % every == 0 and step < self.job.steps

    def evaluation_due(self) -> bool:
        """Whether this step has passed a multiple of the images between evaluations."""
        every, batch = self.config.evaluate_every, self.config.batch_size
        step = self.job.state.step
        return bool(every) and step * batch // every > (step - 1) * batch // every and step < self.job.steps

    def roll_back(self, trouble: str) -> None:
        """Return to the last checkpoint, with other random draws, or give up. `trouble`: what went wrong."""
        job, config = self.job, self.config
        step, rollbacks = job.state.step, job.state.numbers.get("rollbacks", 0)
        trouble = f"{config.safety.max_skips} steps in a row up to step {step} were skipped, {trouble}"
        exact = config.dtype == "fp32" or (config.dtype == "auto" and job.device.type != "cuda")
        remedy = "lower its learning rate" if exact else "lower its learning rate, or use --dtype fp32"
        if self.rollbacks_since_save == config.safety.max_rollbacks or not self.restore():
            raise FloatingPointError(f"{trouble}; {remedy}")
        self.rollbacks_since_save += 1
        job.state.numbers["rollbacks"] = rollbacks + 1
        self.say(f"warning: {trouble}; going back to the checkpoint of step {job.state.step}")

    def save(self) -> None:
        """Write the averaged weights as model.safetensors, and a checkpoint, unless this step has one."""
        job = self.job
        if self.checkpoints.last_step == job.state.step:
            return
        # First, or a run that is killed after its last checkpoint would never write them.
        self.write_weights()
        self.checkpoints.save(job.state)
        self.rollbacks_since_save = 0

    def evaluate(self, log: TrainingLog) -> E:
        """Measure and show the averaged weights."""
        with self.keeping(log), log.paused():
            found = self.measure()
            log.evaluation(self.position, found.quality)
            path = self.write_picture(found) if rank() == 0 else None
            if path is not None:
                log.picture(self.position, path)
        return found

    def announce_stop(self) -> None:
        """What is said when a signal comes; the run stops where it can go on later."""
        self.say("stopping after this step" if self.going else "stopping before the first step")

    def say(self, sentence: str) -> None:
        self.console.print(sentence, highlight=False, soft_wrap=True, markup=False)

    # What differs between the kinds of runs

    def watch(self, means: dict[str, float]) -> None:
        """Take the means of an interval, equal in all processes; FloatingPointError ends the run."""

    @abstractmethod
    def step(self, batch: Any) -> StepResult:
        """One update of everything that trains."""

    @abstractmethod
    def measure(self) -> E:
        """Evaluate the averaged weights, in all processes alike."""

    @abstractmethod
    def write_picture(self, found: E) -> Path | None:
        """The picture of this moment, if there is one; called in the first process."""

    @abstractmethod
    def write_weights(self) -> None:
        """The averaged weights as a file that `vfmvae.load` reads; called in all processes."""

    @abstractmethod
    def announce(self) -> None:
        """Say what trains, on what, how."""

    @abstractmethod
    def summarise(self, last: E) -> None:
        """Say what the run has come to."""
