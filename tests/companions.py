"""Small models that train along with a tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny_runs import job
from vfmvae.encoders import Features
from vfmvae.losses.schedule import WeightSchedule
from vfmvae.train_job import Job
from vfmvae.training.companion import CompanionLosses
from vfmvae.training.draws import StepDraws
from vfmvae.training.optim import OptimizerConfig
from vfmvae.training.stages import LossWeights

FAST = OptimizerConfig(learning_rate=1e-2, eps=1e-3)  # the default would enlarge rounding


class Reader(nn.Module):
    """Guesses noise from latents; stands for a diffusion model."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 1)

    def forward(
        self, latents: Tensor, encoded: Features, draws: StepDraws, labels: Tensor | None
    ) -> CompanionLosses:
        noise = draws.normal(latents.shape[1:])
        of_latents = self.linear(latents.movedim(1, -1)).square().mean()
        guess = self.linear(latents.detach().movedim(1, -1)).squeeze(-1)
        return CompanionLosses(of_latents, (guess - noise.mean(1)).square().mean())


class Gain(nn.Module):
    """One number a: of the latents a * mean(latents), of its own (a - 3)^2 / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0))

    def forward(
        self, latents: Tensor, encoded: Features, draws: StepDraws, labels: Tensor | None
    ) -> CompanionLosses:
        assert not any(tensor.requires_grad for tensor in (*encoded.layers, encoded.pooled))
        return CompanionLosses(self.a * latents.mean(), (self.a - 3.0).square() / 2)


def companion_job(
    model: nn.Module,
    weight: float = 1.0,
    optimizer: OptimizerConfig = FAST,
    schedule: WeightSchedule | None = None,
    losses: LossWeights | None = None,
    **options: Any,
) -> Job:
    """A job with a companion, ready for its first step."""
    built = job(losses or LossWeights(alignment=0.5), **options)
    built.add_companion("reader", model, weight, optimizer, schedule or WeightSchedule())
    return built


def reader() -> Reader:
    """The same one every time."""
    torch.manual_seed(5)
    return Reader()
