"""The ends of a diffusion transformer: latents and class token in, tokens to an encoder's features out.

Shapes: B batch, C latent channels, n tokens per side, D width, K class token width, p patch. Layers compute
in the dtype of their input.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae.diffusion.config import TransformerConfig
from vfmvae.diffusion.embeddings import linear

NORM_EPS = 1e-6


class ConvProjector(nn.Module):
    """A 3 x 3 convolution over the grid of tokens [B, n*n, D] (iREPA)."""

    def __init__(self, config: TransformerConfig, out_width: int) -> None:
        super().__init__()
        self.grid = config.grid
        self.conv = nn.Conv2d(config.width, out_width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        conv = self.conv
        y = F.conv2d(image, conv.weight.to(x.dtype), conv.bias.to(x.dtype), padding=1)  # type: ignore[union-attr]
        return y.flatten(2).transpose(1, 2)


class MLPProjector(nn.Sequential):
    """Three linear layers with SiLU between them (REPA)."""

    def __init__(self, width: int, hidden: int, out_width: int) -> None:
        super().__init__(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, out_width),
        )

    def forward(self, x: Tensor) -> Tensor:
        for number in (0, 2):
            x = F.silu(linear(x, self[number]))
        return linear(x, self[4])


class ClassTokenEmbedder(nn.Module):
    """The noisy class token [B, K] -> a token [B, 1, D]."""

    def __init__(self, class_token_width: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(class_token_width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, class_token: Tensor) -> Tensor:
        x, norm = linear(class_token, self.proj), self.norm
        x = F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        return x[:, None]


class PatchEmbedder(nn.Module):
    """Latents [B, C, h, w] -> tokens [B, n*n, D], by a convolution initialised as a linear layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, config.patch)
        nn.init.xavier_uniform_(self.proj.weight.view(config.width, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.proj.weight.to(x.dtype), self.proj.bias.to(x.dtype)  # type: ignore[union-attr]
        # Published models add up as a convolution does, and their tokens stay transposed: contiguous ones are
        # multiplied in another order. Both decide the last bits.
        if not x.is_cuda:
            return F.conv2d(x, weight, bias, self.patch).flatten(2).transpose(1, 2)
        # As a product, which is what a convolution without overlap is: cuDNN's may compute in TF32.
        batch, channels, height, width, p = *x.shape, self.patch
        patches = x.view(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, -1, channels * p * p)  # [B, n*n, C*p*p]
        return F.linear(patches, weight.flatten(1), bias)
