"""What a diffusion transformer adds to its tokens: positions, times, classes.

Shapes: B batch, C width, N = n * n tokens, d width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_FREQUENCIES = 128
MAX_PERIOD = 10_000.0


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """A linear layer in x's dtype, whatever its parameters'."""
    assert isinstance(layer, nn.Linear)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def sincos_positions(width: int, side: int) -> Tensor:
    """Fixed embedding of a side x side grid, float32 [side^2, width]; the column has the first half of it.

    Per axis: sin of width/4 frequencies 10000^(-4i/width), then cos of them (MAE, arXiv 2111.06377).
    Computed in float64. ValueError for a width that 4 does not divide.
    """
    if width % 4:
        raise ValueError(f"width {width} is not divisible by 4, as a 2-D sin-cos embedding needs")
    frequencies = MAX_PERIOD ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    along = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # [n, width / 4]
    axis = torch.cat([along.sin(), along.cos()], dim=1)  # [n, width / 2]
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def rotary_tables(head_width: int, side: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2-D rotary positions (RoPE, arXiv 2104.09864), float32 [first + side^2, d] each.

    The first half of a head turns with the row, the second with the column, by frequencies
    10000^(-2i / (d/2)), each for two neighbours. The `first` tokens before the grid do not turn. Angles are
    computed in float32, as published. ValueError for a width that 4 does not divide.
    """
    if head_width % 4:
        raise ValueError(f"heads of width {head_width} cannot turn in two dimensions; 4 must divide it")
    half = head_width // 2
    frequencies = 1 / MAX_PERIOD ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    along = (torch.arange(side, dtype=torch.float32)[:, None] * frequencies).repeat_interleave(2, dim=1)
    rows, columns = along.repeat_interleave(side, dim=0), along.repeat(side, 1)
    grid = torch.cat([rows, columns], dim=1)
    angles = torch.cat([grid.new_zeros(first, head_width), grid])  # [N, d]
    return angles.cos(), angles.sin()


class TimestepEmbedder(nn.Module):
    """Times [B] -> [B, C]: 256 numbers cos, then sin, of t (not scaled), then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = nn.Linear(2 * TIME_FREQUENCIES, width), nn.Linear(width, width)
        for layer in (first, second):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The angles are computed in float32, or in float64 for t of that."""
        wide = torch.promote_types(t.dtype, torch.float32)
        numbers = torch.arange(TIME_FREQUENCIES, dtype=wide, device=t.device)
        angles = t[:, None].to(wide) * torch.exp(-math.log(MAX_PERIOD) * numbers / TIME_FREQUENCIES)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)  # [B, 256]
        return linear(F.silu(linear(waves, self.mlp[0])), self.mlp[2])


class LabelEmbedder(nn.Module):
    """Labels [B] -> [B, C]; the row after the last class is that of the null class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return self.embedding_table(y).to(dtype)
