"""Multi-scale latent fusion: several layers of the foundation model become one small latent map, and back.

VFM-VAE (arXiv 2510.18457), section 3. Shapes in this file:
    B batch, C encoder width, N = gh*gw encoder tokens, r = gh/h = gw/w, h x w latent grid, n = h*w
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae import ops
from vfmvae.serialization import check_fields, check_lowest

Projection = Literal["attention", "conv"]


@dataclass(frozen=True)
class FusionConfig:
    """Sizes of the compression from encoder features to the latent and of the decompression after it."""

    compress: Projection = "attention"
    """Attention projections, or plain 1x1 convolutions."""
    decompress: Projection = "attention"
    layer_widths: tuple[int, ...] = (64, 64, 64)
    """Width that each encoder layer is projected to before pixel-unshuffle; one per encoder layer."""
    compress_depth: int = 1
    """Attention projections per compression."""
    decompress_depth: int = 1
    decompress_factor: int = 16
    """Width of the decompressed map divided by the latent channels."""

    def __post_init__(self) -> None:
        check_fields(self, "fusion")
        names = ("layer_widths", "compress_depth", "decompress_depth", "decompress_factor")
        check_lowest(self, "fusion", dict.fromkeys(names, 1))


class FusionAttention(nn.Module):
    """Self-attention that changes the width: heads are averaged downwards, concatenated upwards."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.averages = in_width > out_width
        self.heads = in_width // out_width if self.averages else max(1, out_width // in_width)
        inner = in_width if self.averages else out_width
        if inner % self.heads:
            raise ValueError(
                f"width {inner} cannot be divided into {self.heads} heads"
                f" (attention projection {in_width} -> {out_width})"
            )
        self.out_width = out_width
        self.qkv = nn.Linear(in_width, 3 * inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))
        self.out = nn.Linear(out_width, out_width)

    def qkv_bias(self) -> Tensor:
        """[3D]: keys have no bias, since softmax does not see it."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, qkv: Tensor, fused: bool) -> Tensor:
        batch, length, _ = qkv.shape
        query, key, value = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = ops.attention(query, key, value, head_mean=self.averages, fused=fused)
        if not self.averages:
            y = y.transpose(1, 2).reshape(batch, length, self.out_width)
        elif y.shape[-1] != self.out_width:  # head width does not divide evenly
            y = F.adaptive_avg_pool1d(y, self.out_width)
        return _linear(y, self.out)  # [B, N, out]


class GatedMLP(nn.Module):
    """w_out(gelu(w_gate x) * w_value x) after a layer norm of its own; tanh GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, 2 * width)
        self.value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, fused: bool) -> Tensor:
        norm = self.norm
        gate, value = (
            ops.NormedLinear(norm.weight, norm.bias, layer.weight, layer.bias)
            for layer in (self.gate, self.value)
        )
        return _linear(ops.normed_geglu(x, gate, value, norm.eps, fused=fused), self.out)


class AttentionProjection(nn.Module):
    """One block: y = skip(LN(x)) + attention(LN(x)); y + mlp(LN(y)).  [B, N, in] -> [B, N, out]."""

    fused: bool = True

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(in_width, eps=1e-5)
        self.norm_skip = nn.LayerNorm(in_width, eps=1e-5)
        self.norm_mlp = nn.LayerNorm(out_width, eps=1e-5)
        self.attention = FusionAttention(in_width, out_width)
        self.skip = nn.Linear(in_width, out_width)
        self.mlp = GatedMLP(out_width)

    def forward(self, x: Tensor) -> Tensor:
        front, side = self.norm_attention, self.norm_skip
        qkv, skip = ops.fusion_projection(
            x,
            ops.NormedLinear(front.weight, front.bias, self.attention.qkv.weight, self.attention.qkv_bias()),
            ops.NormedLinear(side.weight, side.bias, self.skip.weight, self.skip.bias),
            front.eps,
            fused=self.fused,
        )
        y = skip + self.attention(qkv, self.fused)
        return y + self.mlp(_layer_norm(y, self.norm_mlp), self.fused)


class LatentProjection(nn.Module):
    """Tokens of one width to tokens of another: a stack of attention projections or one linear layer."""

    def __init__(
        self, in_width: int, out_width: int, kind: Projection, depth: int = 1, *, expand_first: bool = False
    ):
        """`expand_first`: the first block of the stack changes the width (decompression), else the last."""
        super().__init__()
        if kind == "conv":
            self.linear = nn.Linear(in_width, out_width)
        else:
            inner = out_width if expand_first else in_width
            widths = [in_width] + [inner] * (depth - 1) + [out_width]
            self.blocks = nn.ModuleList(
                AttentionProjection(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)
            )
        self.kind = kind
        self.apply(_initialize)

    @property
    def last(self) -> nn.Linear:
        """The layer whose result is (added to) the output."""
        if self.kind == "conv":
            return self.linear
        block = self.blocks[-1]
        assert isinstance(block, AttentionProjection)
        return block.mlp.out

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "conv":
            return _linear(x, self.linear)
        for block in self.blocks:
            x = block(x)
        return x


class LatentFusion(nn.Module):
    """Encoder layers -> channels of the posterior: project each, pixel-unshuffle, concatenate, project."""

    def __init__(self, config: FusionConfig, encoder_width: int, ratio: int, out_channels: int) -> None:
        """`ratio`: encoder tokens per latent position along one axis. `out_channels`: 2z, or the codes'
        width.
        """
        super().__init__()
        self.ratio = ratio
        self.layers = nn.ModuleList(
            LatentProjection(encoder_width, width, config.compress, config.compress_depth)
            for width in config.layer_widths
        )
        joint = sum(config.layer_widths) * ratio**2
        self.final = LatentProjection(joint, out_channels, config.compress, config.compress_depth)

    def forward(self, features: Sequence[Tensor], latent_size: tuple[int, int]) -> Tensor:
        """features: one [B, N, C] per layer, N = r*h * r*w -> [B, out_channels, h, w]."""
        if len(features) != len(self.layers):
            raise ValueError(f"{len(features)} feature maps were given, {len(self.layers)} are fused")
        projected = [project(tokens) for project, tokens in zip(self.layers, features, strict=True)]
        joint = unshuffle_and_concatenate(projected, latent_size, self.ratio)
        return tokens_to_map(self.final(joint), latent_size)


def unshuffle_and_concatenate(layers: Sequence[Tensor], size: tuple[int, int], ratio: int) -> Tensor:
    """Per layer [B, r*h * r*w, c] -> [B, h*w, sum of c*r*r], each channel's r x r tokens side by side.

    Pixel-unshuffle is a view of six dimensions, so the concatenation is the only copy; gradients are views.
    """
    height, width = size
    views = []
    for tokens in layers:
        batch, length, channels = tokens.shape
        if length != height * width * ratio**2:
            raise ValueError(f"{length} tokens do not form a {height * ratio} x {width * ratio} map")
        cells = tokens.view(batch, height, ratio, width, ratio, channels)
        views.append(cells.permute(0, 1, 3, 5, 2, 4))  # [B, h, w, c, r, r]
    return torch.cat(views, dim=3).flatten(3).flatten(1, 2)


def tokens_to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, h*w, C] -> [B, C, h, w], a view in channels-last memory."""
    batch, length, channels = tokens.shape
    if length != size[0] * size[1]:
        raise ValueError(f"{length} tokens do not form a {size[0]} x {size[1]} map")
    return tokens.view(batch, *size, channels).permute(0, 3, 1, 2)


def map_to_tokens(fmap: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h*w, C], a view where memory is channels-last."""
    return fmap.permute(0, 2, 3, 1).flatten(1, 2)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _initialize(module: nn.Module) -> None:
    """Linear layers truncated normal with std 0.02, biases 0; norms keep weight 1 and bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, LatentProjection) and module.kind == "conv":
        nn.init.xavier_normal_(module.linear.weight, gain=0.5)
