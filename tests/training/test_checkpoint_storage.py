"""Reading a checkpoint's metadata runs nothing that the file names; torch's tools read what is written."""

from __future__ import annotations

import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from tests.training.small_run import assert_equal_tensors, small_run
from vfmvae.training.checkpoint import Checkpoints
from vfmvae.training.checkpoint_storage import METADATA, CheckpointWriter, read_metadata

FILES = ["__0_0.distcp"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with tensors of several kinds of state."""
    run = small_run()
    run.step()
    Checkpoints(tmp_path, background=False).save(run.state)
    return tmp_path / "step_00000001"


def test_torch_reads_what_is_written(saved: Path) -> None:
    """`python -m torch.distributed.checkpoint.format_utils dcp_to_torch` does this."""
    run = small_run()
    run.step()
    dcp_to_torch_save(saved, saved / "state.pt")
    assert_equal_tensors(torch.load(saved / "state.pt"), run.tensors())


def test_metadata_says_no_path_of_the_machine(saved: Path) -> None:
    assert str(saved.parent).encode() not in (saved / METADATA).read_bytes()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_every_dtype_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "step_00000001"
    tensor = torch.zeros(2, 3, dtype=dtype)
    dcp.save({"x": tensor}, storage_writer=CheckpointWriter(path, "{}", 1), no_dist=True)
    stored = read_metadata(path, FILES).state_dict_metadata["x"]
    assert stored.properties.dtype == dtype  # type: ignore[union-attr]
    assert stored.size == (2, 3)  # type: ignore[union-attr]


class Calls:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.mkdir, "posix.mkdir"),
        (subprocess.getoutput, "subprocess.getoutput"),
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (torch.load, "torch.serialization.load"),
        (torch.hub.load, "torch.hub.load"),
    ],
)
def test_functions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[..., object], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    attack = Metadata({}, planner_data=Calls(function, "owned"), storage_data={})
    (tmp_path / METADATA).write_bytes(pickle.dumps(attack))
    with pytest.raises(
        ValueError, match=f"no metadata of a checkpoint: it names {name}, which no checkpoint"
    ):
        read_metadata(tmp_path, FILES)
    assert os.listdir(tmp_path) == [METADATA]


def test_a_name_with_dots_reaches_nothing(tmp_path: Path) -> None:
    """Since pickle protocol 4 a name may be a path of attributes."""
    names = b"\x80\x04\x8c\x05torch\x8c\x0cSize.__new__\x93."
    (tmp_path / METADATA).write_bytes(names)
    with pytest.raises(ValueError, match=r"it names torch\.Size\.__new__, which no checkpoint needs"):
        read_metadata(tmp_path, FILES)


def test_what_torch_would_unpickle_on_its_own_is_refused(saved: Path) -> None:
    """Entries that are no tensors are read with torch.load(weights_only=False)."""
    metadata = pickle.loads((saved / METADATA).read_bytes())
    metadata.state_dict_metadata["modules.model.mean"] = BytesStorageMetadata()
    (saved / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="names .*BytesStorageMetadata, which no checkpoint needs"):
        read_metadata(saved, FILES)
    metadata.state_dict_metadata["modules.model.mean"] = None
    (saved / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="lists modules.model.mean, which is no tensor"):
        read_metadata(saved, FILES)


def test_files_elsewhere_are_refused(saved: Path) -> None:
    assert read_metadata(saved, FILES).storage_data
    metadata = pickle.loads((saved / METADATA).read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../other/file"
    (saved / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"points to \.\./\.\./other/file, no file of the checkpoint"):
        read_metadata(saved, FILES)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"x": 1})[:-3], pickle.dumps(7)])
def test_anything_else_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata (is no metadata|holds a int, not metadata)"):
        read_metadata(tmp_path, FILES)
