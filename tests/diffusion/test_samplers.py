"""The steps against closed forms: orders of convergence, marginals of the SDE, the grids of times."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.diffusion.exact import gaussian_solution, gaussian_velocity
from vfmvae.diffusion.samplers import dopri5, euler, euler_maruyama, heun, time_grid

MEAN, STD = torch.tensor(1.5, dtype=torch.float64), 0.3


def velocity(x: Tensor, t: float, start: float) -> Tensor:
    return gaussian_velocity(x, torch.tensor(t, dtype=torch.float64), MEAN, STD)


def noise_of(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(count))


@pytest.mark.parametrize(("method", "order"), [(euler, 1), (heun, 2)])
def test_orders_of_convergence(method: Callable[..., Tensor], order: int) -> None:
    noise = noise_of(100)
    truth = gaussian_solution(noise, MEAN, STD)
    errors = [(method(velocity, noise, time_grid(steps)) - truth).abs().max() for steps in (200, 400, 800)]
    observed = [float(torch.log2(coarse / fine)) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert observed == pytest.approx([order, order], abs=0.15), observed
    assert errors[-1] < (5e-3 if order == 1 else 5e-5)


def test_a_shifted_grid_converges_to_the_same() -> None:
    noise = noise_of(50)
    found = heun(velocity, noise, time_grid(400, shift=1 / 0.3))
    torch.testing.assert_close(found, gaussian_solution(noise, MEAN, STD), atol=1e-3, rtol=0)


def test_heuns_last_step_is_eulers_and_steps_know_their_start() -> None:
    asked: list[tuple[float, float]] = []

    def seen(x: Tensor, t: float, start: float) -> Tensor:
        asked.append((t, start))
        return torch.ones_like(x)

    found = heun(seen, torch.zeros(1), [1.0, 0.5, 0.0])
    assert asked == [(1.0, 1.0), (0.5, 1.0), (0.5, 0.5)]
    assert found.dtype == torch.float64 and found.item() == -1.0


def test_the_state_keeps_float64_whatever_the_velocity_has() -> None:
    def coarse(x: Tensor, t: float, start: float) -> Tensor:
        return torch.full_like(x, 2**-30, dtype=torch.bfloat16)

    for method in (euler, heun):
        assert method(coarse, torch.ones(1), time_grid(8)).item() == 1 - 2**-30


def test_grids() -> None:
    assert time_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert time_grid(4, stochastic=True) == pytest.approx([1.0, 0.68, 0.36, 0.04, 0.0])
    assert time_grid(2, shift=3.0) == pytest.approx([1.0, 0.75, 0.0])
    assert time_grid(1, stochastic=True) == [1.0, 0.0]
    assert len(time_grid(250, stochastic=True)) == 251
    with pytest.raises(ValueError, match="steps is 0"):
        time_grid(0)


def test_lightningdits_grid_in_our_time() -> None:
    # Published: 250 points, shift 0.3 in the time whose 1 is data: t' = s t / (1 + (s - 1) t).
    theirs = np.linspace(0, 1, 250)
    theirs = 0.3 * theirs / (1 + (0.3 - 1) * theirs)
    assert time_grid(249, shift=1 / 0.3) == pytest.approx((1 - theirs).tolist(), abs=1e-12)


def test_the_sde_has_the_marginals_of_the_data() -> None:
    noise = noise_of(40_000)

    def fresh(step: int) -> Tensor:
        return noise_of(40_000, seed=step + 1)

    found = euler_maruyama(velocity, noise, time_grid(250, stochastic=True), fresh)
    # The last step lacks noise and the others are of first order, so the spread is a little off.
    assert found.mean().item() == pytest.approx(1.5, abs=0.01)
    assert found.std().item() == pytest.approx(STD, rel=0.05)
    ended_before = gaussian_solution(noise, MEAN, STD)
    assert np.corrcoef(found, ended_before)[0, 1] < 0.5, "the noise of the start is forgotten in part"


def test_a_step_of_the_sde_by_hand() -> None:
    def one(x: Tensor, t: float, start: float) -> Tensor:
        return torch.ones_like(x)

    # t 1 -> 0.5: score -(0 + 2), drift 1 + 2; noise sqrt(2 * 1 * 0.5) * 4. Then 0.5 -> 0 without noise:
    # x = 2 - 1.5 + 4 = 4.5, score -(0.5 + 4.5) / 0.5 = -10, drift 1 + 5.
    found = euler_maruyama(one, torch.full((1,), 2.0), [1.0, 0.5, 0.0], lambda step: torch.full((1,), 4.0))
    assert found.item() == pytest.approx(4.5 - 0.5 * 6)


def test_dopri5_is_exact_to_its_tolerance() -> None:
    pytest.importorskip("torchdiffeq")
    noise = noise_of(20)
    found = dopri5(velocity, noise, [1.0, 0.0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, gaussian_solution(noise, MEAN, STD), atol=1e-7, rtol=0)


def test_dopri5_solves_pieces_apart() -> None:
    pytest.importorskip("torchdiffeq")
    starts = set()

    def jump(x: Tensor, t: float, start: float) -> Tensor:
        starts.add(start)
        return torch.full_like(x, 3.0 if start > 0.4 else 1.0)

    assert dopri5(jump, torch.zeros(1), [1.0, 0.4, 0.0]).item() == pytest.approx(-(0.6 * 3 + 0.4))
    assert starts == {0.7, 0.2}


def test_dopri5_whose_steps_become_too_small() -> None:
    pytest.importorskip("torchdiffeq")

    def broken(x: Tensor, t: float, start: float) -> Tensor:
        return torch.full_like(x, torch.nan)

    def steep(x: Tensor, t: float, start: float) -> Tensor:
        return -1e6 * x.sign() * (x.abs() + 1) ** 2  # infinite before its end

    assert dopri5(broken, torch.zeros(2), [1.0, 0.0]).isnan().all()
    with pytest.raises(ValueError, match="sampler dopri5 cannot go on at t = 1: underflow in dt"):
        dopri5(steep, torch.ones(2), [1.0, 0.0])


def test_dopri5_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name == "torchdiffeq":
            raise ImportError("No module named 'torchdiffeq'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'vfmvae\[sampling\]'"):
        dopri5(velocity, torch.zeros(1), [1.0, 0.0])
