"""The published VFM-VAE generator: its arguments become a TokenizerConfig, its parameters a Tokenizer's.

Every parameter is either mapped, checked to be what our code computes anyway (blur filters, zero key biases),
or named in an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfmvae.convert.vfm_vae_config import check_encoder_widths, tokenizer_config
from vfmvae.deferred import fill, without_parameters
from vfmvae.ops.resample import BINOMIAL_ROWS
from vfmvae.tokenizer import Tokenizer, TokenizerConfig
from vfmvae.tokenizer.decoder import NUM_BLOCKS, DecoderConfig

ENCODER_PREFIX = "vfm_encoder.encoder."

_ATTENTION_PROJECTION = [
    (r"norm1\.", "norm_attention."),
    (r"norm2\.", "norm_mlp."),
    (r"norm3\.", "norm_skip."),
    (r"attn\.proj\.", "attention.out."),
    (r"attn\.", "attention."),
    (r"proj\.", "skip."),
    (r"mlp\.w0\.", "mlp.gate."),
    (r"mlp\.w1\.", "mlp.value."),
    (r"mlp\.w2\.", "mlp.out."),
    (r"mlp\.norm\.", "mlp.norm."),
]
_CONVNEXT = [
    (r"affine_pw1\.proj\.", "style.linear."),
    (r"dwconv\.", "depthwise."),
    (r"norm\.", "norm."),
    (r"pwconv1\.", "expand_"),
    (r"pwconv2\.", "contract_"),
    (r"gamma$", "gamma"),
    (r"noise_const$", "noise"),
    (r"noise_strength$", "noise_strength"),
]
_SELF_ATTENTION = [
    (r"attn\.norm\.gamma$", "gamma"),
    (r"attn\.to_out\.", "out."),
    (r"ff\.0\.gamma$", "mlp_gamma"),
    (r"ff\.1\.", "mlp_expand."),
    (r"ff\.3\.", "mlp_contract."),
]
_SAME = [(r"", "")]

# A published module (groups become format arguments), ours, and how the names inside it translate.
_MODULES: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        r"ldm_adapter\.patch_quants\.(\d+)\.0\.blocks\.(\d+)\.",
        "fusion.layers.{0}.blocks.{1}.",
        _ATTENTION_PROJECTION,
    ),
    (r"ldm_adapter\.patch_quants\.(\d+)\.0\.", "fusion.layers.{0}.linear.", _SAME),
    (r"ldm_adapter\.final_quant\.blocks\.(\d+)\.", "fusion.final.blocks.{0}.", _ATTENTION_PROJECTION),
    (r"ldm_adapter\.final_quant\.", "fusion.final.linear.", _SAME),
    (r"ldm_adapter\.post_quant\.blocks\.(\d+)\.", "decompress.blocks.{0}.", _ATTENTION_PROJECTION),
    (r"ldm_adapter\.post_quant\.", "decompress.linear.", _SAME),
    (r"ldm_adapter\.linear_proj\.", "align.", _SAME),
    (
        r"ldm_adapter\.quantizer\.codebooks\.(\d+)\.",
        "bottleneck.codebooks.{0}.",
        [(r"codebook\.weight$", "weight"), (r"vocab_usage$", "usage")],
    ),
    (r"mapping\.mlp\.", "style.", _SAME),
    (r"mapping\.x_avg$", "style.average", _SAME),
    (r"synthesis\.blocks\.(\d+)\.conv0\.", "decoder.blocks.{0}.layers.0.", _CONVNEXT),
    (r"synthesis\.blocks\.(\d+)\.convs1\.(\d+)\.", "decoder.blocks.{0}.layers.{1+1}.", _CONVNEXT),
    (r"synthesis\.blocks\.(\d+)\.self_attns\.(\d+)\.", "decoder.blocks.{0}.attention.{1}.", _SELF_ATTENTION),
    (r"synthesis\.blocks\.(\d+)\.seperate_upsample_conv\.", "decoder.blocks.{0}.upsample.", _SAME),
    (r"synthesis\.blocks\.(\d+)\.last_upsample_conv\.", "decoder.blocks.{0}.skip_upsample.", _SAME),
    (r"synthesis\.blocks\.(\d+)\.torgb\.affine\.proj\.", "decoder.blocks.{0}.to_rgb.style.linear.", _SAME),
    (r"synthesis\.blocks\.(\d+)\.torgb\.", "decoder.blocks.{0}.to_rgb.", _SAME),
]


def convert(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], where: str | Path = "checkpoint"
) -> Tokenizer:
    """A published generator's parameters and arguments -> Tokenizer with the same numbers.

    Args:
        state: the generator's state dict, frozen encoder included.
        arguments: the generator's keyword arguments (`G_kwargs`), with `vfm_config` for an encoder that
            has no published name.
        where: the checkpoint's file, for errors.

    Raises ValueError naming every parameter that is missing or has no place, or an argument or a parameter's
    values that do not fit.
    """
    config = tokenizer_config(arguments)
    with without_parameters():
        tokenizer = Tokenizer(config, encoder_weights=None)
    check_encoder_widths(arguments, tokenizer.encoder.width)
    without_alignment = arguments.get("use_vf_loss") is False
    try:
        values = _values(state, tokenizer, without_alignment)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    fill(tokenizer, values, "cpu")
    return tokenizer.eval()


def _values(state: Mapping[str, Tensor], tokenizer: Tokenizer, without_alignment: bool) -> dict[str, Tensor]:
    """A value for every name of the tokenizer's state dict; all that is missing or left over is one error."""
    target = tokenizer.state_dict()
    encoder = {k[len(ENCODER_PREFIX) :]: v for k, v in state.items() if k.startswith(ENCODER_PREFIX)}
    rest = {k: v for k, v in state.items() if not k.startswith(ENCODER_PREFIX)}
    converted, missing, extra = _convert_parameters(rest, tokenizer.config)
    wrong = []
    try:
        adapted = tokenizer.encoder.adapt(_without_wrapper(encoder))
        converted |= {f"encoder.{name}": tensor for name, tensor in adapted.items()}
    except ValueError as error:
        wrong.append(str(error))
        target = {name: like for name, like in target.items() if not name.startswith("encoder.")}
    if "align.weight" not in converted and without_alignment:
        # Trained without the alignment loss: there is nothing to carry over, and decoding does not need it.
        converted["align.weight"] = torch.zeros(target["align.weight"].shape)
    missing += sorted(target.keys() - converted.keys())
    extra += sorted(converted.keys() - target.keys())
    if missing or extra:
        wrong.append(
            f"checkpoint and arguments do not belong together: the arguments call for"
            f" {missing or 'nothing'} more, and have no place for {extra or 'nothing'}"
        )
    if wrong:
        raise ValueError("; ".join(wrong))
    return {name: _fit(name, converted[name], target[name]) for name in target}


def _convert_parameters(
    state: Mapping[str, Tensor], config: TokenizerConfig
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Published parameters but the encoder's -> ours, missing blur filters, names without a counterpart."""
    rest = dict(state)
    ours: dict[str, Tensor] = {}
    _join_attention(rest, ours)
    _drop_zero_biases(rest)
    missing = _drop_blurs(rest, config.decoder)
    unknown = []
    for name, tensor in rest.items():
        mapped = _latent_branch_name(name, config) or _translate(name)
        if mapped is None:
            unknown.append(name)
        else:
            ours[mapped] = tensor
    return ours, missing, sorted(unknown)


def _without_wrapper(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the names of the attributes that the published code keeps the encoder's model in."""
    inner = dict(encoder)
    while len({name.partition(".")[0] for name in inner}) == 1 and all("." in name for name in inner):
        inner = {name.partition(".")[2]: tensor for name, tensor in inner.items()}
    return inner


def _translate(name: str) -> str | None:
    for pattern, replacement, inner in _MODULES:
        match = re.match(pattern, name)
        if match is None:
            continue
        groups = [int(g) for g in match.groups()]
        prefix = replacement.replace("{1+1}", str(groups[1] + 1)) if "{1+1}" in replacement else replacement
        rest = name[match.end() :]
        for leaf, ours in inner:
            if re.match(leaf, rest):
                return prefix.format(*groups) + re.sub(leaf, ours, rest, count=1)
    return None


def _latent_branch_name(name: str, config: TokenizerConfig) -> str | None:
    """`synthesis.z_convs.{i}.{stage}.{layer}.*`: a pixel-(un)shuffle takes a stage of its own."""
    match = re.match(r"synthesis\.z_convs\.(\d+)\.(\d+)\.(\d+)\.(weight|bias)$", name)
    if match is None:
        return None
    block, stage, layer, leaf = int(match[1]), int(match[2]), int(match[3]), match[4]
    if block >= NUM_BLOCKS:
        return None
    shrink = 64 / config.downsample / 2**block
    stages = {shrink > 1: (1, 2), shrink == 1: (0, 1), shrink < 1: (0, 2)}[True]
    names = {
        (stages[0], 0): "depthwise",
        (stages[0], 1): "mix",
        (stages[0], 2): "norm",
        (stages[1], 0): "out",
        (stages[1], 1): "out_norm",
    }
    part = names.get((stage, layer))
    return None if part is None else f"decoder.blocks.{block}.latent.{part}.{leaf}"


def _join_attention(state: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Separate query, key and value weights become one; the null key and value become two."""
    for name in [k for k in state if k.endswith(".attn.to_q.weight")]:
        published = name[: -len("to_q.weight")]
        match = re.match(r"synthesis\.blocks\.(\d+)\.self_attns\.(\d+)\.attn\.$", published)
        parts = [published + leaf for leaf in ("to_q.weight", "to_k.weight", "to_v.weight", "null_kv")]
        if match is None or any(part not in state for part in parts):
            continue  # the names stay in `state` and are reported as unknown
        query, key, value, null = (state.pop(part) for part in parts)
        prefix = f"decoder.blocks.{match[1]}.attention.{match[2]}."
        ours[prefix + "qkv.weight"] = torch.cat([query, key, value])
        ours[prefix + "null_key"], ours[prefix + "null_value"] = null[0], null[1]


def _drop_zero_biases(state: dict[str, Tensor]) -> None:
    """The published attention stores a zero bias of its keys, which ours does not have."""
    for name in [k for k in state if k.endswith(".zero_k_bias")]:
        if state.pop(name).any():
            raise ValueError(f"{name} is not zero; the published attention has no key bias")


def _drop_blurs(state: dict[str, Tensor], config: DecoderConfig) -> list[str]:
    """Blur filters are constants in our decoder: each must be as applied. Returns missing ones."""
    missing = []
    for block in range(NUM_BLOCKS):
        size = config.blur_size(block)
        for module in ("seperate_upsample_conv", "last_upsample_conv")[: 1 if block == 0 else 2]:
            name = f"synthesis.blocks.{block}.{module}.blur_weight"
            if size == 1:
                continue  # a filter that is there all the same is reported as unknown
            if name not in state:
                missing.append(name)
                continue
            filters = state.pop(name).float()
            line = torch.tensor(BINOMIAL_ROWS[size])
            expected = torch.outer(line, line) / line.sum() ** 2
            if filters.shape[-2:] != expected.shape or not torch.allclose(
                filters, expected.expand_as(filters)
            ):
                raise ValueError(f"{name} is not the binomial blur of size {size} that the decoder applies")
    return missing


def _fit(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Drop the singleton axes of convolution weights; ValueError for other shapes and for NaN or infinity."""
    same = [s for s in tensor.shape if s != 1] == [s for s in like.shape if s != 1]
    if not same:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} in the checkpoint, the arguments give"
            f" {tuple(like.shape)}"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite: the checkpoint is of a failed training")
    return tensor.reshape(like.shape)
