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

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.scenarios import FSDP, FSDP_IN_PARTS, IN_PARTS, SCENARIOS, TWO_STAGES, Scenario, game
from tests.tiny_runs import parameters, steps
from tests.whole_runs import small_parts
from vfmvae.images import to_unit
from vfmvae.train_job import Job
from vfmvae.train_step import TOKENIZER, Part, forward
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


class RecordedGather:
    """FSDP2's own way to gather parameters, with a record of when it was asked for."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        self.events.append("gather")
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.14
        return gather(output_tensor, input_tensor, group=group, async_op=async_op)


def blocks_are_gathered_ahead() -> None:
    """Below one root, each block's parameters while the one before it runs, in every pass."""
    built = Scenario(engine=FSDP).job()
    events: list[str] = []

    def watch_backward(block: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        if outputs[1].requires_grad:
            outputs[1].register_hook(lambda gradient: events.append("block"))  # after that of FSDP

    blocks = list(built.tokenizer.decoder.blocks)
    for block in blocks:
        block.set_custom_all_gather(RecordedGather(events))
        block.register_forward_pre_hook(lambda *call: events.append("block"))
        block.register_forward_hook(watch_backward)
    batch = next(built.batches(0))
    built.begin_step()
    part = Part(to_unit(batch[0]), built.first_image(0))
    output = forward(built, part, built.weights(), TOKENIZER)
    assert_ahead(events, len(blocks))
    gradients = [torch.ones_like(image) for image in output.images]
    for again in (True, False):  # as the adaptive weight does: more than one backward pass
        events.clear()
        torch.autograd.grad(output.images, output.leaf, gradients, retain_graph=again)
        assert_ahead(events, len(blocks))
    roots = [m for m in built.forward.modules() if isinstance(m, FSDPModule) and m._get_fsdp_state()._is_root]
    assert roots == [built.forward]


def assert_ahead(events: list[str], blocks: int) -> None:
    """The parameters of the first two are asked for before the first begins, then of one more with each."""
    places = [place for place, event in enumerate(events) if event == "block"]
    asked = [events[places[0] : place].count("gather") for place in places]
    assert asked == [min(n, blocks - 2) for n in range(blocks)], events


def evaluate_at_once(scenario: Scenario) -> dict[str, float]:
    """The quality before the first step, and after one."""
    built = scenario.job()
    with small_parts():
        first = built.evaluate().quality
        steps(built, 1)
        return {**first, **{f"{name} later": value for name, value in built.evaluate().quality.items()}}


def companions_wait_for_the_last_part() -> None:
    built = Scenario(engine=IN_PARTS, companion=True).job()
    reduces: list[bool] = []
    model = built.companions[0].model
    assert isinstance(model, DistributedDataParallel)
    model.register_forward_pre_hook(lambda *call: reduces.append(model.require_backward_grad_sync))
    steps(built, 2)
    assert reduces == [False, True] * 2


def main() -> None:
    folder = Path(sys.argv[1])
    with process_group(torch.device("cpu")):
        blocks_are_gathered_ahead()
        companions_wait_for_the_last_part()
        quality = evaluate_at_once(Scenario(engine=FSDP))
        if rank() == 0:
            torch.save(quality, folder / "quality.pt")
        for name, scenario in SCENARIOS.items():
            found = compute(scenario)
            if rank() == 0:
                torch.save(found, folder / f"{name}.pt")
        one_rank_meets_nan(replace(game(), steps=3))
        one_rank_meets_nan(Scenario(engine=FSDP))
        unmeasurable = Scenario(TWO_STAGES[1:], engine=FSDP_IN_PARTS)
        with pytest.raises(ValueError, match="trains 'encoder', so losses.adaptive_alignment cannot be"):
            unmeasurable.job()
    (folder / "done").touch()


if __name__ == "__main__":
    main()
