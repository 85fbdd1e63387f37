"""Processes that read images: one that dies or cannot read ends the run with a sentence."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import vfmvae.train
from tests.commands import run as run_command
from tests.commands import save_image
from tests.helpers import ROOT
from tests.whole_runs import assert_same_run, cheap, run, saved_steps, small_parts
from vfmvae.serialization import to_json
from vfmvae.train_job import Job


def test_a_worker_that_dies_ends_the_run_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = multiprocessing.active_children()
    config, real_step = cheap(steps=10, workers=2, checkpoint_every=2), vfmvae.train.training_step

    def step_after_a_death(job: Job, *arguments: object) -> object:
        if job.state.step == 3:
            worker = max(p.pid for p in multiprocessing.active_children() if p.pid is not None)
            os.kill(worker, signal.SIGKILL)
        return real_step(job, *arguments)  # type: ignore[arg-type]

    (tmp_path / "config.json").write_text(to_json(config))
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, small_parts():
        patch.setattr(vfmvae.train, "training_step", step_after_a_death)
        code = run_command(vfmvae.train, "--config", tmp_path / "config.json", "--run-dir", folder)
    error = capsys.readouterr().err
    assert code == 1
    assert error.startswith("error: a process that reads images has died (DataLoader worker (pid")
    assert error.endswith("a machine short of memory kills them: try fewer --workers\n")
    assert error.count("\n") == 1
    assert multiprocessing.active_children() == before, "the other one has gone too"
    assert saved_steps(folder)[-1] >= 2
    run(config, folder)
    run(replace(config, workers=0), tmp_path / "undisturbed")
    assert_same_run(tmp_path / "undisturbed", folder)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number in range(6):
        save_image(folder / f"train/{number}.png", 80, 70, seed=number)
    save_image(folder / "val/held_out.png", 64, 64, seed=9)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_whoever_reads_it(
    workers: int, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = images / "train" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    config = cheap(steps=20, data=str(images), workers=workers)
    (tmp_path / "config.json").write_text(to_json(config))
    with small_parts():
        code = run_command(vfmvae.train, "--config", tmp_path / "config.json", "--run-dir", tmp_path / "run")
    error = capsys.readouterr().err
    assert code == 1
    assert error.startswith(f"error: cannot read image {broken}: ")
    assert error.endswith("; repair or remove it\n")
    assert error.count("\n") == 1


def test_a_folder_of_images_trains_alike_whoever_reads_it(images: Path, tmp_path: Path) -> None:
    Image.new("L", (40, 30)).save(images / "train" / "small_and_grey.png")
    for workers in (0, 2):
        run(cheap(data=str(images), workers=workers), tmp_path / str(workers))
    assert_same_run(tmp_path / "0", tmp_path / "2")


def test_an_error_in_a_step_ends_the_workers_too(tmp_path: Path) -> None:
    # In developer mode the traceback keeps the frames of the loop, and with them the workers' iterator.
    program = (
        "import vfmvae.train\n"
        "def broken(*arguments): raise ValueError('broken step')\n"
        "vfmvae.train.training_step = broken\n"
        "vfmvae.train.main()\n"
    )
    (tmp_path / "config.json").write_text(to_json(cheap(workers=2)))
    arguments = ["--config", str(tmp_path / "config.json"), "--run-dir", str(tmp_path / "run")]
    process = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 1
    assert "ValueError: broken step" in process.stderr
