"""Folders of latents: what others find in them, and what is said about those that cannot be trusted."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from tests.data.latent_shards import IMAGES, SETTINGS, damage, fill, latent, shard, writer_for
from vfmvae.data import latent_folder as module
from vfmvae.data.latent_folder import (
    Manifest,
    channel_statistics,
    check_shards,
    open_shard,
    open_shards,
    pack_names,
    read_manifest,
    unpack_name,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "latents")


class LightningDiTLatents(Dataset[tuple[Tensor, Tensor]]):
    """A loader as LightningDiT is described to have: an index of rows, and one open file per item."""

    def __init__(self, folder: Path) -> None:
        self.index: dict[int, tuple[str, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt", device="cpu") as file:
                for row in range(file.get_slice("labels").get_shape()[0]):
                    self.index[len(self.index)] = (str(path), row)
        statistics = torch.load(folder / "latents_stats.pt", weights_only=True)
        self.mean, self.std = statistics["mean"], statistics["std"]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int, flip: bool = False) -> tuple[Tensor, Tensor]:
        path, row = self.index[number]
        with safe_open(path, framework="pt", device="cpu") as file:
            latents = file.get_slice("latents_flip" if flip else "latents")[row : row + 1]
            label = file.get_slice("labels")[row : row + 1]
        return ((latents - self.mean) / self.std).squeeze(0), label.squeeze(0)


def test_lightningdit_reads_the_folder_as_it_is(tmp_path: Path) -> None:
    """With every tensor that may be there, and a shard without images between two others."""
    everything = replace(SETTINGS, tokens=(2, 3), class_token=True)
    found = LightningDiTLatents(fill(tmp_path / "all", everything, without=[3, *range(10, 20)]))
    there = [number for number in range(IMAGES) if number != 3 and not 10 <= number < 20]
    assert len(found) == len(there)
    truth = torch.stack([latent(n, flip) for n in there for flip in (False, True)]).double()
    mean, std = truth.mean((0, 2, 3), keepdim=True), truth.std((0, 2, 3), keepdim=True)
    for place, number in enumerate(there):
        for flip in (False, True):
            value, label = found.__getitem__(place, flip)
            torch.testing.assert_close(value, ((latent(number, flip) - mean) / std)[0].float())
            assert label.item() == number % 5


def test_the_manifest_says_what_is_there(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    everything = torch.stack([latent(n, flip) for n in range(IMAGES) for flip in (False, True)]).double()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 2 and manifest["latent_shape"] == [3, 4, 2]
    assert [entry["images"] for entry in manifest["shards"]] == [10, 10, 3]
    assert [entry["sha256"] for entry in manifest["shards"]] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    ]
    assert manifest["mean"] == pytest.approx(everything.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert manifest["std"] == pytest.approx(everything.std((0, 2, 3)).tolist(), rel=1e-12)


def test_statistics_are_exact_where_sums_of_squares_are_not() -> None:
    values = torch.randn(17, 2, 3, 5, dtype=torch.float64) * 1e-3 + torch.tensor([1e6, -1.0]).view(1, 2, 1, 1)
    mean, std = channel_statistics([*values[:4].split(3), values[4:5], values[5:]])
    torch.testing.assert_close(mean, values.mean((0, 2, 3)), rtol=1e-14, atol=0)
    torch.testing.assert_close(std, values.std((0, 2, 3)), rtol=1e-6, atol=0)


def test_statistics_of_one_number_are_finite() -> None:
    mean, std = channel_statistics([torch.full((1, 1, 1, 1), 3.0)])
    assert (mean.item(), std.item()) == (3.0, 0.0)


def test_shards_are_read_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 4)
    column = open_shard(folder / "latents_00001.safetensors", SETTINGS).columns["latents"]
    parts = list(column.parts())
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat(parts), torch.stack([latent(number) for number in range(10, 20)]))


def test_names_survive() -> None:
    names = ["a/b.png", "", "größe 大.jpg"]
    assert [unpack_name(row.numpy()) for row in pack_names(names)] == names
    assert pack_names([""]).shape == (1, 1) and pack_names([]).shape == (0, 1)


def test_a_folder_without_a_manifest_is_not_finished(tmp_path: Path) -> None:
    writer = writer_for(tmp_path / "begun")
    writer.write(1, shard(SETTINGS.rows(1)))
    words = "missing is 2 of 3 shards, the first is latents_00000.safetensors; run the same `vfmvae encode`"
    with pytest.raises(ValueError, match=words):
        read_manifest(tmp_path / "begun")
    for number in (0, 2):
        writer.write(number, shard(SETTINGS.rows(number)))
    with pytest.raises(ValueError, match=r"missing is manifest.json only; run the same"):
        read_manifest(tmp_path / "begun")
    with pytest.raises(ValueError, match="no folder"):
        read_manifest(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no latents"):
        read_manifest(tmp_path / "empty")


def test_every_damaged_shard_is_counted(folder: Path) -> None:
    manifest = read_manifest(folder)
    damage(folder / "latents_00000.safetensors", "bit")
    damage(folder / "latents_00002.safetensors", "missing")
    with pytest.raises(ValueError, match=r"latents_00000.* its checksum is not .* and 1 more"):
        check_shards(folder, manifest)
    with pytest.raises(ValueError, match=r"latents_00002.safetensors is missing; run the same"):
        check_shards(folder, manifest, checksums=False)


def rewritten(folder: Path, number: int, **changes: Tensor) -> None:
    """A shard with other tensors, and a manifest that knows its new size."""
    path = folder / f"latents_{number:05d}.safetensors"
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    save_file({**load_file(path), **changes}, path, metadata)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][number] |= {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents": torch.zeros(10, 3, 4, 2, dtype=torch.float16)}, "no latents of torch.float32"),
        ({"labels": torch.zeros(10, dtype=torch.int32)}, "no labels of torch.int64"),
        ({"latents": torch.zeros(9, 3, 4, 2)}, "9 rows of latents, 10 of labels"),
        ({"latents_flip": torch.zeros(10, 3, 4, 3)}, r"rows of latents_flip are \(3, 4, 3\)"),
        ({"moments": torch.zeros(10, 3, 4, 2)}, r"rows of moments are \(3, 4, 2\), not \(6, 4, 2\)"),
        ({n: torch.zeros(10, 6, 4, 2) for n in ("moments_flip",)} | {"names": torch.zeros(10)}, "no names"),
        (
            {name: torch.zeros(10, 1, 4, 2) for name in ("latents", "latents_flip")}
            | {name: torch.zeros(10, 2, 4, 2) for name in ("moments", "moments_flip")},
            r"10 latents of \(1, 4, 2\), and the manifest says 10 of \(3, 4, 2\)",
        ),
    ],
)
def test_shards_that_are_not_what_was_promised(folder: Path, changes: dict[str, Tensor], words: str) -> None:
    rewritten(folder, 1, **changes)
    manifest = read_manifest(folder)
    check_shards(folder, manifest)
    with pytest.raises(ValueError, match=f"latents_00001.safetensors is damaged: .*{words}"):
        open_shards(folder, manifest)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 7, b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}", b"\x02" + b"\x00" * 7 + b"[]"],
)
def test_files_that_are_no_shards(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "latents_00000.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="latents_00000.safetensors is damaged"):
        open_shard(path, SETTINGS)
    save_file({"latents": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="it holds no labels|it holds no latents"):
        open_shard(path, SETTINGS)


def changed(folder: Path, path: str, value: object) -> None:
    """The manifest with another value at a dotted place."""
    content = json.loads((folder / "manifest.json").read_text())
    place: Any = content
    *parents, last = path.split(".")
    for parent in parents:
        place = place[int(parent) if isinstance(place, list) else parent]
    place[int(last) if isinstance(place, list) else last] = value
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("shards.0.file", "../../etc/passwd", "3 shards are listed that are not the 3 needed"),
        ("shards", [], "0 shards are listed"),
        ("settings.images", 10**30, "3 shards are listed that are not the"),
        ("settings.images", 0, "settings.images is 0"),
        ("settings.shard_images", 0, "settings.shard_images 0"),
        ("shards.1.images", 11, "said to hold 11 images of 10 planned"),
        ("shards.1.images", -1, "said to hold -1 images"),
        ("latent_shape", [3, 4, 0], "shape"),
        ("latent_shape", [4, 4, 2], "3 means and 3 stds for 4 channels"),
        ("mean.0", float("nan"), "NaN or infinite, as their mean and deviation say"),
        ("format", 1, "has format 1; this version reads format 2: encode the images again"),
        ("format", [1], r"has format \[1\]"),
        ("surprise", 1, "unknown field 'surprise'"),
    ],
)
def test_manifests_that_contradict_themselves(folder: Path, path: str, value: object, words: str) -> None:
    changed(folder, path, value)
    with pytest.raises(ValueError, match=words):
        read_manifest(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 200_000, '{"format": 2}', "\0", "9" * 5000])
def test_manifests_that_are_none(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json"):
        read_manifest(folder)


def test_a_manifest_counts_the_images_that_are_there(tmp_path: Path) -> None:
    manifest: Manifest = read_manifest(fill(tmp_path / "latents", without=[0, 22]))
    assert len(manifest) == 21 and [entry.images for entry in manifest.shards] == [9, 10, 2]
    assert manifest.settings.images == 23
