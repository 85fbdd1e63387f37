"""`vfmvae latents`: folders are described as they are, damage is named, those of others come in unchanged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import files_unchanged, run
from tests.data.latent_shards import SETTINGS, damage, fill, latent, shard, writer_for
from vfmvae import latents as module
from vfmvae.data.latent_folder import channel_statistics, read_manifest
from vfmvae.data.latent_writer import LatentWriter
from vfmvae.data.latents import Latents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "latents")


def rows_of(printed: str) -> dict[str, str]:
    """The table by its first column."""
    lines = [line.strip("│ \n").split("│") for line in printed.splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in lines}


def info_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that `info` ends with."""
    capsys.readouterr()
    assert run(module, "info", folder) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and "│" not in captured.out
    (sentence,) = captured.err.splitlines()
    return sentence


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_info_says_what_a_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = replace(SETTINGS, tokens=(2, 3), class_token=True, encoder="dinov2-base", storage="bf16")
    folder = fill(tmp_path / "latents", settings, without=[4, 22])
    with files_unchanged(folder):
        assert run(module, "info", folder) == 0
    printed = capsys.readouterr().out
    rows, manifest = rows_of(printed), read_manifest(folder)
    assert rows["images"] == "21; 2 could not be read"
    assert rows["latents"] == "3 x 4 x 2, bf16, samples, computed in float32"
    assert rows["features"] == "2 x 3 tokens of 5, dinov2-base" and rows["class token"] == "5, dinov2-base"
    assert rows["moments"] == rows["mirror images"] == "yes"
    assert rows["labels"] == "5 classes of 3 to 5 images"
    assert rows["mean"] == f"{min(manifest.mean):.4g} to {max(manifest.mean):.4g} over channels"
    assert rows["shards"].startswith("3, ") and "tokenizer t" in rows["encoded by"]
    assert "whole" in printed and str(folder) in printed


@pytest.mark.parametrize("how", ["missing", "cut", "bit"])
def test_info_names_damage(folder: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage(folder / "latents_00001.safetensors", how)
    sentence = info_fails(folder, capsys)
    assert "latents_00001.safetensors is " in sentence and "run the same `vfmvae encode`" in sentence


def test_info_says_how_an_unfinished_folder_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = writer_for(tmp_path / "latents")
    writer.write(0, shard(SETTINGS.rows(0)))
    sentence = info_fails(tmp_path / "latents", capsys)
    assert "missing is 2 of 3 shards, the first is latents_00001" in sentence
    assert "run the same `vfmvae encode` command again" in sentence


def finished_again(folder: Path, number: int, **changes: torch.Tensor) -> None:
    """A shard with other values, and checksums and statistics that are true of them."""
    path = folder / f"latents_{number:05d}.safetensors"
    (folder / "manifest.json").unlink()
    writer, whole = LatentWriter(folder, SETTINGS, tuple("abcde")), load_file(path)
    path.unlink()
    writer.write(number, {**whole, **changes})
    assert writer.finish() is not None


def test_info_looks_at_values(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = load_file(folder / "latents_00001.safetensors")
    broken = whole["moments_flip"].clone()
    broken[3, 2, 1, 1] = float("inf")
    finished_again(folder, 1, moments_flip=broken)
    assert "moments_flip that are not all finite" in info_fails(folder, capsys)
    for numbers in ([10, 11, 12, 13, 14, 15, 16, 17, 18, 18], list(range(9, 19)), list(range(19, 9, -1))):
        finished_again(folder, 1, moments_flip=whole["moments_flip"], numbers=torch.tensor(numbers))
        assert "images that do not belong there, or twice" in info_fails(folder, capsys)
    finished_again(folder, 1, numbers=whole["numbers"], labels=torch.full((10,), 5))
    assert "labels go from 0 to 5, and there are 5 classes" in info_fails(folder, capsys)
    finished_again(folder, 1, labels=whole["labels"])
    assert run(module, "info", folder) == 0


def test_info_recomputes_statistics(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["std"][2] *= 1 + 1e-6
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "the statistics in its manifest are not those of its latents" in info_fails(folder, capsys)
    manifest["std"][2] /= 1 + 1e-6
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(module, "info", folder) == 0
    torch.save({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}, folder / "latents_stats.pt")
    assert "latents_stats.pt does not hold the statistics" in info_fails(folder, capsys)
    (folder / "latents_stats.pt").write_bytes(b"garbage")
    assert "latents_stats.pt" in info_fails(folder, capsys)


@pytest.mark.parametrize("file", ["manifest.json", "latents_00000.safetensors", "latents_stats.pt"])
def test_random_damage_never_crashes(file: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes are changed, cut or added anywhere, checksums of shards made true again."""
    rng, content = np.random.default_rng(0), (folder / file).read_bytes()
    whole = (folder / "manifest.json").read_bytes()
    for _ in range(30):
        broken = bytearray(content)
        place = int(rng.integers(min(len(broken), 2000)))
        change = rng.integers(3)
        if change == 0:
            broken[place] ^= int(rng.integers(1, 256))
        elif change == 1:
            del broken[place:]
        else:
            broken[place:place] = rng.bytes(9)
        (folder / file).write_bytes(broken)
        if file.endswith(".safetensors"):
            manifest: dict[str, Any] = json.loads(whole)
            manifest["shards"][0] |= {"bytes": len(broken), "sha256": checksum(folder / file)}
            (folder / "manifest.json").write_text(json.dumps(manifest))
        assert run(module, "info", folder) in (0, 1)
        assert "Traceback" not in capsys.readouterr().err


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_a_manifest_says_does_not_reach_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"] |= {"tokenizer": "\x1b[2J[red]", "encoder": "\udc80"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(module, "info", folder) == 0
    assert "tokenizer ?[2J[red]" in capsys.readouterr().out


def lightningdit(folder: Path, counts: tuple[int, ...] = (7, 10, 6)) -> Path:
    """Shards of two ranks, as LightningDiT writes them."""
    folder.mkdir()
    start = 0
    for number, count in enumerate(counts):
        rows = range(start, start + count)
        shards = {
            "latents": torch.stack([latent(row) for row in rows]),
            "latents_flip": torch.stack([latent(row, True) for row in rows]),
            "labels": torch.tensor([row % 5 for row in rows]),
        }
        save_file(shards, folder / f"latents_rank{number % 2:02d}_shard{number // 2:03d}.safetensors")
        start += count
    return folder


def statistics(mean: float, std: float) -> dict[str, torch.Tensor]:
    return {"mean": torch.full((1, 3, 1, 1), mean), "std": torch.full((1, 3, 1, 1), std)}


def imported(source: Path, output: Path, kind: str, *more: str) -> int:
    return run(module, "import", source, "--from", kind, "--output", output, *more)


def test_lightningdit_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lightningdit(tmp_path / "theirs")
    torch.save(statistics(0.0, 2.0), source / "latents_stats.pt")
    with files_unchanged(source):
        assert imported(source, tmp_path / "out", "lightningdit", "--shard-images", "9") == 0
    printed = capsys.readouterr().out
    assert "complete: 23 latents of 3 x 4 x 2" in printed
    order = [*range(7), *range(17, 23), *range(7, 17)]  # rank00 has the first and the third shard
    found = Latents(tmp_path / "out", "validation")
    batch = found.read(0, 23)
    assert torch.equal(batch["latent"], torch.stack([latent(number) for number in order]))
    assert batch["label"].tolist() == [number % 5 for number in order] and found.classes == tuple("01234")
    assert batch["key"][6:8] == ["latents_rank00_shard000/00006", "latents_rank00_shard001/00000"]
    stored = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert [len(one["labels"]) for one in stored] == [9, 9, 5]
    flips = torch.cat([one["latents_flip"] for one in stored])
    assert torch.equal(flips, torch.stack([latent(number, True) for number in order]))
    mean, std = channel_statistics([batch["latent"], flips])
    assert read_manifest(tmp_path / "out").mean == pytest.approx(mean.tolist(), rel=1e-12)
    off, ratio = (mean / std).abs().max(), (2 / std - 1).abs().max()
    assert f"its means are off by up to {off:.2g} std, its stds by up to {100 * ratio:.2g}%" in printed
    assert run(module, "info", tmp_path / "out") == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["encoded by"] == "lightningdit" and "samples or means" in rows["latents"]


def test_lightningdit_of_half_precision_without_mirror_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "theirs"
    source.mkdir()
    values = torch.randn(5, 3, 4, 2).half()
    save_file({"latents": values, "labels": torch.zeros(5, dtype=torch.int32)}, source / "a.safetensors")
    assert imported(source, tmp_path / "out", "lightningdit") == 0
    assert "cannot be compared: " in capsys.readouterr().out
    found = Latents(tmp_path / "out", block=1)
    assert found.manifest.settings.storage == "fp16" and not found.manifest.settings.flips
    assert torch.equal(Latents(tmp_path / "out", "validation").read(0, 5)["latent"], values.float())
    assert torch.load(tmp_path / "out/latents_stats.pt", weights_only=True)["mean"].shape == (1, 3, 1, 1)


def repa(folder: Path, labels: object = "all", count: int = 13) -> np.ndarray:
    """Moments as REPA's preprocessing writes them, two folders of them; returns [N, 2C, h, w]."""
    rng = np.random.default_rng(0)
    moments = rng.normal(size=(count, 8, 4, 2)).astype(np.float32)
    moments[:, 4:] = np.exp(moments[:, 4:])
    entries = []
    for number in range(count):
        below = folder / "vae-sd" / f"{number // 10:05d}"
        below.mkdir(parents=True, exist_ok=True)
        np.save(below / f"img-mean-std-{number:08d}.npy", moments[number])
        entries.append([f"{number // 10:05d}/img-mean-std-{number:08d}.npy", number % 3])
    content = {"labels": entries if labels == "all" else labels}
    (folder / "vae-sd/dataset.json").write_text(json.dumps(content))
    return moments


def test_repa_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moments = repa(tmp_path / "theirs").astype(np.float64)
    with files_unchanged(tmp_path / "theirs"):
        assert imported(tmp_path / "theirs", tmp_path / "out", "repa", "--shard-images", "6") == 0
    assert "complete: 13 latents of 4 x 4 x 2" in capsys.readouterr().out
    found = Latents(tmp_path / "out", "validation")
    batch, settings = found.read(0, 13), found.manifest.settings
    mean, std = moments[:, :4], moments[:, 4:]
    expected = np.concatenate([mean, np.log(std * std)], axis=1)
    assert torch.equal(batch["moments"], torch.from_numpy(expected).float())
    noise = np.stack(
        [np.random.default_rng((0, n, 0)).standard_normal((4, 4, 2), np.float32) for n in range(13)]
    )
    assert torch.equal(batch["latent"], torch.from_numpy(mean + std * noise).float())
    assert batch["key"][11] == "00001/img-mean-std-00000011.npy"
    assert batch["label"].tolist() == [number % 3 for number in range(13)] and found.classes == tuple("012")
    assert (settings.tokenizer, settings.origin, settings.flips) == ("unknown", "repa", False)
    assert run(module, "info", tmp_path / "out") == 0


def test_repa_labels_by_the_images_names_or_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [[f"{n // 10:05d}/img{n:08d}.png", None if n == 3 else n % 2] for n in range(13)]
    repa(tmp_path / "images", entries)
    assert imported(tmp_path / "images", tmp_path / "out", "repa") == 0
    labels = Latents(tmp_path / "out").labels.tolist()
    assert labels == [-1 if n == 3 else n % 2 for n in range(13)]
    assert run(module, "info", tmp_path / "out") == 0
    expected = "2 classes of 5 to 7 images; 1 images without one"
    assert rows_of(capsys.readouterr().out)["labels"] == expected
    repa(tmp_path / "unlabelled", None)
    assert imported(tmp_path / "unlabelled", tmp_path / "none", "repa") == 0
    assert Latents(tmp_path / "none").classes == ("",)


def test_a_standard_deviation_of_zero_is_the_smallest_of_a_posterior(tmp_path: Path) -> None:
    moments = repa(tmp_path / "theirs")
    moments[2, 4:] = 0
    np.save(tmp_path / "theirs/vae-sd/00000/img-mean-std-00000002.npy", moments[2])
    assert imported(tmp_path / "theirs", tmp_path / "out", "repa") == 0
    assert (Latents(tmp_path / "out", "validation").read(2, 3)["moments"][0, 4:] == -30).all()


@pytest.mark.parametrize("kind", ["lightningdit", "repa"])
def test_an_interrupted_import_goes_on(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "theirs"
    _ = lightningdit(source) if kind == "lightningdit" else repa(source)
    size = ("--shard-images", "5")
    assert imported(source, tmp_path / "whole", kind, *size) == 0
    write, written = LatentWriter.write, []

    def interrupted(self: LatentWriter, number: int, tensors: dict[str, torch.Tensor]) -> None:
        written.append(number)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, number, tensors)

    monkeypatch.setattr(LatentWriter, "write", interrupted)
    assert imported(source, tmp_path / "out", kind, *size) == 130
    assert "run the same `vfmvae latents import` command" in info_fails(tmp_path / "out", capsys)
    assert imported(source, tmp_path / "out", kind, *size) == 0
    assert written[:3] == [0, 1, 1] and written.count(0) == 1
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "whole")
    ]
    assert contents[0] == contents[1]
    assert imported(source, tmp_path / "out", kind, *size) == 0
    assert "0 images imported; complete" in capsys.readouterr().out


def test_damaged_shards_of_others_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lightningdit(tmp_path / "theirs")
    path = source / "latents_rank01_shard000.safetensors"
    whole = load_file(path)
    wrong = whole["latents_flip"].clone()
    wrong[4, 0, 0, 0] = float("nan")
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"latents_flip": wrong}, "row 4 of latents_flip is not finite"),
        (
            {"labels": torch.zeros(9, dtype=torch.int64)},
            "latents are F32 [10, 3, 4, 2], needed is [9, C, h, w]",
        ),
        ({"labels": torch.zeros(10)}, "labels are torch.float32 [10], needed is int [N]"),
        ({"labels": torch.full((10,), -2)}, "labels go from -2 to"),
        ({"labels": torch.full((10,), 2**60)}, "labels go from 0 to 1152921504606846976"),
        ({"latents": whole["latents"].double()}, "latents are F64"),
        (
            {"latents": whole["latents"].half(), "latents_flip": wrong.half()},
            "unlike those of latents_rank00",
        ),
    ]
    for changes, words in cases:
        save_file({**whole, **changes}, path)
        assert imported(source, tmp_path / "out", "lightningdit") == 1
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error and len(error.splitlines()) == 1
        assert not (tmp_path / "out").exists()
    save_file({"latents": whole["latents"]}, path)
    assert imported(source, tmp_path / "out", "lightningdit") == 1
    assert "holds no labels" in capsys.readouterr().err
    path.write_bytes(b"half of it")
    assert imported(source, tmp_path / "out", "lightningdit") == 1
    assert "latents_rank01_shard000.safetensors is damaged" in capsys.readouterr().err


def test_damaged_arrays_of_others_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moments = repa(tmp_path / "theirs")
    path = tmp_path / "theirs/vae-sd/00000/img-mean-std-00000002.npy"
    whole = path.read_bytes()
    infinite, negative = moments[2].copy(), moments[2].copy()
    infinite[0, 0, 0], negative[7, 0, 0] = np.inf, -1
    lying = whole.replace(b"(8, 4, 2)", b"(8, 9**9, 2)"[:9])
    arrays: list[tuple[np.ndarray | bytes, str]] = [
        (infinite, "means and standard deviations must be finite"),
        (negative, "and the latter not negative"),
        (moments[2][:, :1], "is [8, 1, 2], and 00000/img-mean-std-00000000.npy is [8, 4, 2]"),
        (moments[2][:7], "is float32 [7, 4, 2]; needed is float [2C, h, w]"),
        (np.zeros((8, 4, 2), dtype=np.int64), "is int64 [8, 4, 2]"),
        (np.array([{"a": 1}], dtype=object), "is damaged, or no array"),
        (whole[:-9], "is damaged, or no array"),
        (whole[:40], "is damaged, or no array"),
        (b"", "is damaged, or no array"),
        (lying, "img-mean-std-00000002.npy is"),
        (whole.replace(b"(8, 4, 2)", b"(8, 4, 9)"), "is damaged, or no array"),
    ]
    for content, words in arrays:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content, allow_pickle=True)
        assert imported(tmp_path / "theirs", tmp_path / "out", "repa") == 1
        error = capsys.readouterr().err
        assert words in error and "img-mean-std-00000002.npy" in error and "Traceback" not in error
        assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"labels": [["00000/x.npy", 1]]}', "has no label for 00000/img-mean-std-00000000.npy"),
        ('{"labels": [["00000/x.npy", "cat"]]}', "is no [name, label]"),
        ('{"labels": [["00000/x.npy", true]]}', "is no [name, label]"),
        ('{"labels": [3]}', "3 is no [name, label]"),
        ('{"labels": 3}', "labels are no list"),
        ("{", "is not valid JSON"),
        (None, "has no dataset.json"),
    ],
)
def test_labels_that_do_not_fit(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repa(tmp_path / "theirs")
    path = tmp_path / "theirs/vae-sd/dataset.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert imported(tmp_path / "theirs", tmp_path / "out", "repa") == 1
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_usage(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lightningdit(tmp_path / "theirs")
    (tmp_path / "nothing").mkdir()
    for arguments, code, words in [
        ([], 2, "{info, import}"),
        (["info"], 2, "PATH"),
        (["info", tmp_path / "absent"], 1, "no folder"),
        (["info", tmp_path / "nothing"], 1, "holds no latents"),
        (["info", folder, "--quick"], 2, "unknown option --quick; options: --help"),
        (["import", source, "--from", "dit", "--output", "out"], 2, "lightningdit"),
        (
            ["import", source, "--from", "repa", "--outptu", "out", "--output", "x"],
            2,
            "did you mean --output",
        ),
        (["import", tmp_path / "nothing", "--from", "repa", "--output", "out"], 1, "holds no .npy files"),
        (["import", tmp_path / "nothing", "--from", "lightningdit", "--output", "o"], 1, "no *.safetensors"),
        (["import", tmp_path / "absent", "--from", "repa", "--output", "out"], 1, "no folder"),
        (["import", source, "--from", "lightningdit", "--output", source], 1, "holds other files already"),
        (["import", source, "--from", "lightningdit", "--output", "o", "--shard-images", "0"], 2, "is 0"),
    ]:
        assert run(module, *arguments) == code
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error and "Warning" not in error
    assert not Path("out").exists()
