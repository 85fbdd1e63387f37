"""The Frechet distance against closed forms and a general matrix square root; statistics against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vfmvae.metrics.frechet import (
    GaussianStatistics,
    StatisticsAccumulator,
    feature_statistics,
    frechet_distance,
)


def gaussian(mean: Tensor, covariance: Tensor) -> GaussianStatistics:
    return GaussianStatistics(mean.double(), covariance.double(), 1000)


def test_diagonal_gaussians_have_a_closed_form() -> None:
    means, deviations = torch.randn(2, 6).double(), torch.rand(2, 6).double() + 0.1
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    first, second = (gaussian(m, s.square().diag()) for m, s in zip(means, deviations, strict=True))
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-12)


def test_a_common_rotation_changes_nothing_and_the_order_neither() -> None:
    rotation = torch.linalg.qr(torch.randn(5, 5).double()).Q
    a, b = torch.rand(2, 5).double().square().unbind()
    turned = [gaussian(torch.zeros(5), rotation @ c.diag() @ rotation.t()) for c in (a, b)]
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    assert frechet_distance(*turned) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(*reversed(turned)) == pytest.approx(expected, rel=1e-9)


def test_it_is_the_distance_with_a_general_matrix_square_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = torch.randn(300, 12), 0.3 + torch.randn(200, 12) @ torch.randn(12, 12)
    first, second = feature_statistics(a), feature_statistics(b)
    root = linalg.sqrtm(first.covariance.numpy() @ second.covariance.numpy()).real
    apart = (first.mean - second.mean).square().sum().item()
    expected = apart + (first.covariance + second.covariance).trace().item() - 2 * np.trace(root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_fewer_features_than_dimensions_are_no_trouble() -> None:
    few, offset = torch.randn(8, 64), torch.full((64,), 0.5)
    assert frechet_distance(feature_statistics(few), feature_statistics(few)) == pytest.approx(0, abs=1e-6)
    shifted = feature_statistics(few.double() + offset)
    assert frechet_distance(feature_statistics(few), shifted) == pytest.approx(16, rel=1e-6)
    along, across = torch.eye(4)[0].outer(torch.eye(4)[0]), torch.eye(4)[1].outer(torch.eye(4)[1])
    zero = torch.zeros(4)
    assert frechet_distance(gaussian(zero, along), gaussian(zero, across)) == pytest.approx(2, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_add_up_to_all_features_even_far_from_zero(dtype: torch.dtype) -> None:
    features = (torch.randn(101, 7).double() @ torch.randn(7, 7).double() + 1000).to(dtype)
    accumulator = StatisticsAccumulator()
    for batch in (*features.split(13), features[:0]):
        accumulator.update(batch)
    found = accumulator.statistics()
    numbers = features.double().numpy()
    np.testing.assert_allclose(found.mean.numpy(), numbers.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(numbers, rowvar=False), rtol=1e-10, atol=1e-9)
    assert found.count == 101 and found.covariance.dtype == torch.float64


def test_mistakes_are_named() -> None:
    accumulator = StatisticsAccumulator()
    with pytest.raises(ValueError, match="0 features have no covariance"):
        accumulator.statistics()
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        accumulator.update(torch.zeros(3))
    accumulator.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="1 features have no covariance"):
        accumulator.statistics()
    with pytest.raises(ValueError, match="width 4, those before had 3"):
        accumulator.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        accumulator.update(torch.full((2, 3), torch.inf))
    with pytest.raises(ValueError, match="widths 3 and 4"):
        frechet_distance(feature_statistics(torch.randn(5, 3)), feature_statistics(torch.randn(5, 4)))
