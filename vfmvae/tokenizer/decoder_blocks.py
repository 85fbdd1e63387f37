"""The modules of the progressive decoder: latent branch, upsampling, ConvNeXt layer, attention, to-RGB.

VFM-VAE (arXiv 2510.18457), section 3 and appendix; ConvNeXt (arXiv 2201.03545); attention as in GigaGAN
(arXiv 2303.05511).
Shapes: x [B, C, H, W] in the compute dtype, channels-last in the fused path; style [B, D] in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae import ops
from vfmvae.tokenizer.style import StyleSplit


class Depthwise(nn.Module):
    """k x k depthwise convolution; weight [C, 1, k, k]."""

    fused: bool = True

    def __init__(self, channels: int, kernel_size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(_uniform((channels, 1, kernel_size, kernel_size), kernel_size**2))
        self.bias = nn.Parameter(_uniform((channels,), kernel_size**2)) if bias else None

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return ops.depthwise_conv2d(x, self.weight, self.bias, noise, fused=self.fused)


class Pointwise(nn.Module):
    """1 x 1 convolution; weight [D, C]."""

    fused: bool = True

    def __init__(self, in_channels: int, out_channels: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(_uniform((out_channels, in_channels), in_channels))
        self.bias = nn.Parameter(_uniform((out_channels,), in_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.pointwise_conv2d(x, self.weight, self.bias, fused=self.fused)


class GroupNorm(nn.Module):
    """Group norm, eps 1e-5, with an optional activation behind it."""

    fused: bool = True

    def __init__(self, groups: int, channels: int, activation: ops.Activation | None = None) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be divided into {groups} groups")
        self.groups = groups
        self.activation = activation
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm(
            x, self.groups, self.weight, self.bias, activation=self.activation, fused=self.fused
        )


def feature_groups(channels: int) -> int:
    """Groups of the feature path's norms: four or more channels in each, at most 32 groups."""
    return max(1, min(32, channels // 4))


class LatentBranch(nn.Module):
    """Brings the latent map [B, Z, h, w] to a block's input size [B, C, h/s, w/s] with s = `shrink`."""

    fused: bool = True

    def __init__(self, z_channels: int, channels: int, shrink: float, activation: ops.Activation) -> None:
        super().__init__()
        self.unshuffle = int(shrink) if shrink > 1 else 1
        self.shuffle = int(1 / shrink) if shrink < 1 else 1
        inner = z_channels * self.unshuffle**2
        spread = channels * self.shuffle**2
        self.depthwise = Depthwise(inner, 3)
        self.mix = Pointwise(inner, spread)
        self.norm = GroupNorm(min(32, spread), spread, activation)
        self.out = Pointwise(channels, channels)
        self.out_norm = GroupNorm(min(32, channels), channels)

    def forward(self, z_map: Tensor) -> Tensor:
        x = F.pixel_unshuffle(z_map, self.unshuffle) if self.unshuffle > 1 else z_map
        x = self.norm(self.mix(self.depthwise(x)))
        if self.shuffle == 2:
            x = ops.upsample_blur(x, 1, 2, fused=self.fused)  # no blur: a shuffle that stays channels-last
        elif self.shuffle > 1:
            x = F.pixel_shuffle(x, self.shuffle)
        return self.out_norm(self.out(x))


class Upsample(nn.Module):
    """Norm, depthwise 3 x 3, 1 x 1, pixel-shuffle by 2, binomial blur: [B, C, H, W] -> [B, D, 2H, 2W]."""

    fused: bool = True

    def __init__(self, in_channels: int, out_channels: int, blur: int, *, norm_after: bool = False) -> None:
        """`blur`: kernel size 3 or 5, or 1 for none. `norm_after`: the norm sits between shuffle and blur."""
        super().__init__()
        self.blur = blur
        self.norm_after = norm_after
        normed = out_channels if norm_after else in_channels
        self.norm = GroupNorm(feature_groups(normed), normed)
        self.depthwise = Depthwise(in_channels, 3)
        self.pointwise = Pointwise(in_channels, 4 * out_channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`residual` [B, D, 2H, 2W] is added to the result."""
        if self.norm_after:
            x = self.norm(ops.upsample_blur(self.pointwise(self.depthwise(x)), 1, 2, fused=self.fused))
            return ops.upsample_blur(x, self.blur, 1, residual, fused=self.fused)
        x = self.pointwise(self.depthwise(self.norm(x)))
        return ops.upsample_blur(x, self.blur, 2, residual, fused=self.fused)


class ConvNeXtLayer(nn.Module):
    """x + gamma * W2 gelu(modulated W1 (norm(depthwise(x)))), with the noise map of legacy checkpoints."""

    fused: bool = True
    noise: Tensor

    def __init__(
        self, channels: int, kernel_size: int, style_width: int, noise_size: int | None = None
    ) -> None:
        """`noise_size`: side of the fixed noise map, or None for no noise."""
        super().__init__()
        self.style = StyleSplit(style_width, channels)
        self.depthwise = Depthwise(channels, kernel_size, bias=True)
        self.norm = GroupNorm(feature_groups(channels), channels)
        # Demodulation removes the scale of this weight, so unit variance serves.
        self.expand_weight = nn.Parameter(torch.randn(4 * channels, channels))
        self.expand_bias = nn.Parameter(torch.zeros(4 * channels))
        self.contract_weight = nn.Parameter(_uniform((channels, 4 * channels), 4 * channels))
        self.contract_bias = nn.Parameter(_uniform((channels,), 4 * channels))
        self.gamma = nn.Parameter(torch.full((channels,), 1e-5))
        self.has_noise = noise_size is not None
        if noise_size is not None:
            self.register_buffer("noise", torch.randn(noise_size, noise_size))
            self.noise_strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return ops.modulated_convnext(
            x,
            self.depthwise.weight,
            self.depthwise.bias,
            self._noise(x.shape[-2:]) if self.has_noise else None,
            self.norm.groups,
            self.norm.weight,
            self.norm.bias,
            self.style(style),
            self.expand_weight,
            self.expand_bias,
            self.contract_weight,
            self.contract_bias,
            self.gamma,
            fused=self.fused,
        )

    def _noise(self, size: torch.Size) -> Tensor:
        noise = self.noise[None, None]
        if noise.shape[-2:] != size:
            noise = F.interpolate(noise, size, mode="bilinear", align_corners=False)
        return noise[0, 0] * self.noise_strength


class SelfAttention(nn.Module):
    """x + attention(rms(x)), then x + mlp(rms(x)); 8 heads, each with a learned null key and value."""

    HEADS = 8
    fused: bool = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % self.HEADS:
            raise ValueError(f"attention over {channels} channels: not divisible by {self.HEADS} heads")
        self.gamma = nn.Parameter(torch.ones(channels))
        self.qkv = Pointwise(channels, 3 * channels)
        self.null_key = nn.Parameter(torch.randn(self.HEADS, channels // self.HEADS))
        self.null_value = nn.Parameter(torch.randn(self.HEADS, channels // self.HEADS))
        self.out = Pointwise(channels, channels)
        self.mlp_gamma = nn.Parameter(torch.ones(channels))
        self.mlp_expand = Pointwise(channels, 4 * channels, bias=True)
        self.mlp_contract = Pointwise(4 * channels, channels, bias=True)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.mlp_contract.weight)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(ops.channel_rms_norm(x, self.gamma, fused=self.fused))
        tokens = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, 3, self.HEADS, -1)
        query, key, value = tokens.permute(2, 0, 3, 1, 4)  # each [B, heads, H*W, d]
        y = ops.attention(query, key, value, self.null_key, self.null_value, fused=self.fused)
        y = y.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        x = x + self.out(y)
        hidden = F.gelu(self.mlp_expand(ops.channel_rms_norm(x, self.mlp_gamma, fused=self.fused)))
        return x + self.mlp_contract(hidden)


class ToRGB(nn.Module):
    """[B, C, H, W] -> image [B, 3, H, W] in float32: 1 x 1, modulated by the style over sqrt(C)."""

    fused: bool = True

    def __init__(self, channels: int, style_width: int) -> None:
        super().__init__()
        self.style = StyleSplit(style_width, channels)
        self.weight = nn.Parameter(torch.randn(3, channels))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale = self.style(style) * x.shape[1] ** -0.5
        return ops.modulated_to_rgb(x, scale, self.weight, self.bias, fused=self.fused)


def _uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Uniform within 1/sqrt(fan_in), as torch.nn.Conv2d initialises weight and bias."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound)
