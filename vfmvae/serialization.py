"""Config dataclasses to JSON and back, strictly: an unknown key or a value that does not fit is an error that
names the place and lists what fits. `check_fields` holds values given in Python to the same types.

Fields may be dataclasses, int, float, bool, str, None, Literals, tuples of these, and unions of these.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
_NUMBERS = {int: numbers.Integral, float: numbers.Real}


def to_json(config: Any) -> str:
    """A config dataclass as indented JSON; `from_dict` reads it back to an equal object."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(cls: type[T], data: object, where: str) -> T:
    """Build the dataclass `cls` from parsed JSON. Missing keys take their defaults.

    Raises ValueError, beginning with `where`, for unknown keys (listing the valid ones), missing keys without
    a default, values of a wrong type and values that the dataclass refuses.
    """
    try:
        return _dataclass(cls, data, "")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_fields(config: Any, place: str = "") -> None:
    """Hold every field of a config dataclass to its annotation; the first line of a `__post_init__`.

    What `from_dict` would convert is converted, also in a frozen dataclass: a list becomes a tuple, a whole
    number a float where one is needed. Raises ValueError that names the field, below `place`, and what fits;
    NaN and infinity fit nowhere.
    """
    hints = get_type_hints(type(config))
    prefix = f"{place}." if place else ""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        object.__setattr__(config, field.name, _value(hints[field.name], value, f"{prefix}{field.name}"))


def check_lowest(config: Any, place: str, lowest: Mapping[str, float]) -> None:
    """ValueError for a field, or an entry of one that is a tuple, below what `lowest` has for it."""
    for name, limit in lowest.items():
        value = getattr(config, name)
        if any(entry < limit for entry in (value if isinstance(value, tuple) else (value,))):
            subject = "each entry" if isinstance(value, tuple) else "it"
            raise ValueError(f"{place}.{name} is {value}; {subject} must be at least {limit}")


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from a file; ValueError names the file and the place of a mistake."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a number without end
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}, needed is an object")
    return data


def _dataclass(cls: type[T], data: object, place: str) -> T:
    """`place`: dotted name of the value inside the file; "" at the top."""
    if not isinstance(data, Mapping):
        raise _misfit(data, "an object with fields", place)
    hints = get_type_hints(cls)
    inside = f" in {place}" if place else ""
    for key in data:
        if key not in hints:
            raise ValueError(f"unknown field {key!r}{inside}; valid fields: {', '.join(hints)}")
    missing = [name for name in _required(cls) if name not in data]
    if missing:
        raise ValueError(f"missing fields{inside}: {', '.join(missing)}")
    prefix = f"{place}." if place else ""
    return cls(**{key: _value(hints[key], value, f"{prefix}{key}") for key, value in data.items()})


def _required(cls: Any) -> list[str]:
    """Names of the fields without a default."""
    none = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is none and f.default_factory is none]


def _value(hint: Any, value: object, place: str) -> Any:
    """`value` as the annotated type, or a ValueError that says what would fit."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _member(arguments, value, place)
    if origin is Literal:
        if value in arguments:
            return value
        raise _misfit(value, f"one of {', '.join(str(a) for a in arguments)}", place)
    if origin is tuple:
        return _tuple(arguments, value, place)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _dataclass(hint, value, place)
    # A number of NumPy is as good as one of Python; only bool is no number.
    if hint in _NUMBERS and isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool):
        value = hint(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise _misfit(value, "a finite number", place)
    if type(value) is hint:
        return value
    assert hint in _PLAIN, f"{place}: fields of type {hint} cannot be read"
    raise _misfit(value, _PLAIN[hint], place)


def _member(members: tuple[Any, ...], value: object, place: str) -> Any:
    """A union: null where it may be None, else the one other member (no config has more)."""
    (member,) = (m for m in members if m is not type(None))
    return None if value is None else _value(member, value, place)


def _tuple(items: tuple[Any, ...], value: object, place: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _misfit(value, "a list", place)
    if items[-1] is Ellipsis:
        items = items[:1] * len(value)
    if len(value) != len(items):
        raise _misfit(value, f"a list of {len(items)}", place)
    return tuple(
        _value(item, v, f"{place}[{i}]") for i, (item, v) in enumerate(zip(items, value, strict=True))
    )


def _misfit(value: object, needed: str, place: str) -> ValueError:
    try:
        shown = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):  # not from a JSON file, or NaN
        shown = repr(value)
    return ValueError(f"{place + ' is ' if place else 'found '}{shown}; needed is {needed}")
