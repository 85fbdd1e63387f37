"""The scenarios in two processes, and a step that one of them spoils.

    torchrun --nproc-per-node 2 -m tests.distributed.ranks FOLDER

Rank 0 leaves what trained, the exported average and the losses of each scenario in FOLDER.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.distributed.scenarios import FSDP, SCENARIOS, Scenario, game
from tests.tiny_runs import parameters, steps
from vfmvae.train_job import Job
from vfmvae.training.distributed import mean_over_ranks, process_group, rank


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def assert_ranks_agree(tensors: dict[str, Tensor]) -> None:
    """Bit for bit."""
    for name, tensor in tensors.items():
        of_first = tensor.clone()
        dist.broadcast(of_first, src=0)
        assert torch.equal(tensor, of_first), name


def compute(scenario: Scenario) -> dict[str, Any]:
    """What `tests.distributed.test_scenarios` compares."""
    built = scenario.job()
    results = steps(built, scenario.steps)
    trained = whole(parameters(built))
    assert_ranks_agree(trained)
    built.synchronise_statistics()
    losses = results[-1].losses
    mean_over_ranks(*losses.values())
    return {"parameters": trained, "export": built.ema.export(), "losses": losses}


def everything(built: Job) -> dict[str, Tensor]:
    """Copies of all that a step may change."""
    buffers = {name: b.detach().clone() for name, b in built.tokenizer.named_buffers()}
    return whole(parameters(built)) | buffers | built.ema.export()


def spoil(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output * math.nan


def one_rank_meets_nan(scenario: Scenario) -> None:
    """All of them skip the step, and go on alike."""
    built = scenario.job()
    steps(built, 1)
    before = everything(built)
    spoiled = built.tokenizer.fusion.register_forward_hook(spoil) if rank() == 1 else None
    assert steps(built, 1)[0].skipped == 1
    if spoiled is not None:
        spoiled.remove()
    after = everything(built)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert steps(built, 1)[0].skipped == 0
    trained = whole(parameters(built))
    assert_ranks_agree(trained)
    assert not torch.equal(trained["tokenizer.align.weight"], before["tokenizer.align.weight"])


def main() -> None:
    folder = Path(sys.argv[1])
    with process_group(torch.device("cpu")):
        for name, scenario in SCENARIOS.items():
            found = compute(scenario)
            if rank() == 0:
                torch.save(found, folder / f"{name}.pt")
        one_rank_meets_nan(replace(game(), steps=3))
        one_rank_meets_nan(Scenario(engine=FSDP))
    (folder / "done").touch()


if __name__ == "__main__":
    main()
