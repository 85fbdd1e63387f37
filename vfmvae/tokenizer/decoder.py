"""The decoder: progressive-resolution reconstruction from the decompressed latent map and the style.

VFM-VAE (arXiv 2510.18457), section 3. Six blocks work at 1/32, 1/16, ... 1/1 of the image size; each can show
an image, and a running sum of feature maps (the "skip" path) links them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vfmvae import ops
from vfmvae.serialization import check_fields, check_lowest
from vfmvae.tokenizer.decoder_blocks import ConvNeXtLayer, LatentBranch, SelfAttention, ToRGB, Upsample

NUM_BLOCKS = 6
INPUT_STRIDE = 64
"""Image pixels per position of the first block's input."""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; the defaults are the published full-size ones."""

    channel_base: int = 32768
    """Block i has min(channel_base // (8 * 2**i), channel_max) channels."""
    channel_max: int = 512
    num_res_blocks: int = 2
    extra_convnext: bool = True
    """1 + 3 (blocks 0-3) or 2 (blocks 4, 5) layers per residual block, else 1 + 2 everywhere."""
    latent_blocks: tuple[int, ...] = (0, 1, 2, 3)
    """Blocks that the latent map is concatenated in; block 0 has no other input."""
    latent_widths: tuple[int, ...] = (512, 256, 128, 128)
    """Width of the latent branch, indexed by block."""
    latent_activation: ops.Activation = "leaky_relu"
    attention_blocks: tuple[int, ...] = (0, 1, 2)
    attention_depths: tuple[int, ...] = (2, 2, 2)
    """Attention layers of each of `attention_blocks`."""
    blur: bool = True
    noise: bool = False
    """Fixed noise maps in every ConvNeXt layer; only checkpoints published with them need this."""
    style_width: int = 512
    style_pooled: int = 1
    """The style sees the latent map averaged over style_pooled x style_pooled cells."""

    def __post_init__(self) -> None:
        check_fields(self, "decoder")
        lowest = {"channel_max": 1, "style_width": 1, "style_pooled": 1}
        check_lowest(self, "decoder", {**lowest, "num_res_blocks": 0, "attention_depths": 0})
        if 0 not in self.latent_blocks:
            raise ValueError(
                f"decoder.latent_blocks {self.latent_blocks} lacks block 0, which has no other input"
            )
        if any(i not in range(NUM_BLOCKS) for i in (*self.latent_blocks, *self.attention_blocks)):
            raise ValueError(
                f"decoder.latent_blocks {self.latent_blocks} and attention_blocks {self.attention_blocks}"
                f" must lie in 0..{NUM_BLOCKS - 1}"
            )
        if len(self.latent_widths) <= max(self.latent_blocks):
            raise ValueError(
                f"decoder.latent_widths has {len(self.latent_widths)} entries;"
                f" block {max(self.latent_blocks)} needs one too (they are indexed by block)"
            )
        if any(self.latent_widths[i] < 1 for i in self.latent_blocks):
            raise ValueError(
                f"decoder.latent_widths is {self.latent_widths}; each of latent_blocks needs at least 1"
            )
        if len(self.attention_depths) != len(self.attention_blocks):
            raise ValueError(
                f"decoder.attention_depths {self.attention_depths} needs one entry"
                f" for each of attention_blocks {self.attention_blocks}"
            )
        if self.channel_base // (8 * 2 ** (NUM_BLOCKS - 1)) < 1:
            raise ValueError(f"decoder.channel_base {self.channel_base} leaves the last block no channels")

    def channels(self, block: int) -> int:
        return min(self.channel_base // (8 * 2**block), self.channel_max)

    def num_layers(self, block: int) -> int:
        return 1 + self.num_res_blocks * (3 if self.extra_convnext and block <= 3 else 2)

    def attention_depth(self, block: int) -> int:
        return dict(zip(self.attention_blocks, self.attention_depths, strict=True)).get(block, 0)

    def blur_size(self, block: int) -> int:
        return (3 if block <= 2 else 5) if self.blur else 1

    def num_styles(self) -> int:
        """Copies of the style that the published form feeds: one per ConvNeXt layer and one per image."""
        return sum(self.num_layers(i) + 1 for i in range(NUM_BLOCKS))


class DecoderBlock(nn.Module):
    """One resolution: latent branch, upsampling, ConvNeXt layers, attention; its part of the skip path."""

    def __init__(self, config: DecoderConfig, index: int, z_channels: int, downsample: int) -> None:
        super().__init__()
        channels = config.channels(index)
        below = config.channels(index - 1) if index else 0
        self.latent = None
        branch = 0
        if index in config.latent_blocks:
            branch = config.latent_widths[index]
            shrink = INPUT_STRIDE / downsample / 2**index
            self.latent = LatentBranch(z_channels, branch, shrink, config.latent_activation)
        blur = config.blur_size(index)
        self.upsample = Upsample(below + branch, channels, blur, norm_after=index == 0)
        noise_size = 8 * 2**index if config.noise else None
        self.layers = nn.ModuleList(
            ConvNeXtLayer(channels, 5 if index <= 1 else 7, config.style_width, noise_size)
            for _ in range(config.num_layers(index))
        )
        self.attention = nn.ModuleList(SelfAttention(channels) for _ in range(config.attention_depth(index)))
        self.skip_upsample = Upsample(below, channels, blur) if index else None
        self.to_rgb = ToRGB(channels, config.style_width)

    def forward(
        self, x: Tensor | None, skip: Tensor | None, z_map: Tensor, style: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x, skip: [B, C', H, W] of the block below (None in the first) -> the same at [B, C, 2H, 2W]."""
        inputs = [] if x is None else [x]
        if self.latent is not None:
            inputs.append(self.latent(z_map))
        x = self.upsample(torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0])
        for layer in self.layers:
            x = layer(x, style)
        for attend in self.attention:
            x = attend(x)
        return x, x if self.skip_upsample is None else self.skip_upsample(skip, residual=x)


class Decoder(nn.Module):
    """Latent map [B, Z, h, w] and style [B, D] -> images, largest first."""

    def __init__(self, config: DecoderConfig, z_channels: int, downsample: int) -> None:
        """`downsample`: image pixels per latent position, a power of two up to 64."""
        super().__init__()
        self.blocks = nn.ModuleList(
            DecoderBlock(config, i, z_channels, downsample) for i in range(NUM_BLOCKS)
        )

    def forward(self, z_map: Tensor, style: Tensor, multiscale: bool = True) -> list[Tensor]:
        """Images [B, 3, H, W] in float32, not clamped: full size and, if `multiscale`, 1/2, 1/4, ... 1/32."""
        x: Tensor | None = None
        skip: Tensor | None = None
        images = []
        block: Any
        for block in self.blocks:
            x, skip = block(x, skip, z_map, style)
            if multiscale or block is self.blocks[-1]:
                images.append(block.to_rgb(skip, style))
        return images[::-1]
