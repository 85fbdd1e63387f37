"""End-to-end training: what reaches the tokenizer, the latents' statistics, the alarm, a whole run."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import vfmvae
from tests.tiny_runs import raise_layer_scales, stage, steps, tiny
from tests.whole_runs import lines, run
from vfmvae.config import TrainConfig
from vfmvae.diffusion import DiffusionTransformer, TransformerConfig
from vfmvae.diffusion.files import tokenizer_hash_of
from vfmvae.images import to_unit
from vfmvae.tokenizer.files import tokenizer_hash
from vfmvae.train_job import Job
from vfmvae.train_memory import MetaRun
from vfmvae.train_plan import describe
from vfmvae.train_step import COMPANION, Part, begin, generator_backward
from vfmvae.training.diffusion_stage import DiffusionLosses
from vfmvae.training.engine import EngineConfig
from vfmvae.training.joint import (
    NAME,
    VARIANCE,
    VARIATION,
    CollapseAlarm,
    JointConfig,
    LatentNorm,
    latents_measures,
)
from vfmvae.training.stages import LossWeights
from vfmvae.weights import read_safetensors

PLAIN = LossWeights(alignment=0.5, adaptive_alignment=False)
MODEL = TransformerConfig(
    latent_size=8,
    channels=32,
    width=32,
    depth=2,
    heads=2,
    classes=15,
    alignment_depth=1,
    alignment_widths=(128,),
    projector_width=16,
)


def joint_config(velocity: float = 1.0, **changes: Any) -> TrainConfig:
    joint = JointConfig(model=MODEL, losses=DiffusionLosses(velocity=velocity, alignment=0.5))
    options = {"stages": (stage(PLAIN),), "joint": joint, "data": "scenes"} | changes
    return tiny(**options)


def joint_job(**options: Any) -> Job:
    """Ready for its first step, with a transformer whose modulations are not zero any more."""
    built = Job(joint_config(**options))
    raise_layer_scales(built)
    if built.joint is not None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in built.joint.parameters():
                if not parameter.any():
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    built.enter_stage(0)
    return built


def latents_gradient(built: Job) -> tuple[Tensor, Part, Any]:
    """Of all losses of the first step, at the latents."""
    built.begin_step()
    (images,) = next(built.batches(0))
    part = Part(to_unit(images), 0)
    begun = begin(built, part, built.weights())
    generator_backward(built, part, begun, built.weights(), {})
    assert begun.output.leaf.grad is not None
    return begun.output.leaf.grad, part, begun.output


def test_the_alignment_reaches_the_tokenizer_and_the_velocity_loss_does_not() -> None:
    built = joint_job()
    gradient, part, output = latents_gradient(built)
    alone, *_ = latents_gradient(joint_job(joint=None))
    louder, *_ = latents_gradient(joint_job(velocity=1000.0))
    assert torch.equal(gradient, louder), "whatever the velocity loss is"

    # The same by hand: 1.5 times the mean negative cosine after the first block, by running statistics.
    assert built.joint is not None
    labels = built.labels(0)
    assert labels is not None and labels.min() >= 0
    draws = built.draws(part.first, COMPANION)
    t, noise = draws.uniform(()), draws.normal(output.leaf.shape[1:])
    leaf = output.leaf.detach().requires_grad_()
    x = (1 - t[:, None, None, None]) * (leaf - 0.0) / math.sqrt(1 + 1e-4) + t[:, None, None, None] * noise
    (projected,) = built.joint.transformer.project(x, t, labels)
    loss = -F.cosine_similarity(projected, output.encoded.layers[-1].detach(), dim=-1).mean()
    (expected,) = torch.autograd.grad(1.5 * loss, leaf)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient - alone, expected, rtol=1e-3, atol=1e-7)


def reg_config(**losses: float) -> JointConfig:
    """With the encoder's class token, as REG."""
    model = replace(MODEL, class_token_width=128)
    return JointConfig(
        model=model, losses=DiffusionLosses(**{"alignment": 0.5, "class_token": 0.03} | losses)
    )


def test_a_class_token_is_noised_and_aligned_and_its_velocity_loss_does_not_reach_the_tokenizer() -> None:
    built = joint_job(joint=reg_config())
    gradient, part, output = latents_gradient(built)
    alone, *_ = latents_gradient(joint_job(joint=None))
    louder, *_ = latents_gradient(joint_job(joint=reg_config(class_token=1000.0)))
    assert torch.equal(gradient, louder), "whatever the class token's velocity loss is"

    # By hand: the class token on the way to a noise of its own, and the first of the tokens that are aligned.
    assert built.joint is not None
    labels, draws = built.labels(0), built.draws(part.first, COMPANION)
    assert labels is not None
    t, noise = draws.uniform(()), draws.normal(output.leaf.shape[1:])
    draws.uniform(())  # whose label is dropped
    token, t1 = output.encoded.pooled.detach(), t[:, None]
    noisy = (1 - t1) * token + t1 * draws.normal(token.shape[1:])
    leaf = output.leaf.detach().requires_grad_()
    x = (1 - t1[..., None, None]) * leaf / math.sqrt(1 + 1e-4) + t1[..., None, None] * noise
    (projected,) = built.joint.transformer.project(x, t, labels, noisy)
    target = torch.cat([token[:, None], output.encoded.layers[-1].detach()], dim=1)
    loss = -F.cosine_similarity(projected, target, dim=-1).mean()
    (expected,) = torch.autograd.grad(1.5 * loss, leaf)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient - alone, expected, rtol=1e-3, atol=1e-7)


def test_a_run_with_a_class_token_leaves_a_model_that_samples_one(tmp_path: Path) -> None:
    run(joint_config(joint=reg_config(), steps=2), tmp_path)
    assert f"{NAME}_class_token" in lines(tmp_path)[-1]
    model = vfmvae.load(tmp_path / NAME)
    assert isinstance(model, DiffusionTransformer) and model.config.class_token_width == 128
    latents = vfmvae.sample(model, torch.randn(2, 32, 8, 8), torch.tensor([0, 3]), steps=2)
    assert latents.shape == (2, 32, 8, 8)


@pytest.mark.parametrize(
    "model", [replace(MODEL, alignment_widths=(64,)), replace(MODEL, class_token_width=64)]
)
def test_another_width_than_the_encoders_is_refused(model: TransformerConfig) -> None:
    losses = DiffusionLosses(alignment=0.5, class_token=0.03 * (model.class_token_width is not None))
    config = joint_config(joint=JointConfig(model=model, losses=losses))
    for build in (Job, MetaRun):
        with pytest.raises(ValueError, match="features are 128 wide, and joint.model.alignment_widths .*64"):
            run_of = build(config)
            run_of.enter_stage(0)


def test_blocks_that_are_computed_again_give_the_same_gradients() -> None:
    """Those of the pass in which they hold still keep their graphs."""
    found = []
    for recompute in (False, True):
        built = joint_job(engine=EngineConfig(recompute=recompute))
        gradient, *_ = latents_gradient(built)
        assert built.joint is not None
        found.append([gradient, *(p.grad for p in built.joint.parameters())])
    for kept, again in zip(*found, strict=True):
        torch.testing.assert_close(again, kept)


def test_the_transformer_learns_from_its_own_losses_alone() -> None:
    """Its gradients do not depend on the weight with which the tokenizer listens to it."""
    found = []
    for weight in (1.5, 1e-6):
        joint = replace(joint_config().joint or JointConfig(), weight=weight)
        built = joint_job(joint=joint)
        latents_gradient(built)
        assert built.joint is not None
        found.append({n: p.grad for n, p in built.joint.named_parameters()})
    assert all(
        gradient is not None and torch.equal(gradient, found[1][n]) for n, gradient in found[0].items()
    )
    assert all(p.requires_grad for p in built.joint.parameters()), "held still for the one pass only"


def test_the_norm_is_that_of_batch_norm_without_affine() -> None:
    ours, theirs = LatentNorm(4), nn.BatchNorm2d(4, eps=1e-4, momentum=0.1, affine=False)
    for seed in range(3):
        latents = 3 + 2 * torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(ours.of_batch(latents), theirs(latents))
    torch.testing.assert_close(ours.mean, theirs.running_mean)
    torch.testing.assert_close(ours.variance, theirs.running_var)
    torch.testing.assert_close(ours(latents), theirs.eval()(latents))


def test_the_variance_is_that_of_the_batch_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes with the same latents: Bessel's correction is that of four times as many."""
    monkeypatch.setattr("vfmvae.training.joint.world_size", lambda: 4)
    latents = torch.randn(2, 3, 2, 2)
    norm = LatentNorm(3)
    norm.of_batch(latents)
    expected = 0.9 + 0.1 * latents.repeat(4, 1, 1, 1).var(dim=(0, 2, 3))
    torch.testing.assert_close(norm.variance, expected)


def test_a_step_that_is_skipped_leaves_the_statistics_and_the_average_as_they_were() -> None:
    built = joint_job()
    assert built.joint is not None
    steps(built, 1)
    before = {n: b.clone() for n, b in built.joint.named_buffers()}
    with torch.no_grad():
        built.joint.transformer.final_layer.linear.weight.fill_(math.nan)
    (result,) = steps(built, 1)
    assert result.skipped == 1
    assert all(torch.equal(b, before[n]) for n, b in built.joint.named_buffers())


def test_measures_in_closed_form() -> None:
    ramp = torch.arange(4.0).expand(1, 2, 4, 4)
    found = latents_measures(ramp)
    assert found[VARIANCE].item() == pytest.approx(1.25)
    assert found[VARIATION].item() == pytest.approx(2 * 4 * 3)


def test_the_alarm_warns_once_and_then_stops_the_run() -> None:
    stored: dict[str, float] = {}
    alarm = CollapseAlarm(stored)
    assert alarm.check({VARIANCE: 2.0, VARIATION: 100.0}) == []
    assert stored == {VARIANCE: 2.0, VARIATION: 100.0}
    assert alarm.check({}) == [] and alarm.check({VARIANCE: 1.0, VARIATION: math.nan}) == []
    (warning,) = CollapseAlarm(stored).check({VARIANCE: 0.1, VARIATION: 90.0})
    assert "the latents are collapsing: latents_variance is 0.1, 5.00% of the 2" in warning
    assert len(alarm.check({VARIANCE: 0.1})) == 1 and alarm.check({VARIANCE: 0.09}) == []
    with pytest.raises(FloatingPointError, match="have collapsed: latents_variance is 0.01, .*lower joint"):
        alarm.check({VARIANCE: 0.01})


def test_the_alarm_compares_with_the_most_there_was() -> None:
    """Random weights begin with less than a trained tokenizer has: a collapse from there is one too."""
    alarm = CollapseAlarm({})
    for value in (0.03, 0.5, 5.0, 18.0, 2.0):
        assert alarm.check({VARIANCE: value, VARIATION: 300 * value}) == []
    assert len(alarm.check({VARIANCE: 1.0})) == 1
    with pytest.raises(FloatingPointError, match="0.02, 0.11% of the 18 it was at most"):
        alarm.check({VARIANCE: 0.02})


def test_labels_that_are_no_class_of_the_model_are_refused_before_the_first_step() -> None:
    joint = JointConfig(model=replace(MODEL, classes=14), losses=DiffusionLosses(alignment=0.5))
    config = joint_config(joint=joint)
    sentence = "scenes has 15 classes, and joint.model.classes is 14; give it at least as many"
    with pytest.raises(ValueError, match=sentence):
        Job(config)
    with pytest.raises(ValueError, match=sentence):
        describe(config, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("joint") / "run"
    assert "drawn scenes of 15 classes" in run(joint_config(steps=4), folder)
    yield folder


def test_a_run_leaves_both_models(finished: Path) -> None:
    tokenizer, model = vfmvae.load(finished), vfmvae.load(finished / NAME)
    assert isinstance(tokenizer, vfmvae.Tokenizer) and isinstance(model, DiffusionTransformer)
    assert model.config == MODEL
    assert tokenizer_hash_of(finished / NAME) == tokenizer_hash(tokenizer)
    assert (model.latents_std > 0).all() and model.latents_mean.abs().max() > 0
    latents = vfmvae.sample(model, torch.randn(2, 32, 8, 8), torch.tensor([0, 3]), steps=2)
    assert tokenizer.decode(model.denormalise(latents)).shape == (2, 3, 64, 64)


def test_its_log_has_the_measures(finished: Path) -> None:
    last = lines(finished)[-1]
    assert {NAME, f"{NAME}_velocity", f"{NAME}_alignment", VARIANCE, VARIATION} <= last.keys()


def test_a_run_that_stops_and_goes_on_is_the_same(finished: Path, tmp_path: Path) -> None:
    run(joint_config(steps=2), tmp_path)
    run(joint_config(steps=4), tmp_path)
    for name in ("model.safetensors", f"{NAME}/model.safetensors"):
        resumed, whole = (read_safetensors(folder / name) for folder in (tmp_path, finished))
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(tensor, whole[key]) for key, tensor in resumed.items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"joint": JointConfig(model=replace(MODEL, channels=16))}, "latents have 32 channels .* takes 16"),
        ({"engine": replace(tiny().engine, parallel="fsdp")}, "joint.model is not sharded"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        joint_config(**change)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight": 0.0}, "joint.weight is 0.0; it must be above 0"),
        ({"losses": DiffusionLosses()}, "joint.losses.alignment is 0"),
        ({"model": replace(MODEL, alignment_widths=())}, "joint.model has no projector"),
        ({"model": replace(MODEL, class_token_width=8)}, "class_token is 0, and the model has a class token"),
        (
            {"losses": DiffusionLosses(alignment=0.5, class_token=0.03)},
            "class_token is 0.03, and the model has no class token",
        ),
    ],
)
def test_joint_options_that_make_no_sense(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        JointConfig(**{"model": MODEL} | options)
