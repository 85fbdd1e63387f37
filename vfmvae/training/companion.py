"""Another model that trains along with a tokenizer, and through which it is judged.

End-to-end training (REPA-E, arXiv 2504.10483) asks a diffusion transformer how well it can read the latents:
its alignment loss reaches the tokenizer, its diffusion loss only itself. The engine knows of such a model
what this module says, and no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vfmvae.training.guard import StepGuard


class CompanionLosses(NamedTuple):
    """Scalars from one forward of a companion."""

    of_latents: Tensor
    """Differentiated to the latents too, with the companion's weight."""
    own: Tensor
    """For the companion alone: it must not depend on the latents' graph."""


@dataclass
class Companion:
    """One such model in a run.

    `model(latents, features, draws)` gives `CompanionLosses` from latents [B, z, h, w] (sampled, in float32),
    the encoder's features (one [B, N, C] per layer) and the step's random draws (`StepDraws`).
    """

    name: str
    model: nn.Module
    weight: float
    """Of its loss in the tokenizer's."""
    optimizer: torch.optim.Optimizer
    guard: StepGuard

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]
