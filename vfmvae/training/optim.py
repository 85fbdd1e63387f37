"""The optimizer's configuration and its learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam; its rate follows the share of the run that is done."""

    learning_rate: float = 1e-4
    """The highest rate of the run."""
    betas: tuple[float, float] = (0.0, 0.99)
    """Decay of the running means of the gradient and of its square."""
    warmup: float = 0.0
    """Share of the run over which the rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The rate after the warmup: constant, or half a cosine down to 0."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"optimizer.learning_rate is {self.learning_rate}; it must be above 0 and finite"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}; both must lie in [0, 1)")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optimizer.warmup is {self.warmup}; it must lie in [0, 1)")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"optimizer.schedule is {self.schedule!r}; it must be 'constant' or 'cosine'")


def learning_rate(config: OptimizerConfig, progress: float) -> float:
    """The rate at `progress` in [0, 1] of the run: a linear rise, then constant or half a cosine to 0."""
    if progress < config.warmup:
        return config.learning_rate * progress / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    after_warmup = (progress - config.warmup) / (1 - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * after_warmup))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for every parameter from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
