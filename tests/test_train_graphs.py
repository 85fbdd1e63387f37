"""Recorded steps against plain ones: on a CPU by an emulation of CUDA graphs, on a GPU by themselves."""

from __future__ import annotations

import importlib
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import vfmvae.train_job
from tests.companions import reader
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
from vfmvae.losses.schedule import WeightSchedule
from vfmvae.recipes import NO_EQUIVARIANCE
from vfmvae.tokenizer.equivariance import EquivarianceConfig
from vfmvae.train_graphs import RecordedSteps, cuda_graphs, recorded_steps
from vfmvae.train_job import Job
from vfmvae.train_step import StepResult
from vfmvae.training.companion import CompanionLosses
from vfmvae.training.draws import StepDraws
from vfmvae.training.engine import EngineConfig
from vfmvae.training.guard import SafetyConfig
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


def emulated() -> type[EmulatedGraph]:
    return EmulatedGraph


def never() -> Callable[[], EmulatedGraph]:
    """For single steps, which are the first of their kind and not recorded."""

    def refuse() -> EmulatedGraph:
        raise AssertionError("the first step of a kind is not recorded")

    return refuse


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
    found = recorded(again, COUNT, RecordedSteps(again, lambda: new_graph))
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
    how = RecordedSteps(run, emulated)
    recorded(run, 3, how)
    before = parameters(run)
    (batch,) = next(run.batches(run.state.step))
    with mock.patch.object(StandingInputs, "write", _poisoned):
        run.begin_step()
        result = how([batch], run.weights())
    assert result.skipped == 1
    for name, value in parameters(run).items():
        assert torch.equal(value, before[name]) or name.startswith(("projected", "patch")), name


def _poisoned(inputs: StandingInputs, images: Any, labels: Any, weights: Any, sigma: float) -> None:
    for weight in inputs.weights.values():
        weight.fill_(float("nan"))


def test_what_was_recorded_in_a_stage_is_forgotten_in_the_next() -> None:
    """With the memory of its graphs, of which nothing may be left in a discriminator that plays no more."""
    playing, cheap = replace(ALL_LOSSES, alignment=0.0), LossWeights(alignment=0.0, kl=0.0)
    behind = ("decompress", "style", "decoder")
    stages = stage(playing, images=6, trains=("fusion", *behind)), stage(cheap, images=6, trains=behind)
    run, again = (ready(*stages, graphs=True) for _ in range(2))
    pools: list[type[EmulatedGraph]] = []

    def new_pool() -> type[EmulatedGraph]:
        pools.append(EmulatedGraph)
        return EmulatedGraph

    found = recorded(run, 6, RecordedSteps(run, new_pool))
    expected = [recorded(again, 1, RecordedSteps(again, never))[0] for _ in range(6)]
    assert run.state.numbers["stage"] == 1 and len(pools) == 2
    assert_equal(found, expected)
    assert all(p.grad is None for a in run.adversaries for p in a.game.parameters())


@pytest.mark.parametrize(
    "options", [{"clip_norm": 0.5, "adaptive_every": 3}, {"accumulate": 2, "adaptive_every": 2}], ids=str
)
def test_what_else_a_step_may_hold_is_recorded_too(options: dict[str, Any]) -> None:
    """A gradient penalty, a snapshot, companions with a schedule; compared bit by bit."""
    losses = replace(ALL_LOSSES, r1=1.0, preservation=0.3, adaptive_adversarial=True)
    plan = stage(losses, images=200, blur_sigma=2.0, blur_images=60)

    def built() -> Job:
        config = tiny(stages=(plan,), engine=EngineConfig(graphs=True, **options))
        made = Job(config)
        raise_layer_scales(made)
        schedule = WeightSchedule(start=6, ramp=8)
        made.add_companion("reader", reader(), 0.5, OptimizerConfig(eps=1e-3), schedule)
        made.add_companion("other", reader(), 0.2, OptimizerConfig(eps=1e-3))
        made.enter_stage(0)
        return made

    run, again = built(), built()
    expected = [recorded(again, 1, RecordedSteps(again, never))[0] for _ in range(COUNT)]
    found = recorded(run, COUNT, RecordedSteps(run, emulated))
    assert_equal(found, expected)
    for name in ("reader", "other"):
        ours, theirs = (built.state.modules[name].state_dict() for built in (run, again))
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


class Drawing(nn.Module):
    """A companion that notes what it draws."""

    def __init__(self, method: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.method, self.shape = method, shape
        self.drawn: list[torch.Tensor] = []

    def forward(self, latents: torch.Tensor, encoded: Any, draws: StepDraws, labels: Any) -> CompanionLosses:
        numbers = getattr(draws, self.method)(self.shape)
        self.drawn.append(numbers.clone())
        return CompanionLosses(
            (latents.mean() * self.weight).square(), (self.weight * numbers.mean() - 1).square()
        )


def test_companions_draw_apart() -> None:
    drawn = []
    for graphs in (False, True):
        built = Job(tiny(stages=(stage(LossWeights(alignment=0.5)),), engine=EngineConfig(graphs=graphs)))
        models = Drawing("normal", (2,)), Drawing("uniform", (3, 5)), Drawing("normal", (2,))
        for name, model in zip(("one", "two", "three"), models, strict=True):
            built.add_companion(name, model, 1.0, OptimizerConfig())
        built.enter_stage(0)
        if graphs:
            recorded(built, 1, RecordedSteps(built, never))
        else:
            steps(built, 1)
        drawn.append([model.drawn[0] for model in models])
    for plain, standing in zip(*drawn, strict=True):
        assert torch.equal(plain, standing)
    assert not torch.equal(drawn[0][0], drawn[0][2]), "the same numbers for two"


def test_a_rollback_forgets_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bad steps bring the last checkpoint back; the run ends as one that records nothing."""
    train, rich = importlib.import_module("vfmvae.train"), importlib.import_module("rich.console")
    ends = []
    for name, new_steps in (("plain", SingleSteps), ("graphs", lambda job: RecordedSteps(job, emulated))):
        monkeypatch.setattr(train, "recorded_steps", new_steps)
        monkeypatch.setattr(StandingInputs, "write", poisoned_twice(StandingInputs.write))
        config = tiny(
            stages=(stage(LossWeights(), images=18),),
            engine=EngineConfig(graphs=True),
            steps=9,
            checkpoint_every=4,
            log_every=1,
            safety=SafetyConfig(max_skips=2, max_rollbacks=2),
        )
        printed = io.StringIO()
        train.train(config, train.RunFolder(tmp_path / name), rich.Console(file=printed, width=200))
        assert "going back to the checkpoint of step 4" in printed.getvalue()
        ends.append(load_file(tmp_path / name / "model.safetensors"))
        monkeypatch.undo()
        monkeypatch.setattr(vfmvae.train_job, "check_recordable", lambda device: None)
    plain, found = ends
    assert all(torch.equal(found[n], value) for n, value in plain.items())


class SingleSteps:
    """Steps that are each the first of their kind."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, batch: Any, weights: Any) -> StepResult:
        return RecordedSteps(self.job, never)(batch, weights)


def poisoned_twice(write: Callable[..., None]) -> Callable[..., None]:
    """Weights of NaN in the sixth and seventh step."""
    count = itertools.count(1)

    def call(inputs: StandingInputs, images: Any, labels: Any, weights: Any, sigma: float) -> None:
        write(inputs, images, labels, weights, sigma)
        if next(count) in (6, 7):
            inputs._written.clear()
            _poisoned(inputs, images, labels, weights, sigma)

    return call


def test_a_step_that_waits_cannot_be_recorded() -> None:
    run = ready(stage(LossWeights()), graphs=True)
    how = RecordedSteps(run, emulated)
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
    engine, plain = {"graphs": True, **options}, changing()
    stage = replace(
        plain, optimizer=replace(plain.optimizer, implementation=engine.pop("optimizer", "torch"))
    )
    run, again = (ready(stage, device="cuda", dtype=dtype, **engine) for _ in range(2))
    expected = [recorded(run, 1, RecordedSteps(run, never))[0] for _ in range(COUNT)]
    graphs: list[CudaGraph] = []
    new_graph = cuda_graphs()

    def new_one() -> CudaGraph:
        graphs.append(new_graph())
        return graphs[-1]

    found = recorded(again, COUNT, RecordedSteps(again, lambda: new_one))
    assert graphs
    # The same kernels, but cuBLAS may choose others for the stream that records.
    limit = 1e-3 if dtype == "fp32" else 5e-2
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        for name in ("l1", "alignment", "discriminator_projected"):
            torch.testing.assert_close(
                one.losses[name], other.losses[name], rtol=limit, atol=limit, msg=f"step {number}: {name}"
            )
    assert found[-1].losses["total"].isfinite()


@pytest.mark.gpu
def test_stages_and_rollbacks_record_anew() -> None:
    """Into memory of their own: some of the old graphs' is still in use."""
    behind = ("decompress", "style", "decoder")
    plain = LossWeights(alignment=0.0, kl=0.0)
    stages = changing(images=12), stage(plain, images=24, trains=behind)
    run = ready(*stages, device="cuda", dtype="bf16", graphs=True)
    how = recorded_steps(run)
    assert how is not None
    recorded(run, 7, how)
    assert run.state.numbers["stage"] == 1
    run.entries += 1  # as after a rollback
    assert all(result.losses["total"].isfinite() for result in recorded(run, 4, how))
