"""A tokenizer on disk: a folder with config.json and model.safetensors (encoder included); nothing is
pickled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from vfmvae.atomic import replacing
from vfmvae.encoders.deferred import fill, without_parameters
from vfmvae.encoders.weights import read_safetensors
from vfmvae.serialization import from_dict, read_json
from vfmvae.tokenizer.model import Tokenizer, TokenizerConfig

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
FORMAT = 1
"""Version of the two files, in config.json; raised when an earlier `load` would misread them."""


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write both files, or raise OSError (full disk, read-only) and leave what was there."""
    with replacing(path / MODEL_FILE, path / CONFIG_FILE) as (model, config):
        write_model(tokenizer, model)
        config.write_text(_config_json(tokenizer.config), encoding="utf-8")


def write_model(tokenizer: Tokenizer, path: Path) -> None:
    """The parameters and buffers of a tokenizer as one safetensors file."""
    write_state(tokenizer.state_dict(), path)


def write_state(state: Mapping[str, Tensor], path: Path) -> None:
    """The same from a tokenizer's state dict."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


def load(path_or_hub_id: str | Path, device: str | torch.device = "cpu", fused: bool = True) -> Tokenizer:
    """Load a tokenizer from a folder (a saved one, or a training run) or from the Hugging Face hub.

    Returns it on `device`, in eval mode. Raises ValueError where something is missing, damaged or does not
    fit.
    """
    folder = _find(path_or_hub_id)
    config = _read_config(folder / CONFIG_FILE)
    with without_parameters():
        tokenizer = Tokenizer(config, encoder_weights=None, fused=fused)
    load_weights(tokenizer, folder / MODEL_FILE, device)
    return tokenizer.to(device).eval()  # what is in no file moves too


def load_weights(tokenizer: Tokenizer, path: Path, device: str | torch.device) -> None:
    """Load model.safetensors strictly, onto `device`; ValueError names the file and what does not fit."""
    state = read_safetensors(path)
    own = tokenizer.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit its config: missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    wrong = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}"
        for k, v in own.items()
        if state[k].shape != v.shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit its config: wrong shapes: {_some(wrong)}")
    fill(tokenizer, state, device)


def _config_json(config: TokenizerConfig) -> str:
    """Without `encoder.weights`, a path of this machine: the saved model holds the encoder's weights."""
    portable = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, weights=None))
    return json.dumps({"format": FORMAT, **dataclasses.asdict(portable)}, indent=2) + "\n"


def _read_config(path: Path) -> TokenizerConfig:
    data = read_json(path)
    # A training run's config.json describes the whole run and holds the tokenizer's as one section.
    if "tokenizer" in data:
        return from_dict(TokenizerConfig, data["tokenizer"], str(path))
    version = data.pop("format", 1)  # the first files had none
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ValueError(
            f"{path} has format {version!r}; this version of vfmvae reads formats up to {FORMAT}: install a"
            f" newer one"
        )
    return from_dict(TokenizerConfig, data, str(path))


def _find(path_or_hub_id: str | Path) -> Path:
    if not isinstance(path_or_hub_id, str | PathLike):
        raise ValueError(f"cannot load {path_or_hub_id!r}; give a folder or a hub id (owner/name)")
    path = Path(path_or_hub_id)
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise ValueError(f"{path} holds no {CONFIG_FILE}: it is not a saved tokenizer")
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; give the folder that holds {CONFIG_FILE} and {MODEL_FILE}")
    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=[CONFIG_FILE, MODEL_FILE]))
    except HFValidationError:
        raise ValueError(
            f"no folder {path} exists, and {str(path_or_hub_id)!r} is no hub id (owner/name)"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"no folder {path} exists, and {str(path_or_hub_id)!r} could not be fetched from the"
            f" Hugging Face hub"
            f" ({type(error).__name__}); check the name and the network, or give a local folder"
        ) from None


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
