"""Another model that trains along with a tokenizer, and through which it is judged.

End-to-end training (REPA-E, arXiv 2504.10483) asks a diffusion transformer how well it can read the latents:
its alignment loss reaches the tokenizer, its diffusion loss only itself. The engine knows of such a model
what this module says, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vfmvae.encoders import Features
from vfmvae.losses.schedule import WeightSchedule
from vfmvae.training.draws import StepDraws
from vfmvae.training.ema import EMA, EmaConfig
from vfmvae.training.forward import StepOutput
from vfmvae.training.guard import BufferGuard, StepGuard
from vfmvae.training.optim import OptimizerConfig, learning_rate, set_learning_rate

NO_AVERAGE = EmaConfig(half_life_images=0)


class CompanionLosses(NamedTuple):
    """Scalars from one forward of a companion."""

    of_latents: Tensor
    """Differentiated to the latents too, with the companion's weight."""
    own: Tensor
    """For the companion alone: it must not depend on the latents' graph."""
    measures: Mapping[str, Tensor] = MappingProxyType({})
    """What the log shows beside them, without a graph."""


@dataclass
class Companion:
    """One such model in a run.

    `model(latents, encoded, draws, labels)` gives `CompanionLosses` from latents [B, z, h, w] (sampled, in
    float32), what the encoder says of the images (`Features`, without a graph), the step's random draws
    (`StepDraws`) and the images' labels (int64 [B], -1 for none; None where batches have none). With
    engine.graphs its Python runs in the first two steps of a kind only: what changes from step to step must
    come from tensors and `draws.normal` and the like, not from plain numbers, counters or `draws.decisions`.
    It learns from weight * of_latents + own, the tokenizer from weight * of_latents. Where the weight is 0
    the latents have no graph, and the companion learns from its own loss.
    """

    name: str
    model: nn.Module
    """Wrapped for the run's processes."""
    weight: float
    """Of its loss in the tokenizer's."""
    schedule: WeightSchedule
    """A factor of the weight, by the images of the run."""
    rate: OptimizerConfig
    """Whose learning rate is followed over the whole run, across its stages."""
    optimizer: torch.optim.Optimizer
    guard: StepGuard
    average: EMA
    buffers: BufferGuard
    ema: EmaConfig = NO_AVERAGE
    _checked: bool = field(default=False, init=False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def weight_at(self, seen_images: int) -> float:
        """The weight after so many images of the run."""
        return self.weight * self.schedule.factor(seen_images)

    def follow(self, progress: float) -> float:
        """Take the learning rate at `progress` in [0, 1] of the run, and return it."""
        rate = learning_rate(self.rate, progress)
        set_learning_rate(self.optimizer, rate)
        return rate

    def backward(
        self,
        output: StepOutput,
        draws: StepDraws,
        labels: Tensor | None,
        weight: float | Tensor | None,
        scale: Tensor,
    ) -> dict[str, Tensor]:
        """Backward of one part's losses times `scale`, to the companion and to `output.leaf`; returns them.

        ValueError, in the first step that can tell, if its own loss depends on the latents' graph.
        """
        latents = output.leaf.detach() if weight is None else output.leaf
        layers, grid, pooled = output.encoded
        # With a trained encoder these have a graph.
        encoded = Features([layer.detach() for layer in layers], grid, pooled.detach())
        found = self.model(latents, encoded, draws, labels)
        if latents.requires_grad and not self._checked:
            self._check(found.own, latents)
        # Without a weight too: every parameter gets a gradient, which DDP waits for.
        (scale * ((0.0 if weight is None else weight) * found.of_latents + found.own)).backward()
        return {self.name: found.of_latents, f"{self.name}_own": found.own, **found.measures}

    def _check(self, own: Tensor, latents: Tensor) -> None:
        (reached,) = torch.autograd.grad(own, latents, retain_graph=True, allow_unused=True)
        if reached is not None:
            raise ValueError(
                f"companion {self.name!r}: its own loss depends on the latents' graph, so it would train the"
                f" tokenizer too; compute it from latents.detach()"
            )
        self._checked = True


def check_new(
    name: str, model: nn.Module, weight: float, taken: Collection[str], there: Sequence[Companion]
) -> None:
    """ValueError unless a companion of this name and weight can be added.

    `taken`: names of the run's parts and of what its log reports. `there`: companions that it has already.
    """
    if not name.isidentifier():
        raise ValueError(
            f"companion {name!r}: a name in checkpoints and metrics needs letters, digits and '_'"
        )
    taken = {*taken, *(part for c in there for part in (c.name, f"{c.name}_own"))}
    both = sorted({name, f"{name}_own"} & taken)
    if both:
        raise ValueError(f"companion {name!r}: the name {both[0]!r} is taken in this run; choose another one")
    if any(model in c.model.modules() for c in there):
        raise ValueError(f"companion {name!r}: its model trains in this run already")
    if not 0 <= weight < math.inf:
        raise ValueError(f"companion {name!r}: weight is {weight}; it must be finite and not negative")
