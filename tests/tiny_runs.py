"""Runs of seconds: the demo with a decoder of a few channels, and its jobs step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vfmvae.config import TrainConfig
from vfmvae.recipes import NO_EQUIVARIANCE, demo
from vfmvae.tokenizer import DecoderConfig, FusionConfig
from vfmvae.train_job import Job
from vfmvae.train_step import StepResult, training_step
from vfmvae.training.engine import EngineConfig
from vfmvae.training.optim import OptimizerConfig
from vfmvae.training.stages import LossWeights, StageConfig

ALL_LOSSES = LossWeights(
    l1=1.0,
    l2=0.5,
    multiscale_l1=0.1,
    perceptual=0.5,
    ssim=0.2,
    kl=1e-4,
    alignment=0.5,
    adversarial=0.3,
    patch_adversarial=0.2,
    feature_matching=0.5,
)


def stage(losses: LossWeights = ALL_LOSSES, **changes: Any) -> StageConfig:
    """A stage at a constant rate, without equivariance regularisation.

    Adam's epsilon is large: biases before a GroupNorm have a gradient of zero but for rounding, which Adam
    would otherwise enlarge to steps of full size.
    """
    optimizer = OptimizerConfig(learning_rate=1e-3, betas=(0.5, 0.9), eps=1e-3)
    base = {
        "images": 1000,
        "losses": losses,
        "optimizer": optimizer,
        "discriminator_optimizer": optimizer,
        "equivariance": NO_EQUIVARIANCE,
    }
    return StageConfig(**base | changes)


def tiny(**changes: Any) -> TrainConfig:
    """The demo with a small decoder; every field may be replaced."""
    tokenizer = replace(
        demo().tokenizer,
        fusion=FusionConfig(layer_widths=(8, 8, 16), decompress_factor=1),
        decoder=DecoderConfig(
            channel_base=512,
            channel_max=16,
            num_res_blocks=1,
            extra_convnext=False,
            latent_widths=(16, 8, 8, 8),
            attention_blocks=(0,),
            attention_depths=(1,),
            style_width=16,
        ),
    )
    base = replace(demo(), tokenizer=tokenizer, batch_size=2, device="cpu", log_every=1, fused=True)
    return replace(base, **changes)


def job(losses: LossWeights = ALL_LOSSES, batch_size: int = 4, **engine: Any) -> Job:
    """A job of one stage, ready for its first step. Layer scales are raised, so that every layer matters."""
    config = tiny(stages=(stage(losses),), batch_size=batch_size, engine=EngineConfig(**engine))
    built = Job(config)
    raise_layer_scales(built)
    built.enter_stage(0)
    return built


def raise_layer_scales(built: Job) -> None:
    with torch.no_grad():
        for name, parameter in built.tokenizer.named_parameters():
            if name.endswith("gamma") and parameter.abs().max() < 1e-3:
                parameter.fill_(1.0)


def steps(built: Job, count: int) -> list[StepResult]:
    """Do the next `count` updates."""
    results = []
    for batch, _ in zip(built.batches(built.state.step), range(count), strict=False):
        built.begin_step()
        results.append(training_step(built, batch, built.weights()))
        built.state.step += 1
    return results


def parameters(built: Job) -> dict[str, Tensor]:
    """Everything that trains, by name."""
    found = {f"tokenizer.{n}": p for n, p in built.tokenizer.named_parameters() if p.requires_grad}
    for adversary in built.adversaries:
        found |= {f"{adversary.name}.{n}": p for n, p in adversary.game.named_parameters() if p.requires_grad}
    for companion in built.companions:
        model = built.state.modules[companion.name]
        found |= {f"{companion.name}.{n}": p for n, p in model.named_parameters() if p.requires_grad}
    return {name: p.detach().clone() for name, p in found.items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)
