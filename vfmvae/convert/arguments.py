"""Published arguments, each read once, with its type checked; those that nobody asked for are errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Arguments:
    """Reads arguments once each and remembers which were not asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._unread = set(map(str, values))  # YAML has other keys too
        self._known: set[str] = set()

    def __call__(self, name: str, default: Any) -> Any:
        """The value, or `default`, whose type the value must have."""
        self._unread.discard(name)
        self._known.add(name)
        value = self._values.get(name)
        if value is None:
            return default
        kind = {tuple: list}.get(type(default), type(default))
        fits = isinstance(value, kind) or (kind is list and isinstance(value, tuple))
        if kind is float:
            fits = isinstance(value, (int, float))
        if default is not None and (not fits or isinstance(value, bool) != (kind is bool)):
            raise ValueError(f"argument {name} is {value!r}; needed is {kind.__name__}, like {default!r}")
        return value

    def optional(self, name: str, like: Any) -> Any:
        """The value, which must be of the type of `like`, or None."""
        value = self(name, like)
        return None if self._values.get(name) is None else value

    def choice(self, name: str, choices: Mapping[str, T], default: str) -> T:
        value = self(name, default)
        if value not in choices:
            raise ValueError(f"argument {name} is {value!r}; supported are {', '.join(choices)}")
        return choices[value]

    def unread(self) -> list[str]:
        return sorted(self._unread)

    def known(self) -> list[str]:
        """The names that were asked for."""
        return sorted(self._known)
