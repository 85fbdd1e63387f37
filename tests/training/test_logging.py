"""metrics.jsonl and what a run prints."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.helpers import ROOT, run_python
from vfmvae.training import logging
from vfmvae.training.logging import Position, TrainingLog, keep_lines_until, read_metrics, short_count

CPU = torch.device("cpu")
BATCH = 4


def at(step: int, stage: str = "only") -> Position:
    return Position(step, step * BATCH, stage)


def open_log(path: Path, *, total: int, every: int, start: int = 0, **options: Any) -> TrainingLog:
    console = options.pop("console", None) or Console(file=io.StringIO())
    return TrainingLog(path, console, at(start), total * BATCH, every, CPU, **options)


def run_log(path: Path, console: Console, losses: list[float], every: int, start: int = 0) -> None:
    with open_log(path, total=start + len(losses), every=every, start=start, console=console) as log:
        for step, loss in enumerate(losses, start + 1):
            values = {"l1": torch.tensor(loss, requires_grad=True), "total": torch.tensor(2 * loss)}
            log.step(at(step), values, {"tokenizer": step / 1000, "discriminator": 0.5})


def lines(path: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == kind]


def scalars(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_one_line_per_interval_with_means(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run_log(path, Console(file=io.StringIO()), [1.0, 3.0, 5.0, 7.0, 10.0], every=2)
    found = lines(path)
    assert [line["step"] for line in found] == [2, 4, 5], "the end of the run ends an interval too"
    assert [line["seen_images"] for line in found] == [8, 16, 20]
    assert [line["l1"] for line in found] == [2.0, 6.0, 10.0]
    assert [line["total"] for line in found] == [4.0, 12.0, 20.0]
    assert [line["learning_rate_tokenizer"] for line in found] == [0.002, 0.004, 0.005]
    assert {line["learning_rate_discriminator"] for line in found} == {0.5}
    assert all(line["peak_memory_gib"] > 0 and line["skipped_steps"] == 0 for line in found)


def test_a_resumed_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run_log(path, Console(file=io.StringIO()), [1.0, 1.0], every=2)
    run_log(path, Console(file=io.StringIO()), [2.0, 4.0], every=2, start=2)
    assert [(line["step"], line["l1"]) for line in lines(path)] == [(2, 1.0), (4, 3.0)]
    starts = lines(path, "start")
    assert [(line["step"], line["seen_images"], line["total_images"]) for line in starts] == [
        (0, 0, 8),
        (2, 8, 16),
    ]
    assert starts[0]["torch"] == torch.__version__ and starts[0]["processes"] == 1
    assert "CPU" in starts[0]["device"]


def test_losses_may_come_and_go_and_a_mean_is_over_the_steps_that_have_one(tmp_path: Path) -> None:
    with open_log(tmp_path / "m", total=3, every=3) as log:
        assert log.step(at(1), scalars(l1=1.0), {}) is None
        assert log.step(at(2), scalars(l1=2.0, r1=8.0), {}) is None
        assert log.step(at(3), scalars(r1=4.0), {}) == {"l1": 1.5, "r1": 6.0}


def test_skipped_steps_are_counted_and_do_not_enter_the_means(tmp_path: Path) -> None:
    output = io.StringIO()
    good, bad = ({"tokenizer": torch.tensor(float(skipped))} for skipped in (False, True))
    with open_log(tmp_path / "m", total=5, every=3, console=Console(file=output)) as log:
        log.step(at(1), scalars(l1=1.0), {}, good)
        log.step(at(2), scalars(l1=math.nan, r1=math.inf), {}, bad)
        means = log.step(at(3), scalars(l1=2.0), {}, good)
        assert means is not None and means == {"l1": 1.5, "r1": math.inf}
        log.step(at(4), scalars(l1=math.nan), {}, bad)
    first, second = lines(tmp_path / "m")
    assert (first["l1"], first["r1"], first["skipped_steps"]) == (1.5, None, 1)
    assert (second["l1"], second["skipped_steps"], second["skipped_tokenizer"]) == (None, 1, 1)
    assert ["1 skipped" in output.getvalue().splitlines()[0], "2 skipped" in output.getvalue()] == [True] * 2


def test_of_skipped_steps_it_is_said_which_update_and_which_losses(tmp_path: Path) -> None:
    """One of two discriminators is broken; what is finite is shown where no step counts."""
    output = io.StringIO()
    skips = scalars(discriminator_patch=1.0, discriminator_projected=0.0, tokenizer=0.0)
    with open_log(tmp_path / "m", total=2, every=2, console=Console(file=output)) as log:
        log.step(at(1), scalars(l1=1.0, discriminator_patch=math.nan), {}, skips)
        log.step(at(2), scalars(l1=2.0, discriminator_patch=1.0), {}, skips)
        reason = "as the gradients of discriminator_patch were not finite or exploded"
        assert log.trouble == f"{reason}; not finite: discriminator_patch"
    (line,) = lines(tmp_path / "m")
    assert (line["l1"], line["discriminator_patch"], line["skipped_discriminator_patch"]) == (1.5, None, 2)
    assert {name for name in line if name.startswith("skipped_")} == {
        "skipped_steps",
        "skipped_discriminator_patch",
    }
    assert f"step 2: 2 steps skipped, {reason}" in output.getvalue()


def test_skips_in_a_row_are_counted_over_the_ends_of_intervals(tmp_path: Path) -> None:
    flags, counts = [1, 0, 1, 1, 1, 1, 0, 1, 1], []
    with open_log(tmp_path / "m", total=20, every=3) as log:
        for step, flag in enumerate(flags, 1):
            stage = "first" if step <= 4 else "second"  # which ends an interval too
            log.enter_stage(stage)
            log.step(at(step, stage), scalars(l1=1.0), {}, scalars(tokenizer=float(flag)))
            counts.append(log.skips_in_a_row)
        assert counts == [0, 0, 1, 1, 2, 4, 4, 4, 2]
        log.rewind(at(2), skips_in_a_row=3)
        log.step(at(3), scalars(l1=1.0), {}, scalars(tokenizer=1.0))
        assert log.skips_in_a_row == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_null_and_told_to_the_caller(tmp_path: Path, bad: float) -> None:
    with open_log(tmp_path / "m", total=2, every=1) as log:
        means = log.step(at(1), scalars(l1=bad, kl=3.0), {})
        assert means is not None and not math.isfinite(means["l1"]) and means["kl"] == 3.0
        log.evaluation(at(1), {"psnr": bad})
    assert (lines(tmp_path / "m")[0]["l1"], lines(tmp_path / "m")[0]["kl"]) == (None, 3.0)
    assert lines(tmp_path / "m", "eval")[0]["psnr"] is None


def test_an_interval_ends_with_its_stage(tmp_path: Path) -> None:
    with open_log(tmp_path / "m", total=6, every=4) as log:
        for step in range(1, 7):
            stage = "first" if step <= 2 else "second"
            log.step(at(step, stage), scalars(l1=float(step)), {"tokenizer": step})
    found = [(line["step"], line["stage"], line["l1"]) for line in lines(tmp_path / "m")]
    assert found == [(2, "first", 1.5), (4, "second", 3.5), (6, "second", 5.5)]
    assert lines(tmp_path / "m")[0]["learning_rate_tokenizer"] == 2


def test_a_stop_loses_no_steps_and_an_error_reads_none(tmp_path: Path) -> None:
    with open_log(tmp_path / "m", total=100, every=10) as log:
        log.step(at(1), scalars(l1=1.0), {})
    assert [line["step"] for line in lines(tmp_path / "m")] == [1]
    with pytest.raises(KeyError), open_log(tmp_path / "m", total=100, every=10, start=1) as log:
        log.step(at(2), scalars(l1=1.0), {})
        raise KeyError("bug")
    assert [line["step"] for line in lines(tmp_path / "m")] == [1]


def test_the_device_is_read_once_per_interval_and_memory_may_be_reused(tmp_path: Path) -> None:
    loss = torch.tensor(0.0)
    reads = mock.Mock()
    names = ("tolist", "item", "__bool__", "__float__", "numpy")
    originals = {name: getattr(Tensor, name) for name in names}

    def counting(name: str) -> Any:
        def read(self: Tensor, *arguments: Any) -> Any:
            reads(name)
            return originals[name](self, *arguments)

        return read

    patches = {name: counting(name) for name in names}
    with open_log(tmp_path / "m", total=6, every=3) as log, mock.patch.multiple(Tensor, **patches):
        for step in range(1, 7):
            loss.fill_(step)  # as a captured step does, in place
            log.step(at(step), {"l1": loss, "total": loss * 2}, {}, {"tokenizer": torch.tensor(0.0)})
    assert reads.call_args_list == [mock.call("tolist")] * 2
    assert [line["l1"] for line in lines(tmp_path / "m")] == [2.0, 5.0]


def test_pauses_are_not_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # a second passes at every look
    monkeypatch.setattr(logging.time, "perf_counter", lambda: float(next(clock)))
    with open_log(tmp_path / "m", total=2, every=1) as log:
        log.step(at(1), scalars(l1=1.0), {})
        with log.paused():
            for _ in range(100):
                next(clock)
        log.step(at(2), scalars(l1=1.0), {})
    without, with_pause = lines(tmp_path / "m")
    assert without["images_per_second"] == BATCH / without["interval_s"]
    assert with_pause["interval_s"] <= 3 and with_pause["images_per_second"] == round(
        BATCH / with_pause["interval_s"], 2
    )


def test_a_run_that_goes_back_is_logged_as_if_it_had_not_been_there(tmp_path: Path) -> None:
    with open_log(tmp_path / "m", total=4, every=2) as log:
        for step in range(1, 4):
            log.step(at(step), scalars(l1=math.nan), {})
        log.evaluation(at(3), {"psnr": 1.0})
        log.rewind(at(1))
        for step in range(2, 5):
            log.step(at(step), scalars(l1=float(step)), {})
    found = lines(tmp_path / "m")
    assert [(line["step"], line["l1"]) for line in found] == [(2, 2.0), (4, 3.5)]
    assert all(line["images_per_second"] > 0 for line in found)
    assert lines(tmp_path / "m", "eval") == []


def test_evaluations_and_pictures_reach_file_console_and_trackers(tmp_path: Path) -> None:
    output, tracker = io.StringIO(), mock.Mock()
    with open_log(
        tmp_path / "m", total=2, every=2, console=Console(file=output, width=20), trackers=[tracker]
    ) as log:
        log.evaluation(at(0), {"psnr": 10.25, "ssim": 0.5})
        log.step(at(1), scalars(l1=1.0), {"tokenizer": 0.1})
        log.step(at(2), scalars(l1=2.0), {"tokenizer": 0.1})
        log.picture(at(2), tmp_path / "a.png")
    assert lines(tmp_path / "m", "eval") == [
        {"kind": "eval", "step": 0, "seen_images": 0, "stage": "only", "psnr": 10.25, "ssim": 0.5}
    ]
    assert output.getvalue().splitlines()[0] == "step 0  evaluation: psnr 10.25  ssim 0.5"
    (evaluation, train), names = tracker.scalars.call_args_list, {"l1", "learning_rate_tokenizer"}
    assert evaluation == mock.call("eval", {"psnr": 10.25, "ssim": 0.5}, 0)
    assert train.args[0] == "train" and train.args[2] == 8 and names <= train.args[1].keys()
    tracker.picture.assert_called_once_with(tmp_path / "a.png", 8)
    tracker.close.assert_called_once_with(failed=False)


def test_trackers_hear_of_a_failure(tmp_path: Path) -> None:
    tracker = mock.Mock()
    with pytest.raises(KeyError), open_log(tmp_path / "m", total=2, every=2, trackers=[tracker]):
        raise KeyError("bug")
    tracker.close.assert_called_once_with(failed=True)


def test_a_file_gets_one_unwrapped_line_per_interval(tmp_path: Path) -> None:
    output = io.StringIO()
    run_log(tmp_path / "metrics.jsonl", Console(file=output, width=20), [1.0, 3.0, 5.0], every=2)
    first, second = output.getvalue().splitlines()
    assert first.startswith("step 2  8/12 images  ")
    assert first.endswith("GiB  l1 2  total 4")
    assert "images/s  ETA 0:00:0" in first and "  only  " in first
    assert second.startswith("step 3  12/12 images  ")


def test_a_terminal_gets_a_bar_that_fits_and_the_losses_below(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, width=60, force_terminal=True, legacy_windows=False, color_system=None)
    run_log(tmp_path / "metrics.jsonl", console, [1.0, 3.0], every=1)
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]|\r", "", output.getvalue()).strip().splitlines()
    bar, state, losses = shown[-3:]
    assert len(bar) <= 60
    assert bar.startswith("8/8 images ") and "images/s" in bar and "ETA" in bar
    assert "…" not in bar
    assert state.startswith("step 2  only  ") and "GiB" in state
    assert losses.startswith("l1 3  total 6")


def test_another_process_writes_and_shows_nothing(tmp_path: Path) -> None:
    output = io.StringIO()
    with open_log(tmp_path / "m", total=2, every=2, console=Console(file=output), main=False) as log:
        log.evaluation(at(0), {"psnr": 1.0})
        log.step(at(1), scalars(l1=1.0), {})
        assert log.step(at(2), scalars(l1=2.0), {}) == {"l1": 1.5}, "what it decides by must be there"
    assert output.getvalue() == "" and list(tmp_path.iterdir()) == []


def test_two_processes_log_the_mean_of_both(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import torch, torch.distributed as dist
from rich.console import Console
from vfmvae.training.logging import Position, TrainingLog
dist.init_process_group("gloo")
rank, path = dist.get_rank(), Path({str(tmp_path)!r}, "metrics.jsonl")
start = Position(0, 0, "only")
with TrainingLog(path, Console(quiet=True), start, 8, 1, torch.device("cpu"), main=rank == 0) as log:
    means = log.step(Position(1, 8, "only"), {{"l1": torch.tensor(1.0 + 2 * rank)}}, {{}})
    assert means == {{"l1": 2.0}}, means
dist.destroy_process_group()
""")
    options = ("--standalone", "--nproc-per-node", "2")
    run_python("-m", "torch.distributed.run", *options, str(program), env={"OMP_NUM_THREADS": "1"})
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["l1"] == 2.0
    assert lines(tmp_path / "metrics.jsonl", "start")[0]["processes"] == 2


def test_metrics_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"could not write .*metrics\.jsonl: Is a directory"):
        run_log(tmp_path / "metrics.jsonl", Console(file=io.StringIO()), [1.0], every=1)


def test_lines_after_the_checkpoint_and_a_cut_off_one_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 2, "l1": 0.5}\n{"kind": "eval", "step": 4, "psnr": 9}\n{"step": 4, "l1": 0.25}\n'
    for after in (
        "",
        '{"step": 6, "l1": 0.1}\n',
        '{"kind": "eval", "step": 6, "psnr": 10}\n',
        '{"step": 4, "l',
        '{"step": 6, "l1": 0.1}\n{"step"',
        "\x00\x00",
        "4\n",
    ):
        path.write_text(kept + after)
        keep_lines_until(path, 4)
        assert path.read_text() == kept
    keep_lines_until(path, 0)
    assert path.read_text() == ""


def test_a_run_without_metrics_stays_without(tmp_path: Path) -> None:
    keep_lines_until(tmp_path / "metrics.jsonl", 4)
    assert list(tmp_path.iterdir()) == []
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_reading_leaves_out_a_line_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "l1": null}\n{"step": 4, "l1": 0.')
    assert read_metrics(path) == [{"step": 2, "l1": None}]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (12_849, "12.84k"), (999_999, "999.9k"), (1_250_000, "1.25M")],
)
def test_counts_are_short_and_never_rounded_up(count: int, text: str) -> None:
    assert short_count(count) == text
