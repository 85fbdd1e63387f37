"""Disks that fill up and files that are damaged cost at most the steps since the checkpoint before."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.whole_runs import CHEAP, assert_same_run, cheap, run, saved_steps
from vfmvae.training.checkpoint_folder import checkpoints

CONFIG = cheap(steps=4, checkpoint_every=1, keep_checkpoints=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "finished"
    run(CONFIG, path)
    return path


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished run without its last checkpoint."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    return tmp_path / "run"


def test_a_damaged_newest_checkpoint_costs_one_step(finished: Path, copied: Path) -> None:
    newest = checkpoints(copied / "checkpoints")[-1]
    file = next(newest.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    printed = run(CONFIG, copied)
    assert f"warning: checkpoint {newest} is damaged (the content of {file.name} is not what was" in printed
    assert "from step 2\n" in printed
    assert_same_run(finished, copied)


def test_without_an_intact_checkpoint_a_run_does_not_begin_again_in_silence(copied: Path) -> None:
    for checkpoint in checkpoints(copied / "checkpoints"):
        (checkpoint / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact \(.*start a new run"):
        run(CONFIG, copied)


@contextmanager
def disk_of(bytes_per_file: int) -> Iterator[None]:
    """Larger files cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_full_disk_ends_the_run_and_leaves_what_was_there(
    finished: Path, copied: Path, share: float
) -> None:
    model = (copied / "model.safetensors").stat().st_size
    largest = max(file.stat().st_size for file in (finished / "checkpoints").rglob("*.distcp"))
    room = round(model + share * (largest - model))
    assert model < room < largest, "the averaged weights fit, a checkpoint does not"
    message = "could not write the checkpoint .*step_00000004: File too large"
    with disk_of(room), pytest.raises(OSError, match=message):
        run(CONFIG, copied)
    assert saved_steps(copied) == [2, 3]
    assert not list((copied / "checkpoints").glob(".*"))
    run(CONFIG, copied)
    assert_same_run(finished, copied)


def test_a_disk_without_room_for_the_averaged_weights(finished: Path, copied: Path) -> None:
    before = (copied / "model.safetensors").read_bytes()
    with disk_of(len(before) // 2), pytest.raises(OSError, match=r"could not write .*model\.safetensors: "):
        run(CONFIG, copied)
    assert (copied / "model.safetensors").read_bytes() == before
    run(CONFIG, copied)
    assert_same_run(finished, copied)


def test_a_run_whose_last_checkpoint_is_there_has_its_averaged_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Killed at any moment: a run that has nothing left to do must have nothing left to write.
    order = []
    replace_file = os.replace
    rename = os.rename
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace_file(a, b))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append(Path(b).name), rename(a, b))[1])
    run(cheap(steps=1), tmp_path)
    assert order.index("model.safetensors") < order.index("step_00000001")


def test_a_checkpoint_of_another_model_is_refused(copied: Path) -> None:
    wider = replace(CONFIG, tokenizer=replace(CONFIG.tokenizer, latent_channels=16))
    with pytest.raises(ValueError, match="is of another model: "):
        run(wider, copied)
    stages = (replace(CONFIG.stages[0], losses=replace(CHEAP, adversarial=1.0)),)
    with pytest.raises(ValueError, match="it holds .* and this run has .*projected"):
        run(replace(CONFIG, stages=stages), copied)
