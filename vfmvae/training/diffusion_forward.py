"""One forward of diffusion training: noise onto latents, the model, its losses; which DDP and FSDP2 wrap.

Shapes: latents [B, C, h, w], normalised; features [B, N, D] patch tokens; class token [B, D].
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae.diffusion.flow import path_point, times
from vfmvae.diffusion.transformer import DiffusionTransformer, TransformerOutput
from vfmvae.losses.diffusion import cosine_loss, standardise_tokens, token_alignment_loss, velocity_loss
from vfmvae.training.diffusion_stage import DiffusionObjective
from vfmvae.training.draws import StepDraws


class DiffusionInputs(NamedTuple):
    """What a step learns from, in float32."""

    latents: Tensor  # [B, C, h, w], of mean 0 and deviation 1 per channel
    labels: Tensor  # int64 [B]; the number of classes is the null class
    features: Tensor | None = None  # [B, N, D] a frozen encoder's patch tokens
    class_token: Tensor | None = None  # [B, D]


class Noised(NamedTuple):
    """Inputs on their way to noise, and the velocities there."""

    x: Tensor
    t: Tensor
    labels: Tensor  # some of them dropped
    velocity: Tensor
    class_token: Tensor | None
    class_velocity: Tensor | None


def noised(inputs: DiffusionInputs, stage: DiffusionObjective, draws: StepDraws, null: int) -> Noised:
    """Draws times, noise and dropped labels, always in this order and number, and mixes."""
    shape = inputs.latents.shape[1:]
    numbers = draws.uniform(()) if stage.time.draws == "uniform" else draws.normal(())
    t = times(stage.time, numbers, shape.numel())
    x, velocity = path_point(inputs.latents, draws.normal(shape), t, stage.path)
    dropped = draws.uniform(()) < stage.label_dropout
    labels = torch.where(dropped, null, inputs.labels)
    if inputs.class_token is None:
        return Noised(x, t, labels, velocity, None, None)
    noise = draws.normal(inputs.class_token.shape[1:])
    token, class_velocity = path_point(inputs.class_token, noise, t, stage.path)
    return Noised(x, t, labels, velocity, token, class_velocity)


class DiffusionForward(nn.Module):
    """A diffusion transformer with the losses of a stage."""

    def __init__(self, model: DiffusionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: DiffusionInputs, stage: DiffusionObjective, draws: StepDraws, terms: Collection[str]
    ) -> dict[str, Tensor]:
        """The losses of these terms by name, unweighted scalars in float32."""
        at = noised(inputs, stage, draws, self.model.config.classes)
        out = self.model(at.x, at.t, at.labels, at.class_token)
        return losses(
            out, at, alignment_target(inputs, self.model, stage) if "alignment" in terms else None, terms
        )


def losses(
    out: TransformerOutput, at: Noised, target: Tensor | None, terms: Collection[str]
) -> dict[str, Tensor]:
    """The terms of what a model gives at noised inputs."""
    found = {}
    if "velocity" in terms:
        found["velocity"] = velocity_loss(out.velocity, at.velocity)
    if "cosine" in terms:
        found["cosine"] = cosine_loss(out.velocity, at.velocity)
    if target is not None:
        found["alignment"] = alignment_loss(out.projected, target)
    if "class_token" in terms:
        assert out.class_velocity is not None and at.class_velocity is not None
        found["class_token"] = velocity_loss(out.class_velocity, at.class_velocity)
    return found


def alignment_loss(projected: list[Tensor], target: Tensor) -> Tensor:
    """Mean over the projectors; they differ in their initial values, and agree on the target."""
    return torch.stack([token_alignment_loss(p, target) for p in projected]).mean()


def alignment_target(
    inputs: DiffusionInputs, model: DiffusionTransformer, stage: DiffusionObjective
) -> Tensor:
    """The encoder's tokens [B, N, D] as the model has its own: pooled onto its grid, the class token first.

    ValueError where the encoder's grid is no multiple of the model's.
    """
    assert inputs.features is not None
    target = pooled_tokens(inputs.features, model.config.grid)
    if stage.standardise_features:
        target = standardise_tokens(target)
    if model.config.class_token_width is None:
        return target
    assert inputs.class_token is not None
    return torch.cat([inputs.class_token[:, None], target], dim=1)


def pooled_tokens(features: Tensor, side: int) -> Tensor:
    """Tokens of a square grid [B, n*n, D] -> their means over the cells of a coarser one [B, side^2, D]."""
    n = round(features.shape[1] ** 0.5)
    if n * n != features.shape[1] or n % side:
        raise ValueError(
            f"the encoder's {features.shape[1]} tokens cannot be compared with the model's {side} x {side}:"
            f" needed is a square grid of a multiple of {side}; choose another encoder.scale_factor or"
            f" diffusion.patch"
        )
    if n == side:
        return features
    image = features.transpose(1, 2).unflatten(2, (n, n))
    return F.avg_pool2d(image, n // side).flatten(2).transpose(1, 2)
