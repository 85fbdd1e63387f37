"""What kernels.py measures an operation by: its tensors at one shape, and what it cannot do without.

FLOPs count a multiply-add as two. Bytes are those of every tensor that a pass must read or write, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from common import Unit
from torch import Tensor

from vfmvae.ops.dispatch import Op

Pass = Literal["forward", "inputs", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "inputs", "backward")
"""Forward; gradients of the inputs without those of weights; all gradients."""
Shape = tuple[int, ...]


@dataclass
class Case:
    """One operation at one shape."""

    function: Callable[..., Tensor]
    tensors: list[Tensor]
    inputs: int
    """So many of the tensors are inputs; the others are weights."""
    flops: dict[Pass, float]
    unit: Unit
    reads: tuple[int, ...] = ()
    """Tensors that the backward pass needs beside the output's gradient."""
    weight_reads: tuple[int, ...] = ()
    """Those that only gradients of weights need."""
    passed_on: tuple[int, ...] = field(default=())
    """Tensors whose gradient is the output's, so nothing is written."""
    constant_bytes: int = 0
    """Of what every pass reads and that takes no gradient."""
    differentiable: bool = True
    """Else there is a forward pass alone."""

    def moved_bytes(self, y: Tensor) -> dict[Pass, float]:
        """Bytes of each pass; y is the output."""

        def size(indices: range | tuple[int, ...]) -> float:
            return sum(self.tensors[i].numel() * self.tensors[i].element_size() for i in indices)

        out = y.numel() * y.element_size() + self.constant_bytes
        passed_on, everything = size(self.passed_on), range(len(self.tensors))
        inputs = out + size(self.reads) + size(range(self.inputs)) - passed_on
        backward = out + size(self.reads) + size(self.weight_reads) + size(everything) - passed_on
        return {"forward": size(everything) + out, "inputs": inputs, "backward": backward}


class Operation(NamedTuple):
    op: Op
    build: Callable[[Shape, torch.dtype, torch.device], Case]
    shapes: dict[str, list[Shape]]
    """By size: "demo", "full" and "odd"."""


def flops(forward: float, inputs: float = 1, backward: float = 2) -> dict[Pass, float]:
    """Of the three passes; the latter two as multiples of the first."""
    return {"forward": forward, "inputs": inputs * forward, "backward": backward * forward}


def activations(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x
