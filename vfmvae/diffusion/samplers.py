"""From noise to data along a velocity field: one function for each way to take the steps.

A state is a tensor [B, ...] of float64: with hundreds of small steps float32 would lose digits that the model
has. Times are Python floats that fall from 1 (noise) to 0 (data), see `time_grid`. What is integrated is

    velocity(x, t, start) -> dx/dt in any dtype, shaped as x

with `start` the time at which the step began, so that guidance is decided once for a whole step.

Sources: SiT (arXiv 2401.08740), REPA (2410.06940); Heun as in EDM (2206.00364).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vfmvae.diffusion.flow import shifted

Velocity = Callable[[Tensor, float, float], Tensor]

SDE_LAST = 0.04
"""Where the SDE's last step begins: the score grows without bound towards t = 0."""


def time_grid(steps: int, shift: float = 1.0, *, stochastic: bool = False) -> list[float]:
    """The times of `steps` steps, from 1 to 0: one more number than steps.

    Evenly spaced; for the SDE (`stochastic`) from 1 to 0.04, and then 0. Then t' = s t / (1 + (s - 1) t).
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    if stochastic and steps > 1:
        even = torch.linspace(1, SDE_LAST, steps, dtype=torch.float64)
        even = torch.cat([even, torch.zeros(1, dtype=torch.float64)])
    else:
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shifted(even, shift).tolist()


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Euler's method: an evaluation per step, error of first order."""
    x = x.double()
    for t, after in pairwise(times):
        x = x + (after - t) * velocity(x, t, t).double()
    return x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Heun's method: two evaluations per step, error of second order; the last step is Euler's.

    The last one would evaluate the model at t = 0, which training hardly sees.
    """
    x = x.double()
    for t, after in pairwise(times):
        slope = velocity(x, t, t).double()
        if after != times[-1]:
            predicted = x + (after - t) * slope
            slope = (slope + velocity(predicted, after, t).double()) / 2
        x = x + (after - t) * slope
    return x


def euler_maruyama(
    velocity: Velocity, x: Tensor, times: Sequence[float], noise: Callable[[int], Tensor]
) -> Tensor:
    """The reverse SDE of the linear path with w(t) = 2 t: the ODE's marginals, and fresh noise in every step.

    dx = (v - t score) dt + sqrt(2 t) dw, score = -((1 - t) v + x) / t. The last step takes no noise.

    Args:
        noise: the number of a step -> standard normal numbers shaped as x.
    """
    x = x.double()
    last = len(times) - 2
    for step, (t, after) in enumerate(pairwise(times)):
        v = velocity(x, t, t).double()
        score = -((1 - t) * v + x) / t
        x = x + (after - t) * (v - t * score)
        if step < last:
            x = x + (2 * t * (t - after)) ** 0.5 * noise(step).to(x)
    return x


def dopri5(
    velocity: Velocity, x: Tensor, stops: Sequence[float], *, rtol: float = 1e-3, atol: float = 1e-6
) -> Tensor:
    """Dormand and Prince's method of order 5 with steps of its own choice, by the package torchdiffeq.

    Steps follow the largest error of the batch, so give one sample where others must not matter.

    Args:
        stops: times from 1 to 0 where the velocity may jump, as guidance does at the ends of its interval;
            each piece is solved by itself, with the middle of the piece as the start of all of its steps.
        rtol, atol: of each step; defaults of SiT.

    Raises ImportError where torchdiffeq is not installed.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            "sampler 'dopri5' needs the package torchdiffeq: pip install 'vfmvae[sampling]'"
        ) from error
    x = x.double()
    for t, after in pairwise(stops):
        middle = (t + after) / 2

        def slope(time: Tensor, state: Tensor, start: float = middle) -> Tensor:
            return velocity(state, float(time), start).double()

        piece = torch.tensor([t, after], dtype=torch.float64, device=x.device)
        try:
            x = odeint(slope, x, piece, rtol=rtol, atol=atol, method="dopri5")[-1]
        except AssertionError as error:  # its steps became too small to count
            if velocity(x, t, middle).isfinite().all():
                raise ValueError(
                    f"sampler dopri5 cannot go on at t = {t:.3g}: {error}; take another, or larger tolerances"
                ) from None
            return torch.full_like(x, torch.nan)  # whoever asked names what is not finite
    return x
