"""The published VFM-VAE generator's arguments (`G_kwargs`) -> TokenizerConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfmvae.convert.arguments import Arguments
from vfmvae.convert.encoder import resolve_encoder
from vfmvae.encoders import EncoderConfig
from vfmvae.ops import Activation
from vfmvae.tokenizer import (
    AlignmentConfig,
    BottleneckConfig,
    DecoderConfig,
    FusionConfig,
    TokenizerConfig,
)
from vfmvae.tokenizer.decoder import NUM_BLOCKS
from vfmvae.tokenizer.fusion import Projection

# Arguments that change nothing in the numbers of the network, or belong to training.
IGNORED = {
    "class_name",
    "conv_clamp",
    "img_channels",
    "label_dim",
    "label_type",
    "num_fp16_res",
    "train_mode",
    "use_adaptive_vf_loss",
    "use_entropy_loss",
    "use_kl_loss",
    "use_vf_loss",
    "vfm_config",
}
# Arguments with one supported value: no published weights use another.
FIXED: dict[str, Any] = {
    "architecture": "skip",
    "conditional": False,
    "how_to_process_concat_z": "unshuffle",
    "num_blocks": NUM_BLOCKS,
    "use_convnext": True,
    "use_cross_attn": False,
    "use_multiscale_output": True,
}
PROJECTIONS: dict[str, Projection] = {"attnproj": "attention", "conv": "conv"}
ACTIVATIONS: dict[str, Activation] = {"lrelu": "leaky_relu", "gelu": "gelu", "silu": "silu"}


def tokenizer_config(arguments: Mapping[str, Any]) -> TokenizerConfig:
    """Translate published arguments; ValueError names one that is unknown, missing or not supported."""
    if "vfm_name" not in arguments:
        raise ValueError(
            "argument vfm_name is missing: these are not the arguments of a VFM-VAE generator (G_kwargs)"
        )
    arg = Arguments(_flat(arguments))
    for name, supported in FIXED.items():
        value = arg(name, supported)
        if value != supported:
            raise ValueError(f"argument {name} is {value!r}; only {supported!r} is supported")
    discrete = arg("compression_mode", "continuous") == "discrete"
    if arg("compression_mode", "continuous") not in ("continuous", "discrete"):
        raise ValueError(
            f"argument compression_mode is {arg('compression_mode', '')!r}; supported: continuous, discrete"
        )
    z_dimension, vocab_width = arg("z_dimension", 32), arg("vocab_width", 32)
    config = TokenizerConfig(
        encoder=_encoder(arg, arguments.get("vfm_config")),
        fusion=_fusion(arg),
        bottleneck=_bottleneck(arg, discrete),
        decoder=_decoder(arg),
        alignment=AlignmentConfig(
            distance_margin=float(arg("distmat_margin", 0.0)),
            cosine_margin=float(arg("cos_margin", 0.0)),
            distance_weight=float(arg("distmat_weight", 1.0)),
            cosine_weight=float(arg("cos_weight", 1.0)),
        ),
        resolution=arg("img_resolution", 256),
        latent_channels=vocab_width if discrete else z_dimension,
        downsample=arg("resolution_compression_factor", 16),
    )
    unknown = [name for name in arg.unread() if name not in IGNORED]
    if unknown:
        raise ValueError(
            f"unknown arguments: {', '.join(unknown)}; remove them from the config if they do not"
            f" change the network"
        )
    return config


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(arguments)
    inner = flat.pop("synthesis_kwargs", None) or {}
    if not isinstance(inner, Mapping):
        raise ValueError(f"argument synthesis_kwargs is {inner!r}; needed is a mapping of arguments")
    return flat | dict(inner)


def check_encoder_widths(arguments: Mapping[str, Any], width: int) -> None:
    """ValueError unless `patch_in_dimensions`, where given, are the width of the encoder."""
    widths = arguments.get("patch_in_dimensions")
    if widths is None:
        return
    if not isinstance(widths, list | tuple) or any(w != width for w in widths):
        raise ValueError(f"argument patch_in_dimensions is {widths!r}; the encoder's layers are {width} wide")


def _encoder(arg: Arguments, vit: Mapping[str, Any] | None) -> EncoderConfig:
    name, dimensions = resolve_encoder(str(arg("vfm_name", "")), vit)
    return EncoderConfig(
        name=name,
        layers=tuple(arg("patch_from_layers", (0, 12, -1))),
        scale_factor=float(arg("scale_factor", 1.0)),
        vit=dimensions,
    )


def _fusion(arg: Arguments) -> FusionConfig:
    arg("patch_in_dimensions", None)  # see check_encoder_widths
    return FusionConfig(
        compress=arg.choice("how_to_compress", PROJECTIONS, "attnproj"),
        decompress=arg.choice("how_to_decompress", PROJECTIONS, "attnproj"),
        layer_widths=tuple(arg("patch_out_dimensions", (64, 64, 64))),
        compress_depth=arg("attnproj_quant_layers", 1),
        decompress_depth=arg("attnproj_post_quant_layers", 1),
        decompress_factor=arg("decompress_factor", 16),
    )


def _bottleneck(arg: Arguments, discrete: bool) -> BottleneckConfig:
    codebooks, codes = arg("num_codebooks", 1), arg("vocab_size", 16384)
    beta, temperature = float(arg("vocab_beta", 0.25)), float(arg("entropy_temp", 0.01))
    if not discrete:
        return BottleneckConfig()
    return BottleneckConfig(
        "discrete", codebooks=codebooks, codes=codes, beta=beta, entropy_temperature=temperature
    )


def _decoder(arg: Arguments) -> DecoderConfig:
    attention_blocks = tuple(arg("attn_block_indices", (0, 1, 2)))
    attention_depths = tuple(arg("attn_depths", (2,) * len(attention_blocks)))
    if not arg("use_self_attn", True):
        attention_blocks = attention_depths = ()
    return DecoderConfig(
        channel_base=arg("channel_base", 32768),
        channel_max=arg("channel_max", 512),
        num_res_blocks=arg("num_res_blocks", 2),
        extra_convnext=arg("add_additional_convnext", True),
        latent_blocks=tuple(arg("concat_z_block_indices", (0, 1, 2, 3))),
        latent_widths=tuple(arg("concat_z_mapped_dims", (512, 256, 128, 128))),
        latent_activation=arg.choice("activation_for_concat_z", ACTIVATIONS, "lrelu"),
        attention_blocks=attention_blocks,
        attention_depths=attention_depths,
        blur=arg("use_gaussian_blur", True),
        noise=arg("legacy", False),
        style_width=arg("z_dim_for_mapping_mlp_output", 512),
        style_pooled=arg("z_pooled_resolution", 1),
    )
