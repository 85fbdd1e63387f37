"""The step benchmark: both sides compute the same, and what the command writes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.benchmarks.scripts import script
from tests.helpers import ROOT
from tests.tiny_runs import raise_layer_scales, stage, tiny
from vfmvae.config import TrainConfig
from vfmvae.train_job import Job
from vfmvae.train_step import training_step
from vfmvae.training.stages import LossWeights

step = script("step")
PublishedStep = step.PublishedStep


def tiny_config(losses: LossWeights) -> TrainConfig:
    return tiny(stages=(stage(losses),), batch_size=4)


LOSSES = LossWeights(perceptual=0.5, kl=1e-4, alignment=0.5, adversarial=0.3)


def both_sides(config: TrainConfig) -> tuple[PublishedStep, Job]:
    published, ours = PublishedStep(config), Job(config)
    ours.enter_stage(0)
    raise_layer_scales(published.job)
    raise_layer_scales(ours)
    return published, ours


def gradients(job: Job) -> dict[str, Tensor]:
    modules = {"tokenizer": job.tokenizer, **{a.name: a.game for a in job.playing}}
    return {
        f"{name}.{of}": p.grad
        for name, module in modules.items()
        for of, p in module.named_parameters()
        if p.requires_grad
    }


def test_both_sides_have_the_same_losses_gradients_and_averages() -> None:
    config = tiny_config(LOSSES)
    published, ours = both_sides(config)
    images = step.photographs(config, torch.device("cpu"))
    of_published = published(images, torch.float32)
    ours.begin_step()
    of_ours = training_step(ours, [images], ours.weights()).losses
    for name, loss in of_published.items():
        torch.testing.assert_close(of_ours[name], loss, rtol=1e-3, atol=1e-4, msg=name)
    expected, found = gradients(published.job), gradients(ours)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= 5e-3 * gradient.norm() + 1e-5, f"{name}: {error} of {gradient.norm()}"
    # The running mean of the style is left out: of two forwards it sees both.
    for name, average in published.job.ema.state_dict().items():
        if name != "style.average":
            torch.testing.assert_close(ours.ema.state_dict()[name], average, rtol=1e-3, atol=1e-3, msg=name)


def test_the_published_precision_is_low_above_32_pixels_alone() -> None:
    published = PublishedStep(tiny_config(LOSSES))
    seen = {}
    for index, block in enumerate(published.job.tokenizer.decoder.blocks):
        block.register_forward_hook(lambda _, __, out, index=index: seen.__setitem__(index, out[0].dtype))
    losses = published(step.photographs(published.job.config, torch.device("cpu")), torch.bfloat16)
    assert seen == {**dict.fromkeys(range(5), torch.float32), 5: torch.bfloat16}  # 2, 4, ... 64 px
    assert all(loss.isfinite() for loss in losses.values())


def test_a_loss_that_differs_ends_the_command() -> None:
    losses = {"reference": {"l1": 0.5, "kl": 5000.0}, "ours": {"l1": 0.5, "kl": 5004.0, "gradient_norm": 3.0}}
    step.check_agreement(losses, 1e-3)
    losses["ours"]["l1"] = 0.502
    with pytest.raises(SystemExit, match=r"l1 is 0\.5 in 'reference' and 0\.502 in 'ours'"):
        step.check_agreement(losses, 1e-3)
    losses["ours"]["l1"] = float("nan")
    with pytest.raises(SystemExit, match="nan in 'ours'"):
        step.check_agreement(losses, 1e-3)


def test_a_speedup_is_the_median_over_turns() -> None:
    # One slow moment meets the reference, another both: neither counts.
    assert step.ratio([2.0, 9.0, 8.0], [1.0, 1.0, 4.0]) == 2.0


def test_the_sizes_are_those_of_the_recipes() -> None:
    demo, full = (step.configuration(size, None, "cpu") for size in ("demo", "full"))
    assert (demo.tokenizer.resolution, full.tokenizer.resolution) == (64, 256)
    for config in (demo, full):
        losses = config.stages[0].losses
        assert len(config.stages) == 1
        assert min(losses.perceptual, losses.adversarial, losses.alignment, losses.kl) > 0
    assert replace(demo, batch_size=3) == step.configuration("demo", 3, "cpu")


def test_the_command_writes_what_it_measured(tmp_path: Path) -> None:
    output = tmp_path / "results" / "step.json"
    command = [sys.executable, ROOT / "benchmarks" / "step.py", "--batch", "1", "--repeats", "1"]
    command += ["--device", "cpu", "--threads", "1", "--output", output]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    result = json.loads(output.read_text())
    assert (result["size"], result["dtype"], result["batch"], result["threads"]) == ("demo", "fp32", 1, 1)
    assert set(result["images_per_second"]) == set(result["peak_memory_mib"])
    assert set(result["images_per_second"]) == {"reference", "ours, plain", "ours"}
    assert min(result["images_per_second"].values()) > 0
    assert all(20 < mib < 4000 for mib in result["peak_memory_mib"].values())
    assert set(result["times_faster_than"]) == {"reference", "ours, plain"}
