"""A tokenizer on disk: a folder with config.json and model.safetensors (encoder included)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from vfmvae.atomic import replacing
from vfmvae.deferred import without_parameters
from vfmvae.model_files import CONFIG_FILE, MODEL_FILE, check_format, find_model, load_weights, write_state
from vfmvae.serialization import from_dict, read_json
from vfmvae.tokenizer.model import Tokenizer, TokenizerConfig

FORMAT = 1
"""Version of the two files, in config.json; raised when an earlier `load_tokenizer` would misread them."""


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write both files, or raise OSError (full disk, read-only) and leave what was there."""
    with replacing(path / MODEL_FILE, path / CONFIG_FILE) as (model, config):
        write_model(tokenizer, model)
        config.write_text(_config_json(tokenizer.config), encoding="utf-8")


def write_model(tokenizer: Tokenizer, path: Path) -> None:
    """The parameters and buffers of a tokenizer as one safetensors file."""
    write_state(tokenizer.state_dict(), path)


def load_tokenizer(
    path_or_hub_id: str | Path, device: str | torch.device = "cpu", fused: bool = True
) -> Tokenizer:
    """Load a tokenizer from a folder (a saved one, or a training run) or from the Hugging Face hub.

    Returns it on `device`, in eval mode. Raises ValueError where something is missing, damaged or does not
    fit.
    """
    return build_with_weights(tokenizer_config(path_or_hub_id), path_or_hub_id, device, fused).eval()


def tokenizer_config(path_or_hub_id: str | Path) -> TokenizerConfig:
    """Of a saved tokenizer or a training run; ValueError where there is none."""
    return _read_config(find_model(path_or_hub_id) / CONFIG_FILE)


def build_with_weights(
    config: TokenizerConfig, path_or_hub_id: str | Path, device: str | torch.device, fused: bool
) -> Tokenizer:
    """A tokenizer of this configuration with the weights of a saved one; ValueError where they do not fit."""
    with without_parameters():
        tokenizer = Tokenizer(config, encoder_weights=None, fused=fused)
    load_weights(tokenizer, find_model(path_or_hub_id) / MODEL_FILE, device)
    return tokenizer.to(device)  # what is in no file moves too


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of the config and of every parameter and buffer by name: the same wherever the files lie."""
    config = dataclasses.asdict(tokenizer.config)
    config["encoder"]["weights"] = None  # where they once came from
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _config_json(config: TokenizerConfig) -> str:
    """Without `encoder.weights`, a path of this machine: the saved model holds the encoder's weights."""
    portable = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, weights=None))
    return json.dumps({"format": FORMAT, **dataclasses.asdict(portable)}, indent=2) + "\n"


def _read_config(path: Path) -> TokenizerConfig:
    data = read_json(path)
    # A training run's config.json describes the whole run and holds the tokenizer's as one section.
    if "tokenizer" in data:
        return from_dict(TokenizerConfig, data["tokenizer"], str(path))
    check_format(data, FORMAT, path)
    return from_dict(TokenizerConfig, data, str(path))
