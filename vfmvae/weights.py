"""Finding and reading weight files, on disk and on the Hugging Face hub; knows no model.

Files are .safetensors, or torch files opened with weights_only=True; nothing that could run code is ever
unpickled. Every failure is a ValueError of one sentence that names what was wanted, where it was looked for
and what to do.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vfmvae.atomic import reason

# In order of preference; an index names the shards that lie beside it.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
_HUB_TIMEOUT_S = 5
# What the readers raise, depending on where a file ends or what a changed byte meant.
_DAMAGE = (
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# What training scripts wrap around a state dict.
_WRAPPERS = ("model_ema", "model", "module", "state_dict")

FileFinder = Callable[[str], Path | None]  # a file name -> where it lies, None if there is no such file


def read_weights(path: str | Path, only: str = "") -> dict[str, Tensor]:
    """State dict, on the CPU, of a weight file or of a directory that holds one under a usual name.

    `only`: of sharded weights, read just the shards with parameter names that contain this.

    Raises:
        ValueError: no such file, no weights in the directory, a truncated file, a pickle that holds more than
            tensors.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return read_file(path)
    if not path.is_dir():
        raise ValueError(
            f"{path} does not exist: give a .safetensors or torch file, or a directory that holds one"
        )
    try:
        found = _locate(lambda name: path / name if (path / name).is_file() else None, only)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    if not found:
        loose = sorted([*path.glob("*.safetensors"), *path.glob("*.pth"), *path.glob("*.pt")])
        if len(loose) != 1:
            raise ValueError(
                f"{path} holds no weights; looked for {', '.join(WEIGHT_FILES)}, or one .pth or .pt file"
            )
        found = loose
    return {name: tensor for file in found for name, tensor in read_file(file).items()}


def read_hub_weights(repository: str, encoder: str, only: str = "") -> dict[str, Tensor]:
    """State dict of a repository on the Hugging Face hub, from the local cache if there; as `read_weights`.

    Raises:
        ValueError: the hub is out of reach (found out within seconds) or refuses; the message says what to
            do.
    """

    def cached(name: str) -> Path | None:
        file = try_to_load_from_cache(repository, name)
        return Path(file) if isinstance(file, str) else None

    def downloaded(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError:  # out of reach, whatever the repository holds
            raise
        except EntryNotFoundError:
            return None

    try:
        found = _locate(cached, only)
    except FileNotFoundError:  # the cache holds some of the shards
        found = []
    try:
        if not found:
            _require_hub()
            found = _locate(downloaded, only)
    except (OSError, HfHubHTTPError) as error:
        cause = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no weights for the encoder {encoder}: {repository} is not in the cache {hub.HF_HUB_CACHE} and "
            f"could not be fetched from {hub.ENDPOINT} ({cause}); download it on a machine with a network "
            f"and give the file or directory as weights"
        ) from error
    if not found:
        raise ValueError(
            f"no weights for the encoder {encoder}: {hub.ENDPOINT}/{repository} holds none of "
            f"{', '.join(WEIGHT_FILES)}; give a file or directory as weights"
        )
    return {name: tensor for file in found for name, tensor in read_file(file).items()}


def read_file(path: Path) -> dict[str, Tensor]:
    """State dict, on the CPU, of one .safetensors or torch file, without wrappers such as {"model": ...}.

    Raises:
        ValueError: see `read_weights`.
    """
    return unwrap(read_content(path), str(path))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file, on the CPU, whatever its suffix. Errors as `read_content`."""
    return _read(path, "safetensors file", load_file)


def read_content(path: Path) -> Any:
    """What one .safetensors or torch file holds, on the CPU, as it was saved.

    Raises:
        ValueError: the file is missing, may not be read, is truncated or damaged, or is a pickle with more
            than tensors in it.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return _read(path, "torch file", lambda file: torch.load(file, map_location="cpu", weights_only=True))


def _read(path: Path, kind: str, load: Callable[[Path], Any]) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file")
    try:
        size = path.stat().st_size
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {reason(error)}") from error
    try:
        return load(path)
    except _DAMAGE as error:
        # The restricted unpickler stops at the first name that it does not know, or that is cut short.
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden and isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} was refused: it holds more than tensors ({forbidden[1]}), so opening it could run "
                f"code; save its state dict as .safetensors where you trust it, or copy the file again if it "
                f"is truncated or damaged"
            ) from error
        raise ValueError(
            f"{path} ({size} bytes) is truncated or damaged, or not a {kind}; copy or download it again"
        ) from error


def unwrap(content: object, origin: str) -> dict[str, Tensor]:
    """The state dict inside what a training script saved. Raises ValueError if there is none."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{origin} holds no state dict but {type(content).__name__}")
    strangers = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise ValueError(f"{origin} is no state dict: not tensors: {_listed(strangers)}")
    return dict(content)


def check_names(encoder: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the differences, unless both hold the same names with the same shapes."""
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    shapes = [
        f"{name} is {list(given[name].shape)}, needed {list(expected[name].shape)}"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    wrong = [f"{kind}: {_listed(names)}" for kind, names in kinds if names]
    if wrong:
        raise ValueError(f"these weights do not fit the encoder {encoder}; {'; '.join(wrong)}")


def _locate(find: FileFinder, only: str) -> list[Path]:
    """The files of the first kind of `WEIGHT_FILES` that is there, shards resolved; empty if there is none.

    Raises FileNotFoundError for a shard that is not there.
    """
    for name in WEIGHT_FILES:
        file = find(name)
        if file is None:
            continue
        if not name.endswith(".index.json"):
            return [file]
        shards = sorted({shard for key, shard in _weight_map(file).items() if only in key})
        found = [find(shard) for shard in shards]
        if None in found:
            raise FileNotFoundError(
                f"{file} names the file {shards[found.index(None)]}, which is not beside it"
            )
        return [shard for shard in found if shard is not None]
    return []


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{index} is not readable JSON, or is truncated ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
        raise ValueError(f"{index} holds no weight_map, so the shards it stands for are unknown")
    return content["weight_map"]


def _require_hub() -> None:
    """Raises OSError within seconds if the hub is out of reach; its client would retry for half a minute."""
    if hub.HF_HUB_OFFLINE:
        raise ConnectionError("offline mode: HF_HUB_OFFLINE is set")
    request = urllib.request.Request(hub.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # an answer, if not a kind one
    except urllib.error.URLError as error:
        raise ConnectionError(str(error.reason)) from error


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
