"""Checkpoints: the same state back, bit for bit; nothing incomplete under a good name; damage is named."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vfmvae.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    remove_partial_checkpoints,
    save_checkpoint,
    step_of,
)
from vfmvae.training.state import TrainingState


class Model(nn.Module):
    """A frozen part, a trained one and a buffer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 8).requires_grad_(False)
        self.decoder = nn.Linear(8, width)
        self.register_buffer("average", torch.randn(3))


def training_state(width: int = 8) -> tuple[TrainingState, Model, torch.optim.Optimizer]:
    model = Model(width)
    optimizer = torch.optim.Adam(model.decoder.parameters(), lr=0.1, fused=True)
    return TrainingState(model, "encoder.", optimizer), model, optimizer


def take_steps(model: Model, optimizer: torch.optim.Optimizer, inputs: Tensor) -> None:
    for batch in inputs:
        optimizer.zero_grad()
        model.decoder(model.encoder(batch)).square().mean().backward()
        optimizer.step()


def test_going_on_from_a_checkpoint_is_going_on(tmp_path: Path) -> None:
    inputs = torch.randn(6, 4, 8)
    state, model, optimizer = training_state()
    take_steps(model, optimizer, inputs[:3])
    state.step, state.initial = 3, {"psnr": 7.25}
    path = save_checkpoint(tmp_path, 3, state)
    take_steps(model, optimizer, inputs[3:])

    resumed, other, other_optimizer = training_state()
    other.encoder.load_state_dict(model.encoder.state_dict())  # frozen: not in the checkpoint
    load_checkpoint(path, resumed)
    assert (resumed.step, resumed.initial) == (3, {"psnr": 7.25})
    assert torch.equal(other.average, model.average)
    take_steps(other, other_optimizer, inputs[3:])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_the_frozen_part_is_not_stored() -> None:
    state, _, _ = training_state()
    assert sorted(state.state_dict()["model"]) == ["average", "decoder.bias", "decoder.weight"]


def test_checkpoints_are_listed_by_step_and_only_when_complete(tmp_path: Path) -> None:
    state, _, _ = training_state()
    for step in (100, 20, 123_456_789):
        save_checkpoint(tmp_path, step, state)
    (tmp_path / ".step_00000200.partial").mkdir()
    (tmp_path / "step_00000300").touch()
    (tmp_path / "step_best").mkdir()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [20, 100, 123_456_789]
    assert checkpoints(tmp_path / "absent") == []
    remove_partial_checkpoints(tmp_path)
    assert not (tmp_path / ".step_00000200.partial").exists()
    assert len(checkpoints(tmp_path)) == 3


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    state, _, _ = training_state(width=4000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, hard)
    )  # writing fails in the middle, as on a full disk
    try:
        with pytest.raises(OSError, match=r"could not write the checkpoint .*step_00000005: ."):
            save_checkpoint(tmp_path, 5, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_complete_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    state, model, _ = training_state()
    path = save_checkpoint(tmp_path, 5, state)
    before = model.decoder.weight.detach().clone()
    with torch.no_grad():
        model.decoder.weight.zero_()
    with pytest.raises(OSError, match="could not write the checkpoint .*: Directory not empty"):
        save_checkpoint(tmp_path, 5, state)
    load_checkpoint(path, state)
    assert torch.equal(model.decoder.weight, before)
    assert os.listdir(tmp_path) == ["step_00000005"]


def test_a_place_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    state, _, _ = training_state()
    with pytest.raises(OSError, match="could not write the checkpoint .*: Not a directory"):
        save_checkpoint(tmp_path / "file", 1, state)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["empty", "half", "garbage", "missing"])
def test_damage_is_named(tmp_path: Path, file: str, damage: str) -> None:
    state, _, _ = training_state(width=500)
    path = save_checkpoint(tmp_path, 5, state)
    content = (path / file).read_bytes()
    damaged = {"empty": b"", "half": content[: len(content) // 2], "garbage": b"garbage" * 100}
    (path / file).unlink()
    if damage in damaged:
        (path / file).write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"checkpoint .*step_00000005 is damaged or of another model: \S"):
        load_checkpoint(path, state)


def test_another_model_is_refused(tmp_path: Path) -> None:
    state, _, _ = training_state()
    path = save_checkpoint(tmp_path, 5, state)
    other, _, _ = training_state(width=9)
    with pytest.raises(ValueError, match="is damaged or of another model: "):
        load_checkpoint(path, other)
