"""What a run shows and writes while it trains: a progress bar and metrics.jsonl.

metrics.jsonl holds one JSON object per line, of three kinds, each with "step" and "seen_images":

    start   a process begins here: time, versions, device, "total_images"
    train   means over an interval: losses by name, "learning_rate_<name>", INTERVAL_KEYS, and
            "skipped_<name>" where updates of that name were skipped
    eval    quality by name, of an evaluation

Names end in their unit. A value that is not finite is null.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from vfmvae import __version__
from vfmvae.atomic import reason, write_atomically
from vfmvae.training.device import device_name
from vfmvae.training.distributed import mean_over_ranks, world_size
from vfmvae.training.trackers import Tracker

INTERVAL_KEYS = ("images_per_second", "interval_s", "peak_memory_gib", "skipped_steps")
"""What a train line says of its interval, besides losses and learning rates."""
RATE_PREFIX = "learning_rate_"
SKIPPED_PREFIX = "skipped_"
"""Before the name of an update, of which a line says how many were skipped, where any was."""


class Position(NamedTuple):
    """How far a run is: updates done, images seen in them by all processes together, name of the stage."""

    step: int
    seen_images: int
    stage: str


class TrainingLog:
    """Collects loss tensors on their device and reads them once per interval of `every` steps.

    Use as a context manager around the loop, in every process: the values are averaged over the processes,
    and the one with `main` shows and writes them. An interval also ends with its stage and with the run.
    """

    def __init__(
        self,
        path: Path,
        console: Console,
        start: Position,
        total_images: int,
        every: int,
        device: torch.device,
        trackers: Sequence[Tracker] = (),
        main: bool = True,
    ) -> None:
        """`path`: metrics.jsonl. `trackers`: given to the process with `main` only, closed with the log."""
        self._path = path
        self._total_images = total_images
        self._every = every
        self._device = device
        self._trackers = trackers
        self._main = main
        self._display = _Display(console, start, total_images) if main else None
        self._last = self._interval_start = start
        self._values = _DeviceValues()
        self._rates: dict[str, float] = {}
        self._skipped_steps = 0
        self.trouble = ""
        """Why the steps that were skipped last were: a part of a sentence."""
        self.skips_in_a_row = 0
        """How many of the last updates were skipped, with none in between that was not, as of the last
        interval's end; equal in all processes."""
        self._clock = time.perf_counter()

    def __enter__(self) -> TrainingLog:
        if self._main:
            self._append(
                "start", self._last, environment(self._device) | {"total_images": self._total_images}
            )
        if self._display is not None:
            self._display.open()
        self._clock = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:  # after an error the device may not answer
                self.end_interval()
        finally:
            if self._display is not None:
                self._display.close()
            for tracker in self._trackers:
                tracker.close(failed=kind is not None)

    def step(
        self,
        now: Position,
        losses: Mapping[str, Tensor],
        rates: Mapping[str, float],
        skips: Mapping[str, Tensor] | None = None,
    ) -> dict[str, float] | None:
        """Record one step; `now` is the position after it.

        Args:
            losses: scalars on the device, by name. Names may change from step to step, equally in all
                processes; the mean of each is over the steps that have it.
            rates: the learning rate of each optimizer, by its name.
            skips: a scalar per update of the step, not 0 where it was skipped. Steps with one are counted,
                and do not enter the means unless no other step of the interval has the loss.

        Returns:
            At the end of an interval its means, equal in all processes, NaN where a loss was not finite in a
            step that counts. Else None, without a wait for the device.

        Raises:
            OSError: with a sentence, if metrics.jsonl cannot be written.
        """
        self.enter_stage(now.stage)
        self._values.add(losses, skips or {})
        self._rates = dict(rates)
        self._last = now
        if self._display is not None:
            self._display.advance(now)
        if now.step % self._every == 0 or now.seen_images >= self._total_images:
            return self.end_interval()
        return None

    def enter_stage(self, stage: str) -> None:
        """End the interval where another stage begins; call it before that stage's first step."""
        if stage != self._last.stage:
            self.end_interval()
            self._last = self._last._replace(stage=stage)

    def evaluation(self, now: Position, quality: Mapping[str, float]) -> None:
        """Record what an evaluation has measured, by name; call it before this step's checkpoint."""
        if self._main:
            self._append("eval", now, quality)
            for tracker in self._trackers:
                tracker.scalars("eval", quality, now.seen_images)
        if self._display is not None:
            self._display.evaluation(now, quality)

    def picture(self, now: Position, path: Path) -> None:
        """Hand a PNG of reconstructions to the trackers."""
        for tracker in self._trackers:
            tracker.picture(path, now.seen_images)

    def rewind(self, to: Position, skips_in_a_row: int = 0) -> None:
        """Go on from an earlier position: forget what came after it, in metrics.jsonl too.

        `skips_in_a_row`: as it was there.

        A tracker shows the second time over the first.
        """
        self._values = _DeviceValues()
        self._last = self._interval_start = to
        self.skips_in_a_row = skips_in_a_row
        self._clock = time.perf_counter()
        if self._main:
            keep_lines_until(self._path, to.step)
        if self._display is not None:
            self._display.advance(to)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluations and checkpoints inside do not count as training time. Waits for the device first."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        paused_at = time.perf_counter()
        try:
            yield
        finally:
            self._clock += time.perf_counter() - paused_at

    def end_interval(self) -> dict[str, float] | None:
        """Read, show and write the steps since the last interval, and return their means; None if there are
        none. Call it in every process alike.
        """
        if self._values.empty:
            return None
        read = self._values.read()
        means = read.means
        for updates in read.skipped:
            self.skips_in_a_row = self.skips_in_a_row + 1 if updates else 0
        skipped_steps = sum(map(bool, read.skipped))
        skips = Counter(name for updates in read.skipped for name in updates)
        if skips:
            self.trouble = _trouble(skips, read.not_finite)
        clock = time.perf_counter()
        seconds = clock - self._clock
        speed = (self._last.seen_images - self._interval_start.seen_images) / seconds
        self._clock, self._interval_start = clock, self._last
        self._skipped_steps += skipped_steps
        memory_gib = peak_memory_gib(self._device)
        if self._main:
            values = means | {RATE_PREFIX + name: rate for name, rate in self._rates.items()}
            values |= {
                "images_per_second": round(speed, 2),
                "interval_s": round(seconds, 3),
                "peak_memory_gib": round(memory_gib, 3),
                "skipped_steps": skipped_steps,
            }
            values |= {SKIPPED_PREFIX + name: count for name, count in skips.items()}
            self._append("train", self._last, values)
            for tracker in self._trackers:
                tracker.scalars("train", values, self._last.seen_images)
        if self._display is not None:
            self._display.interval(self._last, means, speed, memory_gib, self._skipped_steps)
            if skipped_steps:
                self._display.print(f"step {self._last.step}: {skipped_steps} steps skipped, {self.trouble}")
        return means

    def _append(self, kind: str, now: Position, values: Mapping[str, Any]) -> None:
        line = {"kind": kind, **now._asdict(), **{name: _finite(value) for name, value in values.items()}}
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(f"could not write {self._path}: {reason(error)}") from None


class _Read(NamedTuple):
    """What the steps of an interval say."""

    means: dict[str, float]
    """Of each loss over the steps without a skipped update that have it, or else over those that have it."""
    skipped: list[list[str]]
    """The updates of each step that were skipped."""
    not_finite: list[str]
    """The losses that were not finite in a step with a skipped update."""


class _DeviceValues:
    """Named scalars of some steps, on their device until `read`."""

    def __init__(self) -> None:
        self._names: list[tuple[list[str], list[str]]] = []
        self._rows: list[Tensor] = []

    @property
    def empty(self) -> bool:
        return not self._rows

    def add(self, losses: Mapping[str, Tensor], skipped: Mapping[str, Tensor]) -> None:
        self._names.append((list(losses), list(skipped)))
        # A copy: memory of a captured step is overwritten by the next one.
        self._rows.append(torch.stack([v.detach().float() for v in (*losses.values(), *skipped.values())]))

    def read(self) -> _Read:
        """Everything since the last time; then empty. The one wait for the device."""
        table = torch.cat(self._rows)
        mean_over_ranks(table)
        values = iter(table.tolist())
        good: dict[str, list[float]] = {}
        bad: dict[str, list[float]] = {}
        skipped: list[list[str]] = []
        for of_losses, of_updates in self._names:
            losses = {name: next(values) for name in of_losses}
            skipped.append([name for name in of_updates if next(values) != 0])
            for name, value in losses.items():
                (bad if skipped[-1] else good).setdefault(name, []).append(value)
        self._names, self._rows = [], []
        means = {name: sum(found) / len(found) for name, found in {**bad, **good}.items()}
        not_finite = [name for name, found in bad.items() if not all(map(math.isfinite, found))]
        return _Read(means, skipped, not_finite)


def _trouble(updates: Iterable[str], not_finite: Sequence[str]) -> str:
    """Which updates had gradients that were refused, and which losses were broken."""
    losses = f"; not finite: {', '.join(not_finite)}" if not_finite else ""
    return f"as the gradients of {', '.join(updates)} were not finite or exploded{losses}"


class _Display:
    """A progress bar on a terminal, a line per interval anywhere else."""

    def __init__(self, console: Console, start: Position, total_images: int) -> None:
        self._console = console
        self._total_images = total_images
        self._bar = Progress(
            TextColumn("{task.fields[images]} images"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[speed]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
            speed_estimate_period=120.0,  # one step may take many seconds
        )
        self._task = self._bar.add_task(
            "train", total=total_images, completed=start.seen_images, images=self._images(start), speed=""
        )
        self._below = Text()
        self._live = Live(Group(self._bar, self._below), console=console) if console.is_terminal else None

    def open(self) -> None:
        if self._live is not None:
            self._live.start()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, now: Position) -> None:
        self._bar.update(self._task, completed=now.seen_images, images=self._images(now))

    def interval(
        self, now: Position, means: Mapping[str, float], speed: float, memory_gib: float, skipped_steps: int
    ) -> None:
        images_per_second = f"{speed:.{0 if speed >= 10 else 1}f} images/s"
        state = [f"step {now.step}", now.stage, f"{memory_gib:.1f} GiB"]
        if skipped_steps:
            state.append(f"{skipped_steps} skipped")
        if self._live is not None:
            self._bar.update(self._task, speed=images_per_second)
            self._below.plain = "  ".join(state) + "\n" + _listed(means)
            return
        left_s = max(self._total_images - now.seen_images, 0) / max(speed, 1e-9)
        eta = f"ETA {timedelta(seconds=round(left_s))}"
        head = [state[0], f"{self._images(now)} images", images_per_second, eta, *state[1:]]
        self.print("  ".join([*head, _listed(means)]))

    def evaluation(self, now: Position, quality: Mapping[str, float]) -> None:
        self.print(f"step {now.step}  evaluation: {_listed(quality)}")

    def _images(self, now: Position) -> str:
        return f"{short_count(now.seen_images)}/{short_count(self._total_images)}"

    def print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def environment(device: torch.device) -> dict[str, str | int]:
    """When, with what and on what a process runs: the content of a start line."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "processes": world_size(),
        "vfmvae": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process had: taken by PyTorch on a GPU, else resident in RAM.

    Not "allocated": what belongs to recorded CUDA graphs counts as free there, and cannot be used.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # kibibytes, but bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def short_count(count: int) -> str:
    """A number of images in about four characters: 950, 12.8k, 1.25M."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            digits = 10 if count >= 100 * unit else 100
            return f"{count * digits // unit / digits:g}{name}"
    return str(count)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, in order; none without the file.

    Damaged lines are left out: a process may be writing the last one, and a killed one may have cut it off.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in map(_parsed, lines) if line is not None]


def keep_lines_until(path: Path, step: int) -> None:
    """Drop lines of metrics.jsonl after `step`, and damaged ones: a resumed run writes them again.

    OSError with a sentence, and the file as it was, if it cannot be written.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    parsed = [(line, _parsed(line)) for line in lines]
    kept = "".join(line + "\n" for line, values in parsed if values is not None and values["step"] <= step)
    write_atomically(path, lambda partial: partial.write_text(kept, encoding="utf-8"))


def _parsed(line: str) -> dict[str, Any] | None:
    """A line's values; None if it is cut off or no line of this file."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def _listed(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
