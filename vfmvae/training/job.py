"""What the loop around a training step (vfmvae.training.run) asks of a run's models and what trains them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vfmvae.data import Fault
from vfmvae.training.run_config import RunConfig
from vfmvae.training.state import TrainingState


class StepResult(NamedTuple):
    """What a step reports, all on the device."""

    losses: dict[str, Tensor]  # unweighted scalars, and "total"
    skips: dict[str, Tensor]  # by the name of each update of the step: 1.0 if it was skipped, else 0.0

    @property
    def skipped(self) -> Tensor:
        """1.0 if any update of the step was skipped, else 0.0."""
        return torch.stack(list(self.skips.values())).amax()


class DataIdentity(NamedTuple):
    """Of a data set, to notice that it is another one than before."""

    name: str
    images: int
    keys: str  # SHA-256 of the images' names, or of their bytes


class Job(Protocol):
    """What the loop asks of a run's models and what trains them, in this process."""

    state: TrainingState
    """What checkpoints hold; its numbers have the number of the "stage"."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def steps(self) -> int:
        """Of the whole run."""
        ...

    @property
    def stage_name(self) -> str: ...
    @property
    def images(self) -> int:
        """That it reads from, held-out ones included."""
        ...

    @property
    def faults(self) -> list[Fault]:
        """Images that could not be read and are not reported yet."""
        ...

    def take_faults(self) -> list[Fault]: ...
    def enter_stage(self, number: int) -> None: ...
    def check_position(self, step: int, stage: int) -> None: ...
    def begin_step(self) -> Mapping[str, float]:
        """Go to the present step's stage and learning rates, and return these by name."""
        ...

    def batches(self, start: int) -> Generator[Any, None, None]:
        """This process's part of every step's batch from `start` on."""
        ...

    def skips_in_a_row(self) -> int: ...
    def data_identity(self) -> DataIdentity | None:
        """None for data that cannot change."""
        ...
