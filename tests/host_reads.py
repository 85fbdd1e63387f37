"""Counting the places where the host would wait for a GPU, on any device."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result, or the size of it, is known after the device has finished. `item`, `bool`, `float`
# and `int` of a tensor all arrive as the first.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
    "aten::repeat_interleave",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}
# Ways to the host that are no operation where the tensor is there already.
METHODS = ("tolist", "numpy", "cpu")


class _Watch(TorchDispatchMode):
    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Any = None
    ) -> Any:
        name = function.name().partition(".")[0]
        if name in WAITING or (name in INDEXING and any(_is_mask(index) for index in arguments[1])):
            self.reads.append(_said_by(name))
        return function(*arguments, **(options or {}))


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """While entered, collect every read of a tensor by the host, with where it comes from."""
    reads: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def read(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            reads.append(_said_by(name))
            return original(tensor, *arguments, **options)

        return read

    with mock.patch.multiple(Tensor, **{name: counted(name) for name in METHODS}), _Watch(reads):
        yield reads


def _is_mask(index: object) -> bool:
    """Whether it selects as many elements as it is true for."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _said_by(name: str) -> str:
    """The operation, and the innermost lines of this project that led to it."""
    folders = ("/vfmvae/", "/tests/")
    frames = [f for f in traceback.extract_stack() if any(folder in f.filename for folder in folders)]
    of_it = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if f.filename != __file__]
    return f"{name} in {' '.join(of_it[-3:])}"
