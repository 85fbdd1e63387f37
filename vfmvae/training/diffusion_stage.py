"""What a stage of a diffusion run has: losses and their weights, the law of times, the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from vfmvae.diffusion.flow import Path, TimeConfig
from vfmvae.serialization import check_fields
from vfmvae.training.ema import EmaConfig
from vfmvae.training.optim import OptimizerConfig


@dataclass(frozen=True)
class DiffusionLosses:
    """Weights of the terms; one with weight 0 is not computed."""

    velocity: float = 1.0
    """Mean squared error of the velocity."""
    cosine: float = 0.0
    """Mean of 1 - cosine of the velocity over channels (LightningDiT)."""
    alignment: float = 0.0
    """Negative cosine of the projected tokens and a frozen encoder's (REPA; with a class token REG)."""
    class_token: float = 0.0
    """Mean squared error of the class token's velocity (REG)."""

    def __post_init__(self) -> None:
        check_fields(self, "losses")
        for field_ in fields(self):
            value = getattr(self, field_.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"losses.{field_.name} is {value}; weights must be finite and not negative")
        if not self.velocity and not self.cosine:
            raise ValueError("no loss asks for the velocity; give losses.velocity or losses.cosine a weight")

    def weights(self) -> dict[str, float]:
        """Those that are not 0, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: weight for name, weight in found.items() if weight}


@dataclass(frozen=True)
class DiffusionObjective:
    """How a diffusion model learns; the defaults are those of REG on VFM-VAE latents, without REG itself."""

    losses: DiffusionLosses = field(default_factory=DiffusionLosses)
    time: TimeConfig = field(default_factory=TimeConfig)
    path: Path = "linear"
    """Between latents and noise."""
    label_dropout: float = 0.1
    """Share of the labels that become the null class, for guidance."""
    standardise_features: bool = False
    """Targets of losses.alignment without their mean, and with unit deviation, over space (iREPA)."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(kind="adamw", learning_rate=2e-4, betas=(0.9, 0.95))
    )
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(half_life_of(0.9999, 1024), ramp_up=None))

    def __post_init__(self) -> None:
        check_fields(self, "")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout is {self.label_dropout}; it must lie in [0, 1]")
        if self.standardise_features and not self.losses.alignment:
            raise ValueError("standardise_features is about losses.alignment, whose weight is 0")


@dataclass(frozen=True)
class DiffusionStageConfig(DiffusionObjective):
    """One stage of a diffusion run."""

    name: str = "train"
    images: int = 102_400_000
    """Length of the stage, in images seen."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a stage needs a name")
        try:
            super().__post_init__()
        except ValueError as error:
            raise ValueError(f"stage {self.name!r}: {error}") from None
        if self.images < 1:
            raise ValueError(f"stage {self.name!r}: images is {self.images}; it must be at least 1")


def half_life_of(decay: float, batch_size: int) -> float:
    """Images until a weight counts half in an average that keeps `decay` of itself with every batch."""
    return batch_size * math.log(0.5) / math.log(decay)
