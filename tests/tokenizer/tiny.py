"""A tokenizer small enough for tests; every part of the architecture is there."""

from __future__ import annotations

import dataclasses
from typing import Any

from vfmvae.encoders import EncoderConfig, ViTConfig
from vfmvae.tokenizer import BottleneckConfig, DecoderConfig, FusionConfig, Tokenizer, TokenizerConfig

VIT = ViTConfig(width=32, depth=2, heads=2, patch_size=8, image_size=64, mlp_width=64)


def tiny_config(decoder: dict[str, Any] | None = None, **changes: Any) -> TokenizerConfig:
    """64 px, latent [8, 4, 4]; `decoder` and `changes` replace fields of the decoder and of the whole."""
    config = TokenizerConfig(
        encoder=EncoderConfig(name="mini", layers=(0, 1, -1), scale_factor=1.0, vit=VIT),
        fusion=FusionConfig(layer_widths=(8, 8, 8), decompress_factor=4),
        decoder=DecoderConfig(
            channel_base=512,
            channel_max=32,
            num_res_blocks=1,
            latent_widths=(64, 16, 8, 8),
            attention_blocks=(0, 1),
            attention_depths=(1, 1),
            style_width=16,
        ),
        resolution=64,
        latent_channels=8,
    )
    if decoder:
        changes["decoder"] = dataclasses.replace(config.decoder, **decoder)
    return dataclasses.replace(config, **changes)


def tiny_tokenizer(config: TokenizerConfig | None = None) -> Tokenizer:
    """Random weights; layer scales are raised to 1, so that every layer matters."""
    tokenizer = Tokenizer(config or tiny_config(), encoder_weights=None)
    for name, parameter in tokenizer.named_parameters():
        if name.endswith("gamma") and parameter.abs().max() < 1e-3:
            parameter.data.fill_(1.0)
        if name.endswith(("attention.0.out.weight", "mlp_contract.weight")):
            parameter.data.normal_(std=0.1)
    return tokenizer


DISCRETE = BottleneckConfig("discrete", codebooks=2, codes=32)
