"""A CUDA graph's behaviour on a CPU: operations are noted with the tensors they ran on, and run again there.

What a graph does not see is not repeated: plain numbers keep the values they had, and Python does not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class EmulatedGraph:
    """A recording runs what it records, so that it has results; the first replay finds them there."""

    def __init__(self) -> None:
        self._recorder = _Recorder()
        self.replays = 0

    def record(self, run: Callable[[], T]) -> T:
        with self._recorder:
            return run()

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, results in self._recorder.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results
