"""Compiled code as a PyTorch operation: one node for torch.compile and export, a plain call in eager mode.

A torch.library.custom_op takes a fraction of a millisecond per call on its way through the dispatcher, as
long as a small operation itself. So in eager mode the same functions run under a torch.autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Autograd(NamedTuple):
    """How an operation is differentiated: the two functions that `CustomOpDef.register_autograd` takes."""

    setup_context: Callable[[Any, tuple[Any, ...], Any], None]
    backward: Callable[..., tuple[Tensor | None, ...]]


def operation(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    device_types: str | Sequence[str],
    autograd: Autograd | None = None,
) -> Callable[..., Any]:
    """Make `run` the operation vfmvae::`name`; returns what to call, with positional arguments.

    Args:
        run: computes new tensors from its arguments, whose types its signature declares.
        fake: the same signature; gives results of the right shape and layout without values.
        autograd: None for an operation that is not differentiated, such as the backward of another.
    """
    custom = torch.library.custom_op(f"vfmvae::{name}", run, mutates_args=(), device_types=device_types)
    custom.register_fake(fake)
    eager = run
    if autograd is not None:
        custom.register_autograd(autograd.backward, setup_context=autograd.setup_context)
        members = {
            "forward": staticmethod(run),
            "setup_context": staticmethod(autograd.setup_context),
            "backward": staticmethod(autograd.backward),
        }
        function: Any = type(name, (torch.autograd.Function,), members)
        eager = function.apply

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not _plain(arguments):
            return custom(*arguments)
        return eager(*arguments)

    return call


def _plain(arguments: tuple[Any, ...]) -> bool:
    """Whether no tensor is of a subclass (fake, functional, sharded), whose memory is not at its address."""
    return all(type(a) in (Tensor, torch.nn.Parameter) for a in arguments if isinstance(a, Tensor))
