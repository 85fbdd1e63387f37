"""Processes that read images: one that dies or cannot read ends the run with a sentence."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vfmvae.train
from tests.commands import run as run_command
from tests.commands import save_image
from tests.helpers import ROOT
from tests.whole_runs import assert_same_run, cheap, lines, run, saved_steps, small_parts, weights
from vfmvae.data import open_data
from vfmvae.serialization import to_json
from vfmvae.train_job import Job
from vfmvae.training.run_folder import RunFolder


def test_a_worker_that_dies_ends_the_run_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = multiprocessing.active_children()
    config, real_step = cheap(steps=10, workers=2, checkpoint_every=0), vfmvae.train.training_step

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
    output, error = capsys.readouterr()
    assert code == 1
    assert error.startswith("error: a process that reads images has died (DataLoader worker (pid")
    assert error.endswith("a machine short of memory kills them: try fewer --workers\n")
    assert error.count("\n") == 1
    assert multiprocessing.active_children() == before, "the other one has gone too"
    done = len(lines(folder))
    assert 4 <= done < 10, "the step in which it died is finished"
    assert saved_steps(folder) == [0, done]
    assert f"step {done} is saved; when the cause below is mended, go on with: " in output
    assert f"from step {done}\n" in run(config, folder)
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
    # 6 images in batches of 4: this one is first asked for in the second.
    broken = next(images / f"train/{n}.png" for n in range(6) if n not in first_images(images, 4))
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    config = cheap(steps=20, data=str(images), workers=workers, batch_size=4, log_every=3)
    (tmp_path / "config.json").write_text(to_json(config))
    folder = tmp_path / "run"
    with small_parts():
        code = run_command(vfmvae.train, "--config", tmp_path / "config.json", "--run-dir", folder)
    output, error = capsys.readouterr()
    assert code == 1
    key = broken.relative_to(images).as_posix()
    assert error.startswith(f"error: 1 of 7 images cannot be used, and max_broken 0.001 allows 0: {key} (")
    assert error.endswith(f"; the whole list is {folder}/quarantine.jsonl; mend them, or allow more\n")
    assert error.count("\n") == 1
    assert [json.loads(line)["key"] for line in lines_of(folder / "quarantine.jsonl")] == [key]
    command = RunFolder(folder).resume_command()
    assert output.endswith(f"step 1 is saved; when the cause below is mended, go on with: {command}\n")
    assert saved_steps(folder) == [0, 1]
    broken.write_bytes(whole)
    assert "from step 1\n" in run(config, folder)
    run(config, tmp_path / "undisturbed")
    assert torch.equal(*(next(iter(weights(path).values())) for path in (folder, tmp_path / "undisturbed")))


def lines_of(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_few_broken_images_are_listed_and_replaced(workers: int, images: Path, tmp_path: Path) -> None:
    (images / "train/2.png").write_bytes(b"")
    (images / "train/4.png").write_bytes((images / "train/4.png").read_bytes()[:100])
    config = cheap(steps=6, data=str(images), workers=workers, max_broken=0.3)
    output = run(config, tmp_path / "run")
    assert output.count("warning: train/2.png: the file is empty\n") == 1
    listed = [json.loads(line) for line in lines_of(tmp_path / "run/quarantine.jsonl")]
    assert sorted(entry["key"] for entry in listed) == ["train/2.png", "train/4.png"]
    assert saved_steps(tmp_path / "run")[-1] == 6


def test_a_data_set_that_has_changed_is_told(images: Path, tmp_path: Path) -> None:
    config = cheap(steps=4, data=str(images))
    assert "has changed" not in run(replace(config, steps=2), tmp_path / "run")
    (images / "train/5.png").unlink()
    output = run(config, tmp_path / "run")
    assert "has changed since the checkpoint, from 6 to 5 training images" in output


def first_images(images: Path, count: int) -> set[int]:
    """The numbers of the images that a run on this folder sees first."""
    keys = open_data(str(images), "train", 64, cheap().seed).batch(0, count)["key"]
    return {int(Path(key).stem) for key in keys}


def test_a_held_out_image_that_vanishes_costs_no_step(images: Path, tmp_path: Path) -> None:
    config = cheap(steps=5, data=str(images), evaluate_every=3 * 2)
    held_out = images / "val" / "held_out.png"
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(
            ValueError, match="none of the first held-out images can be read; val/held_out.png: No such"
        ),
    ):
        patch.setattr(vfmvae.train, "training_step", removing(held_out))
        run(config, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [0, 3]


def removing(file: Path) -> Callable[..., object]:
    """A training step that removes a file."""
    real_step = vfmvae.train.training_step

    def step(*arguments: Any) -> object:
        file.unlink(missing_ok=True)
        return real_step(*arguments)

    return step


def test_an_error_in_a_step_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_step = vfmvae.train.training_step

    def step(job: Job, *arguments: Any) -> object:
        result = real_step(job, *arguments)
        if job.state.step == 3:
            raise ValueError("half done")
        return result

    monkeypatch.setattr(vfmvae.train, "training_step", step)
    with pytest.raises(ValueError, match="half done"):
        run(cheap(steps=9, checkpoint_every=2), tmp_path)
    assert saved_steps(tmp_path) == [0, 2]


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
