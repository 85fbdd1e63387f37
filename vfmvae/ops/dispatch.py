"""Which implementation of an operation runs: decided per call, explained in words.

Every public operation owns one `Op`. Its `fused` argument means:

    False     the plain PyTorch reference
    True      the first implementation that has no objection to these arguments
    "name"    exactly that implementation, or a ValueError with its objection

An implementation objects through `why_not(*args) -> str | None`: a sentence that names the offending value,
or None. A missing package, build or device is an objection like any other; it is never an import error.

What True chose is logged through `vfmvae.ops`, once per operation and reasons: as a WARNING where the tensors
are on a CUDA device and an implementation was passed over because this installation lacks its part (Triton,
or the extension's CUDA code), which installing it would mend; else at DEBUG. So the CPU is silent, and so are
arguments that an implementation was not made for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vfmvae.ops import native

logger = logging.getLogger("vfmvae.ops")

Fused = bool | str


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation. `run` and `why_not` take the same positional arguments."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    why_not_first: Callable[..., str | None] = lambda *_: None
    """Why True passes it over though it could run, which it does by name: where it is slower."""


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
        refused: list[tuple[str, str]] = []
        for implementation in self.implementations:
            objection = implementation.why_not(*args) or implementation.why_not_first(*args)
            if objection is None:
                self._log_once(implementation.name, refused, args)
                return implementation.run
            refused.append((implementation.name, objection))
        self._log_once("reference", refused, args)
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

    def _log_once(self, chosen: str, refused: list[tuple[str, str]], args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        reasons = "; ".join(f"{name}: {objection}" for name, objection in refused)
        line = f"{self.name}: {chosen}" + (f" ({reasons})" if reasons else "")
        if line in self._logged:
            return
        self._logged.add(line)
        absent = _absent_parts(args)
        if any(objection in absent for _, objection in refused):
            logger.warning(f"fused {self.name} runs as {chosen!r}, which is slower here ({reasons})")
        else:
            logger.debug(line)


def _absent_parts(args: tuple[Any, ...]) -> set[str | None]:
    """Objections to any CUDA tensor at all: what this installation lacks. Nothing for other devices."""
    x = next((a for a in args if isinstance(a, Tensor) and a.is_cuda), None)
    return set() if x is None else {native.why_no_triton(x), native.why_no_cuda_code(x)} - {None}
