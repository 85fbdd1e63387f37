"""Training steps as CUDA graphs: each kind of step is recorded once, and replayed from then on.

The first step of a kind runs as always, which sets up kernels, libraries and the optimizers' state; the
second is recorded. Steps are of one kind where the same operations run on tensors of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from vfmvae.tokenizer.equivariance import Equivariance
from vfmvae.train_job import Job
from vfmvae.train_step import (
    SECOND_FORWARD,
    TOKENIZER,
    conclude,
    drawn_equivariance,
    update_all,
)
from vfmvae.training.adaptive import LIMITS
from vfmvae.training.draws import renew
from vfmvae.training.job import StepResult
from vfmvae.training.recording import CudaGraph, Graph, StandingInputs


def recorded_steps(job: Job) -> RecordedSteps | None:
    """What takes the place of `training_step(job, ...)` if the configuration asks for graphs, else None."""
    if not job.config.engine.graphs:
        return None
    return RecordedSteps(job, cuda_graphs)


def cuda_graphs() -> Callable[[], Graph]:
    """Makes graphs that share a pool of memory."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)


class Kind(NamedTuple):
    """What decides which operations a step consists of."""

    shapes: tuple[torch.Size, ...]
    terms: frozenset[str]
    measured: tuple[bool, ...]
    changes: tuple[Equivariance, ...]
    blurred: bool


class RecordedSteps:
    """`training_step` of a job, recorded by kind of step."""

    def __init__(self, job: Job, graphs: Callable[[], Callable[[], Graph]]) -> None:
        """`graphs()()` makes what a step is recorded in; what one `graphs()` made is dropped together."""
        self.job = job
        self._graphs = graphs
        self._kinds: dict[Kind, _Recording] = {}
        self._entries = -1

    def __call__(self, batch: Sequence[Tensor], weights: Mapping[str, float]) -> StepResult:
        if self._entries != self.job.entries:  # other parameters train, or a checkpoint was loaded
            self._kinds.clear()
            self._entries = self.job.entries
            self._new_graph = self._graphs()  # a pool without graphs cannot be joined again
        kind = self.kind(batch, weights)
        if kind not in self._kinds:
            self._kinds[kind] = _Recording(self.job)
        result = self._kinds[kind].step(batch, weights, self._new_graph)
        conclude(self.job, weights)
        return result

    def kind(self, batch: Sequence[Tensor], weights: Mapping[str, float]) -> Kind:
        job = self.job
        streams = [TOKENIZER]
        if job.playing and not job.config.engine.share_forward:
            streams.append(SECOND_FORWARD)
        return Kind(
            tuple(part.shape for part in batch),
            frozenset(weights),
            tuple(job.measures(name) for name in LIMITS),
            tuple(drawn_equivariance(job, job.draws(0, stream)) for stream in streams),
            job.blur_sigma() > 0,
        )


class _Recording:
    """Steps of one kind."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._inputs = StandingInputs(torch.ones((), device=job.device))
        self._graph: Graph | None = None
        self._losses: list[str] = []
        self._updates: list[str] = []
        self._numbers: Tensor  # of the result, in the order of both

    def step(
        self, batch: Sequence[Tensor], weights: Mapping[str, float], new_graph: Callable[[], Graph]
    ) -> StepResult:
        """Everything of a step that happens on the device: as always, recorded, or replayed."""
        inputs, first = self._inputs, not self._inputs.images
        if first:
            inputs.place(batch, self._job.read_labels, weights)
        else:
            self._renew_draws()
        inputs.write(batch, self._job.read_labels, weights, self._job.blur_sigma())
        if not first and self._graph is None:
            self._graph = self._recorded(new_graph())
        if self._graph is None:
            with self._standing():
                self._run()
        else:
            self._graph.replay()
        numbers = self._numbers.clone().unbind()  # the next replay writes into the same place
        count = len(self._losses)
        return StepResult(
            dict(zip(self._losses, numbers[:count], strict=True)),
            dict(zip(self._updates, numbers[count:], strict=True)),
        )

    def _renew_draws(self) -> None:
        for (first, stream), made in self._inputs.draws.items():
            renew(made, self._job.draws(first, stream))

    @contextmanager
    def _standing(self) -> Iterator[None]:
        """While entered, the job's draws and blur are those that stand."""
        self._job.standing = self._inputs
        try:
            yield
        finally:
            self._job.standing = None

    def _run(self) -> None:
        result = update_all(self._job, self._inputs.images, self._inputs.weights)
        self._losses, self._updates = list(result.losses), list(result.skips)
        self._numbers = torch.stack(
            [*(loss.float() for loss in result.losses.values()), *result.skips.values()]
        )

    def _recorded(self, graph: Graph) -> Graph:
        job = self._job
        others = [a.optimizer for a in job.playing] + [c.optimizer for c in job.companions]
        for optimizer in (job.optimizer, *others):
            optimizer.zero_grad(set_to_none=True)  # the graph has gradients of its own
        try:
            with self._standing():
                graph.record(self._run)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"this step cannot be recorded as a CUDA graph: {str(error).splitlines()[0]}; turn"
                f" engine.graphs off"
            ) from error
        return graph
