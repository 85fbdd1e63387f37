"""The adaptive weight against gradient norms, and the distance from a snapshot, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vfmvae.losses.alignment import (
    MAX_WEIGHT,
    adaptive_weight,
    gradient_ratio,
    latent_preservation_loss,
)


def quadratics(a: float, b: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses a/2 |w|^2 and b/2 |w|^2 at w = (3, 4): gradient norms 5a and 5b."""
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    return a / 2 * weight.square().sum(), b / 2 * weight.square().sum(), weight


def test_it_is_the_ratio_of_gradient_norms() -> None:
    assert adaptive_weight(*quadratics(2.0, 0.5)).item() == pytest.approx(10.0 / (2.5 + 1e-4), rel=1e-6)


def test_a_vanishing_alignment_gradient_stays_finite() -> None:
    assert adaptive_weight(*quadratics(2.0, 0.0)).item() == pytest.approx(10.0 / 1e-4, rel=1e-6)
    assert adaptive_weight(*quadratics(1e9, 0.0)).item() == MAX_WEIGHT == 1e8


def test_it_carries_no_gradient_and_leaves_both_graphs_usable() -> None:
    reconstruction, alignment, weight = quadratics(2.0, 0.5)
    ratio = adaptive_weight(reconstruction, alignment, weight)
    assert not ratio.requires_grad
    assert weight.grad is None, "no gradient is accumulated on the way"
    (reconstruction + ratio * alignment).backward()
    assert weight.grad is not None
    # The balanced gradients are equally long and parallel here, so the sum is twice the first.
    assert weight.grad.norm().item() == pytest.approx(2 * 10.0, rel=1e-4)


def test_norms_are_taken_over_the_whole_weight_matrix() -> None:
    weight = torch.ones(2, 3, requires_grad=True)
    factors = torch.arange(6.0).reshape(2, 3)
    ratio = adaptive_weight((weight * factors).sum(), weight.sum(), weight)
    assert ratio.item() == pytest.approx(math.sqrt(55) / (math.sqrt(6) + 1e-4), rel=1e-6)


def test_the_ratio_of_given_gradients_is_the_adaptive_weight() -> None:
    ratio = gradient_ratio(torch.tensor([[3.0], [4.0]], dtype=torch.float64), torch.tensor([[0.0], [0.5]]))
    assert ratio.item() == pytest.approx(5.0 / (0.5 + 1e-4), rel=1e-6)
    assert ratio.dtype == torch.float32


def test_preservation_is_the_mean_squared_difference() -> None:
    latents = torch.zeros(2, 3, 2, 2, requires_grad=True)
    snapshot = torch.zeros(2, 3, 2, 2)
    snapshot[0, 1] = 2.0  # 4 of 24 elements, 4 each
    loss = latent_preservation_loss(latents, snapshot)
    assert loss.item() == pytest.approx(16 / 24)
    loss.backward()
    assert latents.grad is not None
    torch.testing.assert_close(latents.grad, -2 * snapshot / 24)


def test_preservation_weighs_the_same_at_every_latent_size() -> None:
    sizes = ((1, 4, 2, 2), (3, 32, 8, 8))
    assert [latent_preservation_loss(torch.full(s, 0.5), torch.zeros(s)).item() for s in sizes] == [0.25] * 2


def test_the_snapshot_is_a_constant_and_sixteen_bits_are_widened() -> None:
    latents = torch.full((1, 1, 1, 1), 256.0, dtype=torch.bfloat16, requires_grad=True)
    snapshot = torch.full((1, 1, 1, 1), 1.0, requires_grad=True)
    loss = latent_preservation_loss(latents, snapshot)
    assert loss.item() == 255.0**2  # 255 * 255 is no bfloat16 number
    loss.backward()
    assert snapshot.grad is None
    with pytest.raises(ValueError, match=r"latents \(1, 1, 1, 1\) and snapshot \(2, 1, 1, 1\)"):
        latent_preservation_loss(latents, torch.zeros(2, 1, 1, 1))
