"""Names, checksums and removal of checkpoint folders."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from vfmvae.training.checkpoint_folder import (
    CHECKSUMS,
    METADATA,
    RECORD,
    FileDigest,
    checkpoints,
    commit,
    digests,
    find_damage,
    partial_of,
    path_of,
    read_checksums,
    remove_all_but_newest,
    remove_partial_checkpoints,
    set_aside,
    step_of,
    write_checksums,
)


def written(path: Path, size: int = 10) -> Path:
    """A folder with the files of a checkpoint."""
    path.mkdir(parents=True)
    for name in (RECORD, METADATA, "__0_0.distcp"):
        (path / name).write_bytes(os.urandom(size))
    write_checksums(path, digests(path, [RECORD, METADATA, "__0_0.distcp"]))
    return path


def test_checkpoints_are_listed_by_step_and_only_when_complete(tmp_path: Path) -> None:
    for step in (100, 20, 123_456_789):
        path_of(tmp_path, step).mkdir()
    (tmp_path / ".step_00000200.partial").mkdir()
    (tmp_path / "step_00000400.damaged").mkdir()
    (tmp_path / "step_00000300").touch()
    (tmp_path / "step_best").mkdir()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [20, 100, 123_456_789]
    assert checkpoints(tmp_path / "absent") == []
    remove_partial_checkpoints(tmp_path)
    remove_partial_checkpoints(tmp_path / "absent")
    assert not (tmp_path / ".step_00000200.partial").exists()
    assert len(checkpoints(tmp_path)) == 3


def test_a_name_is_given_once(tmp_path: Path) -> None:
    path = path_of(tmp_path, 7)
    written(partial_of(path))
    assert checkpoints(tmp_path) == []
    commit(path)
    assert checkpoints(tmp_path) == [path]
    assert os.listdir(tmp_path) == ["step_00000007"]
    written(partial_of(path))
    with pytest.raises(OSError, match="not empty"):
        commit(path)


def test_the_oldest_go_and_never_half_of_one_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (9, 10, 11, 100):
        written(path_of(tmp_path, step))
    seen, real = [], shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            seen.append(path.name)
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    remove_all_but_newest(tmp_path, 2)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [11, 100]
    assert seen == [".step_00000009.partial", ".step_00000010.partial"]
    assert len(os.listdir(tmp_path)) == 2


def test_a_damaged_one_is_set_aside_again_and_again(tmp_path: Path) -> None:
    for _ in range(2):
        aside = set_aside(written(path_of(tmp_path, 5)))
        assert aside.name == "step_00000005.damaged"
    assert os.listdir(tmp_path) == ["step_00000005.damaged"]


def test_digests_are_sha256_of_the_whole_file(tmp_path: Path) -> None:
    content = os.urandom(2**22 + 17)  # more than is read at a time
    (tmp_path / "large").write_bytes(content)
    (tmp_path / "empty").touch()
    found = digests(tmp_path, ["large", "empty"])
    assert found["large"] == FileDigest(len(content), hashlib.sha256(content).hexdigest())
    assert found["empty"] == FileDigest(0, hashlib.sha256().hexdigest())


def test_what_is_whole_has_no_damage(tmp_path: Path) -> None:
    path = written(tmp_path / "step_00000001")
    files = read_checksums(path)
    assert sorted(files) == [METADATA, "__0_0.distcp", RECORD]
    assert find_damage(path, files, sorted(files)) is None
    (path / "notes.txt").touch()  # somebody's, not the checkpoint's
    assert find_damage(path, files, sorted(files)) is None


def test_damage_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "step_00000001")
    files = read_checksums(path)
    (path / RECORD).write_bytes(bytes(10))
    assert find_damage(path, files, [RECORD]) == (
        f"the content of {RECORD} is not what was written (SHA-256 differs)"
    )
    assert find_damage(path, files, [METADATA]) is None, "each rank looks at its share"
    (path / RECORD).write_bytes(bytes(9))
    assert find_damage(path, files, [RECORD]) == f"{RECORD} has 9 bytes, 10 were written"
    (path / RECORD).unlink()
    assert find_damage(path, files, [RECORD]) == f"{RECORD} is missing"
    (path / RECORD).mkdir()
    files[RECORD] = FileDigest((path / RECORD).stat().st_size, "")
    assert find_damage(path, files, [RECORD]) == f"{RECORD} cannot be read: Is a directory"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"run.json": {}}',
        '{"run.json": 7}',
        '{"run.json": {"bytes": "x", "sha256": ""}}',
    ],
)
def test_checksums_that_are_none_are_damage(tmp_path: Path, content: str) -> None:
    (tmp_path / CHECKSUMS).write_text(content)
    with pytest.raises(ValueError, match=f"{CHECKSUMS} is not what was written"):
        read_checksums(tmp_path)


def test_checksums_list_a_checkpoints_own_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{CHECKSUMS} is missing"):
        read_checksums(tmp_path)
    digest = FileDigest(1, "")
    for files in ({}, {RECORD: digest}, {RECORD: digest, METADATA: digest, "../x": digest}):
        write_checksums(tmp_path, files)
        with pytest.raises(ValueError, match="does not list the files of a checkpoint"):
            read_checksums(tmp_path)
