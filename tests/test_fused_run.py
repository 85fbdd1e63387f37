"""A run by fused operations learns what one by the reference learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tiny_runs import steps
from vfmvae.recipes import demo
from vfmvae.train_job import Job

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_fifty_steps_of_the_demo_end_at_the_same_loss(device: str) -> None:
    found = []
    for fused in (False, True):
        built = Job(replace(demo(), fused=fused, device=device, dtype="fp32"))
        built.enter_stage(0)
        losses = [result.losses["total"].item() for result in steps(built, 50)]
        assert losses[-1] < 0.5 * losses[0]
        found.append(losses[-1])
    assert found[1] == pytest.approx(found[0], rel=0.01)
