"""One training step of a diffusion transformer. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vfmvae.diffusion_job import ENCODING, TRAINING, DiffusionJob
from vfmvae.training.guard import clipped_update
from vfmvae.training.job import StepResult
from vfmvae.training.reduction import reduce_unsharded, reducing, settle_unused


def diffusion_step(job: DiffusionJob, batch: Sequence[Any]) -> StepResult:
    """One update.

    `batch`: what the source gives for each of this process's parts, which are accumulated.
    """
    assert job.optimizer is not None
    job.optimizer.zero_grad(set_to_none=True)
    weights = job.stage.losses.weights()
    scale = job.guard.scale / len(batch)
    found: list[dict[str, Tensor]] = []
    for number, part in enumerate(batch):
        last = number == len(batch) - 1
        inputs = job.source.inputs(part, job.draws(number, ENCODING))
        inputs = inputs._replace(latents=job.transformer.normalise(inputs.latents))
        with reducing(job.reducer, last):
            losses = job.model(inputs, job.stage, job.draws(number, TRAINING), weights.keys())
            (scale * weighted(losses, weights)).backward()
            if last:
                settle_unused(job.reducer, job.parameters)
        found.append({name: loss.detach() for name, loss in losses.items()})
    reduce_unsharded(job.reducer, job.parameters)
    losses = {name: torch.stack([part[name] for part in found]).mean() for name in found[0]}
    total = weighted(losses, weights)
    clip = job.config.engine.clip_norm
    skip, norm = clipped_update(job.optimizer, job.parameters, job.guard, total, clip)
    job.average()
    return StepResult({**losses, "total": total, "gradient_norm": norm}, {"transformer": skip})


def weighted(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The sum of the losses times their weights."""
    return torch.stack([weight * losses[name] for name, weight in weights.items()]).sum()
