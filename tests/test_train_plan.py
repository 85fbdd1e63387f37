"""What --dry-run says is what would happen, in seconds on any machine."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from tests.commands import save_image
from tests.tiny_runs import job, stage, tiny
from vfmvae.config import TrainConfig
from vfmvae.data.transforms import CropConfig
from vfmvae.recipes import RECIPES
from vfmvae.tokenizer import BottleneckConfig
from vfmvae.tokenizer.parts import set_trained
from vfmvae.train_plan import describe, saved_bytes
from vfmvae.training.rates import PartRate
from vfmvae.training.stages import LossWeights, TermSchedule


def description(config: TrainConfig) -> str:
    output = io.StringIO()
    describe(config, Console(file=output, width=300))
    return output.getvalue()


@pytest.fixture(scope="module")
def published() -> str:
    return description(RECIPES["vfm_vae_siglip2_large"]())


def test_the_stages_train_the_published_numbers_of_parameters(published: str) -> None:
    counts = [float(count) for count in re.findall(r"\((\d+\.\d) M parameters\)", published)]
    fusion, mapping, decoder, encoder = 13.5, 0.53, 125.7, 316.7
    whole = fusion + mapping + decoder
    assert counts[:2] == [pytest.approx(whole, abs=0.1)] * 2
    assert decoder < counts[2] < whole, "without fusion, bottleneck and alignment"
    assert 0 < counts[3] < decoder, "the blocks above 32 px"
    assert f"{whole + encoder:.0f}." in published or f"{whole + encoder - 1:.0f}." in published
    total = float(re.search(r"(\d+\.\d) M parameters in all", published)[1])  # type: ignore[index]
    assert total == pytest.approx(whole + encoder, abs=0.2)


def test_the_stages_are_in_it_with_their_losses(published: str) -> None:
    for name, images, updates in (
        ("strong-alignment", "20,000,000", "39,063"),
        ("weak-alignment", "20,000,000", "39,063"),
        ("ssim", "1,000,000", "1,954"),
        ("patchgan", "3,000,000", "5,860"),
    ):
        assert f"stage {name}: {images} images, {updates} updates" in published
    assert "multiscale_l1 0.1 (until 5,000,000 images)" in published
    assert "trains  decoder>32 (" in published
    assert "patch_adversarial 1, feature_matching 10" in published
    assert "85,940 updates of 512 images" in published


def test_shapes_are_those_of_the_first_batch(published: str) -> None:
    assert "images [512, 3, 256, 256] uint8, latents [512, 32, 16, 16]" in published
    assert "reconstructions [512, 3, 256, 256], " in published


@pytest.mark.parametrize("fused", [True, False])
def test_counts_are_those_of_the_real_model(fused: bool) -> None:
    config = tiny(stages=(stage(trains=("fusion", "align")), stage(name="b")), fused=fused)
    counts = re.findall(r"\((\d+\.\d) M parameters\)", description(config))
    built = job(batch_size=2)
    for part, count in zip((("fusion", "align"), config.stages[1].trains), counts, strict=True):
        trained = set_trained(built.tokenizer, part)
        assert count == f"{sum(p.numel() for p in trained.values()) / 1e6:.1f}"


def test_schedules_and_absent_terms_are_said() -> None:
    schedules = (TermSchedule(term="l1", start=2000, ramp=500), TermSchedule(term="ssim", end=9000))
    losses = LossWeights(ssim=0.5, entropy=1.0)
    gaussian = description(tiny(stages=(stage(losses, schedules=schedules),)))
    assert "l1 1 (from 2,000 rising over 500 images)" in gaussian
    assert "ssim 0.5 (until 9,000 images)" in gaussian
    assert "kl" in gaussian and "entropy" not in gaussian and "quantization" not in gaussian
    discrete = replace(tiny().tokenizer, bottleneck=BottleneckConfig(kind="discrete", codebooks=2, codes=64))
    shown = description(tiny(stages=(stage(losses),), tokenizer=discrete))
    assert "kl" not in shown and "entropy 1" in shown and "quantization 1" in shown


def test_crops_are_said_where_they_are_unusual() -> None:
    large = stage(crops=CropConfig(side=(0.8, 1.0), flip=0.25))
    assert "crops   0.8 to 1 of the short side, mirrored with 0.25\n" in description(tiny(stages=(large,)))
    assert "crops" not in description(tiny(stages=(stage(),)))


def test_rates_of_parts_are_said() -> None:
    rates = (PartRate("style", 0.1), PartRate("decoder>32", 2.5))
    assert "rates   style x 0.1, decoder>32 x 2.5\n" in description(tiny(stages=(stage(rates=rates),)))
    assert "rates" not in description(tiny(stages=(stage(),)))


def test_the_data_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image folder .* does not exist"):
        description(tiny(data=str(tmp_path / "absent")))
    for number in range(3):
        save_image(tmp_path / f"{number}.png", 70, 80, seed=number)
    assert "images [2, 3, 64, 64] uint8" in description(tiny(data=str(tmp_path)))


def test_saved_bytes_are_counted_once_and_without_parameters() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh())
    inputs = torch.zeros(4, 8)
    with saved_bytes(model) as kept:
        model(inputs)
    assert sum(kept.values()) == 4 * (4 * 8 + 4 * 8), "the linear layer's input, the output of tanh"
