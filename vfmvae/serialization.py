"""Config dataclasses to JSON and back, strictly: an unknown key or a wrong type is an error that lists what
fits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import dacite

T = TypeVar("T")


def to_json(config: Any) -> str:
    """A config dataclass as indented JSON; `from_dict` reads it back to an equal object."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from parsed JSON. Missing keys take their defaults.

    Raises ValueError, beginning with `where`, for unknown keys (listing the valid ones), wrong types and
    values that the dataclass refuses.
    """
    _check_keys(cls, data, where)
    try:
        return dacite.from_dict(cls, dict(data), dacite.Config(cast=[tuple]))
    except (dacite.DaciteError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from a file; ValueError names the file and the place of a mistake."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}, needed is an object")
    return data


def _check_keys(cls: type, data: Any, where: str) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: needed is an object with fields, not {data!r}")
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key, value in data.items():
        if key not in names:
            raise ValueError(f"{where}: unknown field {key!r}; valid fields: {', '.join(names)}")
        nested = _dataclass_in(hints[key])
        if nested is not None and value is not None:
            _check_keys(nested, value, f"{where}: {key}")


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass of a field annotated `Config` or `Config | None`."""
    candidates = (hint, *getattr(hint, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)
