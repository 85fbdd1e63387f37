"""From the command line to a complete configuration, and the sentence for every mistake on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import vfmvae.train
from tests.diffusion.test_transformer import TINY, randomised
from tests.tokenizer.tiny import tiny_tokenizer
from vfmvae.cli import UsageError
from vfmvae.config import TrainConfig, check_same_run
from vfmvae.diffusion.files import save_transformer
from vfmvae.encoders.base import ViTConfig
from vfmvae.recipes import RECIPES, demo
from vfmvae.serialization import to_json
from vfmvae.train_arguments import parse_arguments


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    vfmvae.train.main()


def test_without_arguments_it_is_the_demo_in_a_new_folder() -> None:
    launch, folder = parse_arguments([])
    assert launch.run == demo()
    assert folder.path == Path("runs/demo")
    assert not launch.resume and not launch.dry_run


def test_any_field_can_be_overridden() -> None:
    arguments = "--steps 7 --stages.0.ema.ramp-up 0.5 --tokenizer.encoder.layers 1 2 -1 --fused --dtype fp16"
    config = parse_arguments(arguments.split())[0].run
    assert (config.steps, config.fused, config.dtype) == (7, True, "fp16")
    assert [stage.ema.ramp_up for stage in config.stages] == [0.5, 0.05]
    assert config.tokenizer.encoder.layers == (1, 2, -1)
    assert config.tokenizer.decoder == demo().tokenizer.decoder, "the rest stays the recipe's"


def test_a_config_file_replaces_the_recipe_and_names_the_run() -> None:
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.json").write_text(to_json(TrainConfig(steps=11, fused=True)))
    launch, folder = parse_arguments(["--config", "runs/mine/config.json", "--no-fused"])
    assert launch.run == TrainConfig(steps=11, fused=False)
    assert folder.path == Path("runs/mine-2")


def test_resume_takes_the_runs_own_config() -> None:
    for name, steps in (("demo", 5), ("demo-2", 6), ("other", 7)):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "config.json").write_text(to_json(TrainConfig(steps=steps)))
    launch, folder = parse_arguments(["--resume"])
    assert (folder.path, launch.run.steps) == (Path("runs/demo-2"), 6)
    launch, folder = parse_arguments(["--run-dir", "runs/other", "--resume", "--steps", "70"])
    assert (folder.path, launch.run.steps) == (Path("runs/other"), 70)
    with pytest.raises(ValueError, match="a resumed run cannot change its batch_size from 512 to 3"):
        parse_arguments(["--run-dir", "runs/other", "--resume", "--batch-size", "3"])


@pytest.mark.parametrize("name", RECIPES)
def test_dry_run_describes_the_recipe_and_writes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main(monkeypatch, "--recipe", name, "--dry-run")
    printed = capsys.readouterr().out
    for stage in RECIPES[name]().stages:
        assert f"stage {stage.name}: {stage.images:,} images" in printed
    assert "memory, estimated: " in printed
    assert not list(Path().iterdir())


def test_a_recipe_takes_the_architecture_of_the_tokenizer_that_it_begins_with(tmp_path: Path) -> None:
    saved = tiny_tokenizer()
    saved.save(tmp_path)
    plain, options = ("--initial", str(tmp_path)), ("--joint.weight", "2")
    launch, _ = parse_arguments(plain)
    assert launch.run.tokenizer == saved.config and launch.run.initial == str(tmp_path)
    launch, _ = parse_arguments(("--recipe", "joint_demo", *plain, *options))
    assert launch.run.joint is not None and launch.run.joint.weight == 2
    assert (launch.run.joint.model.channels, launch.run.joint.model.latent_size) == (8, 4)
    # Flags may mend what a recipe and the tokenizer do not agree on.
    large = ("--recipe", "vfm_vae_siglip2_large", *plain)
    stages = [
        f"--stages.{n}.equivariance.{what}-probability" for n in range(4) for what in ("latent", "image")
    ]
    launch, _ = parse_arguments((*large, *(part for flag in stages for part in (flag, "0"))))
    assert launch.run.tokenizer == saved.config
    save_transformer(randomised(TINY), tmp_path / "diffusion")
    with pytest.raises(UsageError, match="diffusion is a diffusion model; give a tokenizer"):
        parse_arguments(("--initial", str(tmp_path / "diffusion")))
    with pytest.raises(ValueError, match="cannot change its initial from .* to None"):
        check_same_run(replace(launch.run, initial=None), launch.run)


def test_a_dry_run_needs_no_new_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").mkdir()
    Path("taken/metrics.jsonl").touch()
    run_main(monkeypatch, "--run-dir", "taken", "--dry-run")
    assert "stage reconstruct: " in capsys.readouterr().out


def test_an_optional_section_can_be_overridden_where_the_config_has_it() -> None:
    vit = ViTConfig(width=64, depth=2, heads=2, patch_size=16, image_size=64, mlp_width=128)
    encoder = replace(demo().tokenizer.encoder, vit=vit)
    Path("c.json").write_text(to_json(replace(demo(), tokenizer=replace(demo().tokenizer, encoder=encoder))))
    launch, _ = parse_arguments(["--config", "c.json", "--tokenizer.encoder.vit.depth", "3"])
    assert launch.run.tokenizer.encoder.vit == replace(vit, depth=3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "absent.json"], "error: absent.json cannot be read: No such file or directory"),
        (["--config", "cut.json"], "error: cut.json is not valid JSON: "),
        (
            ["--config", "newer.json"],
            "error: newer.json: unknown field 'momentum'; valid fields: safety, log, data, ",
        ),
        (["--resume"], "error: there is no run of 'demo' in runs/ to resume; give its folder with --run-dir"),
        (["--resume", "--run-dir", "absent"], "error: absent holds no run to resume (no config.json)"),
        (["--run-dir", "taken"], "error: taken holds a run already; add --resume to go on with it, or give"),
        (["--run-dir", "cut.json"], "error: cut.json is a file; give a folder as --run-dir"),
        (["--data", "absent"], "error: image folder absent does not exist"),
        (["--data", "cut.json"], "error: cut.json is a file; give the folder"),
        (["--data", "taken"], "error: no images for train in taken"),
        (["--tokenizer.encoder.name", "minni"], "error: "),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_run(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("cut.json").write_text('{"steps": 5, "tok')
    Path("newer.json").write_text('{"steps": 5, "momentum": 0.9}')
    Path("taken").mkdir()
    Path("taken/metrics.jsonl").touch()
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 1
    assert error.startswith(sentence)
    assert "Traceback" not in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "dmeo"], "error: unknown recipe 'dmeo'; known: demo, vfm_vae_siglip2_large"),
        (["--recipe"], "error: argument --recipe: expected one argument"),
        (
            ["--recipe", "demo", "--config", "x.json"],
            "error: give --recipe demo or --config x.json, not both",
        ),
        (["--run-dir", ""], "error: --run-dir is empty; give a folder"),
        (["--run-dir="], "error: --run-dir is empty; give a folder"),
        (["--device", "gpu"], "error: device 'gpu' cannot be used: "),
        (["--tokenizer.decoder.channel-max", "0"], "decoder.channel_max is 0;"),
        (["--tokenizer.bottleneck.initial-logvar", "nan"], "initial_logvar is nan;"),
        (["--stepz", "3"], "unknown option --stepz"),
        (["--steps", "three"], "--steps"),
        (["--steps"], "--steps"),
        (["--dtype", "fp8"], "'bf16'"),
        (["--tokenizer.fusion.compress", "pool"], "'attention'"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--losses.kl", "1"], "unknown option --losses.kl"),
        (["--engine.accumulate", "0"], "engine.accumulate is 0; it must be at least 1"),
        (["demo"], "unknown argument demo"),
    ],
)
def test_wrong_usage_names_the_option(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, *arguments)
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert words in output.out + output.err
    assert not Path("runs").exists()


def test_help_explains_the_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, "--help")
    output = capsys.readouterr().out
    assert ended.value.code == 0
    assert "Example: python -m vfmvae.train --fused" in output
    names = "recipe config run-dir steps seed device dtype data resume checkpoint-every dry-run fused"
    assert [name for name in names.split() if f"--{name}" not in output] == []
