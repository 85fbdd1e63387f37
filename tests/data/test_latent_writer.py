"""Filling a folder of latents: shards appear whole, several processes share them, damage is mended."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from tests.data.latent_shards import IMAGES, SETTINGS, damage, fill, shard, writer_for
from vfmvae.data import latent_writer as module
from vfmvae.data.latent_folder import read_manifest
from vfmvae.data.latents import Latents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "latents")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("how", "words"),
    [("missing", "is missing"), ("cut", "is damaged: .* bytes"), ("bit", "is damaged: its checksum")],
)
def test_a_damaged_shard_is_named_and_mended(folder: Path, how: str, words: str) -> None:
    path = folder / "latents_00001.safetensors"
    before = contents(folder)
    damage(path, how)
    with pytest.raises(ValueError, match=f"shard latents_00001.safetensors {words}.*vfmvae encode"):
        Latents(folder)
    assert writer_for(folder).missing == [1]
    fill(folder)
    assert contents(folder) == before
    Latents(folder)


def test_a_damaged_shard_is_no_finished_one_for_other_processes(folder: Path) -> None:
    """Two are damaged, one in each share: whoever is ready first writes no manifest over the other one."""
    before = contents(folder)
    for number in (0, 1):
        damage(folder / f"latents_{number:05d}.safetensors", "bit")
    one, other = writer_for(folder, share=(0, 2)), writer_for(folder, share=(1, 2))
    assert (one.missing, other.missing) == ([0], [1])
    for writer in (one, other):
        assert len(writer.damaged) == 1
        writer.discard_damaged()
        with pytest.raises(ValueError, match="is not finished"):
            read_manifest(folder)
    one.write(0, shard(SETTINGS.rows(0)))
    assert one.finish() is None
    other.write(1, shard(SETTINGS.rows(1)))
    assert other.finish() is not None
    assert contents(folder) == before


def test_who_has_nothing_to_do_takes_no_discarded_manifest_for_the_end(folder: Path) -> None:
    damage(folder / "latents_00000.safetensors", "bit")
    one, other = writer_for(folder, share=(0, 2)), writer_for(folder, share=(1, 2))
    one.discard_damaged()
    assert other.missing == [] and other.finish() is None
    one.write(0, shard(SETTINGS.rows(0)))
    assert one.finish() == other.finish() is not None


def test_a_cut_header_before_the_end_is_damage_too(tmp_path: Path) -> None:
    writer = writer_for(tmp_path)
    writer.write(0, shard(SETTINGS.rows(0)))
    (tmp_path / "latents_00000.safetensors").write_bytes(b"\x10\x00")
    again = writer_for(tmp_path)
    assert again.missing == [0, 1, 2] and "latents_00000.safetensors is damaged" in again.damaged[0]
    again.discard_damaged()
    assert not list(tmp_path.glob("*.safetensors"))


def test_two_writers_fill_one_folder(tmp_path: Path) -> None:
    one, other = writer_for(tmp_path, share=(0, 2)), writer_for(tmp_path, share=(1, 2))
    assert (one.missing, other.missing) == ([0, 2], [1])
    one.write(0, shard(SETTINGS.rows(0)))
    other.write(1, shard(SETTINGS.rows(1)))
    assert other.finish() is None
    one.write(2, shard(SETTINGS.rows(2)))
    assert one.finish() == other.finish()
    assert len(Latents(tmp_path)) == IMAGES


def test_writers_that_end_at_once_do_no_harm(tmp_path: Path) -> None:
    writers = [writer_for(tmp_path / "out", share=(index, 3)) for index in range(3)]
    for number, writer in enumerate(writers):
        writer.write(number, shard(SETTINGS.rows(number)))
    with ThreadPoolExecutor(3) as pool:
        manifests = list(pool.map(lambda writer: writer.finish(), writers * 5))
    assert all(manifest == manifests[0] and manifest is not None for manifest in manifests)
    assert contents(tmp_path / "out") == contents(fill(tmp_path / "alone"))


def test_lost_statistics_are_written_again(folder: Path) -> None:
    before = contents(folder)
    (folder / "latents_stats.pt").unlink()
    writer = writer_for(folder)
    assert writer.missing == [] and writer.finish() is not None
    assert contents(folder) == before


def test_each_shard_is_announced(folder: Path) -> None:
    seen: list[str] = []
    module.LatentWriter(folder, SETTINGS, tuple("abcde"), advance=lambda: seen.append("checked"))
    (folder / "manifest.json").unlink()
    writer_for(folder).finish(lambda: seen.append("done"))
    assert seen == ["checked"] * 3 + ["done"] * 6


def test_other_settings_and_other_files_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds latents with seed 0, and now it would be 7"):
        writer_for(folder, replace(SETTINGS, seed=7))
    with pytest.raises(ValueError, match="holds latents with seed 0, and now it would be 7"):
        writer_for(folder, replace(SETTINGS, seed=7), share=(5, 6))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds other files already \(model.safetensors\)"):
        writer_for(tmp_path)


def test_shards_of_an_older_format_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(module, "describe", lambda settings: {"settings": '{"seed": 0}'})
        writer_for(tmp_path / "old").write(0, shard(SETTINGS.rows(0)))
        older.setattr(module, "describe", lambda settings: {"settings": "[]"})
        writer_for(tmp_path / "others").write(0, shard(SETTINGS.rows(0)))
    for use in (writer_for, read_manifest):
        with pytest.raises(
            ValueError, match="format 1; this version reads format 2: encode the images again"
        ):
            use(tmp_path / "old")
        with pytest.raises(ValueError, match="was not written by vfmvae"):
            use(tmp_path / "others")


def test_a_full_disk_leaves_no_shard_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = writer_for(tmp_path / "latents")
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="could not write .*latents_00000.safetensors: No space left"):
        writer.write(0, shard(SETTINGS.rows(0)))
    assert not list(tmp_path.rglob("*latents_*"))


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    """Of the own shard where it is old, since another process may be writing; everything at the end."""
    old, fresh = (tmp_path / f".latents_00000.safetensors.{name}.partial" for name in ("old", "fresh"))
    others, manifest = (
        tmp_path / ".latents_00001.safetensors.abc.partial",
        tmp_path / ".manifest.json.a.partial",
    )
    for path in (old, fresh, others, manifest):
        path.touch()
    for path in (old, others):
        os.utime(path, (time.time() - 700, time.time() - 700))
    writer = writer_for(tmp_path)
    writer.write(0, shard(SETTINGS.rows(0)))
    assert [path.exists() for path in (old, fresh, others, manifest)] == [False, True, True, True]
    fill(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_two_processes_at_one_shard_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one ends the same shard, or the folder, while this one writes, and clears what it wrote."""
    save_file, replacing, whole = module.save_file, module.replacing, fill(tmp_path / "whole")
    writer = writer_for(tmp_path / "out")

    def overtaken(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        (tmp_path / "out" / path.name.split(".")[1]).with_suffix(".safetensors").write_bytes(
            (whole / "latents_00000.safetensors").read_bytes()
        )
        path.unlink()

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_file", overtaken)
        assert not writer.is_there(0)
        writer.write(0, shard(SETTINGS.rows(0)))
        assert writer.is_there(0)
    for number in (1, 2):
        writer.write(number, shard(SETTINGS.rows(number)))

    @contextmanager
    def ended(*paths: Path) -> Iterator[list[Path]]:
        with replacing(*paths) as partials:
            yield partials
            for path, partial in zip(paths, partials, strict=True):
                path.write_bytes((whole / path.name).read_bytes())
                partial.unlink()

    monkeypatch.setattr(module, "replacing", ended)
    assert writer.finish() == read_manifest(whole)
    assert contents(tmp_path / "out") == contents(whole)


def test_images_that_could_not_be_read_are_left_out(tmp_path: Path) -> None:
    writer = writer_for(tmp_path / "none")
    for number in writer.missing:
        writer.write(number, shard([]))
    with pytest.raises(ValueError, match="none of the 23 images could be read"):
        writer.finish()
    assert not (tmp_path / "none/manifest.json").exists()
