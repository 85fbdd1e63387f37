"""A diffusion transformer that trains along with a tokenizer, end to end (REPA-E, arXiv 2504.10483).

The tokenizer learns from how well the transformer's first blocks, which hold still meanwhile, align its
latents with the frozen encoder. The transformer learns from the same latents without their graph. Its
velocity loss must not reach the tokenizer: latents that are easy to denoise are latents that say nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vfmvae.diffusion import DiffusionTransformer, TransformerConfig
from vfmvae.encoders import Features
from vfmvae.training.companion import CompanionLosses
from vfmvae.training.diffusion_forward import (
    DiffusionInputs,
    alignment_loss,
    alignment_target,
    losses,
    noised,
)
from vfmvae.training.diffusion_stage import DiffusionLosses, DiffusionObjective
from vfmvae.training.distributed import mean_over_ranks, world_size
from vfmvae.training.draws import StepDraws
from vfmvae.training.optim import OptimizerConfig
from vfmvae.training.regions import keeping_graphs

NAME = "diffusion"
"""Of the companion, and of the folder below the run's that its model is saved in."""


@dataclass(frozen=True)
class JointConfig(DiffusionObjective):
    """A diffusion transformer in a tokenizer's run."""

    losses: DiffusionLosses = field(default_factory=lambda: DiffusionLosses(alignment=0.5))
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(kind="adamw", betas=(0.9, 0.999))
    )
    model: TransformerConfig = field(default_factory=TransformerConfig)
    weight: float = 1.5
    """Of the alignment that is read through the model, in the tokenizer's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.weight < math.inf:
            raise ValueError(f"joint.weight is {self.weight}; it must be above 0 and finite")
        if not self.losses.alignment:
            raise ValueError(
                "joint.losses.alignment is 0, so the projectors that the tokenizer is judged through would"
                " not learn; give it a weight"
            )
        if not self.model.alignment_widths:
            raise ValueError(
                "joint.model has no projector that the tokenizer's alignment could be read through; give"
                " joint.model.alignment_widths the width of the encoder"
            )
        if bool(self.losses.class_token) != (self.model.class_token_width is not None):
            has = "no" if self.model.class_token_width is None else "a"
            raise ValueError(
                f"joint.losses.class_token is {self.losses.class_token:g}, and the model has {has} class"
                f" token (joint.model.class_token_width); these go together"
            )


def check_width(model: TransformerConfig, width: int) -> None:
    """ValueError where a model cannot be compared with an encoder of that width."""
    of_token = model.class_token_width
    if any(w != width for w in model.alignment_widths) or of_token not in (None, width):
        token = "" if of_token is None else f", joint.model.class_token_width {of_token}"
        raise ValueError(
            f"the encoder's features are {width} wide, and joint.model.alignment_widths is"
            f" {model.alignment_widths}{token}; make them equal"
        )


def check_classes(model: TransformerConfig, classes: int, data: str) -> None:
    """ValueError where a label of `data` would be no class of the model."""
    if classes > model.classes:
        raise ValueError(
            f"{data} has {classes} classes, and joint.model.classes is {model.classes}; give it at least as"
            f" many"
        )


class LatentNorm(nn.Module):
    """Batch normalisation of latents [B, C, h, w] without affine, over all processes together.

    Its running statistics are the latents' statistics. Momentum 0.1 and eps 1e-4 as published.
    """

    EPS = 1e-4
    MOMENTUM = 0.1

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    @property
    def std(self) -> Tensor:
        """What latents are divided by."""
        return (self.variance + self.EPS).sqrt()

    def forward(self, latents: Tensor) -> Tensor:
        """By the running statistics, which stay as they are; gradients pass."""
        return (latents - self.mean[:, None, None]) / self.std[:, None, None]

    @torch.no_grad()
    def of_batch(self, latents: Tensor) -> Tensor:
        """By the statistics of this batch, which move the running ones; without a graph."""
        mean, variance = self._statistics(latents)
        count = latents[:, 0].numel() * world_size()
        self.mean.lerp_(mean, self.MOMENTUM)
        self.variance.lerp_(variance * (count / max(count - 1, 1)), self.MOMENTUM)
        return (latents - mean[:, None, None]) / (variance + self.EPS).sqrt()[:, None, None]

    @torch.no_grad()
    def begin(self, latents: Tensor) -> None:
        """Take the statistics of these latents as the running ones."""
        mean, variance = self._statistics(latents)
        self.mean.copy_(mean)
        self.variance.copy_(variance)

    @staticmethod
    def _statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance per channel, over all processes."""
        values = latents.float()
        mean = values.mean(dim=(0, 2, 3))
        mean_over_ranks(mean)
        # Of what is left: squares of a large mean would cancel.
        variance = (values - mean[:, None, None]).square().mean(dim=(0, 2, 3))
        mean_over_ranks(variance)
        return mean, variance


class JointDiffusion(nn.Module):
    """The companion of a tokenizer; see vfmvae.training.companion for what is asked of it."""

    def __init__(
        self, config: JointConfig, layer: int, width: int, fused: bool, dtype: torch.dtype | None
    ) -> None:
        """Args:
        layer: which of the encoder's features are aligned with, by their place in the list.
        width: of the encoder; ValueError unless the model's projectors and class token have it.
        """
        super().__init__()
        check_width(config.model, width)
        self.config = config
        self.layer = layer
        self.transformer = DiffusionTransformer(config.model, fused)
        self.transformer.compute_dtype = dtype
        self.norm = LatentNorm(config.model.channels)
        self.terms = config.losses.weights()

    def forward(
        self, latents: Tensor, encoded: Features, draws: StepDraws, labels: Tensor | None
    ) -> CompanionLosses:
        null = self.config.model.classes
        labels = torch.full_like(draws.uniform(()), null, dtype=torch.int64) if labels is None else labels
        labels = torch.where(labels < 0, null, labels)
        class_token = None if self.config.model.class_token_width is None else encoded.pooled
        inputs = DiffusionInputs(self.norm(latents), labels, encoded.layers[self.layer], class_token)
        target = alignment_target(inputs, self.transformer, self.config)

        with holding_still(self.transformer):
            # The same draws as below; in eval mode, as published, no label is dropped.
            at = noised(inputs, replace(self.config, label_dropout=0.0), copy.copy(draws), null)
            projected = self.transformer.project(at.x, at.t, at.labels, at.class_token)
        of_latents = alignment_loss(projected, target)

        batch = self.norm.of_batch(latents.detach())
        at = noised(inputs._replace(latents=batch), self.config, draws, null)
        out = self.transformer(at.x, at.t, at.labels, at.class_token)
        found = losses(out, at, target if "alignment" in self.terms else None, self.terms)
        own = torch.stack([weight * found[name] for name, weight in self.terms.items()]).sum()
        measures = {f"{NAME}_{name}": loss.detach() for name, loss in found.items()}
        return CompanionLosses(of_latents, own, {**measures, **latents_measures(latents)})

    def take_statistics(self) -> None:
        """Put the running statistics into the transformer, for a file."""
        self.transformer.latents_mean.copy_(self.norm.mean)
        self.transformer.latents_std.copy_(self.norm.std)


@contextmanager
def holding_still(model: DiffusionTransformer) -> Iterator[None]:
    """While entered, what the model computes has a graph to its inputs, and none to its parameters.

    Blocks keep their graphs, whatever the engine says: computed again in the backward pass, they would have
    graphs to their parameters.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        with keeping_graphs(model.blocks):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


VARIANCE, VARIATION = "latents_variance", "latents_total_variation"


@torch.no_grad()
def latents_measures(latents: Tensor) -> dict[str, Tensor]:
    """Mean over channels of the latents' variance, and mean over images of their total variation.

    Both fall where latents collapse. Published for REPA-E: variance 18.02 and total variation 5516 with the
    gradient stopped, 0.02 and 89.8 without.
    """
    values = latents.float()
    variance = values.var(dim=(0, 2, 3), correction=0).mean()
    steps = values.diff(dim=2).abs().sum(dim=(1, 2, 3)) + values.diff(dim=3).abs().sum(dim=(1, 2, 3))
    return {VARIANCE: variance, VARIATION: steps.mean()}


class CollapseAlarm:
    """Watches the two measures, against the most that they have been: a tokenizer that begins with random
    weights has little of both at first.
    """

    WARN, STOP = 0.1, 0.01
    """Shares of the most."""

    def __init__(self, most: dict[str, float]) -> None:
        """`most`: the highest values so far, kept up here; the caller stores it."""
        self.most = most
        self._warned: set[str] = set()

    def check(self, means: dict[str, float]) -> list[str]:
        """Warnings of an interval's means; FloatingPointError where there is nothing left to train on."""
        found = []
        for name in (VARIANCE, VARIATION):
            value = means.get(name, math.nan)
            most = self.most[name] = max(self.most.get(name, 0.0), value if math.isfinite(value) else 0.0)
            if not math.isfinite(value) or most == 0:
                continue
            share = value / most
            sentence = f"{name} is {value:.3g}, {share:.2%} of the {most:.3g} it was at most"
            if share < self.STOP:
                raise FloatingPointError(
                    f"the latents have collapsed: {sentence}; lower joint.weight, or raise the weights of the"
                    f" image losses, and start from an earlier checkpoint"
                )
            if share < self.WARN and name not in self._warned:
                found.append(f"warning: the latents are collapsing: {sentence}")
                self._warned.add(name)
        return found
