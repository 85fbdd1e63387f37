"""A diffusion run from its first step to its files: stages, pictures, going on, rollbacks, mistakes."""

from __future__ import annotations

import importlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import vfmvae
import vfmvae.train_diffusion
from tests.commands import run as run_command
from tests.commands import save_tiny
from tests.helpers import ROOT
from tests.host_reads import host_reads
from tests.tiny_diffusion import ALL_LOSSES, MODEL, PLAIN, fill, run, stage, tiny
from tests.whole_runs import assert_same_run, lines, saved_steps, state, weights
from vfmvae.data.latent_folder import read_manifest
from vfmvae.diffusion import DiffusionTransformer
from vfmvae.diffusion.files import save_transformer, tokenizer_hash_of
from vfmvae.diffusion.flow import TimeConfig
from vfmvae.diffusion.sampling import sample_noise
from vfmvae.diffusion_config import DiffusionConfig
from vfmvae.diffusion_inputs import ImageInputs
from vfmvae.serialization import to_json
from vfmvae.training.diffusion_stage import DiffusionLosses
from vfmvae.training.guard import SafetyConfig
from vfmvae.training.run_folder import RunFolder

STAGES = (
    stage(name="first", images=12, time=TimeConfig("lognormal")),
    stage(replace(ALL_LOSSES, velocity=0.0), name="second", images=12),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(fill(tmp_path_factory.mktemp("cache") / "made", moments=True))


@pytest.fixture(scope="module")
def full(made: str) -> DiffusionConfig:
    return tiny(latents=made, stages=STAGES, steps=None, checkpoint_every=2, evaluate_every=8)


@pytest.fixture(scope="module")
def finished(full: DiffusionConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run and what it printed."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    return path, run(full, path)


def test_a_run_logs_every_loss_of_every_stage(finished: tuple[Path, str]) -> None:
    path, printed = finished
    assert sorted(os.listdir(path)) == ["checkpoints", "config.json", "metrics.jsonl", "model.safetensors"]
    found = lines(path)
    assert [line["stage"] for line in found] == ["first"] * 3 + ["second"] * 3
    common = {"cosine", "alignment", "class_token", "total", "gradient_norm", "learning_rate_transformer"}
    common |= {"skipped_steps", "kind", "step", "stage", "seen_images"}
    assert [set(line) for line in found[2:4]] == [common | {"velocity"}, common]
    assert all(math.isfinite(v) for line in found for v in line.values() if isinstance(v, float))
    assert [line["step"] for line in lines(path, "eval")] == [0, 2, 4, 6]
    for word in ("losses at fixed times and noise", "before", "after", "24 images of 5 classes", "metrics"):
        assert word in printed
    assert "samples.png" not in printed, "nothing decodes these latents"


def test_a_run_folder_is_a_model_that_samples(finished: tuple[Path, str], full: DiffusionConfig) -> None:
    model = vfmvae.load(finished[0])
    assert model.config == MODEL and tokenizer_hash_of(finished[0]) == "t" * 64
    assert model.latents_mean.tolist() == pytest.approx(read_manifest(Path(full.latents or "")).mean)
    made = vfmvae.sample(model, sample_noise(0, range(2), (4, 4, 4)), torch.tensor([0, 3]), "euler", steps=3)
    assert made.shape == (2, 4, 4, 4) and made.isfinite().all()


def test_the_same_seed_gives_the_same_run_whoever_reads(
    finished: tuple[Path, str], full: DiffusionConfig, tmp_path: Path
) -> None:
    torch.manual_seed(12345)
    run(replace(full, workers=1), tmp_path)
    assert_same_run(finished[0], tmp_path)


def test_the_host_never_waits_for_the_device_between_log_lines(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_advance, found = vfmvae.train_diffusion.Run.advance, []

    def counted(*arguments: Any) -> bool:
        with host_reads() as reads:
            done = real_advance(*arguments)
        # Files are read, and the workers' seed never leaves the host.
        found.extend(read for read in reads if not any(name in read for name in ("latents.py", "loader.py")))
        return done

    monkeypatch.setattr(vfmvae.train_diffusion.Run, "advance", counted)
    run(tiny(latents=made, steps=7, log_every=3), tmp_path)
    assert len(found) == len(lines(tmp_path)) == 3, found


# Going on


def stop_after(config: DiffusionConfig, folder: Path, step: int) -> None:
    """Run until a SIGTERM in the middle of a step."""
    real_step = vfmvae.train_diffusion.diffusion_step

    def stopped_step(job: Any, batch: Any) -> Any:
        if job.state.step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return real_step(job, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(vfmvae.train_diffusion, "diffusion_step", stopped_step)
        run(config, folder)
    assert ended.value.code == 0


@pytest.mark.parametrize("step", [1, 4])
def test_a_stopped_run_goes_on_bit_for_bit(
    finished: tuple[Path, str], full: DiffusionConfig, tmp_path: Path, step: int
) -> None:
    stop_after(full, tmp_path, step)
    assert saved_steps(tmp_path)[-1] == step
    assert f"from step {step}\n" in run(full, tmp_path)
    assert_same_run(finished[0], tmp_path)


@contextmanager
def training_process(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "vfmvae.train_diffusion", *map(str, arguments)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_killed_process_goes_on_where_its_last_checkpoint_is(made: str, tmp_path: Path) -> None:
    config = tiny(latents=made, steps=2000, checkpoint_every=5)
    (tmp_path / "config.json").write_text(to_json(config))
    folder = tmp_path / "killed"
    with training_process("--config", tmp_path / "config.json", "--run-dir", folder) as process:
        while not saved_steps(folder) or saved_steps(folder)[-1] < 5:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.kill()
    reached = saved_steps(folder)[-1]
    short = replace(config, steps=reached + 3)
    assert f"from step {reached}\n" in run(short, folder)
    run(short, tmp_path / "whole")
    for read in (weights, state):
        ours, theirs = read(folder), read(tmp_path / "whole")
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_a_run_of_nan_rolls_back_and_draws_other_numbers(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_step = vfmvae.train_diffusion.diffusion_step

    def spoiled(job: Any, batch: Any) -> Any:
        if job.state.step >= 3 and not job.state.numbers.get("rollbacks"):
            batch = [{**part, "class_token": part["class_token"] * math.nan} for part in batch]
        return real_step(job, batch)

    monkeypatch.setattr(vfmvae.train_diffusion, "diffusion_step", spoiled)
    safety = SafetyConfig(max_skips=2, max_rollbacks=1)
    printed = run(tiny(latents=made, steps=6, checkpoint_every=2, safety=safety), tmp_path)
    assert "2 steps in a row up to step 5 were skipped, as the gradients of transformer were" in printed
    assert "; going back to the checkpoint of step 2" in printed
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 7))
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_latents_of_another_tokenizer_cannot_continue_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    config = tiny(latents=str(fill(folder)), steps=1)
    run(config, tmp_path / "run")
    before = state(tmp_path / "run")
    for change, settings, sentence in (
        (None, {"tokenizer": "u" * 64}, r"another tokenizer \(uuuuuuuuuuuu\).*began with \(tttttttttttt\)"),
        (1.0, {}, "have other statistics than those that the run's checkpoint was trained on"),
    ):
        for file in folder.iterdir():
            file.unlink()
        fill(folder, lambda stored, _, add=change or 0.0: stored["latents"].add_(add), **settings)
        with pytest.raises(ValueError, match=sentence):
            run(replace(config, steps=2), tmp_path / "run")
    after = state(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


# Pictures, and the way from images to samples


def test_from_images_to_latents_to_a_model_to_samples(tmp_path: Path) -> None:
    import vfmvae.encode
    import vfmvae.report

    tokenizer, latents, folder = save_tiny(tmp_path / "tokenizer"), tmp_path / "latents", tmp_path / "run"
    options = ("--images", "30", "--tokens", "--class-token", "--device", "cpu", "--output", latents)
    assert run_command(vfmvae.encode, "scenes", "--tokenizer", tokenizer, *options) == 0
    model = replace(MODEL, channels=8, classes=15, alignment_widths=(32,), class_token_width=32)
    config = tiny(latents=str(latents), tokenizer=str(tokenizer), diffusion=model, steps=2)
    (tmp_path / "config.json").write_text(to_json(config))
    arguments = ("--config", tmp_path / "config.json", "--run-dir", folder)
    assert run_command(vfmvae.train_diffusion, *arguments) == 0
    assert os.listdir(folder / "figures") == ["samples_000000000008.png"]
    with Image.open(folder / "samples.png") as picture:
        assert picture.size == (8 * 128, 128), "three samples of 64 px, enlarged, in a row of eight"
    loaded = vfmvae.load(folder)
    noise = sample_noise(0, range(2), (8, 4, 4))
    made = loaded.denormalise(vfmvae.sample(loaded, noise, torch.tensor([1, 14]), "heun", steps=2))
    assert vfmvae.load(tokenizer).decode(made).shape == (2, 3, 64, 64)
    sample = importlib.import_module("vfmvae.sample")  # the name is the function's
    options = ("--steps", "2", "--count", "3", "--device", "cpu", "--output", tmp_path / "samples")
    assert run_command(sample, folder, *options) == 0
    with np.load(tmp_path / "samples" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 64, 64, 3), "by the tokenizer that the run names"
    assert run_command(vfmvae.report, folder) == 0
    page = (folder / "report.html").read_text()
    assert "<h2>Samples</h2>" in page and "Reconstructions" not in page and "data:image/webp" in page
    assert run_command(vfmvae.train_diffusion, *arguments, "--resume", "--steps", "3") == 0
    assert [line["step"] for line in lines(folder)] == [1, 2, 3]


def test_a_model_of_pixels_needs_no_tokenizer_for_its_pictures(tmp_path: Path) -> None:
    model = replace(PLAIN, channels=3, latent_size=32, patch=8, classes=15)
    printed = run(tiny(data="scenes", diffusion=model, stages=(stage(DiffusionLosses()),), steps=1), tmp_path)
    assert "data: 15 classes in scenes" in printed and "samples.png" in printed
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (8 * 128, 128)


def test_the_statistics_of_images_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(
        data="scenes",
        tokenizer=str(save_tiny(tmp_path / "tokenizer")),
        diffusion=replace(PLAIN, channels=8, classes=15),
        stages=(stage(DiffusionLosses()),),
        statistics_images=40,
        steps=1,
    )
    folder = tmp_path / "run"
    run(config, folder)
    std = weights(folder)["latents_std"]
    assert (std != 1).all()
    with monkeypatch.context() as patch:
        patch.setattr(ImageInputs, "statistics", mock.Mock(side_effect=AssertionError))
        run(replace(config, steps=2), folder)
    assert torch.equal(weights(folder)["latents_std"], std)
    tuned = replace(config, initial=str(folder), seed=1)
    run(tuned, tmp_path / "tuned")
    assert torch.equal(weights(tmp_path / "tuned")["latents_std"], std), "as its first weights know them"

    # A converted model does not know its tokenizer: only the statistics can tell that it is another.
    model = vfmvae.load(folder)
    assert isinstance(model, DiffusionTransformer)
    model.latents_std.mul_(3)
    save_transformer(model, tmp_path / "strange")
    with pytest.raises(
        ValueError, match="have other statistics than those that initial .*strange was trained on"
    ):
        run(replace(config, initial=str(tmp_path / "strange")), tmp_path / "refused")


def test_an_evaluation_that_is_not_finite_ends_a_run_before_its_first_step(made: str, tmp_path: Path) -> None:
    run(tiny(latents=made, steps=1), tmp_path / "first")
    model = vfmvae.load(tmp_path / "first")
    assert isinstance(model, DiffusionTransformer)
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(torch.nan)
    save_transformer(model, tmp_path / "broken")
    with pytest.raises(ValueError, match="evaluation before the first step gives velocity nan"):
        run(tiny(latents=made, initial=str(tmp_path / "broken")), tmp_path / "second")


# Mistakes


def test_a_published_recipe_learns_from_images_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its features come from the tokenizer that the same command line names, or from an encoder."""
    arguments = ("--recipe", "vfm_vae_reg_xl", "--data", "scenes", "--dry-run", "--run-dir", tmp_path / "run")
    for gives in (("--tokenizer", "t"), ("--encoder.name", "mini", "--encoder.scale-factor", "1.0")):
        assert run_command(vfmvae.train_diffusion, *arguments, *gives) == 0, capsys.readouterr().err
        assert "velocity 1, alignment 0.5, class_token 0.03" in capsys.readouterr().out


def test_a_plan_is_shown_without_latents(
    made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--recipe", "vfm_vae_reg_xl", "--latents", "absent", "--run-dir", tmp_path / "run")
    assert run_command(vfmvae.train_diffusion, *arguments, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "stage train: 102,493,360 images, 100,092 updates" in printed
    assert "velocity 1, alignment 0.5, class_token 0.03" in printed
    assert "257 tokens of latents 32 x 16 x 16" in printed and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--latents", "absent"),
            "error: no folder absent exists; give one that `vfmvae encode` has written",
        ),
        (("--data", "scenes"), "has losses.alignment, and nothing gives features; name an encoder"),
        (("--evaluation.sampling.guidance.interval", "0", "2"), "it must rise and lie in [0, 1]"),
        (("--recipe", "demo"), "unknown recipe 'demo'; known: diffusion_demo, vfm_vae_reg_xl"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = () if "--recipe" in arguments else ("--recipe", "vfm_vae_reg_xl")
    code = run_command(
        vfmvae.train_diffusion, *recipe, *arguments, "--device", "cpu", "--run-dir", tmp_path / "run"
    )
    caught = capsys.readouterr()
    assert code in (1, 2) and sentence in caught.err.replace("\n", " "), caught.err
    assert "Traceback" not in caught.err and not (tmp_path / "run" / "config.json").exists()


def test_a_run_of_another_model_is_not_resumed(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--run-dir", finished[0], "--resume", "--diffusion.width", "32")
    assert run_command(vfmvae.train_diffusion, *arguments) == 1
    assert "a resumed run cannot change its diffusion; start a new run instead" in capsys.readouterr().err
    command = RunFolder(finished[0], "vfmvae.train_diffusion").resume_command()
    assert command == f"python -m vfmvae.train_diffusion --run-dir {finished[0]} --resume"
    assert run_command(vfmvae.train_diffusion, "--run-dir", finished[0]) == 1
    assert "holds a run already; add --resume" in capsys.readouterr().err
