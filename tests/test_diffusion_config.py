"""The configuration of a diffusion run: recipes, JSON, what does not fit, what a resumed run may change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_diffusion import CHANNELS, CLASSES, MODEL, PLAIN, SIZE, WIDTH, fill, stage, tiny
from vfmvae.data import open_data
from vfmvae.diffusion.files import is_diffusion
from vfmvae.diffusion.guidance import Guidance
from vfmvae.diffusion.sampling import Sampling
from vfmvae.diffusion_config import (
    DiffusionConfig,
    EvaluationConfig,
    check_same_diffusion,
    read_diffusion_config,
)
from vfmvae.diffusion_job import DiffusionJob
from vfmvae.encoders import EncoderConfig
from vfmvae.recipes import DIFFUSION_RECIPES, diffusion_demo, joint_demo
from vfmvae.serialization import from_dict, to_json
from vfmvae.train_arguments import DIFFUSION, parse_training
from vfmvae.training.diffusion_stage import DiffusionLosses

VELOCITY = (stage(DiffusionLosses()),)
ALIGNED = replace(PLAIN, alignment_widths=(6,))


@pytest.mark.parametrize("name", DIFFUSION_RECIPES)
def test_recipes_survive_json(name: str, tmp_path: Path) -> None:
    config = DIFFUSION_RECIPES[name]()
    (tmp_path / "config.json").write_text(to_json(config))
    assert read_diffusion_config(tmp_path / "config.json") == config
    assert is_diffusion(json.loads(to_json(config)))


def test_the_demos_have_the_classes_of_what_they_draw() -> None:
    alone, joint = diffusion_demo(), joint_demo()
    assert joint.joint is not None
    for data, model in ((alone.data, alone.diffusion), (joint.data, joint.joint.model)):
        assert len(open_data(data, "train", 32).classes) == model.classes == 8
    assert alone.stages[0].time.shift == 3.0


def test_published_recipes_are_the_published_runs() -> None:
    reg = DIFFUSION_RECIPES["vfm_vae_reg_xl"]()
    model, first = reg.diffusion, reg.stages[0]
    assert (model.depth, model.width, model.heads, model.patch, model.qk_norm) == (28, 1152, 16, 1, True)
    assert (model.channels, model.latent_size, model.tokens, model.alignment_depth) == (32, 16, 257, 8)
    assert first.losses == DiffusionLosses(1.0, 0.0, 0.5, 0.03)
    assert (reg.batch_size, first.images / 1_281_167, reg.engine.clip_norm) == (1024, 80, 1.0)
    optimizer = first.optimizer
    assert (optimizer.kind, optimizer.learning_rate, optimizer.betas) == ("adamw", 2e-4, (0.9, 0.95))
    assert optimizer.weight_decay == 0
    long = DIFFUSION_RECIPES["vfm_vae_lightningdit_xl_long"]()
    assert [s.time.law for s in long.stages] == ["lognormal", "uniform"]
    assert all(s.losses == DiffusionLosses(cosine=1.0) for s in long.stages)
    assert sum(s.images for s in long.stages) == 560 * 1_281_167
    assert (long.diffusion.norm, long.diffusion.swiglu, long.diffusion.rope) == ("rms", True, True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latents": None}, "neither latents nor data is given: name a folder of latents"),
        (
            {"data": "scenes"},
            r"latents \(made\) and data \(scenes\) are both given; take away the recipe's with --data None",
        ),
        ({"encoder": EncoderConfig(name="mini")}, "encoder sees images, and latents come without them"),
        ({"stages": ()}, "stages is empty"),
        ({"statistics_images": 1}, "statistics_images is 1; it must be at least 2"),
        ({"diffusion": PLAIN}, "has losses.alignment, and the model no projector; give"),
        ({"diffusion": ALIGNED}, "losses.class_token 0.03, and the model no class token"),
        ({"stages": VELOCITY}, "losses.class_token 0, and the model a class token"),
        (
            {"diffusion": replace(MODEL, class_token_width=5)},
            r"class token too; make diffusion.class_token_width 5 equal to diffusion.alignment_widths \(6,\)",
        ),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        tiny(**{"latents": "made", **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        (EvaluationConfig, {"count": 0}, "evaluation.count is 0; it must be at least 1"),
        (EvaluationConfig, {"images": 0}, "evaluation.images is 0"),
        (Guidance, {"interval": (0.0, 1.2)}, r"guidance.interval is 0.0 to 1.2; it must rise and lie in \[0"),
        (Guidance, {"interval": (-0.5, 1.0)}, "guidance.interval is -0.5 to 1.0"),
    ],
)
def test_evaluations_that_cannot_be(section: Any, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        section(**values)


def test_a_file_that_is_not_a_diffusion_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"latents": "made", "diffusion": {"depht": 3}}')
    with pytest.raises(ValueError, match=f"{path}.*depht"):
        read_diffusion_config(path)


def test_a_resumed_run_may_go_on_longer_faster_and_elsewhere() -> None:
    begun = tiny(latents="made")
    check_same_diffusion(replace(begun, steps=9, workers=2, dtype="bf16", fused=False, device="cuda"), begun)
    milder = replace(stage().optimizer, learning_rate=1e-5)
    check_same_diffusion(replace(begun, stages=(stage(optimizer=milder),)), begun)
    check_same_diffusion(replace(begun, latents="moved", tokenizer="one for pictures"), begun)
    on_images = tiny(data="scenes", tokenizer="t")
    check_same_diffusion(replace(on_images, tokenizer="moved"), on_images)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latents": None, "data": "scenes"}, "its data from None to scenes"),
        ({"batch_size": 8}, "its batch_size from 4 to 8"),
        ({"seed": 1}, "its seed from 0 to 1"),
        ({"diffusion": replace(MODEL, depth=3)}, "its diffusion; start a new run instead"),
        ({"stages": (stage(name="other"),)}, "its stages from train to other"),
        (
            {"stages": (stage(optimizer=replace(stage().optimizer, kind="adam")),)},
            "optimizer.kind of its stage 'train' from adamw to adam",
        ),
    ],
)
def test_what_a_resumed_run_cannot_change(changes: dict[str, Any], sentence: str) -> None:
    begun = tiny(latents="made", tokenizer="t")
    with pytest.raises(ValueError, match=f"a resumed run cannot change {sentence}"):
        check_same_diffusion(replace(begun, **changes), begun)


def test_a_run_on_images_keeps_the_latents_that_it_learns() -> None:
    pixels = tiny(data="scenes", diffusion=PLAIN, stages=(stage(DiffusionLosses()),))
    with pytest.raises(ValueError, match="cannot change its tokenizer from None to t"):
        check_same_diffusion(replace(pixels, tokenizer="t"), pixels)


def test_pictures_by_the_sde_are_of_the_linear_path() -> None:
    evaluation = EvaluationConfig(sampling=Sampling("sde"))
    bent = tiny(latents="made", evaluation=evaluation, stages=(stage(name="bent", path="cosine"),))
    with pytest.raises(ValueError, match="sampler sde is for the linear path, and stage 'bent' learns"):
        DiffusionJob(bent)


def test_a_batch_is_shared_by_processes_and_parts() -> None:
    config = tiny(latents="made", batch_size=12)
    assert (config.images_at_once(), config.images_at_once(3)) == (12, 4)
    with pytest.raises(ValueError, match="batch_size 12 cannot be shared by 5 processes in 1 parts"):
        config.images_at_once(5)


def test_defaults_are_filled_in() -> None:
    found = from_dict(DiffusionConfig, {"latents": "made"}, "test")
    assert found == DiffusionConfig(latents="made") and found.diffusion.latent_size == 4 * SIZE


def test_the_demo_fits_the_folder_that_the_command_line_names(tmp_path: Path) -> None:
    fill(tmp_path / "latents")
    launch, _ = parse_training(DIFFUSION, ["--latents", str(tmp_path / "latents"), "--steps", "1"])
    model = launch.run.diffusion
    assert (model.channels, model.latent_size, model.classes) == (CHANNELS, SIZE, len(CLASSES))
    assert model.alignment_widths == (WIDTH,) and launch.run.stages[0].losses.alignment
    assert launch.run.data is None and launch.run.encoder is None
    assert launch.run.stages[0].time.shift is None, "that of the demo is for pixels"
    built = DiffusionJob(replace(launch.run, batch_size=2, device="cpu"))
    assert built.steps == 1
