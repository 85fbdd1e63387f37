"""Which implementation of an operation runs: decided per call, explained in words.

Every public operation owns one `Op`. Its `fused` argument means:

    False     the plain PyTorch reference
    True      the first implementation that has no objection to these arguments (the choice is logged once)
    "name"    exactly that implementation, or a ValueError with its objection

An implementation objects through `why_not(*args) -> str | None`: a sentence that names the offending value,
or None. A missing package, build or device is an objection like any other; it is never an import error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

logger = logging.getLogger("vfmvae.ops")

Fused = bool | str


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation. `run` and `why_not` take the same positional arguments."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]


def always(*_: object) -> None:
    """The `why_not` of an implementation that takes everything."""
    return None


@dataclass
class Op:
    """An operation: its reference and the faster implementations in order of preference."""

    name: str
    reference: Callable[..., Any]
    implementations: tuple[Implementation, ...] = ()
    _logged: set[str] = field(default_factory=set, repr=False)

    def __call__(self, fused: Fused, *args: Any) -> Any:
        return self.choose(fused, *args)(*args)

    def choose(self, fused: Fused, *args: Any) -> Callable[..., Any]:
        """The function that `fused` selects for these arguments; see the module docstring."""
        if fused is False or fused == "reference":
            return self.reference
        if isinstance(fused, str):
            return self._by_name(fused, *args)
        refused: list[str] = []
        for implementation in self.implementations:
            objection = implementation.why_not(*args)
            if objection is None:
                self._log_once(implementation.name, refused)
                return implementation.run
            refused.append(f"{implementation.name}: {objection}")
        self._log_once("reference", refused)
        return self.reference

    def names(self) -> list[str]:
        """Every value besides True and False that `fused` may take."""
        return [*(i.name for i in self.implementations), "reference"]

    def _by_name(self, name: str, *args: Any) -> Callable[..., Any]:
        for implementation in self.implementations:
            if implementation.name == name:
                objection = implementation.why_not(*args)
                if objection is not None:
                    raise ValueError(
                        f"{self.name}: the implementation {name!r} cannot be used here: {objection}"
                    )
                return implementation.run
        raise ValueError(f"{self.name}: no implementation {name!r}; known: {', '.join(self.names())}")

    def _log_once(self, chosen: str, refused: list[str]) -> None:
        if torch.compiler.is_compiling():
            return
        line = f"{self.name}: {chosen}" + (f" ({'; '.join(refused)})" if refused else "")
        if line not in self._logged:
            self._logged.add(line)
            logger.debug(line)
