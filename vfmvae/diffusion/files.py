"""A diffusion transformer on disk: a folder with config.json and model.safetensors.

The statistics of the latents that it was trained on are buffers of the model, so they travel with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vfmvae.atomic import replacing
from vfmvae.deferred import without_parameters
from vfmvae.diffusion.config import TransformerConfig
from vfmvae.diffusion.transformer import DiffusionTransformer
from vfmvae.model_files import CONFIG_FILE, MODEL_FILE, check_format, find_model, load_weights, write_state
from vfmvae.serialization import from_dict, read_json

FORMAT = 1
"""Version of the two files, in config.json; raised when an earlier `load_transformer` would misread them."""
HASH = "tokenizer_hash"
"""In the metadata of model.safetensors."""
SECTION = "diffusion"
"""Of config.json, in a saved model and in a training run alike."""


def save_transformer(
    model: DiffusionTransformer,
    path: Path,
    tokenizer: str | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write both files, or raise OSError and leave what was there.

    Args:
        tokenizer: hash of the tokenizer whose latents the model knows (vfmvae.tokenizer.files).
        stages: how it was trained, the last one last: "path" and "time" of each, as in a run's config.json,
            by which `vfmvae sample` chooses its times.
    """
    config = {"format": FORMAT, SECTION: asdict(model.config), "stages": list(stages)}
    with replacing(path / MODEL_FILE, path / CONFIG_FILE) as (weights, description):
        write_state(model.state_dict(), weights, {HASH: tokenizer or ""})
        description.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_transformer(
    path_or_hub_id: str | Path, device: str | torch.device = "cpu", fused: bool = True
) -> DiffusionTransformer:
    """Load a saved model, or the averaged weights of a training run, in eval mode on `device`.

    Raises ValueError where something is missing, damaged or does not fit.
    """
    folder = find_model(path_or_hub_id)
    path = folder / CONFIG_FILE
    data = read_json(path)
    if not is_diffusion(data):
        raise ValueError(f"{path} describes no diffusion model (it has no section {SECTION!r})")
    check_format(data, FORMAT, path)
    with without_parameters():
        model = DiffusionTransformer(from_dict(TransformerConfig, data[SECTION], str(path)), fused=fused)
    load_weights(model, folder / MODEL_FILE, device)
    return model.to(device).eval()  # what is in no file moves too


def tokenizer_hash_of(folder: Path) -> str | None:
    """Hash of the tokenizer whose latents a saved model knows; None where that was not known."""
    with safe_open(folder / MODEL_FILE, "pt") as file:
        return (file.metadata() or {}).get(HASH) or None


def is_diffusion(config: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is that of a diffusion model or of the run that trains one."""
    return isinstance(config.get(SECTION), Mapping) and not isinstance(config.get("tokenizer"), Mapping)
