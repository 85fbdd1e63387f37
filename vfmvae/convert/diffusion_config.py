"""The arguments of published diffusion transformers -> TransformerConfig.

Arguments are those of the models' constructors (`hidden_size`, `z_dims`, `use_rmsnorm`, ...), or of the
published training: a name such as "SiT-XL/2" as `model` or `model_type` in place of sizes, with `resolution`
or `image_size` and `downsample_ratio` in place of `input_size`; LightningDiT's YAML has them in sections. Of
that file `data`, `vae` and `transport` are read for what a model depends on, the rest is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from vfmvae.convert.arguments import Arguments
from vfmvae.diffusion import SIZES, TransformerConfig

Source = Literal["repa", "reg", "sit", "lightningdit"]

# Read from the sections of LightningDiT's YAML; all of `model` is.
SECTIONS = {
    "data": ("image_size", "num_classes", "latent_norm", "latent_multiplier"),
    "vae": ("downsample_ratio",),
    "transport": ("path_type", "prediction"),
}
OTHER_SECTIONS = ("ckpt_path", "optimizer", "sample", "train")
# Arguments that change nothing in the numbers of the network, or belong to training and sampling.
IGNORED = {
    *("fused_attn", "use_checkpoint", "class_dropout_prob", "use_cfg", "cfg_scale", "num_steps"),
    *("output_dir", "exp_name", "logging_dir", "report_to", "sampling_steps", "resume_step", "data_dir"),
    *("batch_size", "allow_tf32", "mixed_precision", "epochs", "max_train_steps", "checkpointing_steps"),
    *("gradient_accumulation_steps", "learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay"),
    *("adam_epsilon", "max_grad_norm", "seed", "num_workers", "cfg_prob", "enc_type", "proj_coeff"),
    *("weighting", "legacy", "cls", "ops_head"),
}
PATHS = dict.fromkeys(("Linear", "linear"))
PREDICTIONS = dict.fromkeys(("velocity", "v"))
WIDTHS = {  # hidden_size, depth, num_heads, encoder_depth, beside those of SIZES
    "S": (384, 12, 6, 4),
    **{name: (s["width"], s["depth"], s["heads"], s["alignment_depth"]) for name, s in SIZES.items()},
    "1p0B": (1536, 24, 24, 8),
    "1p6B": (1792, 28, 28, 8),
}


@dataclass(frozen=True)
class Published:
    """What a published configuration says."""

    config: TransformerConfig
    latent_norm: bool | None
    """Whether latents were normalised by statistics, which must then be given; None: it does not say."""
    latent_multiplier: float | None
    """What the latents were multiplied by after that."""


def published_config(
    source: Source, arguments: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Published:
    """Translate published arguments. Missing ones take the published defaults, which are those of an XL model
    with patch 2 on 32 x 32 latents of 4 channels (LightningDiT: 32 channels).

    `weights`: the published parameters, which tell the widths of REPA's projectors and of REG's class token.

    Raises ValueError naming an argument that is unknown, has a value that does not fit, or asks for what is
    not supported.
    """
    arg = Arguments(_without_sections(arguments))
    sit_family = source != "lightningdit"
    named = _named(arg, sit_family)
    width = _sized(arg, named, "hidden_size", WIDTHS["XL"][0])
    options: dict[str, Any] = {
        "latent_size": _input_size(arg),
        "channels": arg("in_channels", arg("in_chans", 4 if sit_family else 32)),
        "patch": _sized(arg, named, "patch_size", 2),
        "width": width,
        "depth": _sized(arg, named, "depth", WIDTHS["XL"][1]),
        "heads": _sized(arg, named, "num_heads", WIDTHS["XL"][2]),
        "classes": arg("num_classes", 1000),
        "mlp_ratio": float(arg("mlp_ratio", 4.0)),
        "learn_sigma": arg("learn_sigma", source == "sit"),
        "published_time": "data" if source in ("sit", "lightningdit") else "noise",
    }
    if source in ("repa", "reg"):
        options |= _alignment(arg, named, width, weights)
    if source == "reg":
        options["class_token_width"] = _class_token_width(arg, weights)
    if source == "lightningdit":
        options |= {
            "qk_norm": arg("use_qknorm", False),
            "swiglu": arg("use_swiglu", False),
            "rope": arg("use_rope", False),
            "norm": "rms" if arg("use_rmsnorm", False) else "layer",
            "block_shift": not arg("wo_shift", False),
        }
    arg.choice("path_type", PATHS, "linear")
    arg.choice("prediction", PREDICTIONS, "v")
    if arg("null_class", options["classes"]) != options["classes"]:
        raise ValueError(f"argument null_class is {arg('null_class', 0)}; it must be num_classes")
    latent_norm, multiplier = arg.optional("latent_norm", False), arg.optional("latent_multiplier", 1.0)
    if multiplier is not None and multiplier <= 0:
        raise ValueError(f"argument latent_multiplier is {multiplier}; it must be above 0")
    unknown = [name for name in arg.unread() if name not in IGNORED]
    if unknown:
        raise ValueError(
            f"unknown arguments: {', '.join(unknown)}; those of --from {source} are"
            f" {', '.join(arg.known())}; remove what does not change the network from the config"
        )
    return Published(TransformerConfig(**options), latent_norm, multiplier)


def _without_sections(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """LightningDiT's sections as one mapping; other configurations as they are."""
    model = arguments.get("model")
    if not isinstance(model, Mapping):
        return dict(arguments)
    flat = dict(model)
    for section, names in SECTIONS.items():
        values = arguments.get(section) or {}
        if not isinstance(values, Mapping):
            raise ValueError(f"section {section} of the config is {values!r}; needed is a mapping")
        flat |= {name: values[name] for name in names if name in values}
    known = ("model", *SECTIONS, *OTHER_SECTIONS)
    unknown = sorted(str(name) for name in arguments if name not in known)
    if unknown:
        raise ValueError(
            f"unknown sections of the config: {', '.join(unknown)}; known are {', '.join(known)}"
        )
    return flat


def _named(arg: Arguments, sit_family: bool) -> dict[str, int]:
    """The sizes that a name such as SiT-XL/2 stands for; none without a name."""
    name = arg("model", "") or arg("model_type", "")
    arg("model_type", "")
    if not name:
        return {}
    family = "SiT" if sit_family else "LightningDiT"
    match = re.fullmatch(rf"{family}-({'|'.join(WIDTHS)})/([1-9])", name)
    if match is None:
        raise ValueError(
            f"the model's name is {name!r}; needed is {family}-SIZE/PATCH, such as {family}-XL/2, with a SIZE"
            f" of {', '.join(WIDTHS)}"
        )
    names = ("hidden_size", "depth", "num_heads", "encoder_depth")
    return dict(zip(names, WIDTHS[match[1]], strict=True)) | {"patch_size": int(match[2])}


def _sized(arg: Arguments, named: Mapping[str, int], name: str, default: int) -> int:
    value = arg(name, named.get(name, default))
    if name != "encoder_depth" and value != named.get(name, value):
        raise ValueError(f"argument {name} is {value}, and the model's name says {named[name]}; remove one")
    return value


def _input_size(arg: Arguments) -> int:
    """Rows of the latents: given, or of images of `resolution` over `downsample_ratio`, at first 256 / 8."""
    resolution, factor = arg("resolution", 0) or arg("image_size", 0) or 256, arg("downsample_ratio", 8)
    arg("image_size", 0)
    if factor < 1 or resolution % factor:
        raise ValueError(f"argument downsample_ratio is {factor}, which does not divide {resolution} pixels")
    return arg("input_size", resolution // factor)


def _alignment(
    arg: Arguments, named: Mapping[str, int], width: int, weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    """REPA's projectors. The decoder's width is a published argument that only has one sensible value."""
    decoder_width = arg("decoder_hidden_size", width)
    if decoder_width != width:
        raise ValueError(
            f"argument decoder_hidden_size is {decoder_width}, and hidden_size {width}; only equal ones are"
            f" supported"
        )
    found: list[int] = []
    while (last := weights.get(f"projectors.{len(found)}.4.weight")) is not None:
        found.append(last.shape[0] if last.ndim else 0)
    given = arg("z_dims", tuple(found))
    if list(given) != found:
        raise ValueError(f"argument z_dims is {list(given)}; the checkpoint's projectors give {found}")
    return {
        "qk_norm": arg("qk_norm", False),
        "alignment_depth": _sized(arg, named, "encoder_depth", 8),
        "alignment_widths": tuple(found),
        "projector_width": arg("projector_dim", 2048),
    }


def _class_token_width(arg: Arguments, weights: Mapping[str, Tensor]) -> int:
    weight = weights.get("cls_projectors2.weight")
    if weight is None or weight.ndim != 2:
        raise ValueError(
            "cls_projectors2.weight is missing, so this is no checkpoint of REG; use --from repa"
        )
    given = arg("cls_token_dim", weight.shape[1])
    if given != weight.shape[1]:
        raise ValueError(
            f"argument cls_token_dim is {given}; the checkpoint's class token has {weight.shape[1]} numbers"
        )
    return given
