"""Steps of a diffusion run: parts of a batch, precision, recomputation, stages, statistics."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_diffusion import (
    ALL_LOSSES,
    CLASSES,
    MODEL,
    PLAIN,
    engine,
    fill,
    job,
    made_up,
    parameters,
    stage,
    steps,
    tiny,
)
from tests.tiny_runs import largest_difference
from vfmvae.diffusion.flow import TimeConfig
from vfmvae.diffusion_evaluation import evaluate
from vfmvae.diffusion_job import DiffusionJob
from vfmvae.diffusion_step import diffusion_step
from vfmvae.training.diffusion_stage import DiffusionLosses
from vfmvae.training.ema import EmaConfig
from vfmvae.training.guard import SafetyConfig
from vfmvae.training.optim import OptimizerConfig


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(fill(tmp_path_factory.mktemp("latents") / "made"))


@pytest.fixture(scope="module")
def whole(latents: str) -> dict[str, Tensor]:
    """Parameters after three updates of whole batches."""
    built = job(tiny(latents=latents))
    steps(built, 3)
    return parameters(built)


def test_a_batch_in_parts_is_the_same_update(latents: str, whole: dict[str, Tensor]) -> None:
    built = job(tiny(latents=latents, engine=engine(accumulate=2)))
    before = parameters(built)
    results = steps(built, 3)
    assert largest_difference(before, whole) > 1e-2
    assert largest_difference(parameters(built), whole) < 1e-6
    assert all(result.skipped.item() == 0 for result in results)


def test_the_gradients_of_the_parts_are_those_of_the_whole(latents: str) -> None:
    found = []
    for accumulate in (1, 2, 4):
        built = job(tiny(latents=latents, engine=engine(accumulate=accumulate, clip_norm=0.0)))
        steps(built, 1)
        found.append({n: p.grad for n, p in built.transformer.named_parameters() if p.grad is not None})
    largest = max(gradient.abs().max().item() for gradient in found[0].values())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert largest_difference(found[0], other) < 2e-6 * largest


@pytest.mark.parametrize("options", [{"fused": False}, {"engine": engine(recompute=True)}])
def test_how_it_is_computed_changes_nothing(
    latents: str, whole: dict[str, Tensor], options: dict[str, Any]
) -> None:
    built = job(tiny(latents=latents, **options))
    steps(built, 3)
    assert largest_difference(parameters(built), whole) < 1e-5


def test_compiled_blocks_give_the_same(latents: str) -> None:
    found = []
    for options in (engine(), engine(compile="default")):
        one_block = replace(PLAIN, depth=1)
        built = job(
            tiny(latents=latents, diffusion=one_block, stages=(stage(DiffusionLosses()),), engine=options)
        )
        steps(built, 2)
        found.append(parameters(built))
    assert largest_difference(*found) < 1e-5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_near_to_single(latents: str, whole: dict[str, Tensor], dtype: str) -> None:
    built = job(tiny(latents=latents, dtype=dtype))
    results = steps(built, 3)
    assert built.transformer.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert all(result.skipped.item() == 0 for result in results)
    assert all(p.dtype == torch.float32 for p in built.parameters)
    assert largest_difference(parameters(built), whole) < 2e-2
    assert built.guard.scale.item() == (1.0 if dtype == "bf16" else 2.0**16)


def test_a_step_reports_what_it_learns_from(latents: str) -> None:
    built = job(tiny(latents=latents))
    result = steps(built, 1)[0]
    assert list(result.losses) == [*ALL_LOSSES.weights(), "total", "gradient_norm"]
    total = sum(weight * result.losses[name] for name, weight in ALL_LOSSES.weights().items())
    assert result.losses["total"].item() == pytest.approx(float(total), rel=1e-6)


def test_gradients_are_clipped_together(latents: str) -> None:
    built = job(tiny(latents=latents, engine=engine(clip_norm=0.01)))
    assert steps(built, 1)[0].losses["gradient_norm"] > 0.1
    squares = sum(p.grad.square().sum() for p in built.parameters if p.grad is not None)
    assert float(squares) ** 0.5 == pytest.approx(0.01, rel=1e-3)


def test_a_step_with_nan_changes_nothing(latents: str) -> None:
    built = job(tiny(latents=latents, safety=SafetyConfig(max_skips=5)))
    steps(built, 1)
    before, average = parameters(built), {n: a.clone() for n, a in built.ema.state_dict().items()}
    (batch,) = next(built.batches(1))
    batch["latent"][0, 0, 0, 0] = math.nan
    built.begin_step()
    assert diffusion_step(built, [batch]).skipped.item() == 1
    assert largest_difference(parameters(built), before) == 0
    after = built.ema.state_dict()
    assert all(after[n].isfinite().all() for n in average)
    assert built.skips_in_a_row() == 1


def test_the_model_sees_latents_of_mean_zero_and_deviation_one(latents: str) -> None:
    built = job(tiny(latents=latents))
    every = torch.stack([made_up(n)["latents"] for n in range(24)]).double()
    mean, std = every.mean(dim=(0, 2, 3)), every.std(dim=(0, 2, 3))
    torch.testing.assert_close(built.transformer.latents_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(built.transformer.latents_std.double(), std, rtol=1e-6, atol=1e-6)
    seen = built.transformer.normalise(every.float())
    torch.testing.assert_close(seen.std(dim=(0, 2, 3)), torch.ones(4))
    assert torch.equal(built.ema.export()["latents_mean"], built.transformer.latents_mean)


def test_stages_have_their_own_times_losses_and_rates(latents: str) -> None:
    first = stage(DiffusionLosses(), name="first", images=8, time=TimeConfig("lognormal"))
    rate = OptimizerConfig(kind="adamw", learning_rate=3e-3, betas=(0.9, 0.95), warmup=0.5)
    second = stage(
        DiffusionLosses(velocity=0.0, cosine=1.0),
        name="second",
        images=8,
        optimizer=rate,
        ema=EmaConfig(half_life_images=0),
    )
    built = job(tiny(latents=latents, diffusion=PLAIN, stages=(first, second), steps=None))
    assert built.steps == 4
    names, rates, losses, moments = [], [], [], []
    for batch in built.batches(0):
        rates.append(built.begin_step()["transformer"])
        names.append(built.stage_name)
        losses.append(set(diffusion_step(built, batch).losses))
        assert built.optimizer is not None
        moments.append(built.optimizer.state[built.parameters[0]]["step"].item())
        built.state.step += 1
    assert names == ["first", "first", "second", "second"]
    assert rates[:2] == [1e-2, 1e-2] and rates[2] < rates[3] <= 3e-3
    assert losses == [{"velocity", "total", "gradient_norm"}] * 2 + [{"cosine", "total", "gradient_norm"}] * 2
    assert moments == [1, 2, 3, 4], "the moments go on"
    averages = built.ema.of_parameters()
    assert all(torch.equal(averages[p], p) for p in built.parameters), "without averaging, they are equal"


def test_the_average_is_the_ema_of_the_weights(latents: str) -> None:
    built = job(tiny(latents=latents, stages=(stage(ema=EmaConfig(4, ramp_up=None)),)))
    name, parameter = next(iter(built.transformer.named_parameters()))
    expected = built.ema.state_dict()[name].double()
    for _ in range(3):
        steps(built, 1)
        expected = 0.5 * expected + 0.5 * parameter.detach().double()  # a batch is a half-life
    torch.testing.assert_close(built.ema.state_dict()[name].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_an_evaluation_does_not_depend_on_how_much_is_computed_at_once(latents: str, accumulate: int) -> None:
    built = job(tiny(latents=latents, engine=engine(accumulate=accumulate)))
    training = parameters(built)
    found = [evaluate(built), evaluate(built)]
    assert found[0].quality == found[1].quality and found[0].samples is None
    assert found[0].quality.keys() == ALL_LOSSES.weights().keys()
    assert largest_difference(training, parameters(built)) == 0 and built.transformer.training
    alone = evaluate(job(tiny(latents=latents, batch_size=10)))
    assert found[0].quality == pytest.approx(alone.quality, rel=1e-5)


def test_a_job_begins_with_a_saved_model(latents: str, tmp_path: Path) -> None:
    from vfmvae.diffusion.files import save_transformer

    built = job(tiny(latents=latents))
    steps(built, 1)
    save_transformer(built.transformer, tmp_path, "t" * 64)
    other = job(tiny(latents=latents, initial=str(tmp_path), seed=5), raised=False)
    other.check_tokenizer()
    assert largest_difference(parameters(built), parameters(other)) == 0
    with pytest.raises(ValueError, match=r"has diffusion.depth 2, and this run 3; give it the same options"):
        DiffusionJob(tiny(latents=latents, initial=str(tmp_path), diffusion=replace(MODEL, depth=3)))
    shifted = fill(tmp_path / "shifted", lambda stored, _: stored["latents"].add_(1.0))
    with pytest.raises(
        ValueError, match=f"have other statistics than those that initial {tmp_path} was trained on; .*leave"
    ):
        job(tiny(latents=str(shifted), initial=str(tmp_path)))
    strange = fill(tmp_path / "strange", tokenizer="u" * 64)
    with pytest.raises(ValueError, match=r"another tokenizer \(uuuuuuuuuuuu\) than those .*\(tttttttttttt\)"):
        job(tiny(latents=str(strange), initial=str(tmp_path))).check_tokenizer()


def test_it_learns_a_handful_of_latents(tmp_path: Path) -> None:
    # A velocity is noise minus latents; the best guess that looks at neither time nor input leaves the
    # variance of both, which is 2. A class has one latent here, so that class and input tell nearly all.
    latents = fill(tmp_path / "few", images=len(CLASSES), tokens=None, class_token=False)
    fast = OptimizerConfig(kind="adamw", learning_rate=3e-3, betas=(0.9, 0.95))
    config = tiny(
        latents=str(latents),
        diffusion=replace(PLAIN, width=32, patch=1),
        stages=(stage(DiffusionLosses(), optimizer=fast, label_dropout=0.0),),
        batch_size=16,
        steps=200,
    )
    built = job(config, raised=False)
    found = [result.losses["velocity"].item() for result in steps(built, 200)]
    assert found[0] == pytest.approx(2, rel=0.15)
    assert sum(found[-20:]) / 20 < 0.8
