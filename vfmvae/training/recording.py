"""A training step as a CUDA graph: what it reads stands still, and what is in it is new in every step.

Replaying a graph costs the host next to nothing, where launching the same few thousand kernels one by one
takes longer than a GPU needs to run them on a small batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from vfmvae.training.distributed import world_size
from vfmvae.training.draws import Draw

T = TypeVar("T")


def check_recordable(device: torch.device) -> None:
    """ValueError where a step cannot be recorded."""
    if device.type != "cuda":
        raise ValueError(f"engine.graphs records CUDA graphs, and this run computes on {device}; turn it off")
    if world_size() > 1:
        raise ValueError(
            f"engine.graphs is for one process, and this run has {world_size()}; use engine.compile default"
        )


@dataclass
class StandingInputs:
    """What is new in every step of one kind, where a recorded step finds it."""

    sigma: Tensor
    """Of the discriminators' blur, in pixels."""
    draws: dict[tuple[int, int], dict[int, Draw]] = field(default_factory=dict)
    """By first image and stream."""
    images: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    """Of the images; none where the batches come without."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    _written: dict[str, float] = field(default_factory=dict)

    def place(self, images: Sequence[Tensor], labels: Sequence[Tensor], weights: Mapping[str, float]) -> None:
        """Give a step's images, labels and weights a place."""
        self.images = [part.clone() for part in images]
        self.labels = [part.clone() for part in labels]
        self.weights = {name: torch.zeros((), device=self.sigma.device) for name in weights}

    def write(
        self,
        images: Sequence[Tensor],
        labels: Sequence[Tensor],
        weights: Mapping[str, float],
        sigma: float,
    ) -> None:
        """Put those of another step there. Most weights stay the same, and take no time."""
        for place, part in zip([*self.images, *self.labels], [*images, *labels], strict=True):
            place.copy_(part, non_blocking=True)
        for name, value in {**weights, "": sigma}.items():
            if self._written.get(name) != value:
                (self.weights[name] if name else self.sigma).fill_(value)
                self._written[name] = value


class Graph(Protocol):
    """What records a function on the device and repeats it."""

    def record(self, run: Callable[[], T]) -> T: ...

    def replay(self) -> None: ...


class CudaGraph:
    """A CUDA graph. All that share a pool of memory must be replayed one after another."""

    def __init__(self, pool: Any) -> None:
        """`pool`: of torch.cuda.graph_pool_handle()."""
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def record(self, run: Callable[[], T]) -> T:
        """Record what `run` does on the device, which does not happen yet; returns its results' places."""
        # Of this thread: the one that pins the next batch goes on calling CUDA meanwhile.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        self._graph.replay()
