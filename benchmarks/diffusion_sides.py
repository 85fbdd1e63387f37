"""What diffusion.py measures: the published form of a model and ours, with and without torch.compile, from
the same random weights; and the arithmetic of a model.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from published_diffusion import PublishedStep, published_transformer
from torch import Tensor

from vfmvae.data.latent_folder import LatentSettings, pack_names
from vfmvae.data.latent_writer import LatentWriter
from vfmvae.diffusion import SIZES, DiffusionTransformer, TransformerConfig
from vfmvae.diffusion_config import DiffusionConfig
from vfmvae.diffusion_job import TRAINING, DiffusionJob
from vfmvae.diffusion_step import diffusion_step
from vfmvae.recipes import vfm_vae_lightningdit_xl, vfm_vae_reg_xl
from vfmvae.training.device import compute_dtype
from vfmvae.training.diffusion_forward import DiffusionForward, DiffusionInputs
from vfmvae.training.diffusion_stage import DiffusionStageConfig
from vfmvae.training.draws import StepDraws
from vfmvae.training.engine import ComputeConfig
from vfmvae.training.regions import compile_blocks

Model = Literal["sit", "lightningdit", "reg"]
Route = Literal["reference", "reference, compiled", "fused", "fused, compiled"]
TINY: dict[str, Any] = {"depth": 2, "width": 32, "heads": 2, "alignment_depth": 1}
TINY |= {"latent_size": 4, "channels": 4, "projector_width": 16}


@dataclass
class Side:
    """One path: a model that samples, what trains it, and what it keeps."""

    model: DiffusionTransformer
    train: Callable[[], Mapping[str, Tensor]]
    around: Callable[[], AbstractContextManager[object]]
    """Entered for sampling."""
    tensors: Callable[[], Sequence[Tensor]]
    """Moments and averages."""


def configuration(name: Model, options: argparse.Namespace, device: torch.device) -> DiffusionConfig:
    """A run of the model in the published recipe, on latents of a folder that nobody has written yet."""
    sizes = {**SIZES.get(options.size, TINY), "depth": options.depth}
    sizes["alignment_depth"] = min(sizes["alignment_depth"], options.depth)
    if name == "sit":
        model, stage = TransformerConfig(**sizes), DiffusionStageConfig()
    else:
        recipe = vfm_vae_reg_xl() if name == "reg" else vfm_vae_lightningdit_xl()
        model, stage = replace(recipe.diffusion, **sizes), recipe.stages[0]
    return DiffusionConfig(
        diffusion=model,
        stages=(stage,),
        latents="latents",
        batch_size=options.batch,
        fused=True,
        device=str(device),
        dtype=options.dtype,
        engine=ComputeConfig(clip_norm=1.0, deterministic=False),
    )


def random_batch(config: DiffusionConfig, device: torch.device) -> dict[str, Any]:
    """A batch as a folder of latents gives it."""
    model, count = config.diffusion, config.batch_size
    torch.manual_seed(config.seed)
    latents = torch.randn(count, model.channels, model.latent_size, model.latent_size, device=device)
    features, token = None, None
    if model.alignment_widths:
        features = torch.randn(count, model.grid**2, model.alignment_widths[0], device=device)
    if model.class_token_width is not None:
        token = torch.randn(count, model.class_token_width, device=device)
    labels = torch.randint(model.classes, (count,), device=device)
    return {"latent": latents, "moments": None, "features": features, "class_token": token, "label": labels}


def build_job(config: DiffusionConfig, batch: Mapping[str, Any]) -> DiffusionJob:
    """The job of a run, at its first step; its source is a folder of one image, which is not read."""
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder), config, batch)
        job = DiffusionJob(replace(config, latents=folder))
    job.enter_stage(0)
    raise_zeros(job.transformer)
    return job


def write_latents(folder: Path, config: DiffusionConfig, batch: Mapping[str, Any]) -> None:
    """The first image of the batch, in the format of `vfmvae encode`."""
    model = config.diffusion
    settings = LatentSettings(
        tokenizer="unknown",
        images=1,
        names="random",
        resolution=None,
        kind="unknown",
        moments=False,
        storage="fp32",
        compute="fp32",
        seed=0,
        shard_images=1,
        flips=False,
        tokens=(model.grid, model.grid) if model.alignment_widths else None,
        class_token=model.class_token_width is not None,
    )
    first = {"latents": batch["latent"], "features": batch["features"], "class_token": batch["class_token"]}
    writer = LatentWriter(folder, settings, ("random",))
    stored = {name: first[name][:1].cpu() for name in settings.fields}
    zero = torch.zeros(1, dtype=torch.int64)
    writer.write(0, {**stored, "labels": zero, "numbers": zero.clone(), "names": pack_names(["random"])})
    writer.finish()


@torch.no_grad()
def raise_zeros(model: DiffusionTransformer) -> None:
    """Random numbers where training begins with 0: a product of zeros takes less power, and so less time."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)


def build(name: Model, options: argparse.Namespace, device: torch.device) -> dict[Route, Side]:
    """The sides, the first two with a model of their own, the compiled ones with those."""
    config = configuration(name, options, device)
    batch = random_batch(config, device)
    job = build_job(config, batch)
    published = published_step(config, batch, job.transformer.state_dict(), device)
    sides: dict[Route, Side] = {"fused": our_side(job, batch), "reference": published_side(published)}
    if options.compiled:
        sides["fused, compiled"] = our_side(compiled_job(job), batch)
        sides["reference, compiled"] = published_side(published.on(compiled_twin(published.model)))
    return sides


def our_side(job: DiffusionJob, batch: Mapping[str, Any]) -> Side:
    def train() -> Mapping[str, Tensor]:
        job.begin_step()  # always the same: the number of the step stays, and so do its random numbers
        return diffusion_step(job, [batch]).losses

    def tensors() -> list[Tensor]:
        assert job.optimizer is not None
        moments = [v for state in job.optimizer.state.values() for v in state.values() if v.ndim]
        return [*moments, *job.ema.of_parameters().values()]

    return Side(job.transformer, train, nullcontext, tensors)


def compiled_job(job: DiffusionJob) -> DiffusionJob:
    """The same run, parameters and optimizer, with the blocks compiled."""
    twin = copy.copy(job)
    twin.transformer = compiled_twin(job.transformer)
    twin.forward = DiffusionForward(twin.transformer)
    twin.model = twin.reducer = twin.forward
    return twin


def compiled_twin(model: DiffusionTransformer) -> DiffusionTransformer:
    """Another model with the same parameters, whose blocks are compiled."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    compile_blocks(twin.blocks, "default")
    return twin


def published_side(step: PublishedStep) -> Side:
    return Side(step.model, step, step.autocast, step.tensors)


def published_step(
    config: DiffusionConfig, batch: Mapping[str, Any], weights: Mapping[str, Tensor], device: torch.device
) -> PublishedStep:
    """With the inputs and random numbers of our step."""
    low = compute_dtype(config.dtype, device) or torch.float32
    inputs = DiffusionInputs(batch["latent"], batch["label"], batch["features"], batch["class_token"])

    def draws() -> StepDraws:
        return StepDraws(config.seed, 0, device, 0, config.batch_size, config.batch_size, TRAINING)

    model = published_transformer(config.diffusion, weights, device)
    return PublishedStep(model, config, inputs, draws, low)


def flops_per_image(config: TransformerConfig) -> float:
    """Of a forward, a multiply-add as two: what stands in the products, and attention."""
    width, hidden = config.width, int(config.width * config.mlp_ratio)
    mlp = 3 * int(2 / 3 * config.width * config.mlp_ratio) * width if config.swiglu else 2 * hidden * width
    of_token = config.depth * (4 * width**2 + mlp)
    middle = config.projector_width
    of_token += sum(middle * (width + middle + out) for out in config.alignment_widths)
    of_patch = config.channels * config.patch**2 * width * (3 if config.learn_sigma else 2)
    rows = config.depth * (6 if config.block_shift else 4) + 2
    of_image = rows * width**2 + 256 * width + width**2
    of_image += 2 * width * (config.class_token_width or 0)
    attention = 2 * config.depth * config.tokens**2 * width
    return 2.0 * (config.tokens * of_token + config.grid**2 * of_patch + of_image + attention)
