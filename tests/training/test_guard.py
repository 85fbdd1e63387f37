"""The guard's verdict against a plain account of the same rule, without a wait for the device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vfmvae.training.guard import BufferGuard, SafetyConfig, StepGuard, guarded_update
from vfmvae.training.optim import OptimizerConfig, build_optimizer

CPU = torch.device("cpu")
LOSS = torch.tensor(1.0)


def judged(guard: StepGuard, *norms: float) -> list[float]:
    return [guard.judge(torch.tensor(norm), LOSS).item() for norm in norms]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_skipped_and_counted(value: float) -> None:
    guard = StepGuard(SafetyConfig(), CPU, scaled=False)
    assert judged(guard, 1.0, value, value, 2.0, value) == [0, 1, 1, 0, 1]
    assert (guard.skipped.item(), guard.in_a_row.item()) == (3, 1)
    assert guard.judge(torch.tensor(1.0), torch.tensor(value)) == 1, "a loss counts as well as a norm"


def test_an_explosion_is_many_times_the_running_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepGuard, "WARMUP", 3)
    guard = StepGuard(SafetyConfig(explosion=10.0), CPU, scaled=False)
    assert judged(guard, 1.0, 50.0, 1.0) == [0, 0, 0], "not before the mean is trusted"
    mean = 1.0
    for norm in (50.0, 1.0):
        mean += StepGuard.MEAN_WEIGHT * (norm - mean)
    assert judged(guard, 10.1 * mean) == [1]
    mean *= StepGuard.MEAN_GROWTH
    assert guard.state_dict()["mean_norm"].item() == pytest.approx(mean), "how far it exploded does not count"
    assert judged(guard, 9.9 * mean) == [0]
    mean += StepGuard.MEAN_WEIGHT * (9.9 * mean - mean)
    assert judged(guard, math.nan) == [1]
    assert guard.state_dict()["mean_norm"].item() == pytest.approx(mean), "nor does what is not finite"


def test_gradients_that_stay_large_are_not_skipped_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepGuard, "WARMUP", 3)
    guard = StepGuard(SafetyConfig(explosion=10.0), CPU, scaled=False)
    judged(guard, *[1.0] * 5)
    verdicts = judged(guard, *[15.0] * 20)
    # 1.1^5 = 1.61: after five skipped steps 15 lies within ten times the mean.
    assert verdicts == [1] * 5 + [0] * 15
    assert judged(guard, 1e9) == [1], "and an explosion is one still"


def test_steps_without_gradients_say_nothing_of_those_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepGuard, "WARMUP", 3)
    guard = StepGuard(SafetyConfig(), CPU, scaled=False)
    assert judged(guard, *[2e-3] * 10, *[0.0] * 500, *[2e-3] * 5) == [0] * 515


def test_another_stage_has_gradients_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepGuard, "WARMUP", 3)
    guard = StepGuard(SafetyConfig(), CPU, scaled=False)
    assert judged(guard, *[1.0] * 5, 1e4) == [0] * 5 + [1]
    guard.begin_stage()
    assert judged(guard, *[1e4] * 5, 1e8) == [0] * 5 + [1]
    assert guard.skipped == 2, "what has happened stays counted"


def test_explosions_may_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepGuard, "WARMUP", 1)
    assert judged(StepGuard(SafetyConfig(explosion=0.0), CPU, scaled=False), 1.0, 1e9) == [0, 0]


def test_the_scale_halves_after_a_bad_step_and_doubles_after_many_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StepGuard, "GROWTH_STEPS", 3)
    guard, scales = StepGuard(SafetyConfig(), CPU, scaled=True), []
    for norm in (math.inf, 1.0, 1.0, math.inf, 1.0, 1.0, 1.0, 1.0):
        guard.judge(torch.tensor(norm), LOSS)
        scales.append(math.log2(guard.scale.item()))
    assert scales == [15, 15, 15, 14, 14, 14, 15, 15]


def test_without_fp16_there_is_no_scale() -> None:
    guard = StepGuard(SafetyConfig(), CPU, scaled=False)
    judged(guard, math.inf)
    assert guard.scale == 1.0


def test_a_restored_guard_goes_on_as_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepGuard, "WARMUP", 2)
    one, other = (StepGuard(SafetyConfig(explosion=10.0), CPU, scaled=True) for _ in range(2))
    judged(one, 1.0, 2.0, math.nan)
    other.load_state_dict({name: number.clone() for name, number in one.state_dict().items()})
    assert judged(one, 11.0, 9.0) == judged(other, 11.0, 9.0) == [1, 0]
    for name, number in one.state_dict().items():
        assert torch.equal(number, other.state_dict()[name]), name


@pytest.mark.parametrize("skip", [0.0, 1.0])
@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_update_changes_neither_parameters_nor_moments(skip: float, fused: bool) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(OptimizerConfig(betas=(0.5, 0.9)), [parameter])
    if not fused:
        optimizer = torch.optim.Adam([parameter], betas=(0.5, 0.9), foreach=False, fused=False)
    parameter.grad = torch.ones(3)
    guarded_update(optimizer, torch.tensor(0.0))
    before = [parameter.detach().clone(), *(v.clone() for v in optimizer.state[parameter].values())]
    parameter.grad = torch.full((3,), math.nan if skip else 2.0)
    guarded_update(optimizer, torch.tensor(skip))
    after = [parameter.detach(), *optimizer.state[parameter].values()]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [bool(skip)] * len(before)


def test_buffers_go_back_with_a_skipped_step() -> None:
    module = nn.BatchNorm1d(2)
    guard = BufferGuard(module)
    for skip in (0.0, 1.0):
        guard.keep()
        before = module.running_mean.clone()
        module(torch.randn(8, 2) + 3)
        guard.restore(torch.tensor(skip))
        assert torch.equal(module.running_mean, before) == bool(skip)
