"""What a diffusion run would do, without doing it: stages, the model and its size, memory that stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from vfmvae.diffusion import DiffusionTransformer
from vfmvae.diffusion_config import DiffusionConfig
from vfmvae.diffusion_inputs import LatentInputs, check_classes

GIB = 2**30
BYTES_PER_PARAMETER = 4 + 4 + 8 + 4
"""Its own, its gradient's, its two moments', its average's, all float32."""


def describe(config: DiffusionConfig, console: Console) -> None:
    """Print the plan of a run; ValueError for a batch that cannot be shared as the engine is asked to."""
    config.check_sampler()
    plan, at_once, model = config.plan(), config.images_at_once(), config.diffusion
    if config.latents is not None and Path(config.latents).exists():
        # What is wrong with a folder is found here too.
        source = LatentInputs(replace(config, verify_latents=False), None, torch.device("cpu"))
        check_classes(source, model.classes)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DiffusionTransformer(model).parameters())
    lines = []
    for stage, updates in zip(config.stages, plan.lengths, strict=True):
        terms = ", ".join(f"{name} {weight:g}" for name, weight in stage.losses.weights().items())
        rate = stage.optimizer
        lines += [
            f"stage {stage.name}: {stage.images:,} images, {updates:,} updates",
            f"  losses  {terms}",
            f"  times   {stage.time.law}, {stage.path} path, labels dropped {stage.label_dropout:g}",
            f"  rate    {rate.learning_rate:g}, {rate.schedule} ({rate.kind})",
        ]
    where = f"latents of {config.latents}" if config.latents else f"images of {config.data}"
    lines += [
        f"{plan.steps:,} updates of {config.batch_size} images in all, on {where}",
        f"model: {parameters / 1e6:.1f} M parameters, {model.depth} blocks of width {model.width},"
        f" {model.tokens} tokens of latents {model.channels} x {model.latent_size} x {model.latent_size}",
        f"memory: {parameters * BYTES_PER_PARAMETER / GIB:.1f} GiB for weights, gradients, moments and"
        f" averages, beside the graphs of {at_once} images computed at once",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
