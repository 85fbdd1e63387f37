from __future__ import annotations

import torch
from torch.distributions import Normal, kl_divergence

from vfmvae import ops


def test_sample_and_divergence_are_those_of_a_normal_distribution() -> None:
    mean, logvar, noise = (torch.randn(3, 2, 4, 4).double() for _ in range(3))
    z, kl = ops.gaussian_posterior(mean, logvar, noise)
    distribution = Normal(mean, (0.5 * logvar).exp())
    torch.testing.assert_close(z, distribution.mean + distribution.stddev * noise)
    torch.testing.assert_close(kl, kl_divergence(distribution, Normal(0.0, 1.0)).flatten(1).sum(1))


def test_log_variance_is_clamped() -> None:
    mean, one = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    logvar = torch.tensor([-100.0, 100.0]).view(1, 1, 1, 2)
    z, kl = ops.gaussian_posterior(mean, logvar, one)
    torch.testing.assert_close(z.flatten(), torch.tensor([-15.0, 10.0]).exp())
    assert torch.isfinite(kl).all()
