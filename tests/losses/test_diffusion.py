"""Diffusion losses worked out by hand, and in float64 by numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from vfmvae.losses.diffusion import cosine_loss, standardise_tokens, token_alignment_loss, velocity_loss


def test_velocity_loss_is_the_mean_square() -> None:
    prediction = torch.zeros(2, 3, 2, 2, requires_grad=True)
    velocity = torch.zeros(2, 3, 2, 2)
    velocity[0, 1] = 2.0  # 4 of 24 elements, 4 each
    loss = velocity_loss(prediction, velocity)
    assert loss.item() == pytest.approx(16 / 24)
    loss.backward()
    assert prediction.grad is not None
    torch.testing.assert_close(prediction.grad, -2 * velocity / 24)
    assert velocity_loss(torch.zeros(2, 5), torch.full((2, 5), 3.0)).item() == 9.0


def test_cosine_loss_goes_over_channels() -> None:
    prediction = torch.zeros(1, 2, 1, 3)
    prediction[0, 0] = 1.0  # along the first channel at every place
    velocity = torch.zeros(1, 2, 1, 3)
    velocity[0, :, 0] = torch.tensor([[5.0, 0.0, -2.0], [0.0, 3.0, 0.0]])  # same, orthogonal, opposite
    assert cosine_loss(prediction, velocity).item() == pytest.approx((0 + 1 + 2) / 3)


def test_token_alignment_is_minus_the_mean_cosine() -> None:
    rng = np.random.default_rng(0)
    projected, target = rng.standard_normal((2, 5, 7)), rng.standard_normal((2, 5, 7))
    lengths = np.linalg.norm(projected, axis=-1) * np.linalg.norm(target, axis=-1)
    truth = -((projected * target).sum(-1) / lengths).mean()
    loss = token_alignment_loss(torch.from_numpy(projected), torch.from_numpy(target))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(truth, abs=1e-6)
    assert token_alignment_loss(
        torch.from_numpy(3 * target), torch.from_numpy(target)
    ).item() == pytest.approx(-1)


def test_the_target_is_a_constant() -> None:
    projected, target = (torch.randn(1, 2, 3, requires_grad=True) for _ in range(2))
    token_alignment_loss(projected, target).backward()
    assert projected.grad is not None and target.grad is None


def test_standardised_tokens_against_numpy() -> None:
    tokens = np.random.default_rng(1).standard_normal((2, 6, 3)) * 4 + 2
    truth = (tokens - tokens.mean(1, keepdims=True)) / (tokens.std(1, ddof=1, keepdims=True) + 1e-6)
    found = standardise_tokens(torch.from_numpy(tokens))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.from_numpy(truth).float(), rtol=1e-5, atol=1e-5)


def test_a_channel_without_variation_becomes_zero() -> None:
    assert standardise_tokens(torch.full((1, 4, 2), 5.0)).abs().max() == 0


@pytest.mark.parametrize("loss", [velocity_loss, cosine_loss, token_alignment_loss])
def test_sixteen_bits_are_widened_and_shapes_checked(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    assert loss(a, b).dtype == torch.float32 and loss(a, b).equal(loss(a.float(), b.float()))
    with pytest.raises(ValueError, match="differ in shape"):
        loss(a, b[:1])


def test_one_token_has_no_spread() -> None:
    with pytest.raises(ValueError, match="2 tokens"):
        standardise_tokens(torch.zeros(1, 1, 3))
