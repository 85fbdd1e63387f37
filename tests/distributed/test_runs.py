"""Runs that torchrun starts: the same result as in one process, and what a signal or a death does to them."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.commands import save_image
from tests.distributed.launch import launched, run
from tests.distributed.runs import DYING_STEP, HALF, STEPS, run_config
from tests.tiny_runs import largest_difference
from vfmvae.data import open_data
from vfmvae.serialization import to_json
from vfmvae.train import train
from vfmvae.training.checkpoint_folder import checkpoints, path_of, step_of
from vfmvae.training.run_folder import RunFolder
from vfmvae.weights import read_safetensors

A_MINUTE = 60  # seconds, from the death of a process to the end of the others
HANGS = 600


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    (made / "config.json").write_text(to_json(run_config()))
    return made


def in_one_process(folder: Path) -> str:
    output = io.StringIO()
    train(run_config(), RunFolder(folder), Console(file=output, width=200))
    return output.getvalue()


def weights(folder: Path) -> dict[str, Tensor]:
    return read_safetensors(folder / "model.safetensors")


def steps_of(folder: Path) -> list[int]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == "train"]


def without_end(folder: Path, copy: Path) -> Path:
    """A copy of a run as it was after its first checkpoint."""
    shutil.copytree(folder, copy)
    shutil.rmtree(path_of(copy / "checkpoints", STEPS))
    (copy / "model.safetensors").unlink()
    return copy


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    in_one_process(folder / "alone")
    return folder / "alone"


@pytest.fixture(scope="module")
def together(folder: Path) -> tuple[Path, str]:
    """A run of two processes, and what they printed."""
    path = folder / "together"
    return path, run("vfmvae.train", "--config", folder / "config.json", "--run-dir", path)


@pytest.fixture(scope="module")
def sharded(folder: Path) -> Path:
    """A run with FSDP2."""
    run("tests.distributed.runs", folder, "sharded")
    return folder / "sharded"


def test_a_run_of_two_processes_ends_where_that_of_one_does(alone: Path, together: tuple[Path, str]) -> None:
    path, printed = together
    assert largest_difference(weights(path), weights(alone)) <= 1e-5
    assert steps_of(path) == list(range(1, STEPS + 1))
    assert printed.count("images/s") == STEPS, "one process prints"
    assert "x 2 processes" in printed
    assert "Warning" not in printed


def test_a_checkpoint_of_two_goes_on_in_one(together: tuple[Path, str], alone: Path, folder: Path) -> None:
    resumed = without_end(together[0], folder / "two to one")
    assert f"from step {HALF}" in in_one_process(resumed)
    assert largest_difference(weights(resumed), weights(alone)) <= 1e-5


def test_a_sharded_run_ends_there_too(sharded: Path, alone: Path) -> None:
    assert largest_difference(weights(sharded), weights(alone)) <= 1e-5


def test_a_sharded_checkpoint_goes_on_in_one(sharded: Path, alone: Path, folder: Path) -> None:
    resumed = without_end(sharded, folder / "sharded to one")
    assert f"from step {HALF}" in in_one_process(resumed)
    assert largest_difference(weights(resumed), weights(alone)) <= 1e-5


def test_a_checkpoint_of_one_goes_on_sharded(alone: Path, folder: Path) -> None:
    resumed = without_end(alone, folder / "carried")
    assert f"from step {HALF}" in run("tests.distributed.runs", folder, "carried")
    assert largest_difference(weights(resumed), weights(alone)) <= 1e-5


def test_all_roll_back_when_one_meets_nan(folder: Path) -> None:
    printed = run("tests.distributed.runs", folder, "poisoned")
    assert printed.count("going back to the checkpoint of step 2") == 1  # that of step 4 is not saved
    assert "2 steps in a row up to step 5 were skipped" in printed
    assert steps_of(folder / "poisoned") == list(range(1, STEPS + 1))
    assert all(tensor.isfinite().all() for tensor in weights(folder / "poisoned").values())


def test_both_stop_when_one_meets_a_broken_image(folder: Path) -> None:
    for number in range(10):
        save_image(folder / f"images/{number}.png", 70, 70, seed=number)
    seed, batch = run_config().seed, 4  # of both; rank 1 has the later half
    order = open_data(str(folder / "images"), "train", 64, seed).batch(0, 2 * batch)["key"]
    key = next(key for key in order[batch + 2 :] if key not in order[:batch])
    (folder / "images" / key).write_bytes(b"")
    printed = run("tests.distributed.runs", folder, "broken", code=1)
    assert f"warning: {key}: the file is empty" in printed
    assert "error: 1 of 10 images cannot be used, and max_broken 0 allows 0" in printed
    assert "]: Traceback" not in printed, "but of torchrun itself"
    (line,) = (folder / "broken" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == key
    assert "step 1 is saved; when the cause below is mended, go on with: torchrun" in printed
    assert [step_of(path) for path in checkpoints(folder / "broken" / "checkpoints")] == [0, 1]


def test_a_dying_rank_ends_the_run_with_its_cause_and_it_goes_on_exactly(
    together: tuple[Path, str], folder: Path
) -> None:
    printed = run("tests.distributed.runs", folder, "dies", code=1)
    assert time.time() - (folder / "dies.died").stat().st_mtime < A_MINUTE
    assert "rank 0 has lost another process of this run" in printed
    assert "Signal 9 (SIGKILL) received" in printed
    assert "[rank0]: Traceback" not in printed
    assert [step_of(path) for path in checkpoints(folder / "dies" / "checkpoints")] == [0, HALF]
    assert DYING_STEP not in steps_of(folder / "dies")
    printed = run("vfmvae.train", "--run-dir", folder / "dies", "--resume")
    assert f"from step {HALF}" in printed
    ours, theirs = weights(folder / "dies"), weights(together[0])
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_a_dying_machine_ends_the_run_on_the_others(folder: Path) -> None:
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", str(folder / "meeting"), "--rdzv-id", "run")
    launcher = (
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *meeting,
        *("--rdzv-conf", "store_type=file"),
    )
    act = ("tests.distributed.runs", folder, "leaves")
    with launched(*act, launcher=launcher) as one, launched(*act, launcher=launcher) as other:
        outputs = {process.communicate(timeout=HANGS)[0]: process.returncode for process in (one, other)}
    assert time.time() - (folder / "leaves.died").stat().st_mtime < A_MINUTE
    assert sorted(outputs.values()) == [-signal.SIGKILL, 1], outputs
    assert any("rank 0 has lost another process of this run" in output for output in outputs)


def test_a_stop_signal_saves_and_says_how_to_go_on(alone: Path, folder: Path) -> None:
    path = folder / "stopped"
    arguments = ("--config", folder / "config.json", "--run-dir", path, "--steps", "100000")
    with launched("vfmvae.train", *arguments) as process:
        while not (path / "metrics.jsonl").exists() or not steps_of(path):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=A_MINUTE)
    saved = steps_of(path)[-1]
    assert step_of(checkpoints(path / "checkpoints")[-1]) == saved
    assert printed.count("stopping after this step") == 1
    command = f"torchrun --nproc-per-node 2 -m vfmvae.train --run-dir {path} --resume"
    assert f"stopped after step {saved}; go on with: {command}\n" in printed
    assert "Unable to shutdown" not in printed, "no process had to be killed"
