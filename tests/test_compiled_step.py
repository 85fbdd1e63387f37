"""A step with compiled blocks against the same step without: one block on the CPU, all of them on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import vfmvae.train_networks
from tests.tiny_runs import ALL_LOSSES, raise_layer_scales, stage, steps, tiny
from tests.whole_runs import small_parts
from vfmvae.tokenizer.decoder import DecoderBlock
from vfmvae.train_job import Job
from vfmvae.training.engine import EngineConfig
from vfmvae.training.stages import TermSchedule

# The first step goes backward once. The second measures the adaptive weight, which goes backward twice
# through a graph that the first has compiled.
STAGE = stage(ALL_LOSSES, schedules=(TermSchedule(term="alignment", start=2),))


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def last_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling all of them takes minutes on a CPU."""
    monkeypatch.setattr(vfmvae.train_networks, "decoder_blocks", lambda model: [model.decoder.blocks[-1]])
    monkeypatch.setattr(vfmvae.train_networks, "encoder_blocks", lambda encoder: [])


def ready(device: str = "cpu", **engine: Any) -> Job:
    with small_parts():
        built = Job(tiny(stages=(STAGE,), engine=EngineConfig(**engine), device=device))
    raise_layer_scales(built)
    built.enter_stage(0)
    return built


def take_weights(built: Job, plain: Job) -> None:
    """Start from the same weights again: an update magnifies what two orders of summation differ by."""
    with torch.no_grad():
        for ours, theirs in zip(built.tokenizer.parameters(), plain.tokenizer.parameters(), strict=True):
            ours.copy_(theirs)
        for one, other in zip(built.adversaries, plain.adversaries, strict=True):
            one.game.load_state_dict(other.game.state_dict())


def gradients(built: Job) -> dict[str, Tensor]:
    return {name: p.grad for name, p in built.tokenizer.named_parameters() if p.grad is not None}


def assert_same_gradients(built: Job, plain: Job, limit: float = 1e-3) -> None:
    found, expected = gradients(built), gradients(plain)
    assert found.keys() == expected.keys() and len(found) > 100
    wrong = {n: (found[n] - g).norm() / (g.norm() + 1e-9) for n, g in expected.items()}
    assert {name: error.item() for name, error in wrong.items() if error > limit} == {}


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_block_gives_the_gradients_of_a_plain_one(recompute: bool, last_block_only: None) -> None:
    plain, compiled = ready(), ready(compile="default", recompute=recompute)
    for _ in range(2):
        expected, found = steps(plain, 1)[0], steps(compiled, 1)[0]
        assert_same_gradients(compiled, plain)
        take_weights(compiled, plain)
    assert counters["stats"]["unique_graphs"] >= 1, "it was compiled"
    assert not counters["graph_break"]
    assert found.losses.keys() == expected.losses.keys() >= {"alignment_factor", "adversarial"}
    for name, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[name], loss, rtol=1e-3, atol=1e-5, msg=name)


def test_a_recomputed_block_keeps_its_input_alone_when_it_is_compiled(last_block_only: None) -> None:
    kept = {}
    for recompute in (False, True):
        block: DecoderBlock = ready(compile="default", recompute=recompute).tokenizer.decoder.blocks[-1]
        x, skip = torch.randn(1, 4, 32, 32), torch.randn(1, 4, 32, 32)
        z_map, style = torch.randn(1, 32, 8, 8), torch.randn(1, 16)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(x, skip, z_map, style)
        kept[recompute] = sum(sizes)
    assert kept[True] < kept[False] / 2


def test_a_block_is_compiled_for_more_shapes_than_torch_would() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    vfmvae.train_networks.compile_blocks([block], "default")
    for size in range(2, 13):
        block(torch.ones(size, 4))
    assert counters["stats"]["unique_graphs"] == 11
