"""Published discriminator parameters -> ours: one projected head, and the multi-scale PatchGAN."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_CONVOLUTION = {"weight_orig": "weight", "bias": "bias", "weight_u": "u", "weight_v": "v"}
_AFFINE = {"weight": "weight", "bias": "bias"}
_HEAD = {
    "main.0.0": ("first.conv", _CONVOLUTION),
    "main.0.1": ("first.norm", _AFFINE),
    "main.1.fn.0": ("residual.conv", _CONVOLUTION),
    "main.1.fn.1": ("residual.norm", _AFFINE),
    "cls": ("last", _CONVOLUTION),
    "cmapper": ("condition", _AFFINE),
}
_PATCH_PARTS = {"0": "conv", "1": "norm"}
_PATCH_LAYER = re.compile(r"scale(\d+)_layer([0-4])\.([01])\.(weight|bias)")


def convert_projected_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a published head -> of `ProjectedHead`; ValueError names what has no counterpart."""
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        target, leaves = _HEAD.get(module, ("", {}))
        if leaf in leaves:
            ours[f"{target}.{leaves[leaf]}"] = tensor
        else:
            unknown.append(name)
    _refuse(unknown)
    return ours


def convert_patch_discriminator(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a published PatchGAN -> of `PatchDiscriminator`; ValueError names the unknown.

    Published names count scales from the coarsest, ours from the finest.
    """
    matches = {name: _PATCH_LAYER.fullmatch(name) for name in state}
    _refuse([name for name, match in matches.items() if match is None])
    found = {name: match.groups() for name, match in matches.items() if match is not None}
    finest = max((int(scale) for scale, *_ in found.values()), default=0)
    ours: dict[str, Tensor] = {}
    for name, (scale, layer, part, leaf) in found.items():
        module = "last" if layer == "4" else f"layers.{layer}.{_PATCH_PARTS[part]}"
        ours[f"scales.{finest - int(scale)}.{module}.{leaf}"] = state[name]
    return ours


def _refuse(unknown: list[str]) -> None:
    if unknown:
        raise ValueError(f"parameters without a counterpart in vfmvae: {', '.join(sorted(unknown))}")
