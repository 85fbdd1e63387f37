"""`vfmvae reconstruct`: the pictures it writes, what it says of them, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import vfmvae
from tests.commands import files_unchanged, run, save_image, save_tiny
from vfmvae import reconstruct as module
from vfmvae.images import to_uint8
from vfmvae.reconstruct import GAP, reconstruct


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_original_and_reconstruction_stand_side_by_side(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = save_image(tmp_path / "in/deep/photo.png", 150, 80)
    save_image(tmp_path / "one.png", 64, 64, seed=1)
    inputs = [tmp_path / "in", tmp_path / "one.png"]
    assert run(module, *inputs, "--tokenizer", tiny, "--output", tmp_path / "out") == 0

    picture = np.asarray(Image.open(tmp_path / "out/deep/photo.png"))
    assert picture.shape == (64, 2 * 128 + GAP, 3)
    original, gap, back = picture[:, :128], picture[:, 128:-128], picture[:, -128:]
    assert np.array_equal(original, pixels[8:72, 11:139]), "the centre, in multiples of 64"
    assert (gap == 255).all()
    tokenizer = vfmvae.load(tiny)
    image = torch.from_numpy(original.copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = to_uint8(tokenizer.decode(tokenizer.encode(image).mode()))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(back, expected)

    assert (tmp_path / "out/one.png").is_file() and (tmp_path / "out/reconstructions.png").is_file()
    output = capsys.readouterr().out
    assert "128 x 64 of 150 x 80" in output
    assert f"{peak_signal_noise_ratio(original, back):.2f}" in output
    assert "mean" in output and not list(tmp_path.rglob("*.partial"))


def test_a_resolution_makes_centred_squares(tiny: Path, tmp_path: Path) -> None:
    save_image(tmp_path / "small.png", 30, 20)
    save_image(tmp_path / "large.png", 300, 200)
    inputs = [tmp_path / "small.png", tmp_path / "large.png"]
    assert run(module, *inputs, "--tokenizer", tiny, "--output", tmp_path / "out", "--resolution", "128") == 0
    sizes = {Image.open(tmp_path / "out" / f"{name}.png").size for name in ("small", "large")}
    assert sizes == {(2 * 128 + GAP, 128)}


def test_batches_hold_neighbours_of_one_size_and_keep_the_order(tiny: Path, tmp_path: Path) -> None:
    sizes = [(64, 64), (64, 64), (64, 64), (128, 64), (64, 64)]
    files = [(tmp_path / f"{n}.png", f"{n}.png") for n in range(len(sizes))]
    for number, ((file, _), size) in enumerate(zip(files, sizes, strict=True)):
        save_image(file, *size, seed=number)
    tokenizer = vfmvae.load(tiny)
    seen = []
    encode = tokenizer.encode
    tokenizer.encode = lambda images: seen.append(tuple(images.shape)) or encode(images)  # type: ignore
    pairs = list(reconstruct(tokenizer, files, None, batch_size=2))
    assert [pair.name for pair in pairs] == [name for _, name in files]
    assert [shape[0] for shape in seen] == [2, 1, 1, 1]
    single = list(reconstruct(tokenizer, files, None, batch_size=1))
    for pair, alone in zip(pairs, single, strict=True):
        assert pair.psnr == pytest.approx(alone.psnr, abs=0.02)


def test_inputs_are_never_overwritten(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_image(tmp_path / "photo.png", 64, 64)
    with files_unchanged(tmp_path):
        assert run(module, tmp_path / "photo.png", "--tokenizer", tiny, "--output", tmp_path) == 1
    assert "photo.png is one of the images given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["in/tiny.png"], 1, "tiny.png is 40 x 40, and the tokenizer needs 64 pixels at least"),
        (["in/broken.png"], 1, "cannot read image in/broken.png"),
        (["in/absent.png"], 1, "image in/absent.png does not exist"),
        (["empty"], 1, "no images in empty"),
        ([], 2, "no images given"),
        (["in/tiny.png", "--resolution", "100"], 2, "--resolution 100 does not fit"),
        (["in/tiny.png", "--batch-size", "0"], 2, "batch_size is 0"),
        (["in/tiny.png", "--tokenizer", "empty"], 1, "empty holds no config.json"),
        (
            ["in/tiny.png", "--outptu", "x"],
            2,
            "unknown option --outptu; did you mean --output? options: --help, ",
        ),
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
    (tmp_path / "empty").mkdir()
    save_image(tmp_path / "in/tiny.png", 40, 40)
    (tmp_path / "in/broken.png").write_bytes(b"\x89PNG half")
    known = [] if "--tokenizer" in arguments else ["--tokenizer", str(tiny)]
    assert run(module, *arguments, *known) == code
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not list(tmp_path.rglob("reconstructions*.png"))


def test_an_interrupt_leaves_whole_pictures_only(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        save_image(tmp_path / f"in/{number}.png", 64, 64)
    save, calls = Image.Image.save, []

    def interrupted(image: Image.Image, path: Path, format: str) -> None:
        save(image, path, format=format)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    assert run(module, tmp_path / "in", "--tokenizer", tiny, "--output", tmp_path / "out") == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.png"]
