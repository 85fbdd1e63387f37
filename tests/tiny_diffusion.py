"""Diffusion runs of seconds: made-up latents, a transformer of two narrow blocks, its jobs step by step."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from vfmvae.data.latent_folder import LatentSettings, pack_names
from vfmvae.data.latent_writer import LatentWriter
from vfmvae.diffusion import TransformerConfig
from vfmvae.diffusion.sampling import Sampling
from vfmvae.diffusion_config import DiffusionConfig, EvaluationConfig
from vfmvae.diffusion_job import DiffusionJob
from vfmvae.diffusion_step import diffusion_step
from vfmvae.training.diffusion_stage import DiffusionLosses, DiffusionStageConfig
from vfmvae.training.ema import EmaConfig
from vfmvae.training.engine import ComputeConfig
from vfmvae.training.job import StepResult
from vfmvae.training.optim import OptimizerConfig
from vfmvae.training.run_folder import RunFolder

CHANNELS, SIZE, WIDTH, GRID = 4, 4, 6, 4
"""Of the latents; of the encoder's features, whose grid is twice as fine as the model's."""
CLASSES = tuple("abcde")
SETTINGS = LatentSettings(
    tokenizer="t" * 64,
    images=24,
    names="n",
    resolution=64,
    kind="sample",
    moments=False,
    storage="fp32",
    compute="float32",
    seed=0,
    shard_images=10,
    flips=False,
    tokens=(GRID, GRID),
    class_token=True,
    encoder="mini",
)
MODEL = TransformerConfig(
    latent_size=SIZE,
    channels=CHANNELS,
    patch=2,
    width=16,
    depth=2,
    heads=2,
    classes=len(CLASSES),
    qk_norm=True,
    class_token_width=WIDTH,
    alignment_depth=1,
    alignment_widths=(WIDTH,),
    projector_width=8,
)
PLAIN = replace(MODEL, class_token_width=None, alignment_widths=())
ALL_LOSSES = DiffusionLosses(cosine=0.5, alignment=0.5, class_token=0.03)


def made_up(number: int, mirrored: bool = False) -> dict[str, Tensor]:
    """What is stored of an image, each channel with its own mean and deviation."""
    rng = np.random.default_rng((number, mirrored))
    scale = np.array([1.0, 0.2, 30.0, 4.0])[:, None, None]
    mean = scale * (rng.standard_normal((CHANNELS, SIZE, SIZE)) + [[[0.0]], [[-3.0]], [[1.0]], [[0.5]]])
    found = {
        "latents": mean,
        "moments": np.concatenate([mean, np.full_like(mean, -4.0)]),
        "features": rng.standard_normal((GRID * GRID, WIDTH)) + 0.5,
        "class_token": rng.standard_normal(WIDTH),
    }
    return {name: torch.from_numpy(values).float() for name, values in found.items()}


def fill(
    folder: Path,
    change: Callable[[dict[str, Tensor], int], None] = lambda stored, number: None,
    finish: bool = True,
    classes: tuple[str, ...] = CLASSES,
    **settings: Any,
) -> Path:
    """A folder of latents; `change` may spoil what is stored of an image."""
    chosen = replace(SETTINGS, **settings)
    writer = LatentWriter(folder, chosen, classes)
    for shard in writer.missing:
        rows, tensors = list(chosen.rows(shard)), {}
        for mirrored in range(1 + chosen.flips):
            stored = [made_up(row, bool(mirrored)) for row in rows]
            for row, entry in zip(rows, stored, strict=True):
                change(entry, row)
            for name in chosen.fields:
                tensors[name + "_flip" * mirrored] = torch.stack([entry[name] for entry in stored])
        labels = torch.tensor([row % len(classes) for row in rows], dtype=torch.int64)
        numbers = torch.tensor(rows, dtype=torch.int64)
        names = pack_names([f"{row}.png" for row in rows])
        writer.write(shard, {**tensors, "labels": labels, "numbers": numbers, "names": names})
        if not finish:
            return folder
    assert writer.finish() is not None
    return folder


def stage(losses: DiffusionLosses = ALL_LOSSES, **changes: Any) -> DiffusionStageConfig:
    """A stage at a constant rate; Adam's large epsilon keeps rounding from becoming whole steps."""
    base: dict[str, Any] = {
        "images": 1000,
        "losses": losses,
        "optimizer": OptimizerConfig(kind="adamw", learning_rate=1e-2, betas=(0.9, 0.95), eps=1e-3),
        "ema": EmaConfig(half_life_images=8, ramp_up=None),
    }
    return DiffusionStageConfig(**base | changes)


def tiny(**changes: Any) -> DiffusionConfig:
    """Every loss on latents, which `changes` must name, or data in their place."""
    base: dict[str, Any] = {
        "diffusion": MODEL,
        "stages": (stage(),),
        "evaluation": EvaluationConfig(count=3, images=10, sampling=Sampling("heun", steps=2)),
        "batch_size": 4,
        "steps": 4,
        "device": "cpu",
        "threads": 1,
        "log_every": 1,
        "fused": True,
    }
    return DiffusionConfig(**base | changes)


def job(config: DiffusionConfig, raised: bool = True) -> DiffusionJob:
    """A job ready for its first step; `raised`: weights that begin at zero do not, so that all matter."""
    built = DiffusionJob(config)
    if raised:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in built.parameters:
                if not parameter.any():
                    parameter.normal_(std=0.2, generator=generator)
    built.enter_stage(0)
    built.take_statistics()
    return built


def steps(built: DiffusionJob, count: int) -> list[StepResult]:
    """Do the next `count` updates."""
    results = []
    for batch, _ in zip(built.batches(built.state.step), range(count), strict=False):
        built.begin_step()
        results.append(diffusion_step(built, batch))
        built.state.step += 1
    return results


def parameters(built: DiffusionJob) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in built.transformer.named_parameters()}


def engine(**options: Any) -> ComputeConfig:
    return ComputeConfig(**{"clip_norm": 1.0, **options})


def run(config: DiffusionConfig, path: Path) -> str:
    """Train in this process, or go on; returns what it printed."""
    from vfmvae.train_diffusion import train

    output = io.StringIO()
    folder = RunFolder(path, "vfmvae.train_diffusion")
    train(config, folder, Console(file=output, width=200))
    return output.getvalue()
