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
    again: bool = False
    """Whether the backward is made of what can be differentiated; else a second derivative raises."""


def operation(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    device_types: str | Sequence[str],
    autograd: Autograd | None = None,
    eager: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Make `run` the operation vfmvae::`name`; returns what to call, with positional arguments.

    Args:
        run: computes new tensors from its arguments, whose types its signature declares.
        fake: the same signature; gives results of the right shape and layout without values.
        autograd: None for an operation that is not differentiated, such as the backward of another.
        eager: what takes the place of `run` in eager mode, where results may be views of the arguments.

    `run` and the backward are called outside of torch.autocast, which would give results of other dtypes
    than `fake` promises.
    """
    schema = torch.library.infer_schema(run, mutates_args=())
    run = _without_autocast(run)
    custom = torch.library.custom_op(
        f"vfmvae::{name}", run, mutates_args=(), device_types=device_types, schema=schema
    )
    custom.register_fake(fake)
    eager = run if eager is None else _without_autocast(eager)
    if autograd is not None:
        backward = autograd.backward if autograd.again else _once(name, autograd.backward)
        backward = _without_autocast(backward)
        custom.register_autograd(backward, setup_context=autograd.setup_context)
        members = {
            "forward": staticmethod(eager),
            "setup_context": staticmethod(autograd.setup_context),
            "backward": staticmethod(backward),
        }
        function: Any = type(name, (torch.autograd.Function,), members)
        eager = function.apply

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _watched() or not _plain(arguments):
            return custom(*arguments)
        return eager(*arguments)

    return call


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with torch._C._DisableAutocast():
            return function(*arguments)

    return call


def _once(
    name: str, backward: Callable[..., tuple[Tensor | None, ...]]
) -> Callable[..., tuple[Tensor | None, ...]]:
    """A backward whose results raise where they are differentiated.

    torch's once_differentiable lets second derivatives pass, as zeros, where the incoming gradient is a
    constant and only the saved tensors are not.
    """

    def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        # The results must lead back to all that they are functions of, or nobody would ask for more.
        return _SecondDerivative.apply(name, len(found), *found, *grads, *ctx.saved_tensors)

    return run


class _Unpacked:
    """A context whose saved tensors are unpacked once, as checkpointing that is not reentrant demands."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _SecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tuple(None if g is None else g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name} can be differentiated once in its compiled form; with fused=False it can be twice"
        )


def _watched() -> bool:
    """Whether something looks on at every operation (make_fx, counters of FLOPs, selective checkpointing)."""
    return torch._C._len_torch_dispatch_stack() > 0


def _plain(arguments: tuple[Any, ...]) -> bool:
    """Whether the values of all tensors are what is at their addresses: not so for subclasses (fake,
    functional, sharded), nor for views that stand for the negated or conjugated numbers.
    """
    return not any(
        type(a) not in (Tensor, torch.nn.Parameter) or a.is_neg() or a.is_conj()
        for a in arguments
        if isinstance(a, Tensor)
    )
