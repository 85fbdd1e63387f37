"""What a run shows and writes while it trains: a progress bar and metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor


class TrainingLog:
    """Collects loss tensors on their device and reads them once per interval.

    Use as a context manager around the loop. Each interval appends a line to metrics.jsonl and updates the
    progress bar (or prints a line where output is no terminal).
    """

    def __init__(
        self, path: Path, console: Console, start: int, steps: int, every: int, batch_size: int
    ) -> None:
        self._path = path
        self._console = console
        self._steps = steps
        self._every = every
        self._batch_size = batch_size
        self._pending: list[dict[str, Tensor]] = []
        self._interval_start = time.perf_counter()
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, completed=start, status="")

    def __enter__(self) -> TrainingLog:
        self._progress.start()
        self._interval_start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, step: int, losses: dict[str, Tensor], rate: float) -> None:
        """Record the losses of step number `step` (1 for the first)."""
        self._pending.append(losses)
        self._progress.update(self._task, completed=step)
        if step % self._every == 0 or step == self._steps:
            self._flush(step, rate)

    def skip_time(self, seconds: float) -> None:
        """Leave out time that was not spent on training (evaluation, checkpoints) from images per second."""
        self._interval_start += seconds

    def _flush(self, step: int, rate: float) -> None:
        names = list(self._pending[0])
        stacked = torch.stack(
            [torch.stack([losses[n].detach().float() for n in names]) for losses in self._pending]
        )
        means = dict(zip(names, stacked.mean(dim=0).tolist(), strict=True))  # the one wait for the device
        now = time.perf_counter()
        speed = len(self._pending) * self._batch_size / (now - self._interval_start)
        self._pending, self._interval_start = [], now
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"loss {', '.join(bad)} is not finite at step {step}; lower optimizer.learning_rate or"
                f" use --dtype fp32"
            )
        line = {"step": step, "seen_images": step * self._batch_size, **means}
        line |= {"learning_rate": rate, "images_per_second": round(speed, 2)}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        self._progress.update(self._task, status=f"{speed:.0f} images/s  {shown}")
        if not self._console.is_terminal:
            left = (self._steps - step) * self._batch_size / speed
            self._console.print(
                f"step {step}/{self._steps}  {speed:.0f} images/s  ETA {left:.0f} s  {shown}", highlight=False
            )


def keep_lines_until(path: Path, step: int) -> None:
    """Drop lines of metrics.jsonl after `step`: a resumed run writes them again."""
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf  # a line that a kill cut off
