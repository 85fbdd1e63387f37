"""The published description of the frozen encoder, `vfm_name` and `vfm_config`, in terms of our table.

`vfm_name` is a name, a Hugging Face hub id or a timm model; `vfm_config`, where given, is the Hugging Face
configuration of a model of any size: its family is then one of our table's, its dimensions are its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vfmvae.encoders import ENCODERS, ViTConfig

# Names in lower case, without the owner and with hyphens, that the table does not give by itself.
_SPELLINGS = {
    **{f"vit-mae-{size}": f"mae-{size}" for size in ("base", "large", "huge")},
    **{f"{name}-pretrain-lvd1689m": name for name in ENCODERS if name.startswith("dinov3-")},
    **{f"dinov2-vit{size[0]}14": f"dinov2-{size}" for size in ("small", "base", "large", "giant")},
    **{
        f"dinov2-vit{size[0]}14-{registers}": f"dinov2-with-registers-{size}"
        for size in ("small", "base", "large", "giant")
        for registers in ("reg", "reg4")
    },
    "eva02-clip-b-16": "eva02-clip-base-patch16-224",
    "eva02-clip-l-14": "eva02-clip-large-patch14-224",
    "eva02-clip-l-14-336": "eva02-clip-large-patch14-336",
}


@dataclass(frozen=True)
class Family:
    """How the configurations of one Hugging Face model type read.

    `name`: any member in our table. `options`: what changes features, and the values that our family computes
    with; an option that a configuration does not mention has the first one.
    """

    name: str
    options: Mapping[str, tuple[Any, ...]]


_SIGLIP = Family(
    "siglip2-large-patch16-512", {"hidden_act": ("gelu_pytorch_tanh",), "layer_norm_eps": (1e-6,)}
)
_DINOV2 = {"hidden_act": ("gelu",), "layer_norm_eps": (1e-6,), "qkv_bias": (True,)}
_REGISTERS = {"num_register_tokens": (4,)}
_DINOV3 = _REGISTERS | {
    "layer_norm_eps": (1e-5,),
    "rope_theta": (100.0,),
    "query_bias": (True,),
    "key_bias": (False,),
    "value_bias": (True,),
}
_CLIP = Family("clip-vit-large-patch14", {"hidden_act": ("quick_gelu",), "layer_norm_eps": (1e-5,)})
# The library's configurations say 1e-12 where the publication computed with 1e-6, as we do; at the scale of
# these features that changes less than float32 rounding through the blocks.
_MAE = Family("mae-large", {"hidden_act": ("gelu",), "layer_norm_eps": (1e-12, 1e-6), "qkv_bias": (True,)})
_QWEN = Family(
    "qwen2.5-vl-7b",
    {"hidden_act": ("silu",), "window_size": (112,), "spatial_merge_size": (2,), "temporal_patch_size": (2,)},
)
# By the Hugging Face model type, and whether its MLP is gated.
FAMILIES: dict[tuple[str, bool], Family] = {
    ("siglip", False): _SIGLIP,
    ("siglip_vision_model", False): _SIGLIP,
    ("siglip2", False): _SIGLIP,
    ("siglip2_vision_model", False): _SIGLIP,
    ("dinov2", False): Family("dinov2-large", _DINOV2),
    ("dinov2", True): Family("dinov2-giant", _DINOV2),
    ("dinov2_with_registers", False): Family("dinov2-with-registers-large", _DINOV2 | _REGISTERS),
    ("dinov2_with_registers", True): Family("dinov2-with-registers-giant", _DINOV2 | _REGISTERS),
    ("dinov3_vit", False): Family("dinov3-vitl16", _DINOV3 | {"hidden_act": ("gelu",)}),
    ("dinov3_vit", True): Family("dinov3-vith16plus", _DINOV3 | {"hidden_act": ("silu",)}),
    ("clip", False): _CLIP,
    ("clip_vision_model", False): _CLIP,
    ("vit_mae", False): _MAE,
    ("qwen2_5_vl", False): _QWEN,
    ("qwen2_5_vl_vision", False): _QWEN,
}
_GATES = ("use_swiglu_ffn", "use_gated_mlp")
_TIMM_WRAPPER = "timm_wrapper"


def resolve_encoder(name: str, config: Mapping[str, Any] | None) -> tuple[str, ViTConfig | None]:
    """A key of `vfmvae.encoders.ENCODERS`, and dimensions that replace its own where `config` gives them.

    Raises ValueError for an unknown name or model type, listing the known ones, and for an option of `config`
    that would change features.
    """
    if config is None:
        return _known_name(name, "argument vfm_name"), None
    if not isinstance(config, Mapping) or not isinstance(config.get("vision_config", {}), Mapping):
        raise ValueError(f"vfm_config is {config!r}; needed is the encoder's configuration, a mapping")
    if config.get("model_type") == _TIMM_WRAPPER:
        return _known_name(str(config.get("architecture")), "architecture in vfm_config"), None
    if "vision_config" in config:  # of a model with a text side
        config = {"model_type": config.get("model_type"), **config["vision_config"]}
    kind, gated = config.get("model_type"), any(config.get(option) for option in _GATES)
    family = FAMILIES.get((str(kind), gated))
    if family is None:
        known = dict.fromkeys(kind for kind, _ in FAMILIES)
        raise ValueError(
            f"vfm_config has model_type {kind!r}{' with a gated MLP' if gated else ''}; supported are"
            f" {', '.join(known)}, {_TIMM_WRAPPER}"
        )
    _check_options(config, {**family.options, "num_channels": (3,)})
    vit = _dimensions(config, positions=family is not _QWEN)
    if family is _QWEN:
        # Every fourth of the model ends with a block that attends to the whole image.
        whole_image = [vit.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        _check_options(config, {"fullatt_block_indexes": (whole_image,)})
    return family.name, vit


def _check_options(config: Mapping[str, Any], options: Mapping[str, tuple[Any, ...]]) -> None:
    for key, supported in options.items():
        if config.get(key, supported[0]) not in supported:
            needed = f"{config['model_type']} is supported with {supported[0]!r}"
            raise ValueError(f"vfm_config has {key} {config[key]!r}; {needed}")


def _known_name(published: str, where: str) -> str:
    spelled = published.rsplit("/", 1)[-1].lower().replace("_", "-")
    name = {**_table_spellings(), **_SPELLINGS}.get(spelled)
    if name is None:
        raise ValueError(
            f"{where} is {published!r}; known encoders: {', '.join(ENCODERS)}, also under their"
            f" hub ids and timm names"
        )
    return name


def _table_spellings() -> dict[str, str]:
    """Our names, and timm's or the hub's for the same models; without timm's tag where one model has it."""
    published = {
        name: entry.model.rsplit("/", 1)[-1].lower().replace("_", "-")
        for name, entry in ENCODERS.items()
        if entry.file is None
    }
    untagged: dict[str, list[str]] = {}
    for name, model in published.items():
        untagged.setdefault(model.partition(".")[0], []).append(name)
    return {
        **{model: names[0] for model, names in untagged.items() if len(names) == 1},
        **{model: name for name, model in published.items()},
        **{name: name for name in ENCODERS},
    }


def _dimensions(config: Mapping[str, Any], positions: bool) -> ViTConfig:
    """`positions`: the model has position embeddings, and so a size that they are made for."""

    def whole(*keys: str) -> int:
        """The number under the first of `keys` that is there."""
        key = next((key for key in keys if config.get(key) is not None), None)
        if key is None:
            raise ValueError(f"vfm_config lacks {keys[0]!r}")
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"vfm_config has {key} {value!r}; needed is a whole number above 0")
        return value

    width, depth, patch_size = whole("hidden_size"), whole("num_hidden_layers", "depth"), whole("patch_size")
    # Pixels at the edge that fill no patch are not seen: SigLIP so400m says 384 and means 27 * 14 = 378.
    image_size = whole("image_size") // patch_size * patch_size if positions else patch_size
    if "mlp_ratio" in config and config.get("intermediate_size") is None:
        ratio = config["mlp_ratio"]
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
            raise ValueError(f"vfm_config has mlp_ratio {ratio!r}; needed is a number above 0")
        mlp_width = math.floor(ratio * width)
        if config.get("use_swiglu_ffn"):  # two thirds of it, rounded up to a multiple of 8
            mlp_width = (math.floor(mlp_width * 2 / 3) + 7) // 8 * 8
    else:
        mlp_width = whole("intermediate_size")
    heads = whole("num_attention_heads", "num_heads")
    return ViTConfig(width, depth, heads, patch_size, image_size, mlp_width)
