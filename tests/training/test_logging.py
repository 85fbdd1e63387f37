"""metrics.jsonl and what a run prints."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vfmvae.training.logging import TrainingLog, keep_lines_until


def run_log(path: Path, console: Console, losses: list[float], every: int, start: int = 0) -> None:
    steps = start + len(losses)
    log = TrainingLog(path, console, start=start, steps=steps, every=every, batch_size=4)
    with log:
        for step, loss in enumerate(losses, start + 1):
            values = {"l1": torch.tensor(loss, requires_grad=True), "total": torch.tensor(2 * loss)}
            log.step(step, values, rate=step / 1000)


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_per_interval_with_means(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run_log(path, Console(file=io.StringIO()), [1.0, 3.0, 5.0, 7.0, 10.0], every=2)
    found = lines(path)
    assert [line["step"] for line in found] == [2, 4, 5], "the last step ends an interval too"
    assert [line["seen_images"] for line in found] == [8, 16, 20]
    assert [line["l1"] for line in found] == [2.0, 6.0, 10.0]
    assert [line["total"] for line in found] == [4.0, 12.0, 20.0]
    assert [line["learning_rate"] for line in found] == [0.002, 0.004, 0.005]
    assert all(line["images_per_second"] > 0 for line in found)


def test_a_resumed_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run_log(path, Console(file=io.StringIO()), [1.0, 1.0], every=2)
    run_log(path, Console(file=io.StringIO()), [2.0, 4.0], every=2, start=2)
    assert [(line["step"], line["l1"]) for line in lines(path)] == [(2, 1.0), (4, 3.0)]


def test_a_file_gets_one_unwrapped_line_per_interval(tmp_path: Path) -> None:
    output = io.StringIO()
    run_log(tmp_path / "metrics.jsonl", Console(file=output, width=20), [1.0, 3.0, 5.0], every=2)
    first, second = output.getvalue().splitlines()
    assert first.startswith("step 2/3  ")
    assert first.endswith("l1 2  total 4")
    assert "images/s  ETA 0:00:0" in first
    assert second.startswith("step 3/3  ")


def test_a_terminal_gets_a_bar_that_fits_and_the_losses_below(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, width=60, force_terminal=True, legacy_windows=False, color_system=None)
    run_log(tmp_path / "metrics.jsonl", console, [1.0, 3.0], every=1)
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]|\r", "", output.getvalue()).strip().splitlines()
    bar, losses = shown[-2:]
    assert len(bar) <= 60
    assert bar.startswith("step 2/2 ") and "images/s" in bar and "ETA" in bar
    assert "…" not in bar
    assert losses.startswith("l1 3  total 6")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_logged(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(FloatingPointError, match="loss l1, total is not finite at step 4; lower optimizer"):
        run_log(path, Console(file=io.StringIO()), [1.0, 1.0, bad, 1.0, 1.0, 1.0], every=2)
    assert [line["step"] for line in lines(path)] == [2]


def test_metrics_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"could not write .*metrics\.jsonl: Is a directory"):
        run_log(tmp_path / "metrics.jsonl", Console(file=io.StringIO()), [1.0], every=1)


def test_lines_after_the_checkpoint_and_a_cut_off_one_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 2, "l1": 0.5}\n{"step": 4, "l1": 0.25}\n'
    for after in (
        "",
        '{"step": 6, "l1": 0.1}\n',
        '{"step": 4, "l',
        '{"step": 6, "l1": 0.1}\n{"step"',
        "\x00\x00",
    ):
        path.write_text(kept + after)
        keep_lines_until(path, 4)
        assert path.read_text() == kept
    keep_lines_until(path, 0)
    assert path.read_text() == ""


def test_a_run_without_metrics_stays_without(tmp_path: Path) -> None:
    keep_lines_until(tmp_path / "metrics.jsonl", 4)
    assert list(tmp_path.iterdir()) == []
