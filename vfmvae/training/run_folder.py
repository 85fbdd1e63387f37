"""The folder of one run: what lies where, and how a new one gets its name."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from vfmvae.atomic import write_atomically
from vfmvae.training.checkpoint import checkpoints
from vfmvae.training.logging import keep_lines_until

RUNS = Path("runs")


class RunFolder:
    """config.json, metrics.jsonl, checkpoints/, model.safetensors and reconstructions.png of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model.safetensors"
        self.figure = path / "reconstructions.png"

    def start(self, config_json: str) -> None:
        """Create the folder for a new run. ValueError if a run is there already, OSError if it cannot be
        written.
        """
        if self.config.exists():
            raise ValueError(
                f"{self.path} holds a run already; add --resume to go on with it, or give another --run-dir"
            )
        self.write(self.config, lambda path: path.write_text(config_json, encoding="utf-8"))

    def resume(self, config_json: str) -> None:
        """Take up the run with this (possibly changed) configuration."""
        if not self.config.exists():
            raise ValueError(f"{self.path} holds no run to resume (no config.json)")
        self.write(self.config, lambda path: path.write_text(config_json, encoding="utf-8"))

    def newest_checkpoint(self) -> Path | None:
        found = checkpoints(self.checkpoints)
        return found[-1] if found else None

    def forget_after(self, step: int) -> None:
        """Drop logged metrics beyond `step`, which a resumed run logs again."""
        keep_lines_until(self.metrics, step)

    def write(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file of this run whole or not at all."""
        write_atomically(path, write)

    def resume_command(self) -> str:
        return f"python -m vfmvae.train --run-dir {shlex.quote(str(self.path))} --resume"


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
