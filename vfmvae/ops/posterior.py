"""The diagonal Gaussian posterior: clamp, sample and Kullback-Leibler divergence."""

from __future__ import annotations

from torch import Tensor

from vfmvae.ops.dispatch import Fused, Op

LOGVAR_RANGE = (-30.0, 20.0)


def gaussian_posterior(
    mean: Tensor, logvar: Tensor, noise: Tensor, *, fused: Fused = True
) -> tuple[Tensor, Tensor]:
    """Draw from N(mean, exp(logvar)) and measure it against N(0, 1).

    Args:
        mean, logvar: [B, C, h, w]; logvar is clamped to [-30, 20].
        noise: [B, C, h, w], standard normal.

    Returns:
        z = mean + exp(logvar/2) * noise, [B, C, h, w], and the divergence
        0.5 * sum(mean^2 + exp(logvar) - 1 - logvar) of each sample, [B].
    """
    return _GAUSSIAN_POSTERIOR(fused, mean, logvar, noise)


def gaussian_posterior_reference(mean: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    logvar = logvar.clamp(*LOGVAR_RANGE)
    z = mean + (0.5 * logvar).exp() * noise
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)
    return z, kl


_GAUSSIAN_POSTERIOR = Op("gaussian_posterior", gaussian_posterior_reference)
