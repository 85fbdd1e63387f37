"""Recorded steps against plain ones: on a CPU by an emulation of CUDA graphs, on a GPU by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import vfmvae.train_job
from tests.emulated_graph import EmulatedGraph
from tests.tiny_runs import (
    ALL_LOSSES,
    largest_difference,
    parameters,
    raise_layer_scales,
    stage,
    steps,
    tiny,
)
from vfmvae.recipes import NO_EQUIVARIANCE
from vfmvae.tokenizer.equivariance import EquivarianceConfig
from vfmvae.train_graphs import RecordedSteps, recorded_steps
from vfmvae.train_job import Job
from vfmvae.train_step import StepResult
from vfmvae.training.engine import EngineConfig
from vfmvae.training.optim import OptimizerConfig
from vfmvae.training.recording import CudaGraph, StandingInputs, check_recordable
from vfmvae.training.stages import LossWeights, StageConfig, TermSchedule

COUNT = 8


@pytest.fixture(autouse=True)
def graphs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vfmvae.train_job, "check_recordable", lambda device: None)


def changing(**changes: Any) -> StageConfig:
    """A stage where all that may change from step to step does."""
    rate = OptimizerConfig(learning_rate=1e-3, betas=(0.5, 0.9), eps=1e-3, warmup=0.3, schedule="cosine")
    base: dict[str, Any] = {
        "images": 2 * COUNT,
        "optimizer": rate,
        "discriminator_optimizer": rate,
        "schedules": (TermSchedule(term="perceptual", ramp=20), TermSchedule(term="ssim", start=1)),
        "blur_sigma": 3.0,
        "blur_images": 100,
        "equivariance": EquivarianceConfig(0.5, 0.0, latent_scales=(1.0,), rotations=(90,)),
    }
    return stage(replace(ALL_LOSSES, adaptive_adversarial=True), **base | changes)


def ready(*stages: StageConfig, device: str = "cpu", dtype: str = "fp32", **engine: Any) -> Job:
    built = Job(tiny(stages=stages, engine=EngineConfig(**engine), device=device, dtype=dtype))
    raise_layer_scales(built)
    built.enter_stage(0)
    return built


def recorded(built: Job, count: int, how: RecordedSteps) -> list[StepResult]:
    results = []
    for batch, _ in zip(built.batches(built.state.step), range(count), strict=False):
        built.begin_step()
        results.append(how(batch, built.weights()))
        built.state.step += 1
    return results


def never() -> EmulatedGraph:
    raise AssertionError("the first step of a kind is not recorded")


def assert_equal(found: Sequence[StepResult], expected: Sequence[StepResult]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.losses.keys() == other.losses.keys()
        assert {n: v.item() for n, v in one.losses.items()} == {n: v.item() for n, v in other.losses.items()}
        assert one.skipped == other.skipped


@pytest.mark.parametrize(
    "options",
    [{}, {"share_forward": False, "accumulate": 2}, {"recompute": True, "adaptive_every": 2}],
    ids=str,
)
def test_replayed_steps_are_those_that_python_runs(options: dict[str, Any]) -> None:
    """Bit by bit, over steps in which everything changes that may."""
    graphs: list[EmulatedGraph] = []

    def new_graph() -> EmulatedGraph:
        graphs.append(EmulatedGraph())
        return graphs[-1]

    stages = changing() if not options else changing(equivariance=NO_EQUIVARIANCE)
    run, again = (ready(stages, graphs=True, **options) for _ in range(2))
    expected = [recorded(run, 1, RecordedSteps(run, never))[0] for _ in range(COUNT)]
    found = recorded(again, COUNT, RecordedSteps(again, new_graph))
    assert_equal(found, expected)
    assert sum(graph.replays - 1 for graph in graphs) >= 2, "steps beside those that were recorded"
    ours, theirs = parameters(again), parameters(run)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert all(torch.equal(v, run.ema.state_dict()[n]) for n, v in again.ema.state_dict().items())


def test_the_first_step_of_a_kind_is_a_plain_one() -> None:
    plain, run = ready(changing()), ready(changing(), graphs=True)
    for _ in range(2):
        (expected,), (found,) = steps(plain, 1), recorded(run, 1, RecordedSteps(run, never))
        for name, loss in expected.losses.items():  # weights and rates are float32 there
            torch.testing.assert_close(found.losses[name], loss.float(), rtol=1e-4, atol=1e-5, msg=name)
    assert largest_difference(parameters(run), parameters(plain)) < 1e-4


def test_a_bad_step_is_skipped_in_a_replay_too() -> None:
    run = ready(stage(), graphs=True)
    how = RecordedSteps(run, EmulatedGraph)
    recorded(run, 3, how)
    before = parameters(run)
    (batch,) = next(run.batches(run.state.step))
    with mock.patch.object(StandingInputs, "write", _poisoned):
        run.begin_step()
        result = how([batch], run.weights())
    assert result.skipped == 1
    for name, value in parameters(run).items():
        assert torch.equal(value, before[name]) or name.startswith(("projected", "patch")), name


def _poisoned(inputs: StandingInputs, images: Any, weights: Any, sigma: float) -> None:
    for weight in inputs.weights.values():
        weight.fill_(float("nan"))


def test_what_was_recorded_in_a_stage_is_forgotten_in_the_next() -> None:
    cheap = LossWeights(alignment=0.0, kl=0.0)
    behind = ("decompress", "style", "decoder")
    stages = stage(cheap, images=6, trains=("fusion", *behind)), stage(cheap, images=6, trains=behind)
    run, again = (ready(*stages, graphs=True) for _ in range(2))
    found = recorded(run, 6, RecordedSteps(run, EmulatedGraph))
    expected = [recorded(again, 1, RecordedSteps(again, never))[0] for _ in range(6)]
    assert run.state.numbers["stage"] == 1
    assert_equal(found, expected)


def test_a_step_that_waits_cannot_be_recorded() -> None:
    run = ready(stage(LossWeights()), graphs=True)
    how = RecordedSteps(run, EmulatedGraph)
    recorded(run, 1, how)
    with (
        mock.patch.object(run.buffers, "keep", lambda: run.guard.scale.item()),
        pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph: .*turn engine.graphs off"),
    ):
        recorded(run, 1, how)


def test_graphs_need_one_process_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="engine.graphs records CUDA graphs, and this run computes on cpu"):
        check_recordable(torch.device("cpu"))
    monkeypatch.setattr("vfmvae.training.recording.world_size", lambda: 4)
    with pytest.raises(ValueError, match=r"engine.graphs is for one process, and this run has 4"):
        check_recordable(torch.device("cuda"))
    with pytest.raises(ValueError, match="engine.parallel 'fsdp'"):
        EngineConfig(graphs=True, parallel="fsdp")
    assert recorded_steps(ready(stage())) is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"share_forward": False}, {"accumulate": 2}, {"recompute": True}, {"optimizer": "triton"}],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cuda_graphs_train_as_python_does(dtype: str, options: dict[str, Any]) -> None:
    pool = torch.cuda.graph_pool_handle()
    graphs: list[CudaGraph] = []

    def new_graph() -> CudaGraph:
        graphs.append(CudaGraph(pool))
        return graphs[-1]

    engine, plain = {"graphs": True, **options}, changing()
    stage = replace(
        plain, optimizer=replace(plain.optimizer, implementation=engine.pop("optimizer", "torch"))
    )
    run, again = (ready(stage, device="cuda", dtype=dtype, **engine) for _ in range(2))
    expected = [recorded(run, 1, RecordedSteps(run, never))[0] for _ in range(COUNT)]
    found = recorded(again, COUNT, RecordedSteps(again, new_graph))
    assert graphs
    # The same kernels, but cuBLAS may choose others for the stream that records.
    limit = 1e-3 if dtype == "fp32" else 5e-2
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        for name in ("l1", "alignment", "discriminator_projected"):
            torch.testing.assert_close(
                one.losses[name], other.losses[name], rtol=limit, atol=limit, msg=f"step {number}: {name}"
            )
    assert found[-1].losses["total"].isfinite()
