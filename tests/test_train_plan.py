"""What --dry-run says is what would happen, in seconds on any machine."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.commands import save_image
from tests.tiny_runs import ALL_LOSSES, job, stage, tiny
from vfmvae.config import TrainConfig
from vfmvae.data.transforms import CropConfig
from vfmvae.recipes import RECIPES
from vfmvae.tokenizer import BottleneckConfig
from vfmvae.tokenizer.equivariance import EquivarianceConfig
from vfmvae.tokenizer.parts import set_trained
from vfmvae.train_plan import describe
from vfmvae.training.engine import EngineConfig
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
    losses = LossWeights(ssim=0.5)
    gaussian = description(tiny(stages=(stage(losses, images=20_000, schedules=schedules),)))
    assert "l1 1 (from 2,000 rising over 500 images)" in gaussian
    assert "ssim 0.5 (until 9,000 images)" in gaussian
    assert "kl" in gaussian and "entropy" not in gaussian and "quantization" not in gaussian
    discrete = replace(tiny().tokenizer, bottleneck=BottleneckConfig(kind="discrete", codebooks=2, codes=64))
    losses = LossWeights(ssim=0.5, entropy=1.0)
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


def test_equivariance_is_said() -> None:
    drawn = EquivarianceConfig(0.5, 0.25, (0.5, 1.0), (0, 90), (0.5,))
    wide = replace(tiny().tokenizer, resolution=128)
    shown = description(tiny(stages=(stage(equivariance=drawn), stage(name="b")), tokenizer=wide))
    assert (
        "equivariance  0.5 of the steps: latents and targets scaled by 0.5 or 1, turned by 0 or 90 degrees;"
        " 0.125 of the steps: images shrunk by 0.5\n"
    ) in shown
    assert "equivariance  none\n" in shown


def test_the_stage_that_needs_most_memory_is_named() -> None:
    small = stage(LossWeights(alignment=0.0), name="small", trains=("decoder>16",))
    stages = (small, stage(ALL_LOSSES, name="large"), small)
    shown = description(tiny(stages=stages, batch_size=8, engine=EngineConfig(accumulate=2, recompute=True)))
    assert "most in stage large, " in shown
    assert "computes 4 images at once (engine.accumulate 2): " in shown
    assert "decoder blocks computed again (engine.recompute)" in shown
    numbers = r"(\d+\.\d) GiB in one process.*: (\d+\.\d) GiB for weights.* and (\d+\.\d\d) GiB per image"
    total, fixed, image = map(float, re.search(numbers, shown).groups())  # type: ignore[union-attr]
    assert total == pytest.approx(fixed + 4 * image, abs=0.15)
    assert shown.count("  memory  ") == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trains": ("fusion", "align", "heart")}, "unknown part 'heart'"),
        ({"trains": ("fusion", "align", "decoder>64")}, "no decoder block lies above 64 px"),
        ({"losses": replace(ALL_LOSSES, adversarial=1.0)}, "batch of 9 images per process cannot be cut"),
    ],
)
def test_errors_of_later_stages_are_found(changes: dict[str, object], message: str) -> None:
    first, second = stage(LossWeights(alignment=0.5), name="a"), stage(LossWeights(alignment=0.5), name="b")
    with pytest.raises(ValueError, match=message):
        description(tiny(stages=(first, replace(second, **changes)), batch_size=9))


def test_a_discriminator_that_cannot_be_is_found() -> None:
    absent = replace(tiny().discriminator, layers=(0, 77))
    with pytest.raises(ValueError, match="layer 77 does not exist"):
        description(tiny(stages=(stage(LossWeights(alignment=0.5, adversarial=1.0)),), discriminator=absent))


def test_a_batch_that_cannot_be_accumulated_is_found() -> None:
    with pytest.raises(ValueError, match="batch_size 4 cannot be shared by 1 processes in 3 parts"):
        description(tiny(batch_size=4, engine=EngineConfig(accumulate=3)))
