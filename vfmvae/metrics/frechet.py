"""The Frechet distance between two sets of features, each taken for a Gaussian (FID, arXiv 1706.08500).

Features are [N, D], of any encoder or classifier. Statistics are float64 whatever the features are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianStatistics:
    """What a set of features is reduced to."""

    mean: Tensor  # float64 [D]
    covariance: Tensor  # float64 [D, D], of the sample: divided by N - 1
    count: int


class StatisticsAccumulator:
    """Mean and covariance of features that come in batches, on the device of the first one.

    Batches are merged by their means and squared deviations (Chan et al., 1983), so a large common offset
    costs no digits, as it does in sums of squares.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._deviations = torch.zeros(())

    def update(self, features: Tensor) -> None:
        """Take in a batch [B, D]; an empty one changes nothing. ValueError for another shape or NaN."""
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(
                f"features are {features.dtype} of shape {tuple(features.shape)};"
                f" needed is floating point [B, D]"
            )
        if self._count and features.shape[1] != len(self._mean):
            raise ValueError(f"features have width {features.shape[1]}, those before had {len(self._mean)}")
        if not len(features):
            return
        features = features.detach().double()
        if not features.isfinite().all():
            raise ValueError("features have values that are not finite; a distance would hide them")
        mean = features.mean(dim=0)
        centred = features - mean
        deviations = centred.t() @ centred
        if self._count:
            count, total = len(features), self._count + len(features)
            apart = mean - self._mean
            deviations += self._deviations + torch.outer(apart, apart) * (self._count * count / total)
            mean = self._mean + apart * (count / total)
        self._count += len(features)
        self._mean, self._deviations = mean, deviations

    def statistics(self) -> GaussianStatistics:
        """Of everything so far; ValueError below two features."""
        if self._count < 2:
            raise ValueError(f"{self._count} features have no covariance; at least 2 are needed")
        return GaussianStatistics(self._mean.clone(), self._deviations / (self._count - 1), self._count)


def feature_statistics(features: Tensor) -> GaussianStatistics:
    """Of features [N, D] that are all there."""
    accumulator = StatisticsAccumulator()
    accumulator.update(features)
    return accumulator.statistics()


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """|m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)), at least 0; computed in float64.

    (C1 C2)^(1/2) has the trace of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric and positive: its
    eigenvalues' roots are added. Unlike a general matrix square root this is exact for singular covariances,
    as those of fewer features than dimensions are.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"statistics have widths {len(first.mean)} and {len(second.mean)}; the same features are needed"
        )
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.t()
    product = root @ second.covariance.to(root.device) @ root
    mixed = torch.linalg.eigvalsh((product + product.t()) / 2).clamp(min=0).sqrt().sum()
    apart = (first.mean - second.mean.to(root.device)).square().sum()
    traces = first.covariance.trace() + second.covariance.trace().to(root.device)
    return max((apart + traces - 2 * mixed).item(), 0.0)
