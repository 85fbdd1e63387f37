"""The path from data to noise, its velocity, and the law of the times that training sees.

t = 1 is noise, t = 0 is data. Nothing here draws: random numbers come in as tensors on their device.

Sources: SiT (arXiv 2401.08740) for the paths and laws, RAE (arXiv 2510.11690) for the dimension shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vfmvae.serialization import check_fields

Path = Literal["linear", "cosine"]
Law = Literal["uniform", "lognormal", "logit-normal"]

DIMENSION_BASE = 4096
"""Latent elements at which the dimension shift changes nothing."""


_LAWS: dict[Law, Callable[[Tensor], Tensor]] = {
    "uniform": lambda uniform: uniform,
    "lognormal": torch.sigmoid,  # sigma / (1 + sigma) with sigma = exp(normal), without exp's overflow
    "logit-normal": torch.sigmoid,
}


@dataclass(frozen=True)
class TimeConfig:
    """Which times training sees, and whether they are moved towards noise."""

    law: Law = "uniform"
    """uniform in [0, 1); lognormal: noise to signal is exp(N(0, 1)); logit-normal: the logit of t is N(0, 1).
    On the linear path the last two are the same numbers under the names of two papers."""
    shift: float | None = None
    """s of t' = s t / (1 + (s - 1) t), above 1 towards noise; None: no shift."""
    dimension_shift: bool = False
    """The same with s = sqrt(latent elements / 4096)."""

    def __post_init__(self) -> None:
        check_fields(self, "time")
        if self.shift is not None:
            if self.dimension_shift:
                raise ValueError(
                    f"time.shift is {self.shift} and time.dimension_shift is on; give one of them"
                )
            check_shift(self.shift, "time.shift")

    @property
    def draws(self) -> Literal["uniform", "normal"]:
        """Which numbers `times` needs: uniform ones in [0, 1), or standard normal ones."""
        return "uniform" if self.law == "uniform" else "normal"

    def shift_for(self, elements: int) -> float:
        """The shift for latents of so many elements; 1 is none. For training and the sampling grid alike."""
        if self.dimension_shift:
            return dimension_shift(elements)
        return 1.0 if self.shift is None else self.shift


def times(config: TimeConfig, draws: Tensor, elements: int) -> Tensor:
    """Times in [0, 1], float32, from random numbers of the kind `config.draws`.

    Args:
        draws: [B], on any device.
        elements: of one latent, C * h * w; read by the dimension shift only.
    """
    t = _LAWS[config.law](draws.float())
    shift = config.shift_for(elements)
    return t if shift == 1 else shifted(t, shift)


def shifted(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t), which keeps 0 and 1; above 1 it moves times towards noise."""
    return shift * t / (1 + (shift - 1) * t)


def dimension_shift(elements: int) -> float:
    """sqrt(elements / 4096): the more numbers a latent has, the more noise hides as much of it."""
    return math.sqrt(elements / DIMENSION_BASE)


def check_shift(shift: float, name: str) -> None:
    """ValueError unless it is a finite number above 0."""
    if not 0 < shift < math.inf:
        raise ValueError(f"{name} is {shift}; it must be above 0 and finite, and 1 shifts nothing")


class PathPoint(NamedTuple):
    """Where a path is at a time, and how fast it moves there, both shaped as the data."""

    x: Tensor
    velocity: Tensor


def path_point(data: Tensor, noise: Tensor, t: Tensor, path: Path = "linear") -> PathPoint:
    """x_t = alpha(t) data + sigma(t) noise, and its derivative by t, which a model learns.

    linear: alpha = 1 - t, sigma = t, so the velocity is noise - data.
    cosine: alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Args:
        data, noise: [B, ...] of one shape: latents [B, C, h, w] or class tokens [B, D].
        t: [B], 1 is noise.

    Returns float32, or float64 if an input is.

    Raises ValueError for shapes that do not fit.
    """
    if data.shape != noise.shape or t.shape != data.shape[:1]:
        raise ValueError(
            f"data {tuple(data.shape)}, noise {tuple(noise.shape)} and t {tuple(t.shape)} do not fit:"
            f" needed are [B, ...], the same, and [B]"
        )
    dtype = torch.promote_types(torch.promote_types(data.dtype, noise.dtype), torch.float32)
    data, noise, t = data.to(dtype), noise.to(dtype), t.to(dtype).view(-1, *[1] * (data.ndim - 1))
    if path == "linear":
        return PathPoint((1 - t) * data + t * noise, noise - data)
    alpha, sigma = (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()
    return PathPoint(alpha * data + sigma * noise, math.pi / 2 * (alpha * noise - sigma * data))
