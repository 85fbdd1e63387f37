"""`vfmvae sample`: the images are the tokenizer's of the sampler's latents, whoever makes them."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vfmvae
from tests.commands import run, save_tiny
from tests.distributed.launch import run as torchrun
from tests.tokenizer.tiny import tiny_config, tiny_tokenizer
from vfmvae.diffusion import DiffusionTransformer, TransformerConfig
from vfmvae.diffusion.files import load_transformer, save_transformer
from vfmvae.diffusion.sampling import sample_noise
from vfmvae.images import to_uint8
from vfmvae.sample_files import ImagesUnderWay, begin, finish
from vfmvae.sample_labels import label_of
from vfmvae.sample_models import training_shift
from vfmvae.tokenizer.files import tokenizer_hash
from vfmvae.training.run_lock import run_lock

CONFIG = TransformerConfig(latent_size=4, channels=8, width=32, depth=2, heads=4, classes=5)
module = importlib.import_module("vfmvae.sample")  # `from vfmvae import sample` is the function
FEW = ("--count", "6", "--steps", "4")
WRITTEN = ["samples.json", "samples.npz", "samples.png"]


def save_diffusion(folder: Path, seed: int = 1, tokenizer: str | None = None, **options: object) -> Path:
    """A model with random weights, zeros included, and statistics that are not 0 and 1."""
    torch.manual_seed(seed)
    model = DiffusionTransformer(TransformerConfig(**{**vars(CONFIG), **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.latents_mean.copy_(torch.linspace(-1, 1, model.config.channels))
    model.latents_std.fill_(0.5)
    save_transformer(model, folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def diffusion(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusion(tmp_path_factory.mktemp("diffusion"), tokenizer=tokenizer_hash(vfmvae.load(tiny)))


def made(diffusion: Path, tiny: Path, output: Path, *more: str | Path) -> tuple[np.ndarray, list[int], dict]:
    """Images uint8 [N, H, W, 3], labels and settings that the command wrote."""
    assert run(module, diffusion, "--tokenizer", tiny, "--output", output, *FEW, *more) == 0
    with np.load(output / "samples.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.dtype == np.uint8 and labels.dtype == np.int64
    return images, labels.tolist(), json.loads((output / "samples.json").read_text())


def test_images_are_decoded_latents(
    diffusion: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guided = ["--sampler", "heun", "--guidance", "2", "--guidance-interval", "0.2", "0.8", "--shift", "2"]
    options = [*guided, "--guidance-channels", "3", "--classes", "4,1,2", "--labels", "balanced", "--png"]
    images, labels, said = made(diffusion, tiny, tmp_path / "out", *options, "--seed", "9")
    assert labels == [4, 1, 2, 4, 1, 2]
    model, noise = vfmvae.load(diffusion), sample_noise(9, range(6), (8, 4, 4))
    latents = vfmvae.sample(
        model, noise, torch.tensor(labels), "heun", 4, 2.0, (0.2, 0.8), shift=2.0, guidance_channels=3
    )
    latents = latents * 0.5 + torch.linspace(-1, 1, 8).view(8, 1, 1)
    with torch.no_grad():
        expected = to_uint8(vfmvae.load(tiny).decode(latents)).permute(0, 2, 3, 1).numpy()
    assert np.abs(images.astype(int) - expected).max() <= 1 and images.std() > 5
    assert len(np.unique(images.reshape(6, -1), axis=0)) == 6

    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    singles = [f"images/{number:06}.png" for number in range(6)]
    assert files == [*singles, "samples.json", "samples.npz", "samples.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / singles[5])), images[5])
    sheet = np.asarray(Image.open(tmp_path / "out/samples.png"))
    assert sheet.shape == (128, 192, 3) and np.array_equal(sheet[64:, 128:], images[5])

    assert said["sampling"]["guidance"]["interval"] == [0.2, 0.8] and said["sampling"]["sampler"] == "heun"
    assert (said["images"], said["seed"], said["dtype"]) == (6, 9, "float32")
    assert said["classes"] == [4, 1, 2] and said["tokenizer_hash"] == tokenizer_hash(vfmvae.load(tiny))
    assert said["labels"] == "exactly 2 images of each of 3 classes"
    output = capsys.readouterr().out
    assert said["labels"] in output and "note:" not in output


def test_batches_and_processes_change_no_image(diffusion: Path, tiny: Path, tmp_path: Path) -> None:
    options = ("--sampler", "sde", "--guidance", "1.5")
    whole, labels, _ = made(diffusion, tiny, tmp_path / "whole", *options)
    parts, same, _ = made(diffusion, tiny, tmp_path / "parts", *options, "--batch-size", "2")
    assert same == labels and np.abs(parts.astype(int) - whole).max() <= 1
    arguments = [diffusion, "--tokenizer", tiny, "--output", tmp_path / "two", *FEW, *options]
    assert torchrun("vfmvae.sample", *arguments).count("6 images in") == 1
    with np.load(tmp_path / "two/samples.npz") as archive:
        assert archive["arr_1"].tolist() == labels
        assert np.abs(archive["arr_0"].astype(int) - whole).max() <= 1
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == WRITTEN


def test_random_labels_follow_the_seed_and_are_even() -> None:
    labels = [label_of(number, range(5), "random", 3) for number in range(2000)]
    counts = np.bincount(labels, minlength=5)
    assert ((counts > 330) & (counts < 470)).all(), "400 each, give or take four standard deviations"
    assert labels[:50] == [label_of(number, range(5), "random", 3) for number in range(50)]
    assert labels[:50] != [label_of(number, range(5), "random", 4) for number in range(50)]


def test_a_model_with_a_class_token_and_autoguidance(tiny: Path, tmp_path: Path) -> None:
    strong = save_diffusion(tmp_path / "strong", class_token_width=6)
    weak = save_diffusion(tmp_path / "weak", seed=2, class_token_width=6, depth=1, alignment_depth=1)
    plain, labels, said = made(strong, tiny, tmp_path / "plain")
    assert said["guide"] is None
    options = ("--guide", weak, "--guidance", "1.5", "--class-token-guidance", "1.2")
    guided, same, said = made(strong, tiny, tmp_path / "guided", *options)
    assert same == labels and np.abs(guided.astype(int) - plain).max() > 5
    assert said["guide"] == str(weak) and len(said["guide_sha256"]) == 64
    assert said["guide_sha256"] != said["model_sha256"]


def test_another_tokenizer_is_said_or_refused(
    diffusion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_tokenizer()
    other.align.weight.data.zero_()
    other.save(tmp_path / "other")
    output = ["--output", tmp_path / "out", "--count", "1", "--steps", "1"]
    assert run(module, diffusion, "--tokenizer", tmp_path / "other", *output) == 2
    assert "trained on latents of another tokenizer" in capsys.readouterr().err
    assert run(module, diffusion, "--tokenizer", tmp_path / "other", "--other-tokenizer", *output) == 0
    tiny_tokenizer(tiny_config(latent_channels=4)).save(tmp_path / "narrow")
    assert run(module, diffusion, "--tokenizer", tmp_path / "narrow", "--output", tmp_path / "new") == 1
    assert "makes latents of 8 channels; this tokenizer has 4" in capsys.readouterr().err
    odd = save_diffusion(tmp_path / "odd", latent_size=6)
    assert run(module, odd, "--tokenizer", tmp_path / "other", "--output", tmp_path / "new") == 1
    assert "images of 96 px" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def of_a_run(folder: Path, **training: object) -> Path:
    """A saved model's folder with what a training run's config.json says beside the model."""
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"diffusion": described["diffusion"], **training}))
    return folder


def test_a_run_on_pixels_needs_no_tokenizer(tmp_path: Path) -> None:
    folder = of_a_run(save_diffusion(tmp_path / "run", channels=3), data="scenes", tokenizer=None)
    arguments = ["--output", tmp_path / "out", "--labels", "balanced", "--count", "5", "--steps", "2"]
    assert run(module, folder, *arguments) == 0
    model, noise = vfmvae.load(folder), sample_noise(0, range(5), (3, 4, 4))
    pixels = model.denormalise(vfmvae.sample(model, noise, torch.arange(5), steps=2))
    with np.load(tmp_path / "out/samples.npz") as archive:
        assert np.array_equal(archive["arr_0"], to_uint8(pixels).permute(0, 2, 3, 1).numpy())
    assert json.loads((tmp_path / "out/samples.json").read_text())["tokenizer"] is None


def test_a_run_knows_its_tokenizer_and_path(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{"path": "cosine"}]
    folder = of_a_run(save_diffusion(tmp_path / "run"), latents="l", tokenizer=str(tiny), stages=stages)
    assert run(module, folder, "--output", tmp_path / "out", "--count", "1", "--steps", "1") == 0
    assert json.loads((tmp_path / "out/samples.json").read_text())["tokenizer"] == str(tiny)
    assert run(module, folder, "--output", tmp_path / "sde", "--sampler", "sde") == 2
    assert "this run learned the cosine path" in capsys.readouterr().err


def test_mistakes_are_named(
    diffusion: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for arguments, code, words in [
        (["--guidance-interval", "0.8", "0.2"], 2, "guidance.interval is 0.8 to 0.2"),
        (["--guidance-interval", "0", "1.5"], 2, "guidance.interval is 0.0 to 1.5"),
        (["--classes", "1,5"], 2, "class 5 does not exist; this model has 0 to 4"),
        (["--classes", "1,1"], 2, "names a class twice"),
        (["--classes", "cat"], 2, "classes is 'cat'"),
        (["--labels", "balanced", "--count", "7"], 2, "7 images cannot be divided among 5 classes"),
        (["--steps", "0"], 2, "sampling.steps is 0"),
        (["--sampler", "dopri5", "--steps", "5"], 2, "chooses its own"),
        (["--guide", diffusion], 2, "guide does nothing"),
        (["--guidance-channels", "9", "--guidance", "2"], 1, "the latents have 8 channels"),
        (["--output", tmp_path / "full"], 1, "is not empty"),
        (["--device", "nowhere"], 2, "device 'nowhere'"),
    ]:
        given = ["--tokenizer", tiny, "--output", tmp_path / "out", *arguments]
        assert run(module, diffusion, *given) == code, arguments
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error
    assert run(module, tiny, "--tokenizer", tiny, "--output", tmp_path / "out") == 1
    assert "describes no diffusion model" in capsys.readouterr().err
    assert not list(tmp_path.rglob("samples.*"))


def test_a_guide_of_other_latents_is_refused(
    diffusion: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = vfmvae.load(save_diffusion(tmp_path / "guide"))
    other.latents_std.fill_(0.7)
    save_transformer(other, tmp_path / "guide")
    given = ["--tokenizer", tiny, "--output", tmp_path / "out", "--guide", tmp_path / "guide"]
    assert run(module, diffusion, *given, "--guidance", "2") == 1
    assert "the guide was trained on other latents" in capsys.readouterr().err


def test_a_guide_of_another_path_or_tokenizer_is_refused(
    diffusion: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--tokenizer", tiny, "--output", tmp_path / "out", "--guidance", "2", "--guide"]
    strange = save_diffusion(tmp_path / "strange", tokenizer="s" * 64)
    assert run(module, diffusion, *given, strange) == 2
    assert "the guide was trained on latents of another tokenizer" in capsys.readouterr().err
    assert run(module, diffusion, *given, strange, "--other-tokenizer", "--count", "1", "--steps", "1") == 0
    shutil.rmtree(tmp_path / "out")
    straight, bent = (
        of_a_run(save_diffusion(tmp_path / path), stages=[{"path": path}]) for path in ("linear", "cosine")
    )
    assert run(module, straight, *given, bent) == 1
    assert "the guide learned another path than the model (cosine, linear)" in capsys.readouterr().err
    assert run(module, diffusion, *given, bent, "--count", "1", "--steps", "1") == 0, "which may be either"


def test_the_model_of_an_end_to_end_run_has_its_tokenizer_beside_it(
    tiny: Path, diffusion: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "run")
    shutil.copytree(diffusion, tmp_path / "run/diffusion")
    given = ["--output", tmp_path / "out", "--count", "1", "--steps", "1"]
    assert run(module, tmp_path / "run/diffusion", *given) == 0
    assert json.loads((tmp_path / "out/samples.json").read_text())["tokenizer"] == str(tmp_path / "run")


def test_latents_that_are_not_finite_end_it(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_diffusion(tmp_path / "broken")
    broken = vfmvae.load(folder)
    with torch.no_grad():
        broken.y_embedder.embedding_table.weight[3] = torch.nan
    save_transformer(broken, folder)
    given = ["--tokenizer", tiny, "--output", tmp_path / "out", "--labels", "balanced", "--count", "5"]
    assert run(module, folder, *given, "--steps", "2") == 1
    assert "the latents of image 3 (class 3) are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_after_a_stop_the_same_command_makes_what_is_missing(
    diffusion: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--sampler", "sde", "--batch-size", "2", "--png")
    whole, _, said = made(diffusion, tiny, tmp_path / "whole", *options)
    images_of, asked = module.images_of, list[int]()

    def stopped(models: object, settings: object, numbers: list[int], *more: object) -> torch.Tensor:
        asked.extend(numbers)
        if asked == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return images_of(models, settings, numbers, *more)

    out = tmp_path / "out"
    given = ["--tokenizer", tiny, "--output", out, *FEW, *options]
    monkeypatch.setattr(module, "images_of", stopped)
    assert run(module, diffusion, *given) == 130
    assert "2 of 6 images are kept; the same command goes on" in capsys.readouterr().out
    assert not list(out.rglob("samples.*")) and len(list(out.rglob("*.png"))) == 2
    assert run(module, diffusion, *given, "--seed", "1") == 2
    assert "begun with seed 0, which now is 1" in capsys.readouterr().err
    assert run(module, diffusion, *given, "--guidance", "3") == 2
    assert "begun with sampling.guidance.scale 1.0, which now is 3.0" in capsys.readouterr().err
    assert run(module, diffusion, *[option for option in given if option != "--png"]) == 2
    assert "begun with png True, which now is False" in capsys.readouterr().err
    (out / "notes.txt").touch()
    assert run(module, diffusion, *given) == 1
    assert "images that were begun, and notes.txt: move that away" in capsys.readouterr().err
    (out / "notes.txt").unlink()

    asked.clear()
    for folder in (out, out / "images"):
        (folder / ".samples.npz.killed.partial").touch()
    again, _, same = made(diffusion, tiny, out, *options)
    assert asked == [2, 3, 4, 5] and "2 images are there already" in capsys.readouterr().out
    assert np.array_equal(again, whole) and same == said
    assert len(list((out / "images").iterdir())) == 6
    assert sorted(path.name for path in out.iterdir()) == ["images", *WRITTEN]


def test_a_file_that_is_damaged_is_begun_again_and_said(
    diffusion: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(diffusion, tiny, tmp_path / "out")
    described = {**json.loads((tmp_path / "out/samples.json").read_text()), "png": False}
    for name in WRITTEN:
        (tmp_path / "out" / name).unlink()
    hidden, settings = (tmp_path / "out" / f".samples.{kind}.begun" for kind in ("npz", "json"))
    hidden.write_bytes(b"short")
    settings.write_text(json.dumps(described))
    given = ["--tokenizer", tiny, "--output", tmp_path / "out", *FEW]
    assert run(module, diffusion, *given) == 0
    assert "is damaged, so all images are made again" in capsys.readouterr().out
    for path in tmp_path.glob("out/*"):
        path.unlink()
    settings.write_text("{")
    assert run(module, diffusion, *given) == 1
    error = capsys.readouterr().err
    assert "is not valid JSON" in error and "or give another --output" in error

    # Begun, and no image is there: other options are welcome.
    hidden.write_bytes(bytes(6 * (64 * 64 * 3 + 1)))
    settings.write_text(json.dumps(described))
    assert run(module, diffusion, *given, "--seed", "1") == 0


def test_images_that_are_lost_are_not_written_as_black_ones(tmp_path: Path) -> None:
    begin(tmp_path, {"images": 2, "resolution": 8}, 2, 8)
    under_way = ImagesUnderWay(tmp_path, 2, 8)
    under_way.write([0], torch.ones(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(OSError, match="lacks 1 images, the first of them number 1"):
        finish(tmp_path, under_way, [0, 0], {})
    assert not list(tmp_path.glob("samples.*"))
    (tmp_path / ".samples.npz.begun").unlink()
    with pytest.raises(OSError, match=r"could not write .*samples.npz.begun: No such file"):
        under_way.write([1], torch.ones(1, 3, 8, 8, dtype=torch.uint8))


def test_two_commands_do_not_share_a_folder(
    diffusion: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with run_lock(tmp_path, print):
        assert run(module, diffusion, "--tokenizer", tiny, "--output", tmp_path, *FEW) == 1
    assert "samples in" in (error := capsys.readouterr().err) and "give another --output" in error
    (tmp_path / "file").touch()
    assert run(module, diffusion, "--tokenizer", tiny, "--output", tmp_path / "file", *FEW) == 1
    assert "is a file; give a folder as --output" in capsys.readouterr().err


def test_a_stop_while_the_archive_is_written_loses_nothing(
    diffusion: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> object:
        raise KeyboardInterrupt

    given = ["--tokenizer", tiny, "--output", tmp_path / "out", *FEW]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.samples.npz.begun").touch()  # a process that was killed before it made anything
    with monkeypatch.context() as patch:
        patch.setattr("vfmvae.sample_files.write_arrays", interrupted)
        assert run(module, diffusion, *given) == 130
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("*.partial"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "images_of", interrupted)
        assert run(module, diffusion, *given) == 0
    assert (tmp_path / "out/samples.npz").is_file()


def test_the_shift_of_training_is_that_of_the_last_stage(diffusion: Path) -> None:
    model = load_transformer(diffusion)
    elements = model.config.channels * model.config.latent_size**2
    stages = [{"time": {"shift": 3.0}}, {"time": {"dimension_shift": True}}]
    assert training_shift({"stages": stages}, model) == pytest.approx((elements / 4096) ** 0.5)
    assert training_shift({"stages": stages[:1]}, model) == 3.0
    assert training_shift({"stages": []}, model) == training_shift({}, model) == 1.0
