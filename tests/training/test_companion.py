"""A companion's gradients in closed form, its schedules, and what it must not do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.companions import FAST, Gain, Reader, companion_job, reader
from tests.tiny_runs import job, largest_difference, parameters, stage, steps, tiny
from tests.whole_runs import EVERYTHING
from vfmvae.encoders import Features
from vfmvae.images import to_unit
from vfmvae.losses.schedule import WeightSchedule
from vfmvae.train_job import Job
from vfmvae.train_step import Part, begin, generator_backward
from vfmvae.training.checkpoint import Checkpoints
from vfmvae.training.companion import CompanionLosses
from vfmvae.training.draws import StepDraws
from vfmvae.training.forward import StepOutput
from vfmvae.training.stages import LossWeights

PLAIN = LossWeights(alignment=0.5, adaptive_alignment=False)


def backward(built: Job) -> StepOutput:
    """The backward passes of the first step, without an update."""
    built.begin_step()
    (images,) = next(built.batches(0))
    part = Part(to_unit(images), 0)
    begun = begin(built, part, built.weights())
    generator_backward(built, part, begun, built.weights(), {})
    return begun.output


def test_both_losses_reach_the_companion_and_one_of_them_the_latents() -> None:
    gain, weight = Gain(), 0.5
    output = backward(companion_job(gain, weight, losses=PLAIN))
    without = backward(job(PLAIN))
    assert torch.equal(output.latents, without.latents)
    assert output.leaf.grad is not None and without.leaf.grad is not None
    assert gain.a.grad is not None
    assert gain.a.grad.item() == pytest.approx(weight * output.latents.mean().item() + (2.0 - 3.0), rel=1e-5)
    of_companion = output.leaf.grad - without.leaf.grad
    expected = torch.full_like(of_companion, weight * 2.0 / of_companion.numel())
    torch.testing.assert_close(of_companion, expected, rtol=1e-3, atol=1e-8)


def test_with_weight_zero_it_trains_and_the_tokenizer_does_not_notice() -> None:
    gain = Gain()
    output, without = backward(companion_job(gain, 0.0, losses=PLAIN)), backward(job(PLAIN))
    assert torch.equal(output.leaf.grad, without.leaf.grad)
    assert gain.a.grad == -1.0, "from its own loss"
    (result,) = steps(companion_job(reader(), 0.0), 1)
    assert {"reader", "reader_own"} <= result.losses.keys(), "and both are reported"


def test_with_weight_zero_the_latents_it_sees_have_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watching(self: Reader, latents: Tensor, *arguments: object) -> CompanionLosses:
        seen.append(latents.requires_grad)
        return original(self, latents, *arguments)  # type: ignore[arg-type]

    original = Reader.forward
    monkeypatch.setattr(Reader, "forward", watching)
    for weight in (0.0, 1.0):
        steps(companion_job(reader(), weight), 1)
    assert seen == [False, True]


class Leaky(nn.Module):
    """Its own loss reads the latents with their graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(()))

    def forward(
        self, latents: Tensor, encoded: Features, draws: StepDraws, labels: Tensor | None
    ) -> CompanionLosses:
        return CompanionLosses(latents.mean(), (self.a * latents).mean())


def test_an_own_loss_that_would_train_the_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="'reader': its own loss depends on the latents' graph.*detach"):
        steps(companion_job(Leaky()), 1)


def test_features_of_a_trained_encoder_have_no_graph_for_it() -> None:
    built = Job(tiny(stages=(stage(LossWeights(alignment=0.5), trains=EVERYTHING),)))
    built.add_companion("reader", Gain(), 1.0, FAST)  # which asserts it
    built.enter_stage(0)
    steps(built, 1)


def test_it_trains_along_in_a_run() -> None:
    built, alone = companion_job(reader()), job(LossWeights(alignment=0.5))
    before = parameters(built)
    result = steps(built, 2)[-1]
    steps(alone, 2)
    assert {"reader", "reader_own"} <= result.losses.keys()
    assert result.losses["total"] > result.losses["l1"] + result.losses["reader"]
    assert not torch.equal(parameters(built)["reader.linear.weight"], before["reader.linear.weight"])
    ours, theirs = (each.tokenizer.last_fusion_weight for each in (built, alone))
    assert (ours - theirs).abs().max() > 1e-5
    assert "modules.reader.linear.weight" in built.state.tensors()


# Schedules


def test_its_rate_follows_the_whole_run() -> None:
    first, second = (stage(PLAIN, name=name, images=4, trains=("decoder",)) for name in "ab")
    built = Job(tiny(stages=(first, second)))
    rising = replace(FAST, learning_rate=1.0, warmup=0.5, schedule="cosine")
    built.add_companion("reader", Gain(), 0.0, rising)
    built.enter_stage(0)
    rates = []
    for built.state.step in range(4):
        rates.append(built.begin_step()["reader"])
        assert built.companions[0].optimizer.param_groups[0]["lr"] == rates[-1]
    cosine = [0.5 * (1 + math.cos(math.pi * share)) for share in (0.25, 0.75)]
    assert rates == pytest.approx([0.25, 0.75, *cosine])


def test_its_weight_follows_the_images_of_the_run() -> None:
    first, second = (stage(PLAIN, name=name, images=8, trains=("decoder",)) for name in "ab")
    built = Job(tiny(stages=(first, second)))  # 2 images each step
    built.add_companion("reader", Gain(), 2.0, FAST, WeightSchedule(start=2, ramp=4, end=14))
    built.enter_stage(0)
    found = []
    for built.state.step in range(8):
        built.begin_step()
        found.append(built.weights().get("reader", 0.0))
    assert found == [0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0, 0.0]


# Parts and checkpoints


def test_an_accumulated_batch_gives_the_same_update() -> None:
    # No L1: signs that flip would enlarge rounding from step to step.
    smooth = LossWeights(l1=0.0, l2=1.0, multiscale_l1=0.0, alignment=0.5)
    whole, parts = (companion_job(reader(), losses=smooth, batch_size=16, accumulate=n) for n in (1, 2))
    steps(whole, 3), steps(parts, 3)
    assert largest_difference(parameters(whole), parameters(parts)) < 1e-6


def test_a_resumed_one_goes_on_bit_for_bit(tmp_path: Path) -> None:
    undisturbed, resumed = companion_job(reader()), companion_job(Reader())
    checkpoints = Checkpoints(tmp_path, background=False)
    steps(undisturbed, 2)
    checkpoints.save(undisturbed.state)
    steps(undisturbed, 2)
    assert checkpoints.load_newest(resumed.state) is not None
    steps(resumed, 2)
    ours, theirs = resumed.state.tensors(), undisturbed.state.tensors()
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizers.reader.") for name in ours)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


# Mistakes


@pytest.mark.parametrize(
    "name", ["tokenizer", "projected", "snapshot", "kl", "total", "reader", "reader_own"]
)
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    built = companion_job(Gain(), losses=LossWeights(alignment=0.5, adversarial=1.0))
    with pytest.raises(ValueError, match=f"the name '{name}.*' is taken in this run"):
        built.add_companion(name, Gain(), 1.0, FAST)
    assert len(built.companions) == 1


def test_a_model_that_is_added_twice_is_refused() -> None:
    gain = Gain()
    built = companion_job(gain)
    with pytest.raises(ValueError, match="'again': its model trains in this run already"):
        built.add_companion("again", gain, 1.0, FAST)


@pytest.mark.parametrize("name", ["", "a.b", "a b"])
def test_a_name_that_files_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="needs letters, digits and '_'"):
        companion_job(Gain()).add_companion(name, Gain(), 1.0, FAST)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_is_finite_and_not_negative(weight: float) -> None:
    with pytest.raises(ValueError, match=f"weight is {weight}; it must be finite"):
        companion_job(Gain(), weight)
