"""Adversarial losses against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from vfmvae.losses.adversarial import (
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    lsgan_discriminator_loss,
    lsgan_generator_loss,
    r1_penalty,
)

LOGITS = torch.tensor([[-2.0, 0.0], [0.5, 3.0]])


def test_hinge_losses() -> None:
    # relu(1 - x): 3, 1, 0.5, 0; relu(1 + x): 0, 1, 1.5, 4
    assert hinge_discriminator_loss(LOGITS, torch.full((1, 5), -1.0)).item() == 4.5 / 4
    assert hinge_discriminator_loss(torch.full((1, 5), 1.0), LOGITS).item() == 6.5 / 4
    assert hinge_discriminator_loss(torch.zeros(2), torch.zeros(3)).item() == 2
    assert hinge_generator_loss(LOGITS).item() == -0.375


def test_the_hinge_stops_pulling_beyond_its_margin() -> None:
    real, fake = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    hinge_discriminator_loss(real, fake).backward()
    assert real.grad is not None and real.grad.tolist() == [[-0.25, -0.25], [-0.25, 0]]
    assert fake.grad is not None and fake.grad.tolist() == [[0, 0.25], [0.25, 0.25]]


def test_least_squares_losses_are_means_over_scales_of_any_size() -> None:
    ones, halves = torch.ones(2, 1, 4, 4), torch.full((2, 1, 2, 2), 0.5)
    assert lsgan_discriminator_loss([ones], [0 * ones]).item() == 0
    assert lsgan_discriminator_loss([ones, halves], [ones, halves]).item() == (1 + 0.5) / 2
    assert lsgan_generator_loss([ones]).item() == 0
    assert lsgan_generator_loss([-ones, halves]).item() == (4 + 0.25) / 2


def test_feature_matching_sums_layers_and_averages_scales() -> None:
    def features(*values: float) -> list[torch.Tensor]:
        return [torch.full((2, 3 * k, 8 // k, 8 // k), value) for k, value in enumerate(values, start=1)]

    real = [features(0, 0, 0, 0), features(1, 1, 1, 1)]
    fake = [features(1, -2, 3, 0), features(1, 1, 1, 0)]
    assert feature_matching_loss(fake, real).item() == (6 + 1) / 2
    two_layers = [features(1, 0)], [features(0, 0)]
    assert feature_matching_loss(*two_layers).item() == 2.0


def test_feature_matching_leaves_the_real_side_alone() -> None:
    fake, real = torch.ones(1, 4).requires_grad_(), torch.zeros(1, 4).requires_grad_()
    feature_matching_loss([[fake]], [[real]]).backward()
    assert real.grad is None
    assert fake.grad is not None and fake.grad.tolist() == [[1.0] * 4]


def test_r1_is_the_squared_gradient_of_the_mean_logit() -> None:
    images = torch.randn(3, 3, 4, 4).requires_grad_()
    weight = torch.randn(3, 3, 4, 4).requires_grad_()
    score = (images * weight).sum(dim=(1, 2, 3))
    penalty = r1_penalty(images, torch.stack([score, 3 * score], dim=1))  # the mean logit is 2 * score
    expected = 4 * weight.detach().square().sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    torch.testing.assert_close(weight.grad, 8 * weight.detach() / 3)


@pytest.mark.parametrize("loss", [hinge_generator_loss, lambda x: lsgan_generator_loss([x])])
def test_16_bit_logits_are_averaged_in_float32(loss) -> None:
    logits = torch.full((4096,), 1 / 3, dtype=torch.bfloat16)
    value = loss(logits)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(logits.double()).item(), rel=1e-6)


def test_mistakes_are_named() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="2 scales for real and 1 for generated"):
        lsgan_discriminator_loss([x, x], [x])
    with pytest.raises(ValueError, match="0 scales"):
        lsgan_generator_loss([])
    with pytest.raises(ValueError, match=r"\[\[1, 1\]\] and real ones \[\[1, 1\], \[1, 1\]\]"):
        feature_matching_loss([[x]], [[x, x]])
    with pytest.raises(ValueError, match="requires_grad_"):
        r1_penalty(torch.zeros(1, 3, 2, 2), x)
