"""Recipes are complete configurations that survive JSON, and the published one is the published run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.tiny_runs import steps
from vfmvae.config import TrainConfig
from vfmvae.recipes import RECIPES, demo
from vfmvae.serialization import from_dict, to_json
from vfmvae.train_job import Job


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name: str) -> None:
    config = RECIPES[name]()
    assert from_dict(TrainConfig, json.loads(to_json(config)), name) == config


def test_the_demo_gives_the_same_losses_fused_and_plain() -> None:
    runs = []
    for fused in (True, False):
        built = Job(replace(demo(), device="cpu", fused=fused))
        built.enter_stage(0)
        runs.append([result.losses for result in steps(built, 5)])
    for fast, plain in zip(*runs, strict=True):
        assert {k: v.item() for k, v in fast.items()} == pytest.approx(
            {k: v.item() for k, v in plain.items()}, rel=2e-3
        )


def test_the_published_recipe_is_the_published_run() -> None:
    config = RECIPES["vfm_vae_siglip2_large"]()
    assert (config.batch_size, config.tokenizer.resolution, config.tokenizer.latent_channels) == (
        512,
        256,
        32,
    )
    assert [stage.images for stage in config.stages] == [20e6, 20e6, 1e6, 3e6]
    strong, weak, ssim, patch = (stage.losses for stage in config.stages)
    assert (strong.l1, strong.perceptual, strong.adversarial, strong.kl) == (1.0, 10.0, 1.0, 1e-6)
    assert (strong.multiscale_l1, strong.alignment, weak.alignment) == (0.1, 5.0, 1.0)
    assert (ssim.l1, ssim.perceptual, ssim.ssim, ssim.kl, ssim.alignment) == (1.0, 2.0, 1.0, 0.0, 0.0)
    assert (patch.l1, patch.patch_adversarial, patch.adversarial, patch.feature_matching) == (0, 1, 1, 10)
    rates = [stage.optimizer.learning_rate for stage in config.stages]
    assert rates == [1e-4, 1e-4, 5e-5, 5e-5]
    assert {stage.optimizer.betas for stage in config.stages} == {(0.0, 0.99)}
    assert {(stage.ema.half_life_images, stage.ema.ramp_up) for stage in config.stages} == {(160_000, 0.05)}
    assert config.stages[3].trains == ("decoder>32",)


def test_the_multiscale_loss_of_the_published_run_ends_early() -> None:
    strong = RECIPES["vfm_vae_siglip2_large"]().stages[0]
    assert "multiscale_l1" in strong.weights(4_999_999)
    assert "multiscale_l1" not in strong.weights(5_000_000)


def test_the_demo_needs_nothing_but_this_package() -> None:
    config = RECIPES["demo"]()
    assert config.data is None
    networks = (config.tokenizer.encoder.name, config.discriminator.backbone, config.perceptual.network)
    assert networks == ("mini", "mini", "mini")
    assert config.stages[-1].losses.adversarial > 0, "and it plays against a discriminator"
