"""How far a diffusion model is: its losses at fixed times and noise, and a picture of samples."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vfmvae.diffusion.sampling import as_trained, run, sample_noise
from vfmvae.diffusion_inputs import LatentInputs
from vfmvae.diffusion_job import ENCODING, EVALUATION, DiffusionJob
from vfmvae.images import to_uint8
from vfmvae.training.draws import StepDraws


class DiffusionEvaluation(NamedTuple):
    """Losses by name, and samples uint8 [N, 3, H, W]; None where nothing decodes latents."""

    quality: dict[str, float]
    samples: Tensor | None


@torch.no_grad()
def evaluate(job: DiffusionJob) -> DiffusionEvaluation:
    """Of the averaged weights; the same in all processes, which must all call it."""
    model = job.transformer.eval()
    try:
        with job.ema.applied():
            return DiffusionEvaluation(measured_losses(job), samples(job))
    finally:
        model.train()


def measured_losses(job: DiffusionJob) -> dict[str, float]:
    """Mean of each loss of the present stage over the evaluation's images, without dropped labels.

    The n-th of these images has its own draws, however many are computed at once.
    """
    found: dict[str, list[Tensor]] = {}
    seen, total = 0, job.config.evaluation.images
    terms, stage = job.stage.losses.weights().keys(), replace(job.stage, label_dropout=0.0)
    for batch in job.source.evaluation_batches(job.part_size):
        job.faults += batch.get("faults", ())
        count = len(batch["key"])
        if not count:
            continue
        encoding, draws = (
            StepDraws(job.config.seed, 0, job.device, seen, count, total, EVALUATION + stream)
            for stream in (ENCODING, EVALUATION)
        )
        seen += count
        inputs = job.source.inputs(batch, encoding)
        inputs = inputs._replace(latents=job.transformer.normalise(inputs.latents))
        for name, loss in job.forward(inputs, stage, draws, terms).items():
            found.setdefault(name, []).append(loss * count)
    if not seen:
        raise ValueError(f"none of the images of {job.source.name} that an evaluation uses can be read")
    return {name: (torch.stack(values).sum() / seen).item() for name, values in found.items()}


def samples(job: DiffusionJob) -> Tensor | None:
    """Decoded samples of classes spread over all, sample number i always from the same noise."""
    settings, model, source = job.config.evaluation, job.transformer, job.source
    decoder = source.tokenizer
    if decoder is None and isinstance(source, LatentInputs):
        return None
    config, images = model.config, []
    elements = config.channels * config.latent_size**2
    sampling = as_trained(settings.sampling, job.stage.time.shift_for(elements))
    labels = torch.arange(settings.count) * config.classes // settings.count
    for start in range(0, settings.count, job.part_size):
        numbers = range(start, min(start + job.part_size, settings.count))
        shape = (config.channels, config.latent_size, config.latent_size)
        noise = sample_noise(job.config.seed, numbers, shape).to(job.device)
        latents = run(
            sampling,
            model,
            noise,
            labels[numbers.start : numbers.stop].to(job.device),
            seed=job.config.seed,
            numbers=numbers,
        ).latents
        latents = model.denormalise(latents)
        images.append(to_uint8(latents if decoder is None else decoder.decode(latents)).cpu())
    return torch.cat(images)
