"""`vfmvae evaluate`: the means are those of another library, and the file says what they are of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import vfmvae
from tests.commands import run, save_image, save_tiny
from vfmvae import evaluate as module
from vfmvae.data.ordered import open_in_order
from vfmvae.images import to_uint8
from vfmvae.losses.perceptual import VGG16
from vfmvae.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_means_agree_with_scikit_image(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        save_image(tmp_path / f"in/{number}.png", 70, 90, seed=number)
    arguments = ["--data", tmp_path / "in", "--part", "all", "--batch-size", "2"]
    assert run(module, "--tokenizer", tiny, *arguments, "--output", tmp_path / "result.json") == 0
    result = json.loads((tmp_path / "result.json").read_text())

    images = open_in_order(str(tmp_path / "in"), "all", 64).read(0, 5)["image"]
    tokenizer = vfmvae.load(tiny)
    with torch.no_grad():
        back = to_uint8(tokenizer.decode(tokenizer.encode(images).mode()))
    arrays = (batch.permute(0, 2, 3, 1).numpy() for batch in (images, back))
    pairs = list(zip(*arrays, strict=True))
    decibel = np.mean([peak_signal_noise_ratio(a, b) for a, b in pairs])
    assert result["psnr"] == pytest.approx(decibel, abs=0.02), "batches of another size round otherwise"
    settings = {"channel_axis": -1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    similarity = np.mean([structural_similarity(a, b, **settings) for a, b in pairs])
    assert result["ssim"] == pytest.approx(similarity, abs=0.02)
    assert result["mini_distance"] > 0
    assert (result["images"], result["resolution"], result["part"]) == (5, 64, "all")
    output = capsys.readouterr().out
    assert "the distance is that of the small encoder mini" in output and f"{result['psnr']:.4f}" in output


def test_held_out_photographs_are_measured_and_filed_with_the_tokenizer(tiny: Path) -> None:
    assert run(module, "--tokenizer", tiny, "--images", "3") == 0
    result = json.loads((tiny / "evaluation.json").read_text())
    assert (result["data"], result["part"], result["images"]) == ("embedded photographs", "validation", 3)
    assert result["tokenizer"] == str(tiny) and len(result["tokenizer_sha256"]) == 64


def test_broken_images_are_left_out_and_named_up_to_a_limit(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        save_image(tmp_path / f"in/{number}.png", 70, 70, seed=number)
    arguments = [
        "--tokenizer",
        tiny,
        "--data",
        tmp_path / "in",
        "--part",
        "all",
        "--output",
        tmp_path / "a.json",
    ]
    (tmp_path / "in/5.png").write_bytes(b"")
    assert run(module, *arguments, "--batch-size", "1") == 1
    assert "error: 1 of 6 images cannot be used, and max_broken 0.001 allows 0: 5.png (the file is" in (
        capsys.readouterr().err
    )
    assert run(module, *arguments, "--batch-size", "1", "--max-broken", "0.2") == 0
    assert "warning: 5.png is left out: the file is empty" in capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["images"] == 5 and found["left_out"] == ["5.png"]
    (tmp_path / "in/5.png").unlink()
    assert run(module, *arguments, "--batch-size", "1") == 0
    assert json.loads((tmp_path / "a.json").read_text())["psnr"] == found["psnr"]


def test_vgg_weights_make_the_distance_lpips(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torchvision_names(VGG16()), tmp_path / "vgg.pth")
    arguments = ["--images", "2", "--vgg", tmp_path / "vgg.pth", "--output", tmp_path / "result.json"]
    assert run(module, "--tokenizer", tiny, *arguments) == 0
    assert json.loads((tmp_path / "result.json").read_text())["lpips"] > 0
    assert run(module, "--tokenizer", tiny, "--images", "2", "--vgg", tmp_path / "absent.pth") == 1
    assert "absent.pth" in capsys.readouterr().err


def torchvision_names(vgg: VGG16) -> dict[str, torch.Tensor]:
    return dict(vgg.state_dict())


def test_equal_images_have_no_psnr_in_the_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perfect(tokenizer: Tokenizer, images: torch.Tensor) -> torch.Tensor:
        return images

    monkeypatch.setattr(module, "reconstruct_images", perfect)
    assert run(module, "--tokenizer", tiny, "--images", "2", "--output", tmp_path / "result.json") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["psnr"] is None
    assert result["ssim"] == pytest.approx(1) and result["mini_distance"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--data", "absent"], 1, "image folder absent does not exist"),
        (["--resolution", "1"], 2, "--resolution 1 does not fit"),
        (["--images", "0"], 2, "images is 0"),
        (["--metric", "fid"], 2, "unknown option --metric; options: --help, --data, --part"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str],
    code: int,
    words: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(module, "--tokenizer", tiny, *arguments) == code
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
