"""Style mapping: the pooled latent becomes one style vector that modulates every decoder layer.

Equalised learning rate as in StyleGAN (arXiv 1812.04948): weights are stored with unit variance (divided by
the learning-rate multiplier) and scaled by multiplier/sqrt(fan_in) when used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EqualizedLinear(nn.Module):
    """Linear with weight * multiplier/sqrt(fan_in) and bias * multiplier, in the dtype of the weight."""

    def __init__(self, in_width: int, out_width: int, multiplier: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_width, in_width) / multiplier)
        self.bias = nn.Parameter(torch.full((out_width,), bias / multiplier))
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        # The scale goes to the input, which has fewer elements than the weight.
        x = x.to(self.weight.dtype) * (self.multiplier * self.weight.shape[1] ** -0.5)
        return F.linear(x, self.weight, self.bias if self.multiplier == 1 else self.bias * self.multiplier)


class StyleMapping(nn.Module):
    """Decompressed latent map [B, C, h, w] -> style [B, D].

    The map is averaged over positions (or over pooled x pooled cells, which are concatenated), scaled to unit
    mean square and passed through two equalised layers with a leaky ReLU between. `average` [D] follows the
    mean style in training, for truncation. The order of more than one cell, all of a channel before the next,
    is our reading: the publication uses one and does not say.
    """

    MULTIPLIER = 0.01
    AVERAGE_BETA = 0.995
    average: Tensor

    def __init__(self, in_channels: int, style_width: int, pooled: int = 1) -> None:
        super().__init__()
        width = in_channels * pooled**2
        self.pooled = pooled
        self.fc0 = EqualizedLinear(width, width, self.MULTIPLIER)
        self.fc1 = EqualizedLinear(width, style_width, self.MULTIPLIER)
        self.register_buffer("average", torch.zeros(style_width))
        self._newest = 1 - self.AVERAGE_BETA

    @contextmanager
    def averaging(self, newest: float) -> Iterator[None]:
        """While entered, a forward in training mode counts this much in `average`: average = (1 - newest) *
        average + newest * mean style. 0: it leaves `average` alone.
        """
        before, self._newest = self._newest, newest
        try:
            yield
        finally:
            self._newest = before

    def forward(self, z_map: Tensor, truncation: float = 1.0) -> Tensor:
        """`truncation` psi: 1 keeps the style, 0 replaces it by the average."""
        x = F.adaptive_avg_pool2d(z_map.to(self.fc0.weight.dtype), self.pooled).flatten(1)
        x = x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        style = self.fc1(F.leaky_relu(self.fc0(x), 0.2))  # [B, D]
        if self.training and self._newest:
            with torch.no_grad():
                self.average.lerp_(style.mean(dim=0).to(self.average.dtype), self._newest)
        return style if truncation == 1.0 else self.average.lerp(style, truncation)


def share_of_part(number: int, parts: int) -> float:
    """How much part `number` (0 for the first) of a batch in equal parts counts in the running mean, so that
    all of them, one after another, move it as the whole batch would.

    After k of n parts the mean is (beta * before + (1 - beta) / n * their sum), over the sum of its weights.
    """
    beta = StyleMapping.AVERAGE_BETA
    return (1 - beta) / parts / (beta + (1 - beta) * (number + 1) / parts)


class StyleSplit(nn.Module):
    """Style [B, D] -> per-channel scale [B, C]: m1 * m2 + m3 with (m1, m2, m3) linear in the style."""

    def __init__(self, style_width: int, channels: int) -> None:
        super().__init__()
        self.linear = EqualizedLinear(style_width, 3 * channels, bias=1.0)

    def forward(self, style: Tensor) -> Tensor:
        m1, m2, m3 = self.linear(style).chunk(3, dim=1)
        return m1 * m2 + m3
