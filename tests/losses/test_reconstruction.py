"""Pixel losses against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vfmvae.losses.reconstruction import l1_loss, l2_loss, multiscale_l1_loss, resized, ssim_loss


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


def test_l2_is_four_from_black_to_white_with_twice_the_difference_as_gradient() -> None:
    assert l2_loss(torch.ones(2, 3, 4, 4), -torch.ones(2, 3, 4, 4)).item() == 4.0
    prediction = torch.tensor([1.0, 0.5, -0.5, 0.0]).reshape(1, 1, 2, 2).requires_grad_()
    loss = l2_loss(prediction, torch.zeros(1, 1, 2, 2))
    loss.backward()
    assert loss.item() == 1.5 / 4
    assert prediction.grad is not None
    assert prediction.grad.flatten().tolist() == [0.5, 0.25, -0.25, 0.0]


def test_ssim_loss_of_constant_images_is_known() -> None:
    # Without variance what is left is (2 a b + c1) / (a^2 + b^2 + c1), c1 = (0.01 * 2)^2.
    a, b, c1 = 0.5, -0.25, 0.0004
    loss = ssim_loss(torch.full((2, 3, 16, 16), a), torch.full((2, 3, 16, 16), b))
    assert loss.item() == pytest.approx(1 - (2 * a * b + c1) / (a * a + b * b + c1), rel=1e-5)


def test_ssim_loss_is_zero_for_equal_images_and_falls_along_its_gradient() -> None:
    target, prediction = torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 3, 16, 16) * 2 - 1
    assert ssim_loss(target, target).item() == pytest.approx(0.0, abs=1e-6)
    prediction.requires_grad_()
    loss = ssim_loss(prediction, target)
    (slope,) = torch.autograd.grad(loss, prediction)
    step = 1e-2 * slope / slope.norm()
    fallen = loss.item() - ssim_loss(prediction - step, target).item()
    assert fallen == pytest.approx(1e-2 * slope.norm().item(), rel=0.05)


@pytest.mark.parametrize("loss", [l1_loss, l2_loss, ssim_loss])
def test_different_shapes_are_refused_rather_than_broadcast(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\) and target \(2, 3, 16, 16\)"):
        loss(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))


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


def test_targets_that_are_resized_already_give_the_same_loss() -> None:
    target = torch.rand(2, 3, 32, 32) * 2 - 1
    predictions = [torch.rand(2, 3, size, size) * 2 - 1 for size in (16, 8)]
    smaller = [resized(target, image.shape[-2:]) for image in predictions]
    assert torch.equal(multiscale_l1_loss(predictions, smaller), multiscale_l1_loss(predictions, target))
    with pytest.raises(ValueError, match="2 predictions and 1 targets"):
        multiscale_l1_loss(predictions, smaller[:1])
    with pytest.raises(ValueError, match="differ in shape"):
        multiscale_l1_loss(predictions, smaller[::-1])
