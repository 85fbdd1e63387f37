"""Which implementation of an operation runs: decided per call, explained in words.

Every public operation owns one `Op`. Its `fused` argument means:

    False     the plain PyTorch reference
    True      the first implementation that has no objection to these arguments
    "name"    exactly that implementation, or a ValueError with its objection

An implementation objects through `why_not(*args) -> str | None`: a sentence that names the offending value,
or None. A missing package, build or device is an objection like any other; it is never an import error.

What True chose is logged through `vfmvae.ops`, once per operation and reasons: as a WARNING where the tensors
are on a CUDA device and an implementation made for it cannot run, either because this installation lacks its
part (Triton, or the extension's CUDA code), which installing it would mend, or because of the dtype, the size
or the card, so that plain PyTorch runs; else at the operation's `level`. So the CPU is silent, and so is the
choice of what is faster (`why_not_first`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vfmvae.ops import native

logger = logging.getLogger("vfmvae.ops")

Fused = bool | str

PLAIN = ("reference", "gemm", "channels_last")
"""Names of implementations in plain PyTorch."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation. `run` and `why_not` take the same positional arguments."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    why_not_first: Callable[..., str | None] = lambda *_: None
    """Why True passes it over though it could run, which it does by name: where it is slower.

    To tell whether an objection of `why_not` costs anything, this is asked there too, but not of "cpu".
    """


def always(*_: object) -> None:
    """The `why_not` of an implementation that takes everything."""
    return None


@dataclass
class Op:
    """An operation: its reference and the faster implementations in order of preference."""

    name: str
    reference: Callable[..., Any]
    implementations: tuple[Implementation, ...] = ()
    level: int = logging.DEBUG
    """Of what is logged of choices that are no warning."""
    _logged: set[str] = field(default_factory=set, repr=False)

    def __call__(self, fused: Fused, *args: Any) -> Any:
        return self.choose(fused, *args)(*args)

    def choose(self, fused: Fused, *args: Any) -> Callable[..., Any]:
        """The function that `fused` selects for these arguments; see the module docstring."""
        if fused is False or fused == "reference":
            return self.reference
        if isinstance(fused, str):
            return self._by_name(fused, *args)
        found, refused = self._first(args)
        self._log_once(found.name if found else "reference", refused, args)
        return found.run if found else self.reference

    def explain(self, *args: Any) -> tuple[str, dict[str, str]]:
        """What True runs for these arguments, and what would come before it with its objection."""
        found, refused = self._first(args)
        return found.name if found else "reference", {r.implementation.name: r.objection for r in refused}

    def _first(self, args: tuple[Any, ...]) -> tuple[Implementation | None, list[_Refusal]]:
        """The first implementation without an objection, and those before it."""
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            return None, []  # torch.func transforms what it can look into
        refused: list[_Refusal] = []
        for implementation in self.implementations:
            objection = implementation.why_not(*args)
            cannot = objection is not None
            objection = objection or implementation.why_not_first(*args)
            if objection is None:
                return implementation, refused
            refused.append(_Refusal(implementation, objection, cannot))
        return None, refused

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

    def _log_once(self, chosen: str, refused: list[_Refusal], args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        reasons = "; ".join(f"{r.implementation.name}: {r.objection}" for r in refused)
        line = f"{self.name}: {chosen}" + (f" ({reasons})" if reasons else "")
        if line in self._logged:
            return
        self._logged.add(line)
        if any(r.worth_a_warning(chosen, args) for r in refused):
            logger.warning(f"fused {self.name} runs as {chosen!r}, which is slower here ({reasons})")
        else:
            logger.log(self.level, line)


class _Refusal(NamedTuple):
    implementation: Implementation
    objection: str
    cannot: bool
    """Whether it is that of `why_not`."""

    def worth_a_warning(self, chosen: str, args: tuple[Any, ...]) -> bool:
        """Whether CUDA tensors lose by it: see the module docstring."""
        x = next((a for a in args if isinstance(a, Tensor) and a.is_cuda), None)
        if x is None or not self.cannot or self.implementation.name == "cpu":
            return False
        if self.implementation.why_not_first(*args) is not None:
            return False  # it would not be the first choice if it could run
        return self.objection in (native.why_no_triton(x), native.why_no_cuda_code(x)) or chosen in PLAIN
