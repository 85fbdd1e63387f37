"""Shards of latents: what is in them, that they appear whole, and how batches come out of them."""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vfmvae.data import latents as module
from vfmvae.data.latents import (
    Latents,
    LatentSettings,
    LatentWriter,
    channel_statistics,
    pack_names,
    unpack_name,
)

IMAGES, SHARD = 23, 10
SETTINGS = LatentSettings(
    tokenizer="t",
    images=IMAGES,
    names="n",
    resolution=64,
    kind="sample",
    moments=True,
    storage="fp32",
    compute="float32",
    seed=0,
    shard_images=SHARD,
)
NAMES = [f"größe/{number}.jpg" for number in range(IMAGES)]


def latent(number: int, mirrored: bool = False) -> Tensor:
    """[3, 4, 2], told apart by its values."""
    rng = np.random.default_rng((number, mirrored))
    return torch.from_numpy(rng.normal([[[1.0]], [[-5.0]], [[300.0]]], 2.0, (3, 4, 2))).float()


def shard(rows: range) -> dict[str, Tensor]:
    plain, flipped = (torch.stack([latent(row, flip) for row in rows]) for flip in (False, True))
    return {
        "latents": plain,
        "latents_flip": flipped,
        "moments": torch.cat([plain, -plain], dim=1),
        "moments_flip": torch.cat([flipped, -flipped], dim=1),
        "labels": torch.tensor([row % 5 for row in rows]),
        "names": pack_names([NAMES[row] for row in rows]),
    }


def writer_for(folder: Path, settings: LatentSettings = SETTINGS) -> LatentWriter:
    return LatentWriter(folder, settings, tuple("abcde"))


def fill(folder: Path) -> Path:
    writer = writer_for(folder)
    for number in writer.missing:
        writer.write(number, shard(writer.rows(number)))
    assert writer.finish() is not None
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "latents")


def test_another_reader_finds_the_published_layout(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    counts = []
    for path in files:
        with safe_open(path, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
            counts.append(shapes["labels"][0])
            assert shapes["latents"] == shapes["latents_flip"] == [counts[-1], 3, 4, 2]
    assert counts == [10, 10, 3]
    statistics = torch.load(folder / "latents_stats.pt", weights_only=True)
    everything = torch.stack([latent(n, flip) for n in range(IMAGES) for flip in (False, True)]).double()
    torch.testing.assert_close(statistics["mean"].double(), everything.mean((0, 2, 3), keepdim=True))
    torch.testing.assert_close(statistics["std"].double(), everything.std((0, 2, 3), keepdim=True))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [entry["sha256"] for entry in manifest["shards"]] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    ]
    assert manifest["mean"] == pytest.approx(everything.mean((0, 2, 3)).tolist(), rel=1e-12)


def test_statistics_are_exact_where_sums_of_squares_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)
    values = torch.randn(17, 2, 3, 5, dtype=torch.float64) * 1e-3 + torch.tensor([1e6, -1.0]).view(1, 2, 1, 1)
    mean, std = channel_statistics([values[:4], values[4:5], values[5:]])
    torch.testing.assert_close(mean, values.mean((0, 2, 3)), rtol=1e-14, atol=0)
    torch.testing.assert_close(std, values.std((0, 2, 3)), rtol=1e-6, atol=0)


def test_names_survive() -> None:
    names = ["a/b.png", "", "größe 大.jpg"]
    assert [unpack_name(row) for row in pack_names(names)] == names
    assert pack_names([""]).shape == (1, 1)


def test_validation_is_every_image_in_order(folder: Path) -> None:
    source = Latents(folder, "validation")
    assert len(source) == IMAGES and source.classes == tuple("abcde")
    batches = [source.batch(step, 9) for step in range(3)]
    assert [len(batch["key"]) for batch in batches] == [9, 9, 5]
    assert [key for batch in batches for key in batch["key"]] == NAMES
    found = torch.cat([batch["latent"] for batch in batches])
    assert torch.equal(found, torch.stack([latent(number) for number in range(IMAGES)]))
    assert batches[1]["label"].tolist() == [number % 5 for number in range(9, 18)]
    assert batches[0]["moments"] is not None and torch.equal(batches[0]["moments"][:, :3], found[:9])
    with pytest.raises(ValueError, match="begins beyond the 23"):
        source.batch(3, 9)


def test_an_epoch_of_training_has_every_image_once_mirrored_or_not(folder: Path) -> None:
    source = Latents(folder, seed=3)
    batches = [source.batch(step, 4) for step in range(2 * IMAGES)]  # eight epochs
    keys = [key for batch in batches for key in batch["key"]]
    latents = torch.cat([batch["latent"] for batch in batches])
    moments = torch.cat([batch["moments"] for batch in batches if batch["moments"] is not None])
    epochs = [keys[start : start + IMAGES] for start in range(0, len(keys), IMAGES)]
    assert all(sorted(epoch) == sorted(NAMES) for epoch in epochs)
    assert epochs[0] != epochs[1]
    mirrored = 0
    for key, found, both in zip(keys, latents, moments, strict=True):
        flip = not torch.equal(found, latent(NAMES.index(key)))
        assert torch.equal(found, latent(NAMES.index(key), flip)) and torch.equal(both[:3], found)
        mirrored += flip
    assert 0.35 < mirrored / len(keys) < 0.65


def test_a_batch_depends_on_seed_and_position_alone(folder: Path) -> None:
    source, again = Latents(folder, seed=1), Latents(folder, seed=1, verify=False)
    halves = torch.cat([source.batch(4, 6)["latent"], source.batch(5, 6)["latent"]])
    assert torch.equal(again.batch(2, 12)["latent"], halves)
    assert not torch.equal(Latents(folder, seed=2).batch(2, 12)["latent"], halves)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-100])
    else:
        content[-8] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "words"),
    [("missing", "is missing"), ("cut", "is damaged: .* bytes"), ("bit", "is damaged: its checksum")],
)
def test_a_damaged_shard_is_named_and_mended(folder: Path, how: str, words: str) -> None:
    path = folder / "latents_00001.safetensors"
    before = path.read_bytes()
    damage(path, how)
    with pytest.raises(ValueError, match=f"shard latents_00001.safetensors {words}.*vfmvae encode"):
        Latents(folder)
    assert writer_for(folder).missing == [1]
    fill(folder)
    assert path.read_bytes() == before
    Latents(folder)


def test_sizes_can_be_trusted_instead_of_checksums(folder: Path) -> None:
    damage(folder / "latents_00001.safetensors", "bit")
    Latents(folder, verify=False)


def test_a_folder_without_a_manifest_is_not_finished(tmp_path: Path) -> None:
    writer = writer_for(tmp_path)
    writer.write(1, shard(writer.rows(1)))
    assert writer.finish() is None
    assert writer_for(tmp_path).missing == [0, 2]
    with pytest.raises(ValueError, match="encoding did not end"):
        Latents(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        Latents(tmp_path / "absent")


def test_two_writers_fill_one_folder(tmp_path: Path) -> None:
    one, other = writer_for(tmp_path), writer_for(tmp_path)
    one.write(0, shard(one.rows(0)))
    other.write(1, shard(other.rows(1)))
    assert other.finish() is None
    one.write(2, shard(one.rows(2)))
    assert one.finish() == other.finish()
    assert len(Latents(tmp_path)) == IMAGES


def test_other_settings_and_other_files_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds latents with seed 0, and now it would be 7"):
        writer_for(folder, replace(SETTINGS, seed=7))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds other files already \(model.safetensors\)"):
        writer_for(tmp_path)
    newer = json.loads((folder / "manifest.json").read_text()) | {"format": 2}
    (folder / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(ValueError, match="has format 2; this version reads format 1"):
        Latents(folder)


def test_a_full_disk_leaves_no_shard_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = writer_for(tmp_path / "latents")
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="could not write .*latents_00000.safetensors: No space left"):
        writer.write(0, shard(writer.rows(0)))
    assert not list(tmp_path.rglob("*latents_*"))


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    leftover = tmp_path / ".latents_00000.safetensors.abc.partial"
    others = tmp_path / ".latents_00001.safetensors.abc.partial"
    leftover.touch()
    others.touch()
    writer = writer_for(tmp_path)
    writer.write(0, shard(writer.rows(0)))
    assert not leftover.exists() and others.exists(), "another process may be writing the other shard"
