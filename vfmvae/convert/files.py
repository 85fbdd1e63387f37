"""Reading published checkpoints and their configurations; only plain tensors are ever unpickled."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vfmvae.serialization import read_json
from vfmvae.weights import read_content

GENERATORS = ("G_ema", "G")
"""Where a published training checkpoint keeps the generator, in order of preference."""
MODELS = ("ema", "model", "state_dict")
"""The same, for diffusion models."""


def read_generator(path: Path) -> dict[str, Tensor]:
    """The generator's state dict from a .safetensors file or a torch checkpoint with "G_ema" or "G".

    Raises ValueError where the file is missing, truncated, holds code instead of tensors, or something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file")
    return _state_dict(read_content(path), path, GENERATORS, "generator")


def read_arguments(path: Path) -> dict[str, Any]:
    """The generator's arguments from a published YAML or a JSON, with or without a `G_kwargs` section."""
    arguments = read_config(path)
    inner = arguments.get("G_kwargs") or arguments
    if not isinstance(inner, dict):
        raise ValueError(
            f"{path} holds no arguments: needed is a mapping, with or without a G_kwargs section"
        )
    return inner


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or a JSON file. ValueError where it cannot be read or holds something else."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return read_json(path)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no arguments: needed is a mapping of them")
    return config


def read_state(path: Path) -> dict[str, Tensor]:
    """A diffusion model's state dict: that of a .safetensors file, or of a torch checkpoint, where "ema", the
    average of the weights, is preferred to "model".

    Names lose the prefixes of torch's wrappers. Errors as `read_generator`.
    """
    # Published training keeps its options beside the weights; a Namespace is a plain record of them.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = read_content(path)
    state = _state_dict(content, path, MODELS, "model")
    names = {name: re.sub(r"^(module\.|_orig_mod\.)+", "", name) for name in state}
    return {names[name]: tensor for name, tensor in state.items()}


def _state_dict(content: Any, path: Path, places: tuple[str, ...], what: str) -> dict[str, Tensor]:
    found = content
    if isinstance(content, Mapping):
        found = next((content[name] for name in places if content.get(name) is not None), content)
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        keys = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{path} holds no {what}: needed is a state dict, or one under {places}; found {keys[:200]}"
        )
    return dict(found)
