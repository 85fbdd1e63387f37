"""Weight schedules against their closed form."""

from __future__ import annotations

import pytest

from vfmvae.losses.schedule import WeightSchedule


def test_without_limits_a_weight_counts_always() -> None:
    assert [WeightSchedule().factor(seen) for seen in (0, 1, 10**9)] == [1.0, 1.0, 1.0]


def test_it_rises_linearly_and_ends_at_once() -> None:
    schedule = WeightSchedule(start=1000, end=5000, ramp=400)
    seen = (0, 999, 1000, 1100, 1300, 1399, 1400, 4999, 5000, 10**9)
    assert [schedule.factor(s) for s in seen] == [0, 0, 0, 0.25, 0.75, 0.9975, 1, 1, 0, 0]


def test_without_a_ramp_it_starts_at_full_strength() -> None:
    schedule = WeightSchedule(start=1000)
    assert [schedule.factor(s) for s in (999, 1000)] == [0.0, 1.0]


def test_a_ramp_longer_than_the_schedule_never_gets_to_one() -> None:
    schedule = WeightSchedule(end=100, ramp=200)
    assert [schedule.factor(s) for s in (50, 99, 100)] == [0.25, 0.495, 0.0]


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="end 5 must lie after start 5"):
        WeightSchedule(start=5, end=5)
    for wrong in ({"start": -1}, {"ramp": -1}):
        with pytest.raises(ValueError, match="must not be negative"):
            WeightSchedule(**wrong)
