"""Hugging Face parameter names -> timm parameter names, for the vision transformers that both libraries have.

Each `convert_*` takes a state dict as published: of the vision model alone or of the whole model around it,
under any common prefix. What belongs to the model but not to its vision encoder (text tower, mask token,
decoder) is left out knowingly; every other name that has no translation is passed on as it is, so that
loading names it in its error. A state dict that is not in this format gives None.

Newer versions of the library rename some modules in memory; both spellings are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_BLOCK = re.compile(r"(?:model\.|encoder\.)?layers?\.(\d+)\.(.+?)(\.weight|\.bias|)$")
_BLOCK_NAMES = {
    "layer_norm1": "norm1",
    "layernorm_before": "norm1",
    "norm1": "norm1",
    "self_attn.out_proj": "attn.proj",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_norm2": "norm2",
    "layernorm_after": "norm2",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.fc2",
    "layer_scale2.lambda1": "ls2.gamma",
} | {
    f"{module}.{theirs}": f"attn.{letter}"
    for letter, word in (("q", "query"), ("k", "key"), ("v", "value"))
    for module, theirs in (
        ("self_attn", f"{letter}_proj"),
        ("attention", f"{letter}_proj"),
        ("attention.attention", word),
    )
}
_LEFT_OUT = ""


def convert_siglip(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """SiglipVisionModel or SiglipModel, also for SigLIP 2 with fixed resolution."""
    names = {
        "embeddings.patch_embedding": "patch_embed.proj",
        "embeddings.position_embedding.weight": "pos_embed",
        "embeddings.position_ids": _LEFT_OUT,
        "post_layernorm": "norm",
        "head.probe": "attn_pool.latent",
        "head.attention.in_proj_weight": "attn_pool.in.weight",
        "head.attention.in_proj_bias": "attn_pool.in.bias",
        "head.attention.out_proj": "attn_pool.proj",
        "head.layernorm": "attn_pool.norm",
        "head.mlp.fc1": "attn_pool.mlp.fc1",
        "head.mlp.fc2": "attn_pool.mlp.fc2",
    }
    beside = ("text_model.", "logit_scale", "logit_bias", "classifier.")
    own = _rename(state, "embeddings.patch_embedding.weight", names, beside)
    if own is None:
        return None
    if "pos_embed" in own:
        own["pos_embed"] = own["pos_embed"].unsqueeze(0)
    for kind in ("weight", "bias"):
        packed = own.pop(f"attn_pool.in.{kind}", None)
        if packed is not None:
            own[f"attn_pool.q.{kind}"], own[f"attn_pool.kv.{kind}"] = packed.tensor_split([len(packed) // 3])
    return own


def convert_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """CLIPVisionModel, CLIPVisionModelWithProjection or CLIPModel."""
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.patch_embedding": "patch_embed.proj",
        "embeddings.position_embedding.weight": "pos_embed",
        "embeddings.position_ids": _LEFT_OUT,
        "pre_layrnorm": "norm_pre",  # so spelled there
        "post_layernorm": "norm",
    }
    beside = ("text_model.", "visual_projection.", "text_projection.", "logit_scale", "classifier.")
    own = _rename(state, "embeddings.patch_embedding.weight", names, beside)
    if own is None:
        return None
    if "pos_embed" in own:
        own["pos_embed"] = own["pos_embed"].unsqueeze(0)
    if "cls_token" in own:
        own["cls_token"] = own["cls_token"].view(1, 1, -1)
    return own


def convert_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Dinov2Model and Dinov2WithRegistersModel, alone or under a classifier."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": _LEFT_OUT,
        "embeddings.register_tokens": "reg_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
    }
    own = _rename(state, "embeddings.patch_embeddings.projection.weight", names, ("classifier.",))
    if own is None:
        return None
    _fuse(own, ("mlp.gate", "mlp.up"), "mlp.fc1")
    if {"reg_token", "cls_token", "pos_embed"} <= own.keys():
        # timm keeps no position for prefix tokens here; that of the class token is added beforehand.
        own["cls_token"] = own["cls_token"] + own["pos_embed"][:, :1]
        own["pos_embed"] = own["pos_embed"][:, 1:]
    return own


def convert_dinov3(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """DINOv3ViTModel, with plain or gated MLP."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": _LEFT_OUT,
        "embeddings.register_tokens": "reg_token",
        "embeddings.patch_embeddings": "patch_embed.proj",
        "norm": "norm",
    }
    own = _rename(state, "embeddings.patch_embeddings.weight", names, ("classifier.",))
    if own is None:
        return None
    gated = any(".mlp.gate." in name for name in own)
    names_in_eva = {
        "ls1.gamma": "gamma_1",
        "ls2.gamma": "gamma_2",
        "attn.q.bias": "attn.q_bias",
        "attn.v.bias": "attn.v_bias",
        "mlp.gate.": "mlp.fc1_g.",
        "mlp.up.": "mlp.fc1_x." if gated else "mlp.fc1.",
    }
    for theirs, ours in names_in_eva.items():
        own = {name.replace(theirs, ours): tensor for name, tensor in own.items()}
    return own


def convert_mae(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """ViTMAEModel or ViTMAEForPreTraining; the decoder is left out."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
    }
    return _rename(state, "embeddings.patch_embeddings.projection.weight", names, ("decoder.",))


def _rename(
    state: Mapping[str, Tensor], anchor: str, names: Mapping[str, str], beside: tuple[str, ...]
) -> dict[str, Tensor] | None:
    """`state` with translated names; query, key and value fused. `anchor` is a name that tells the encoder's
    prefix; without it, None.

    `names` translates modules (their weight and bias follow) and single tensors outside the blocks; the block
    table is common. Names that begin with one of `beside`, outside the encoder, are left out.
    """
    prefix = next((name.removesuffix(anchor) for name in state if name.endswith(anchor)), None)
    if prefix is None:
        return None
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        inner = name.removeprefix(prefix)
        if prefix and inner == name:
            if not name.startswith(beside):
                renamed[name] = tensor
            continue
        translated = _translate(inner, names)
        if translated != _LEFT_OUT:
            renamed[translated or name] = tensor
    _fuse(renamed, ("attn.q", "attn.k", "attn.v"), "attn.qkv")
    return renamed


def _translate(name: str, names: Mapping[str, str]) -> str | None:
    """timm's name, `_LEFT_OUT`, or None for a name without a translation."""
    if block := _BLOCK.match(name):
        index, module, kind = block.groups()
        ours = _BLOCK_NAMES.get(module)
        return None if ours is None else f"blocks.{index}.{ours}{kind}"
    if name in names:
        return names[name]
    module, _, kind = name.rpartition(".")
    return f"{names[module]}.{kind}" if module in names and kind in ("weight", "bias") else None


def _fuse(state: dict[str, Tensor], parts: tuple[str, ...], whole: str) -> None:
    """In place: stacks the outputs of the linear layers `parts` of every block into the layer `whole`.

    An incomplete set stays as it is.
    """
    first = re.compile(rf"(blocks\.\d+\.){re.escape(parts[0])}\.(weight|bias)")
    for name in list(state):
        if match := first.fullmatch(name):
            block, kind = match.groups()
            pieces = [f"{block}{part}.{kind}" for part in parts]
            if all(piece in state for piece in pieces):
                state[f"{block}{whole}.{kind}"] = torch.cat([state.pop(piece) for piece in pieces])
