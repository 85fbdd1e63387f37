"""A tokenizer on disk: a folder with config.json and model.safetensors (encoder included); nothing is
pickled.
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vfmvae import ops
from vfmvae.atomic import replacing
from vfmvae.serialization import from_dict, read_json, to_json
from vfmvae.tokenizer.model import Tokenizer, TokenizerConfig

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write both files, or raise OSError (full disk, read-only) and leave what was there."""
    with replacing(path / MODEL_FILE, path / CONFIG_FILE) as (model, config):
        write_model(tokenizer, model)
        config.write_text(to_json(tokenizer.config), encoding="utf-8")


def write_model(tokenizer: Tokenizer, path: Path) -> None:
    """The parameters and buffers of a tokenizer as one safetensors file."""
    state = {name: tensor.detach().contiguous() for name, tensor in tokenizer.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})


def load(
    path_or_hub_id: str | Path, device: str | torch.device = "cpu", fused: ops.Fused = True
) -> Tokenizer:
    """Load a tokenizer from a folder (a saved one, or a training run) or from the Hugging Face hub.

    Returns it on `device`, in eval mode. Raises ValueError where something is missing, damaged or does not
    fit.
    """
    folder = _find(path_or_hub_id)
    data = read_json(folder / CONFIG_FILE)
    # A training run's config.json describes the whole run and holds the tokenizer's as one section.
    config = from_dict(TokenizerConfig, data.get("tokenizer", data), str(folder / CONFIG_FILE))
    tokenizer = Tokenizer(config, encoder_weights=None, fused=fused)
    load_weights(tokenizer, folder / MODEL_FILE)
    return tokenizer.to(device).eval()


def load_weights(tokenizer: Tokenizer, path: Path) -> None:
    """Load model.safetensors strictly; ValueError names the file and what does not fit."""
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
    tokenizer.load_state_dict(state)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file; ValueError where it is missing, truncated or something else."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None


def _find(path_or_hub_id: str | Path) -> Path:
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
