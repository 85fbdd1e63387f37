"""Gaussian data, for which the velocity and every marginal are known, as a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Out(NamedTuple):
    velocity: Tensor
    class_velocity: Tensor | None


def gaussian_velocity(x: Tensor, t: Tensor, mean: Tensor, std: float) -> Tensor:
    """E[e - x0 | x_t] for data N(mean, std^2) on the linear path."""
    variance = ((1 - t) * std) ** 2 + t**2
    return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean


def gaussian_solution(noise: Tensor, mean: Tensor, std: float) -> Tensor:
    """Where the ODE ends: quantiles are kept, so standard normal noise is scaled and moved."""
    return mean + std * noise


class GaussianModel(nn.Module):
    """The interface of a DiffusionTransformer; data of class k is N(means[k], std^2), the last one is null.

    With `class_token_width` the class token is N(-means[k], std^2). Calls are kept: rows, time, labels.
    """

    def __init__(
        self,
        means: tuple[float, ...] = (2.0, -1.0, 0.5),
        std: float = 0.5,
        class_token_width: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.means, self.std, self.dtype = torch.tensor(means, dtype=torch.float64), std, dtype
        self.config = SimpleNamespace(
            classes=len(means) - 1, channels=4, latent_size=2, class_token_width=class_token_width
        )
        self.calls: list[tuple[int, float, list[int]]] = []
        self.part = nn.Dropout().eval()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, class_token: Tensor | None = None) -> Out:
        assert x.dtype == self.dtype and not self.training and not torch.is_grad_enabled()
        self.calls.append((len(x), float(t[0]), y.tolist()))
        mean = self.means[y].to(x.dtype)
        velocity = gaussian_velocity(
            x, t.to(x.dtype)[:, None, None, None], mean[:, None, None, None], self.std
        )
        if self.config.class_token_width is None:
            assert class_token is None
            return Out(velocity, None)
        assert class_token is not None and class_token.dtype == self.dtype
        return Out(velocity, gaussian_velocity(class_token, t.to(x.dtype)[:, None], -mean[:, None], self.std))
