"""Path, velocity and time laws against their formulas, worked out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from vfmvae.diffusion.flow import (
    Path,
    TimeConfig,
    dimension_shift,
    path_point,
    shifted,
    times,
)
from vfmvae.serialization import from_dict


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_path_goes_from_data_to_noise(path: Path) -> None:
    data, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(path_point(data, noise, torch.zeros(2), path).x, data)
    torch.testing.assert_close(path_point(data, noise, torch.ones(2), path).x, noise)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_velocity_is_the_derivative_by_time(path: Path) -> None:
    data, noise = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    t, step = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 1e-5
    after, before = (path_point(data, noise, t + d, path).x for d in (step, -step))
    torch.testing.assert_close(path_point(data, noise, t, path).velocity, (after - before) / (2 * step))


def test_the_linear_path_by_hand() -> None:
    point = path_point(torch.tensor([[2.0], [4.0]]), torch.tensor([[6.0], [0.0]]), torch.tensor([0.25, 0.5]))
    assert point.x.tolist() == [[3.0], [2.0]] and point.velocity.tolist() == [[4.0], [-4.0]]


def test_cosine_keeps_the_variance_of_unit_data() -> None:
    # alpha^2 + sigma^2 = 1: of orthogonal unit vectors the length stays 1.
    data, noise = torch.tensor([[1.0, 0.0]] * 5), torch.tensor([[0.0, 1.0]] * 5)
    assert torch.allclose(
        path_point(data, noise, torch.linspace(0, 1, 5), "cosine").x.norm(dim=1), torch.ones(5)
    )


def test_sixteen_bits_are_widened() -> None:
    data, noise = (
        torch.full((1, 1), 256.0, dtype=torch.bfloat16),
        torch.full((1, 1), 1.0, dtype=torch.bfloat16),
    )
    point = path_point(data, noise, torch.tensor([0.0]))
    assert point.velocity.dtype == torch.float32 and point.velocity.item() == -255.0  # no bfloat16 number


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4), (2,)), ((2, 3), (2, 3), (1,)), ((2, 3), (2, 3), (2, 1))])
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        path_point(*(torch.zeros(shape) for shape in shapes))


def numbers(kind: str, count: int = 20_000) -> Tensor:
    rng = np.random.default_rng(0)
    drawn = rng.random(count) if kind == "uniform" else rng.standard_normal(count)
    return torch.from_numpy(drawn.astype(np.float32))


@pytest.mark.parametrize("law", ["uniform", "lognormal", "logit-normal"])
def test_times_have_the_law_they_are_named_for(law: str) -> None:
    config = from_dict(TimeConfig, {"law": law}, "test")
    t = times(config, numbers(config.draws), 4096).double().numpy()
    if law == "uniform":
        found, law_of = t, stats.uniform()
    elif law == "lognormal":
        found, law_of = t / (1 - t), stats.lognorm(s=1)
    else:
        found, law_of = np.log(t / (1 - t)), stats.norm()
    assert stats.kstest(found, law_of.cdf).pvalue > 0.01


def test_extreme_draws_stay_in_the_interval() -> None:
    t = times(TimeConfig("lognormal", shift=4.0), torch.tensor([-200.0, -9.0, 9.0, 200.0]), 1)
    assert t[0] == 0 and t[-1] == 1 and t.isfinite().all() and (t.diff() > 0).all()


def test_the_shift_is_the_formula_and_scales_noise_to_signal() -> None:
    t = torch.tensor([0.2, 0.5, 0.75], dtype=torch.float64)
    moved = shifted(t, 3.0)
    torch.testing.assert_close(moved, 3 * t / (1 + 2 * t))
    torch.testing.assert_close(moved / (1 - moved), 3 * t / (1 - t))
    assert shifted(torch.tensor([0.0, 1.0]), 3.0).tolist() == [0.0, 1.0]
    torch.testing.assert_close(shifted(moved, 1 / 3), t)


def test_the_dimension_shift() -> None:
    assert dimension_shift(4096) == 1 and dimension_shift(16 * 16 * 768) == pytest.approx(math.sqrt(48))
    t = times(TimeConfig(dimension_shift=True), torch.tensor([0.5]), 4 * 4096)
    assert t.item() == pytest.approx(2 * 0.5 / 1.5)
    assert times(TimeConfig(shift=2.0), torch.tensor([0.5]), 123).item() == pytest.approx(2 * 0.5 / 1.5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"law": "normal"}, "time.law is"),
        ({"shift": 0.0}, "time.shift is 0.0; it must be above 0"),
        ({"shift": -1.0}, "time.shift is -1.0"),
        ({"shift": math.inf}, "a finite number"),
        ({"shift": 2.0, "dimension_shift": True}, "give one of them"),
    ],
)
def test_values_that_no_config_can_have(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TimeConfig(**given)  # type: ignore[arg-type]
