"""Evaluation sees the same held-out images whatever the batch size, and measures what was decoded."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_runs import tiny
from vfmvae.data import Photographs
from vfmvae.images import to_uint8, to_unit
from vfmvae.losses.perceptual import perceptual_network
from vfmvae.metrics.reconstruction import psnr
from vfmvae.tokenizer import Tokenizer
from vfmvae.training import evaluation
from vfmvae.training.evaluation import evaluate
from vfmvae.training.forward import TrainingForward


def test_the_first_held_out_images_whatever_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "HELD_OUT_IMAGES", 9)
    tokenizer, held_out = Tokenizer(tiny().tokenizer).train(), Photographs("validation", 64)
    networks = {"mini_distance": perceptual_network("mini")}
    by_two, by_nine = (evaluate(TrainingForward(tokenizer), held_out, size, networks) for size in (2, 9))
    assert torch.equal(by_two.images, held_out.batch(0, 9)["image"])
    assert torch.equal(by_two.images, by_nine.images)
    assert by_two.quality == pytest.approx(by_nine.quality, rel=1e-3)
    assert list(by_two.quality) == ["psnr", "ssim", "mini_distance"]
    assert tokenizer.training


def test_the_measures_are_those_of_the_rounded_reconstructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "HELD_OUT_IMAGES", 4)
    tokenizer, held_out = Tokenizer(tiny().tokenizer), Photographs("validation", 64)
    found = evaluate(TrainingForward(tokenizer), held_out, 4, {})
    with torch.no_grad():
        decoded = to_uint8(tokenizer.eval().decode(tokenizer.encode(found.images).mode()))
    assert torch.equal(found.reconstructions, decoded)
    error = (decoded.double() - found.images.double()).square().mean((1, 2, 3))
    expected = (10 * torch.log10(255**2 / error)).mean().item()
    assert found.quality["psnr"] == pytest.approx(expected, rel=1e-5)
    assert psnr(to_unit(decoded), to_unit(found.images)).mean().item() == pytest.approx(expected, rel=1e-5)
