"""Guidance: the velocity of a class, pushed away from that of no class or of a weaker model.

v = other + scale (conditional - other). `other` is the same model's velocity for the null class
(classifier-free guidance, arXiv 2207.12598), or a second model's for the same class (AutoGuidance,
2406.02507). Only times in an interval are guided (2404.07724); outside it only the conditional velocity is
computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vfmvae.serialization import check_fields

if TYPE_CHECKING:
    from vfmvae.diffusion.transformer import DiffusionTransformer

_ROUNDING = 1e-9  # a time of the grid that is an end of the interval but for rounding is in it


@dataclass(frozen=True)
class Guidance:
    """How much is guided, when, and which channels."""

    scale: float = 1.0
    """1: none."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guided are steps that begin at these times, both ends included; 1 is noise."""
    channels: int | None = None
    """Only the first so many channels of the latents (LightningDiT: 3); None: all."""
    class_token_scale: float | None = None
    """For the class token of a model that has one (REG); None: the same scale."""

    def __post_init__(self) -> None:
        check_fields(self, "guidance")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"guidance.interval is {low} to {high}; it must rise and lie in [0, 1], where 1 is noise"
            )
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance.channels is {self.channels}; it must be at least 1")

    @property
    def token_scale(self) -> float:
        """The class token's scale."""
        return self.scale if self.class_token_scale is None else self.class_token_scale

    def guides(self, t: float) -> bool:
        """Whether a step that begins at t needs the other velocity."""
        low, high = self.interval
        return low - _ROUNDING <= t <= high + _ROUNDING and (self.scale != 1 or self.token_scale != 1)


class Velocities(NamedTuple):
    """Of latents [B, C, h, w], and of the class token [B, K] where the model has one."""

    latents: Tensor
    class_token: Tensor | None


GuidedVelocity = Callable[[Tensor, Tensor | None, float, float], Velocities]


def guided_velocity(
    model: DiffusionTransformer,
    labels: Tensor,
    null_label: int,
    guidance: Guidance,
    guide: DiffusionTransformer | None = None,
) -> GuidedVelocity:
    """A function (latents, class token, t, start) -> velocities; `start` decides whether it is guided.

    The null class goes through the model in the same pass, as the second half of a batch of 2 B.

    Args:
        labels: int64 [B].
        guide: a weaker model of the same latents, which takes the place of the null class.
    """
    nulls = torch.full_like(labels, null_label)

    def velocity(x: Tensor, token: Tensor | None, t: float, start: float) -> Velocities:
        if not guidance.guides(start):
            return _evaluate(model, x, token, t, labels)
        if guide is not None:
            conditional = _evaluate(model, x, token, t, labels)
            return _guided(conditional, _evaluate(guide, x, token, t, labels), guidance)
        twice = None if token is None else torch.cat([token, token])
        both = _evaluate(model, torch.cat([x, x]), twice, t, torch.cat([labels, nulls]))
        tokens = (None, None) if both.class_token is None else both.class_token.chunk(2)
        conditional, other = map(Velocities, both.latents.chunk(2), tokens)
        return _guided(conditional, other, guidance)

    return velocity


def _evaluate(
    model: DiffusionTransformer, x: Tensor, token: Tensor | None, t: float, labels: Tensor
) -> Velocities:
    """The model in its own dtype; times keep float32 at least."""
    dtype = model.dtype
    time = torch.full((len(x),), t, dtype=torch.promote_types(dtype, torch.float32), device=x.device)
    out = model(x.to(dtype), time, labels, None if token is None else token.to(dtype))
    return Velocities(out.velocity.double(), None if token is None else out.class_velocity.double())


def _guided(conditional: Velocities, other: Velocities, guidance: Guidance) -> Velocities:
    latents = other.latents + guidance.scale * (conditional.latents - other.latents)
    if guidance.channels is not None:
        latents = torch.cat(
            [latents[:, : guidance.channels], conditional.latents[:, guidance.channels :]], dim=1
        )
    if conditional.class_token is None or other.class_token is None:
        return Velocities(latents, conditional.class_token)
    token = other.class_token + guidance.token_scale * (conditional.class_token - other.class_token)
    return Velocities(latents, token)
