"""What a run shows and writes while it trains: a progress bar and metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from vfmvae.atomic import reason, write_atomically


class TrainingLog:
    """Collects loss tensors on their device and reads them once per interval of `every` steps.

    Use as a context manager around the loop. Each interval appends a line to metrics.jsonl (mean losses, seen
    images, learning rate, images per second) and updates the progress bar, or prints one line where the
    output is no terminal.
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
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[speed]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            expand=True,
            speed_estimate_period=120.0,  # one step may take many seconds
        )
        self._task = self._bar.add_task("train", total=steps, completed=start, speed="")
        self._losses = Text()
        self._live = Live(Group(self._bar, self._losses), console=console) if console.is_terminal else None

    def __enter__(self) -> TrainingLog:
        self._interval_start = time.perf_counter()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, step: int, losses: dict[str, Tensor], rate: float) -> None:
        """Record the losses of step number `step` (1 for the first).

        At the end of an interval: FloatingPointError for a loss that is not finite, OSError with a sentence
        if metrics.jsonl cannot be written.
        """
        self._pending.append({name: loss.detach() for name, loss in losses.items()})
        self._bar.update(self._task, completed=step)
        if step % self._every == 0 or step == self._steps:
            self._end_interval(step, rate)

    def _end_interval(self, step: int, rate: float) -> None:
        means = self._means()
        now = time.perf_counter()
        speed = (len(self._pending) * self._batch_size) / (now - self._interval_start)
        self._pending, self._interval_start = [], now
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"loss {', '.join(bad)} is not finite at step {step}; lower optimizer.learning_rate or"
                f" use --dtype fp32"
            )
        line = {"step": step, "seen_images": step * self._batch_size, **means}
        self._append(line | {"learning_rate": rate, "images_per_second": round(speed, 2)})
        self._show(step, means, speed)

    def _means(self) -> dict[str, float]:
        """Mean of each loss over the interval; the one wait for the device."""
        names = list(self._pending[0])
        table = torch.stack([torch.stack([losses[n].float() for n in names]) for losses in self._pending])
        return dict(zip(names, table.mean(dim=0).tolist(), strict=True))

    def _append(self, line: dict[str, float]) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"could not write {self._path}: {reason(error)}") from None

    def _show(self, step: int, means: dict[str, float], speed: float) -> None:
        losses = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        images_per_second = f"{speed:.{0 if speed >= 10 else 1}f} images/s"
        if self._live is not None:
            self._bar.update(self._task, speed=images_per_second)
            self._losses.plain = losses
            return
        left = timedelta(seconds=round((self._steps - step) * self._batch_size / speed))
        self._console.print(
            f"step {step}/{self._steps}  {images_per_second}  ETA {left}  {losses}",
            highlight=False,
            soft_wrap=True,
        )


def keep_lines_until(path: Path, step: int) -> None:
    """Drop lines of metrics.jsonl after `step`, and one that a kill cut off: a resumed run writes them again.

    OSError with a sentence, and the file as it was, if it cannot be written.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = "".join(line + "\n" for line in lines if _step(line) <= step)
    write_atomically(path, lambda partial: partial.write_text(kept, encoding="utf-8"))


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # cut off
