"""Reading published checkpoints and their configurations; only plain tensors are ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from vfmvae.serialization import read_json
from vfmvae.weights import read_content

GENERATORS = ("G_ema", "G")
"""Where a published training checkpoint keeps the generator, in order of preference."""


def read_generator(path: Path) -> dict[str, Tensor]:
    """The generator's state dict from a .safetensors file or a torch checkpoint with "G_ema" or "G".

    Raises ValueError where the file is missing, truncated, holds code instead of tensors, or something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file")
    return _state_dict(read_content(path), path)


def read_arguments(path: Path) -> dict[str, Any]:
    """The generator's arguments from a published YAML or a JSON, with or without a `G_kwargs` section."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        arguments = read_json(path)
    else:
        try:
            arguments = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(arguments, dict):
        arguments = arguments.get("G_kwargs") or arguments
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{path} holds no arguments: needed is a mapping, with or without a G_kwargs section"
        )
    return arguments


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    found = content
    if isinstance(content, Mapping):
        found = next((content[name] for name in GENERATORS if content.get(name) is not None), content)
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        keys = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{path} holds no generator: needed is a state dict, or one under {GENERATORS}; found"
            f" {keys[:200]}"
        )
    return dict(found)
