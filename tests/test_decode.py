"""`vfmvae decode`: images out of shards are what the tokenizer makes of their latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vfmvae
from tests.commands import run, save_image, save_tiny
from tests.tokenizer.tiny import tiny_config, tiny_tokenizer
from vfmvae import decode as module
from vfmvae import encode
from vfmvae import latents as latents_command
from vfmvae.data.latents import Latents
from vfmvae.images import to_uint8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def latents(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(("a/1.png", "a/1.bmp", "b/2.png", "b/3.png", "b/4.png")):
        save_image(folder / "in" / name, 70, 90, seed=number)
    arguments = [folder / "in", "--part", "all", "--kind", "mean", "--shard-images", "2"]
    assert run(encode, "--tokenizer", tiny, "--output", folder / "latents", *arguments) == 0
    return folder / "latents"


def expected(tiny: Path, latents: Path) -> np.ndarray:
    """uint8 [N, H, W, 3]."""
    with torch.no_grad():
        images = vfmvae.load(tiny).decode(Latents(latents, "validation").read(0, 5)["latent"])
    return to_uint8(images).permute(0, 2, 3, 1).numpy()


def test_pictures_have_the_names_they_were_encoded_from(tiny: Path, latents: Path, tmp_path: Path) -> None:
    assert run(module, latents, "--tokenizer", tiny, "--output", tmp_path / "out") == 0
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    names = ["a/1-2.png", "a/1.png", "b/2.png", "b/3.png", "b/4.png"]
    assert [path.relative_to(tmp_path / "out").as_posix() for path in files] == names
    order = ["a/1.png", "a/1-2.png", *names[2:]]  # a/1.bmp was encoded before a/1.png
    found = np.stack([np.asarray(Image.open(tmp_path / "out" / name)) for name in order])
    assert np.array_equal(found, expected(tiny, latents))


def test_arrays_hold_all_images_and_labels(tiny: Path, latents: Path, tmp_path: Path) -> None:
    arguments = ["--format", "npz", "--batch-size", "2"]
    assert run(module, latents, "--tokenizer", tiny, "--output", tmp_path / "out", *arguments) == 0
    with np.load(tmp_path / "out/images.npz") as archive:
        assert archive["arr_1"].tolist() == [0, 0, 1, 1, 1]
        difference = np.abs(archive["arr_0"].astype(int) - expected(tiny, latents))
        assert archive["arr_0"].dtype == np.uint8 and difference.max() <= 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["images.npz"]


def test_only_the_first_images(tiny: Path, latents: Path, tmp_path: Path) -> None:
    assert run(module, latents, "--tokenizer", tiny, "--output", tmp_path / "out", "--images", "2") == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2


def test_another_tokenizer_is_said_or_refused(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer().save(tmp_path / "other")
    with torch.no_grad():
        finetuned = vfmvae.load(tmp_path / "other")
        finetuned.align.weight.zero_()
    finetuned.save(tmp_path / "other")
    assert run(module, latents, "--tokenizer", tmp_path / "other", "--output", tmp_path / "out") == 0
    assert "note: another tokenizer wrote these latents" in capsys.readouterr().out
    tiny_tokenizer(tiny_config(latent_channels=4)).save(tmp_path / "narrow")
    assert run(module, latents, "--tokenizer", tmp_path / "narrow", "--output", tmp_path / "new") == 1
    assert "holds latents of 8 channels; this tokenizer has 4" in capsys.readouterr().err


def test_latents_of_others_are_said_to_be(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs").mkdir()
    values = {"latents": torch.randn(3, 8, 4, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    save_file(values, tmp_path / "theirs/latents_rank00_shard000.safetensors")
    source = ["import", tmp_path / "theirs", "--from", "lightningdit"]
    assert run(latents_command, *source, "--output", tmp_path / "latents") == 0
    capsys.readouterr()
    assert run(module, tmp_path / "latents", "--tokenizer", tiny, "--output", tmp_path / "out") == 0
    assert "note: these latents come from lightningdit" in capsys.readouterr().out
    assert (tmp_path / "out/latents_rank00_shard000/00002.png").exists()


def test_mistakes_are_named(
    tiny: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    known = ["--tokenizer", str(tiny)]
    for arguments, code, words in [
        ([latents, "--output", tmp_path / "full"], 1, "is not empty"),
        ([tmp_path / "full", "--output", tmp_path / "out"], 1, "holds no latents"),
        ([tmp_path / "absent", "--output", tmp_path / "out"], 1, "no folder"),
        ([latents, "--images", "0"], 2, "images is 0"),
        ([], 2, "PATH"),
    ]:
        assert run(module, *arguments, *known) == code
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_an_interrupt_leaves_no_half_archive(
    tiny: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "to_uint8", interrupted)
    arguments = ["--output", tmp_path / "out", "--format", "npz"]
    assert run(module, latents, "--tokenizer", tiny, *arguments) == 130
    assert not list(tmp_path.rglob("*npz*"))
