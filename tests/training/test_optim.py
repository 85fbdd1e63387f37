"""The learning-rate schedule at points that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from vfmvae.training.optim import OptimizerConfig, learning_rate, set_learning_rate


def test_the_rate_rises_linearly_over_the_warmup() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup=0.2)
    rates = [learning_rate(config, progress) for progress in (0.0, 0.05, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 2.0, 2.0, 2.0])


def test_the_cosine_begins_after_the_warmup_and_ends_at_zero() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup=0.2, schedule="cosine")
    rates = [learning_rate(config, progress) for progress in (0.2, 0.4, 0.6, 0.8, 1.0)]
    root = 0.5**0.5
    assert rates == pytest.approx([2.0, 1 + root, 1.0, 1 - root, 0.0])


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(OptimizerConfig(learning_rate=0.5), 0.0) == 0.5


def test_the_rate_is_set_for_every_parameter() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 3.0}], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    a.grad = b.grad = torch.ones(1)
    optimizer.step()
    assert (a.item(), b.item()) == (-0.25, -0.25)
