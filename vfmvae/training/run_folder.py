"""The folder of one run: what lies where, and how a new one gets its name."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from vfmvae.atomic import remove_leftovers, write_atomically
from vfmvae.data.quarantine import QUARANTINE
from vfmvae.training.checkpoint_folder import checkpoints, remove_partial_checkpoints
from vfmvae.training.figures import LATEST, LATEST_SAMPLES, keep_figures_until
from vfmvae.training.logging import keep_lines_until

RUNS = Path("runs")


class RunFolder:
    """The files of a run: config.json, metrics.jsonl, checkpoints/, model.safetensors, reconstructions.png or samples.png,
    quarantine.jsonl.
    """

    def __init__(self, path: Path, module: str = "vfmvae.train") -> None:
        """`module`: what `python -m` trains such runs with."""
        self.path = path
        self.module = module
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model.safetensors"
        self.figure = path / LATEST
        self.samples = path / LATEST_SAMPLES
        self.quarantine = path / QUARANTINE

    def check_new(self) -> None:
        """ValueError unless a new run can begin here, because a run's files or something else is there.

        A run that ended before its first checkpoint and its first line of metrics left nothing to go on with;
        a new one takes its place.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; give a folder as --run-dir")
        if self._holds_training():
            raise ValueError(
                f"{self.path} holds a run already; add --resume to go on with it, or give another --run-dir"
            )

    def _holds_training(self) -> bool:
        files = (self.metrics, self.model, *self.checkpoints.glob("step_*"))
        return any(path.exists() for path in files)

    def check_resumable(self) -> None:
        """ValueError if there is no run to go on with."""
        if not self.config.exists():
            raise ValueError(f"{self.path} holds no run to resume (no {self.config.name})")

    def begin(self, config_json: str, step: int, seen_images: int) -> None:
        """Take the folder for a run that has done `step` steps: write its config, and clear what a killed
        process left (temporary files, metrics and pictures from beyond).

        Raises OSError with a sentence if the folder cannot be written.
        """
        self.write(self.config, lambda path: path.write_text(config_json, encoding="utf-8"))
        remove_leftovers(self.path)
        remove_partial_checkpoints(self.checkpoints)
        keep_lines_until(self.metrics, step or -1)  # one that starts over writes its first lines again
        keep_figures_until(self.path, seen_images)

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint of the most steps, or None."""
        found = checkpoints(self.checkpoints)
        return found[-1] if found else None

    def write(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file of this run whole or not at all; OSError with a sentence if that fails."""
        write_atomically(path, write)

    def resume_command(self, launcher: str = "python") -> str:
        """What to type to go on with this run; `launcher` starts its processes."""
        return f"{launcher} -m {self.module} --run-dir {shlex.quote(str(self.path))} --resume"


def new_run_path(name: str) -> Path:
    """runs/<name>, or runs/<name>-2, -3, ... where that is taken."""
    path, number = RUNS / name, 1
    while path.exists():
        number += 1
        path = RUNS / f"{name}-{number}"
    return path


def latest_run_path(name: str) -> Path:
    """The highest-numbered run of that name; ValueError if there is none."""
    runs = [p for p in RUNS.glob(f"{name}*") if p.name == name or p.name.removeprefix(f"{name}-").isdigit()]
    if not runs:
        raise ValueError(f"there is no run of {name!r} in {RUNS}/ to resume; give its folder with --run-dir")
    return max(runs, key=lambda p: int(p.name.removeprefix(name).removeprefix("-") or 1))
