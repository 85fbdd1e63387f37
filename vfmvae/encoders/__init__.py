"""Frozen foundation models: images [B, 3, H, W] in [-1, 1] -> `Features` of chosen layers.

`ENCODERS` is the one table of names; a new encoder is one line here if its family is known, and one family
beside `TimmFamily` values otherwise. What all encoders do alike, and the layer convention, stand in
`vfmvae.encoders.base`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vfmvae.deferred import fill, without_parameters
from vfmvae.encoders.base import EncoderConfig, Features, FrozenEncoder, Preprocessing, ViTConfig
from vfmvae.encoders.hf_weights import (
    convert_clip,
    convert_dinov2,
    convert_dinov3,
    convert_mae,
    convert_siglip,
)
from vfmvae.encoders.qwen_vl import QwenEncoder, QwenFamily
from vfmvae.encoders.timm_vit import TimmEncoder, TimmFamily, hub_repository
from vfmvae.weights import read_hub_weights, read_weights

__all__ = ["ENCODERS", "EncoderConfig", "Features", "FrozenEncoder", "ViTConfig", "build_encoder"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

SIGLIP = TimmFamily(
    Preprocessing(*_HALF, "bilinear"),
    pooling="attention",
    hugging_face=convert_siglip,
    activation="gelu_tanh",  # timm has the exact form for some members
)
DINO = TimmFamily(Preprocessing(*_IMAGENET, "bicubic"), pooling="class", hugging_face=convert_mae)
DINOV2 = TimmFamily(Preprocessing(*_IMAGENET, "bicubic"), pooling="class", hugging_face=convert_dinov2)
DINOV2_GIANT = replace(DINOV2, packed_gate=True)
DINOV2_REGISTERS = replace(DINOV2, antialias_positions=True)
DINOV2_REGISTERS_GIANT = replace(DINOV2_REGISTERS, packed_gate=True)
DINOV3 = TimmFamily(Preprocessing(*_IMAGENET, "bicubic"), pooling="class", hugging_face=convert_dinov3)
EVA_CLIP = TimmFamily(Preprocessing(*_CLIP, "bicubic"), pooling="class")
CLIP = TimmFamily(Preprocessing(*_CLIP, "bicubic"), pooling="class", hugging_face=convert_clip)
MAE = TimmFamily(Preprocessing(*_IMAGENET, "bilinear"), pooling="class", hugging_face=convert_mae)
MINI = TimmFamily(Preprocessing(*_HALF, "bilinear"), pooling="mean")
QWEN = QwenFamily(Preprocessing(*_CLIP, "bicubic"))


@dataclass(frozen=True)
class Entry:
    """One member of a family.

    `model`: timm's name with the tag of the weights, or the hub repository for families outside timm. `vit`:
    its dimensions where `model` does not say them. `file`: weights that ship beside this module instead of
    the hub.
    """

    family: TimmFamily | QwenFamily
    model: str
    vit: ViTConfig | None = None
    file: str | None = None


_QWEN_VIT = ViTConfig(width=1280, depth=32, heads=16, patch_size=14, image_size=224, mlp_width=3420)

ENCODERS: dict[str, Entry] = {
    "siglip2-base-patch16-224": Entry(SIGLIP, "vit_base_patch16_siglip_224.v2_webli"),
    "siglip2-base-patch16-256": Entry(SIGLIP, "vit_base_patch16_siglip_256.v2_webli"),
    "siglip2-base-patch16-384": Entry(SIGLIP, "vit_base_patch16_siglip_384.v2_webli"),
    "siglip2-base-patch16-512": Entry(SIGLIP, "vit_base_patch16_siglip_512.v2_webli"),
    "siglip2-base-patch32-256": Entry(SIGLIP, "vit_base_patch32_siglip_256.v2_webli"),
    "siglip2-large-patch16-256": Entry(SIGLIP, "vit_large_patch16_siglip_256.v2_webli"),
    "siglip2-large-patch16-384": Entry(SIGLIP, "vit_large_patch16_siglip_384.v2_webli"),
    "siglip2-large-patch16-512": Entry(SIGLIP, "vit_large_patch16_siglip_512.v2_webli"),
    "siglip2-so400m-patch14-224": Entry(SIGLIP, "vit_so400m_patch14_siglip_224.v2_webli"),
    "siglip2-so400m-patch14-384": Entry(SIGLIP, "vit_so400m_patch14_siglip_378.v2_webli"),  # 27 x 27 patches
    "siglip2-so400m-patch16-256": Entry(SIGLIP, "vit_so400m_patch16_siglip_256.v2_webli"),
    "siglip2-so400m-patch16-384": Entry(SIGLIP, "vit_so400m_patch16_siglip_384.v2_webli"),
    "siglip2-so400m-patch16-512": Entry(SIGLIP, "vit_so400m_patch16_siglip_512.v2_webli"),
    "siglip-base-patch16-224": Entry(SIGLIP, "vit_base_patch16_siglip_224.webli"),
    "siglip-base-patch16-256": Entry(SIGLIP, "vit_base_patch16_siglip_256.webli"),
    "siglip-base-patch16-384": Entry(SIGLIP, "vit_base_patch16_siglip_384.webli"),
    "siglip-base-patch16-512": Entry(SIGLIP, "vit_base_patch16_siglip_512.webli"),
    "siglip-large-patch16-256": Entry(SIGLIP, "vit_large_patch16_siglip_256.webli"),
    "siglip-large-patch16-384": Entry(SIGLIP, "vit_large_patch16_siglip_384.webli"),
    "siglip-so400m-patch14-224": Entry(SIGLIP, "vit_so400m_patch14_siglip_224.webli"),
    "siglip-so400m-patch14-384": Entry(SIGLIP, "vit_so400m_patch14_siglip_378.webli"),
    "dino-small-patch16": Entry(DINO, "vit_small_patch16_224.dino"),
    "dinov2-small": Entry(DINOV2, "vit_small_patch14_dinov2.lvd142m"),
    "dinov2-base": Entry(DINOV2, "vit_base_patch14_dinov2.lvd142m"),
    "dinov2-large": Entry(DINOV2, "vit_large_patch14_dinov2.lvd142m"),
    "dinov2-giant": Entry(DINOV2_GIANT, "vit_giant_patch14_dinov2.lvd142m"),
    "dinov2-with-registers-small": Entry(DINOV2_REGISTERS, "vit_small_patch14_reg4_dinov2.lvd142m"),
    "dinov2-with-registers-base": Entry(DINOV2_REGISTERS, "vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov2-with-registers-large": Entry(DINOV2_REGISTERS, "vit_large_patch14_reg4_dinov2.lvd142m"),
    "dinov2-with-registers-giant": Entry(DINOV2_REGISTERS_GIANT, "vit_giant_patch14_reg4_dinov2.lvd142m"),
    "dinov3-vits16": Entry(DINOV3, "vit_small_patch16_dinov3_qkvb.lvd1689m"),
    "dinov3-vits16plus": Entry(DINOV3, "vit_small_plus_patch16_dinov3_qkvb.lvd1689m"),
    "dinov3-vitb16": Entry(DINOV3, "vit_base_patch16_dinov3_qkvb.lvd1689m"),
    "dinov3-vitl16": Entry(DINOV3, "vit_large_patch16_dinov3_qkvb.lvd1689m"),
    "dinov3-vith16plus": Entry(DINOV3, "vit_huge_plus_patch16_dinov3_qkvb.lvd1689m"),
    "dinov3-vit7b16": Entry(DINOV3, "vit_7b_patch16_dinov3.lvd1689m"),
    "eva02-clip-base-patch16-224": Entry(EVA_CLIP, "eva02_base_patch16_clip_224.merged2b"),
    "eva02-clip-large-patch14-224": Entry(EVA_CLIP, "eva02_large_patch14_clip_224.merged2b"),
    "eva02-clip-large-patch14-336": Entry(EVA_CLIP, "eva02_large_patch14_clip_336.merged2b"),
    "clip-vit-base-patch16": Entry(CLIP, "vit_base_patch16_clip_quickgelu_224.openai"),
    "clip-vit-base-patch32": Entry(CLIP, "vit_base_patch32_clip_quickgelu_224.openai"),
    "clip-vit-large-patch14": Entry(CLIP, "vit_large_patch14_clip_quickgelu_224.openai"),
    "clip-vit-large-patch14-336": Entry(CLIP, "vit_large_patch14_clip_quickgelu_336.openai"),
    "mae-base": Entry(MAE, "vit_base_patch16_224.mae"),
    "mae-large": Entry(MAE, "vit_large_patch16_224.mae"),
    "mae-huge": Entry(MAE, "vit_huge_patch14_224.mae"),
    "qwen2.5-vl-3b": Entry(QWEN, "Qwen/Qwen2.5-VL-3B-Instruct", vit=_QWEN_VIT),
    "qwen2.5-vl-7b": Entry(QWEN, "Qwen/Qwen2.5-VL-7B-Instruct", vit=_QWEN_VIT),
    "mini": Entry(
        MINI,
        "vit_tiny_patch16_224",
        vit=ViTConfig(width=128, depth=6, heads=4, patch_size=8, image_size=64, mlp_width=512),
        file="mini.safetensors",
    ),
}


def build_encoder(
    config: EncoderConfig,
    weights: Literal["pretrained"] | str | Path | Mapping[str, Tensor] | None = "pretrained",
) -> FrozenEncoder:
    """The frozen encoder that `config` describes, in eval mode, no parameter requiring a gradient.

    Args:
        config: see `EncoderConfig`.
        weights: "pretrained" for `config.weights`, or the table's own source if that is None; a file or a
            directory (safetensors or torch files, sharded too); a state dict in timm's format, the original
            publication's or Hugging Face's; None for random weights, also under `torch.device("meta")`.

    Raises:
        ValueError: an unknown name (the message lists the known ones), a layer that does not exist, weights
            that cannot be found or read, or that do not fit: every missing or unknown tensor is named.
        ImportError: Qwen2.5-VL without the transformers package.
    """
    entry = ENCODERS.get(config.name)
    if entry is None:
        raise ValueError(f"unknown encoder {config.name!r}; known: {', '.join(ENCODERS)}")
    if weights is None:
        encoder = _build(config, entry)
    else:
        state = _find_weights(config, entry, weights)
        device = torch.get_default_device()
        if device.type == "meta":
            raise ValueError(
                f"encoder {config.name}: the meta device holds no weights; build it with weights=None"
            )
        with without_parameters():
            encoder = _build(config, entry)
        fill(encoder, encoder.adapt(state), device)
    return encoder.eval().requires_grad_(False)


def _build(config: EncoderConfig, entry: Entry) -> FrozenEncoder:
    vit = config.vit or entry.vit
    if isinstance(entry.family, QwenFamily):
        assert vit is not None, f"the table must give the dimensions of {config.name}"
        return QwenEncoder(config, entry.family, vit)
    return TimmEncoder(config, entry.family, entry.model, vit)


def _find_weights(
    config: EncoderConfig, entry: Entry, weights: str | Path | Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    if isinstance(weights, Mapping):
        return weights
    only = "visual." if isinstance(entry.family, QwenFamily) else ""
    path = config.weights if weights == "pretrained" else weights
    if path is not None:
        try:
            return read_weights(path, only)
        except ValueError as error:
            raise ValueError(f"no weights for the encoder {config.name}: {error}") from error
    if config.vit is not None:
        raise ValueError(
            f"encoder {config.name} with dimensions of its own has no published weights; give a file, a "
            f"directory or a state dict, or weights=None for random ones"
        )
    if entry.file is not None:
        return read_weights(Path(__file__).parent / entry.file)
    if isinstance(entry.family, QwenFamily):
        return read_hub_weights(entry.model, config.name, only)
    return read_hub_weights(hub_repository(entry.model), config.name)
