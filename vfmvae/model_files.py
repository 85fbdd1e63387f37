"""A model on disk: a folder with config.json and model.safetensors; nothing is pickled.

What stands in config.json is the model's own affair (vfmvae.tokenizer.files, vfmvae.diffusion.files).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor, nn

from vfmvae.deferred import fill
from vfmvae.weights import read_safetensors

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"


def write_state(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A state dict as one safetensors file."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(contiguous, path, metadata={"format": "pt", **(metadata or {})})


def load_weights(model: nn.Module, path: Path, device: str | torch.device) -> None:
    """Fill a model from a safetensors file, strictly, onto `device`; ValueError says what does not fit."""
    fill(model, fitting_weights(model, path), device)


def fitting_weights(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file that are those of a model by name and shape; else ValueError."""
    state = read_safetensors(path)
    own = model.state_dict()
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
    return dict(state)


def file_hash(path_or_hub_id: str | Path) -> str:
    """SHA-256 of a saved model's file of weights."""
    digest = hashlib.sha256()
    with open(find_model(path_or_hub_id) / MODEL_FILE, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_hash(path_or_hub_id: str | Path, prefixes: tuple[str, ...]) -> str:
    """SHA-256 of a saved model's weights whose names begin like one of these."""
    state, digest = read_safetensors(find_model(path_or_hub_id) / MODEL_FILE), hashlib.sha256()
    for name in sorted(name for name in state if name.startswith(prefixes)):
        digest.update(f"{name} {state[name].dtype} {tuple(state[name].shape)}".encode())
        digest.update(state[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_model(path_or_hub_id: str | Path) -> Path:
    """The folder of a saved model or a training run, fetched from the Hugging Face hub if it is not here.

    ValueError where there is none.
    """
    if not isinstance(path_or_hub_id, str | PathLike):
        raise ValueError(f"cannot load {path_or_hub_id!r}; give a folder or a hub id (owner/name)")
    path = Path(path_or_hub_id)
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise ValueError(f"{path} holds no {CONFIG_FILE}: it is no saved model")
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


def check_format(data: dict[str, Any], newest: int, path: Path) -> None:
    """Take the version out of a config.json; ValueError for one that is newer than this package reads."""
    version = data.pop("format", 1)  # the first files had none
    if type(version) is not int or not 1 <= version <= newest:
        raise ValueError(
            f"{path} has format {version!r}; this version of vfmvae reads formats up to {newest}: install a"
            f" newer one"
        )


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
