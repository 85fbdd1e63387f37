"""What a stage of a diffusion run may be."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vfmvae.training.diffusion_stage import DiffusionLosses, DiffusionStageConfig, half_life_of
from vfmvae.training.ema import ema_beta


def test_the_default_average_keeps_what_is_published() -> None:
    # 0.9999 per update of 1024 images, whatever the batch of a run is.
    ema = DiffusionStageConfig().ema
    assert ema_beta(ema, 1024, 0) == pytest.approx(0.9999, abs=1e-12)
    assert ema_beta(ema, 256, 10**9) == pytest.approx(0.9999**0.25, abs=1e-12)
    assert half_life_of(0.5, 7) == pytest.approx(7)


def test_terms_without_weight_are_left_out() -> None:
    assert DiffusionLosses(cosine=0.5, class_token=0.0).weights() == {"velocity": 1.0, "cosine": 0.5}
    assert DiffusionLosses(velocity=0.0, cosine=1.0).weights() == {"cosine": 1.0}


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ({"velocity": 0.0, "alignment": 1.0}, "no loss asks for the velocity; give losses.velocity or"),
        ({"alignment": -1.0}, "losses.alignment is -1.0; weights must be finite and not negative"),
        ({"cosine": math.inf}, "losses.cosine is inf"),
    ],
)
def test_losses_that_cannot_be(losses: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DiffusionLosses(**losses)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": ""}, "a stage needs a name"),
        ({"images": 0}, "stage 'train': images is 0; it must be at least 1"),
        ({"label_dropout": 1.5}, r"label_dropout is 1.5; it must lie in \[0, 1\]"),
        ({"standardise_features": True}, "standardise_features is about losses.alignment, whose weight is 0"),
        ({"path": "straight"}, "path"),
    ],
)
def test_stages_that_cannot_be(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DiffusionStageConfig(**changes)
