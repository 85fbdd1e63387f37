"""Names of runs, and when a folder can begin or go on with one."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from vfmvae.training.run_folder import RunFolder, latest_run_path, new_run_path


def test_new_runs_are_numbered_and_the_latest_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no run of 'demo' in runs/ to resume; give its folder"):
        latest_run_path("demo")
    names = []
    for _ in range(11):
        names.append(new_run_path("demo").name)
        new_run_path("demo").mkdir(parents=True)
    assert names == ["demo", *(f"demo-{i}" for i in range(2, 12))]
    Path("runs/demo-large").mkdir()
    Path("runs/demonstration-99").mkdir()
    assert latest_run_path("demo") == Path("runs/demo-11"), "by number, not by letters"


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "model.safetensors",
        "checkpoints/step_00000004",
        "checkpoints/step_00000004.damaged",
    ],
)
def test_a_folder_with_any_file_of_a_run_is_taken(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.check_new()
    folder.checkpoints.mkdir(parents=True)
    (folder.path / "notes.txt").touch()
    folder.check_new()
    (folder.path / name).touch()
    with pytest.raises(ValueError, match="run holds a run already; add --resume to go on with it, or give"):
        folder.check_new()


def test_a_run_that_failed_before_it_had_anything_leaves_its_place(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin("{}\n", step=0, seen_images=0)
    (folder.checkpoints / ".step_00000004.partial").mkdir(parents=True)
    folder.check_new()
    folder.check_resumable()
    folder.begin('{"seed": 1}\n', step=0, seen_images=0)
    assert folder.config.read_text() == '{"seed": 1}\n'
    assert list(folder.checkpoints.iterdir()) == []


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; give a folder as --run-dir"):
        RunFolder(tmp_path / "file").check_new()


def test_only_a_run_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run to resume \(no config.json\)"):
        RunFolder(tmp_path).check_resumable()


def test_beginning_clears_what_a_killed_process_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.checkpoints / ".step_00000008.partial").mkdir(parents=True)
    (folder.checkpoints / "step_00000004").mkdir()
    (tmp_path / ".model.safetensors.abc.partial").touch()
    folder.metrics.write_text('{"step": 4}\n{"step": 6}\n')
    folder.begin("{}\n", step=4, seen_images=4)
    assert folder.config.read_text() == "{}\n"
    assert folder.metrics.read_text() == '{"step": 4}\n'
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "config.json", "metrics.jsonl"]
    assert folder.newest_checkpoint() == folder.checkpoints / "step_00000004"


def test_the_resume_command_survives_a_shell(tmp_path: Path) -> None:
    command = RunFolder(tmp_path / "my run").resume_command()
    assert shlex.split(command)[-3:] == ["--run-dir", str(tmp_path / "my run"), "--resume"]
