"""Pixel losses against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from vfmvae.losses.reconstruction import l1_loss, multiscale_l1_loss


def test_l1_is_two_from_black_to_white() -> None:
    assert l1_loss(torch.ones(2, 3, 4, 4), -torch.ones(2, 3, 4, 4)).item() == 2.0


def test_l1_is_the_mean_over_all_values_with_the_sign_as_gradient() -> None:
    prediction = torch.tensor([1.0, 0.5, -0.5, 0.0]).reshape(1, 1, 2, 2).requires_grad_()
    loss = l1_loss(prediction, torch.zeros(1, 1, 2, 2))
    loss.backward()
    assert loss.item() == 0.5
    assert prediction.grad is not None
    assert prediction.grad.flatten().tolist() == [0.25, 0.25, -0.25, 0.0]


def test_l1_of_bfloat16_is_computed_in_float32() -> None:
    prediction, target = torch.full((1, 3, 64, 64), 1.0), torch.full((1, 3, 64, 64), 1 / 3)
    loss = l1_loss(prediction.bfloat16(), target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2 / 3, rel=1e-6)


def test_different_shapes_are_refused_rather_than_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) and target \(2, 3, 4, 4\)"):
        l1_loss(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4))


def test_multiscale_sums_over_scales_of_a_constant_image() -> None:
    target = torch.full((2, 3, 16, 16), 0.5)
    smaller = [torch.full((2, 3, size, size), value) for size, value in ((8, 1.0), (4, 0.5), (2, -0.5))]
    assert multiscale_l1_loss(smaller, target).item() == pytest.approx(0.5 + 0.0 + 1.0)


def test_the_target_is_shrunk_with_antialiasing() -> None:
    # Stripes of two columns average to grey; a plain resize would look at the two dark columns alone.
    stripes = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(16).expand(1, 3, 64, 64)
    resized = multiscale_l1_loss([torch.zeros(1, 3, 16, 16)], stripes)
    assert resized.item() < 0.05
    # A ramp stays a ramp: away from the border, pixel k of the half-size image is the mean of 2k and 2k + 1.
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    half = ramp.reshape(1, 3, 64, 32, 2).mean(-1)[:, :, ::2]
    assert multiscale_l1_loss([half], ramp).item() < 1e-3
