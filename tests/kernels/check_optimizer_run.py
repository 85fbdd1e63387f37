"""A run whose optimizer moves the averages, against one with torch's, on a GPU or in Triton's interpreter.

tests/ops/test_optimizer.py runs this file in a process of its own, because Triton chooses the interpreter
when it is first imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/check_optimizer_run.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny_runs import largest_difference, parameters, raise_layer_scales, stage, steps, tiny
from vfmvae.train_job import Job
from vfmvae.training.averaging_adam import AveragingAdam
from vfmvae.training.optim import OptimizerConfig
from vfmvae.training.rates import PartRate
from vfmvae.training.stages import LossWeights

ON_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if ON_GPU else []


def test_a_run_learns_the_same() -> None:
    """Weights, averages and moments, over a rate of a part, a skipped step and a stage that freezes."""
    found = {name: learned(name) for name in ("triton", "torch")}
    for ours, torchs in zip(found["triton"], found["torch"], strict=True):
        assert largest_difference(ours, torchs) < 2e-5


def learned(implementation: str) -> list[dict[str, Tensor]]:
    rate = OptimizerConfig(learning_rate=1e-3, betas=(0.5, 0.9), eps=1e-3, implementation=implementation)
    losses, parts = LossWeights(kl=1e-4, alignment=0.0), ("decompress", "style", "decoder>8")
    first = stage(losses, images=6, trains=parts, optimizer=rate, rates=(PartRate("style", 0.5),))
    second = stage(losses, images=6, trains=parts[1:], optimizer=rate)
    device = "cuda" if ON_GPU else "cpu"
    run = Job(tiny(stages=(first, second), device=device, fused=ON_GPU))
    raise_layer_scales(run)
    run.enter_stage(0)
    for number in range(4):
        if number == 1:  # what the guard takes for an explosion
            run.guard._numbers["mean_norm"].fill_(1e-9)
            run.guard._numbers["good"].fill_(1000.0)
        before = parameters(run)
        result = steps(run, 1)[0]
        after = {name: value for name, value in parameters(run).items() if name in before}
        skipped = all(torch.equal(before[name], value) for name, value in after.items())
        assert bool(result.skipped) == skipped == (number == 1)
        if skipped:
            run.guard.begin_stage()
    assert run.state.numbers["stage"] == 1
    assert isinstance(run.optimizer, AveragingAdam) == (implementation == "triton")
    averages = {name: average.clone() for name, average in run.ema.state_dict().items()}
    states = enumerate(run.optimizer.state.values())
    moments = {f"{n}.{name}": value for n, state in states for name, value in state.items()}
    return [parameters(run), averages, moments]
