"""Which gradients a backward pass computes.

An operation written as a torch.autograd.Function is told which of its inputs require a gradient, but not
which gradients the present call of torch.autograd.grad asks for; PyTorch's own operations are told both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_of_weights = True


@contextmanager
def input_gradients_only() -> Iterator[None]:
    """While entered, a backward pass need not compute gradients of weights; those it leaves out are None.

    For torch.autograd.grad with respect to something that is no weight. The setting is the process's, since
    backward passes of CUDA tensors run in threads of their own. What was compiled by torch.compile does not
    know about it and computes all gradients.
    """
    global _of_weights
    before, _of_weights = _of_weights, False
    try:
        yield
    finally:
        _of_weights = before


def weight_gradients_wanted() -> bool:
    """Whether the backward pass that asks this must compute gradients of weights."""
    return _of_weights
