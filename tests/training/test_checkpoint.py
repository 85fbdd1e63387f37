"""Checkpoints: the same state back, bit for bit; nothing incomplete under a good name; damage passed over."""

from __future__ import annotations

import json
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.helpers import DEVICES, run_python
from tests.training.small_run import assert_equal_tensors, small_run
from vfmvae.training import checkpoint_storage
from vfmvae.training.checkpoint import Checkpoints
from vfmvae.training.checkpoint_folder import (
    CHECKSUMS,
    RECORD,
    checkpoints,
    digests,
    step_of,
    write_checksums,
)
from vfmvae.training.checkpoint_storage import CheckpointWriter
from vfmvae.training.state import FORMAT, TrainingState


def save(saved: Checkpoints, state: TrainingState, step: int) -> None:
    """As if the state had got to that step."""
    state.step = step
    saved.save(state)


def steps_in(folder: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(folder)]


@contextmanager
def full_disk(free: int = 2_000) -> Iterator[None]:
    """No file grows beyond `free` bytes, so a write fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("background", [False, True])
def test_going_on_from_a_checkpoint_is_going_on(tmp_path: Path, background: bool, device: str) -> None:
    run, saved = small_run(device=device), Checkpoints(tmp_path, background=background)
    for _ in range(3):
        run.step()
    run.state.numbers = {"stage": 1, "initial": {"psnr": 7.25}}
    save(saved, run.state, 3)
    for _ in range(3):
        run.step()  # while it is written
    saved.close()

    other, found = small_run(seed=9, device=device), Checkpoints(tmp_path)
    stored = found.load_newest(other.state)
    assert stored is not None and stored.damaged == ()
    assert (stored.step, other.state.step, found.last_step) == (3, 3, 3)
    assert stored.numbers == other.state.numbers == {"stage": 1, "initial": {"psnr": 7.25}}
    for _ in range(3):
        other.step()
    assert_equal_tensors(other.tensors(), run.tensors())


def test_the_step_may_go_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, real = threading.Event(), CheckpointWriter.write_data

    def waiting(self: CheckpointWriter, *arguments: object) -> object:
        assert may_write.wait(timeout=60)
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointWriter, "write_data", waiting)
    run, saved = small_run(), Checkpoints(tmp_path)
    run.step()
    before = run.tensors()
    save(saved, run.state, 1)
    assert saved.last_step == 1
    run.step()
    run.state.numbers["stage"] = 5
    assert steps_in(tmp_path) == [], "nothing has the name before it is complete"
    may_write.set()
    saved.wait()
    other = small_run(seed=9)
    stored = saved.load_newest(other.state)
    assert stored is not None and stored.step == 1 and stored.numbers == {}
    assert_equal_tensors(other.tensors(), before)


@pytest.mark.parametrize("critic", [False, True])
def test_optimizers_without_a_step_stay_without_state(tmp_path: Path, critic: bool) -> None:
    run, saved = small_run(), Checkpoints(tmp_path)
    save(saved, run.state, 0)
    run.step(critic=critic)
    save(saved, run.state, 1)
    saved.wait()
    assert len(run.optimizers["critic"].state) == (2 if critic else 0), "saving steps no optimizer"

    other = small_run(seed=9)
    other.step()  # with state, as when a run goes back
    newest = saved.newest()
    assert newest is not None
    saved.load(newest, other.state)
    assert_equal_tensors(other.tensors(), run.tensors())
    run.step()
    other.step()
    assert_equal_tensors(other.tensors(), run.tensors())


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run, saved = small_run(), Checkpoints(tmp_path, keep=2)
    for step in (100, 20, 123_456_789):
        save(saved, run.state, step)
    saved.close()
    assert steps_in(tmp_path) == [100, 123_456_789]
    assert sorted(os.listdir(tmp_path)) == ["step_00000100", "step_123456789"]
    with pytest.raises(ValueError, match="checkpoints to keep: 0; it must be at least 1"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_costs_one_checkpoint(tmp_path: Path, background: bool) -> None:
    run, saved = small_run(), Checkpoints(tmp_path, background=background)
    save(saved, run.state, 5)
    saved.wait()
    sentence = r"could not write the checkpoint .*step_00000006: ."
    with full_disk():
        if background:
            save(saved, run.state, 6)
        with pytest.raises(OSError, match=sentence):
            save(saved, run.state, 7 if background else 6)
    assert saved.last_step is None
    assert os.listdir(tmp_path) == ["step_00000005"], "the one before stays, and nothing half-written"
    run.step()
    save(saved, run.state, 6)  # there is room again
    saved.close()
    other = small_run(seed=9)
    assert Checkpoints(tmp_path).load_newest(other.state) is not None
    assert_equal_tensors(other.tensors(), run.tensors())


def test_a_background_error_surfaces_when_the_run_ends(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path)
    with full_disk():
        save(saved, small_run().state, 6)
        with pytest.raises(OSError, match="could not write the checkpoint .*step_00000006"):
            saved.close()
    assert os.listdir(tmp_path) == []
    saved.wait()  # it was said once


def test_a_full_disk_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": usage.f_bfree * 0}))

    def write_data(self: CheckpointWriter, *arguments: object) -> object:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 22")

    monkeypatch.setattr(CheckpointWriter, "write_data", write_data)
    with pytest.raises(OSError, match="step_00000001: No space left on device"):
        save(Checkpoints(tmp_path, background=False), small_run().state, 1)


def test_an_error_of_the_program_is_not_called_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointWriter, "storage_meta", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(Checkpoints(tmp_path, background=False), small_run().state, 1)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not write the checkpoint .*file/step_00000001: Not a directory"):
        save(Checkpoints(tmp_path / "file", background=False), small_run().state, 1)
    # Permissions do not bind root; nobody can make a folder here.
    place = Path("/proc/self/fd") if os.geteuid() == 0 else tmp_path / "closed"
    if place.is_relative_to(tmp_path):
        place.mkdir(mode=0o555)
    with pytest.raises(OSError, match=f"could not write the checkpoint {place}/step_00000001: ."):
        save(Checkpoints(place, background=False), small_run().state, 1)


def test_a_complete_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    run, saved = small_run(), Checkpoints(tmp_path, background=False)
    before = run.tensors()
    save(saved, run.state, 5)
    run.step()
    with pytest.raises(OSError, match="step_00000005: a checkpoint of this step is there already"):
        save(saved, run.state, 5)
    saved.load_newest(run.state)
    assert_equal_tensors(run.tensors(), before)
    assert os.listdir(tmp_path) == ["step_00000005"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip_a_bit,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x80garbage" * 100),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", RECORD, CHECKSUMS])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, file: str, damage: str) -> None:
    run, saved = small_run(), Checkpoints(tmp_path, background=False)
    save(saved, run.state, 5)
    before = run.tensors()
    run.step()
    save(saved, run.state, 6)
    DAMAGE[damage](tmp_path / "step_00000006" / file)
    stored = saved.load_newest(run.state)
    assert stored is not None and stored.step == run.state.step == 5
    assert_equal_tensors(run.tensors(), before)
    (sentence,) = stored.damaged
    assert sentence.startswith(f"checkpoint {tmp_path}/step_00000006 is damaged (")
    assert file in sentence or file == CHECKSUMS
    assert sentence.endswith("it is now called step_00000006.damaged")
    save(saved, run.state, 6)  # its place is free
    assert sorted(os.listdir(tmp_path)) == ["step_00000005", "step_00000006", "step_00000006.damaged"]


def test_a_run_does_not_start_again_in_silence_where_all_is_damaged(tmp_path: Path) -> None:
    run, saved = small_run(), Checkpoints(tmp_path, background=False)
    assert saved.load_newest(run.state) is None
    assert Checkpoints(tmp_path / "absent").newest() is None
    save(saved, run.state, 5)
    save(saved, run.state, 6)
    flip_a_bit(tmp_path / "step_00000005" / RECORD)
    (tmp_path / "step_00000006" / "__0_0.distcp").unlink()
    with pytest.raises(
        ValueError, match="no checkpoint in .* is intact .*00006: __0_0.distcp is missing; .*005"
    ):
        saved.newest()
    assert steps_in(tmp_path) == [5, 6], "nothing was renamed"


def test_another_model_is_an_error_and_no_damage(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, background=False)
    save(saved, small_run().state, 5)
    save(saved, small_run(width=6).state, 6)
    other = small_run(seed=9)
    before = other.tensors()
    sentence = r"step_00000006 is of another model: modules.model.decoder.0.weight is \[6, 7\] float32 there"
    with pytest.raises(ValueError, match=sentence):
        saved.load_newest(other.state)
    assert steps_in(tmp_path) == [5, 6]
    assert_equal_tensors(other.tensors(), before)


def test_a_checkpoint_of_a_later_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, saved = small_run(), Checkpoints(tmp_path, background=False)
    monkeypatch.setattr("vfmvae.training.state.FORMAT", FORMAT + 1)
    save(saved, run.state, 5)
    with pytest.raises(
        ValueError, match=f"has format {FORMAT + 1}, this version reads up to {FORMAT}; update"
    ):
        saved.load_newest(run.state)


def test_a_crash_before_the_name_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_storage, "commit", crash)
    with pytest.raises(KeyboardInterrupt):
        save(Checkpoints(tmp_path, background=False), small_run().state, 1)
    assert steps_in(tmp_path) == []
    assert json.loads((tmp_path / ".step_00000001.partial" / CHECKSUMS).read_text()), "all but the name"


def test_no_kill_loses_a_run(tmp_path: Path) -> None:
    report = json.loads(run_python("-m", "tests.training.kill_while_saving", str(tmp_path)).splitlines()[-1])
    assert report["kills"] == 20
    assert report["interrupted"] > 0, "kills hit saves"
    assert report["steps"] > 0, "the run got on in spite of them"
    assert report["faults"] == 0


def test_ranks(tmp_path: Path) -> None:
    """A checkpoint of any number of ranks, replicated or sharded, fits any other number."""
    run = small_run()
    for _ in range(2):
        run.step()
    saved = Checkpoints(tmp_path / "plain", background=False)
    save(saved, run.state, 2)
    faults = run_python("-m", "tests.training.checkpoint_ranks", str(tmp_path)).splitlines()
    assert faults == ["done"]
    for _ in range(2):
        run.step()
    for kind in ("ddp", "fsdp"):
        path = tmp_path / kind / "step_00000004"
        files = sorted(name for name in os.listdir(path) if name.endswith(".distcp"))
        assert files == ["__0_0.distcp", "__1_0.distcp"], "each rank writes its share"
        other = small_run(seed=9)
        stored = Checkpoints(tmp_path / kind).load_newest(other.state)
        assert stored is not None and stored.step == 4
        found = other.tensors()
        assert_equal_tensors(found, torch.load(tmp_path / f"{kind}.pt"))
        for name, tensor in run.tensors().items():  # vectors of another length round otherwise
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def test_a_rewritten_file_with_a_right_checksum_is_still_not_trusted(tmp_path: Path) -> None:
    run, saved = small_run(), Checkpoints(tmp_path, background=False)
    save(saved, run.state, 5)
    path = tmp_path / "step_00000005"
    (path / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    write_checksums(path, digests(path, [".metadata", RECORD, "__0_0.distcp"]))
    with pytest.raises(ValueError, match=r"it names os.system, which no checkpoint needs"):
        saved.load_newest(run.state)
    assert not (tmp_path / "owned").exists()
