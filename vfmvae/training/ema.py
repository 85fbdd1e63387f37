"""Exponential moving average of a model's weights, which is what a run evaluates and delivers.

The half-life is counted in images, and early in a run it is a share of the images seen, so that the average
forgets the initial weights (Karras et al., arXiv 1912.04958 and 2006.06676).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from vfmvae.serialization import check_fields


@dataclass(frozen=True)
class EmaConfig:
    """How long the average of the weights remembers, in one stage."""

    half_life_images: float = 160_000
    """Images until a weight counts half; 0: no averaging, the average equals the weights."""
    ramp_up: float | None = 0.05
    """The half-life is at most this share of the images that the whole run has seen; None: no ramp."""

    def __post_init__(self) -> None:
        check_fields(self, "ema")
        if not 0 <= self.half_life_images < math.inf:
            raise ValueError(
                f"ema.half_life_images is {self.half_life_images}; it must be finite, and 0 or above"
            )
        if self.ramp_up is not None and not 0 < self.ramp_up < math.inf:
            raise ValueError(f"ema.ramp_up is {self.ramp_up}; it must be above 0, or None for no ramp")


def ema_beta(config: EmaConfig, batch_size: int, seen_images: int) -> float:
    """Share of the average that an update after `batch_size` images keeps, in [0, 1).

    `seen_images`: images of the run so far; 0 keeps nothing while the half-life is ramped up.
    """
    half_life = config.half_life_images
    if config.ramp_up is not None:
        half_life = min(half_life, seen_images * config.ramp_up)
    return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0


class EMA:
    """The average of every parameter that some stage trains, in float32, and copies of the buffers.

    Build it when the model is where it trains: on its device, sharded (FSDP2) if it is to be, and without
    the DistributedDataParallel around it. Averages of sharded parameters are sharded alike, and an update
    touches a process's own shards. Nothing but `export` waits for the device. 64-bit parameters have 64-bit
    averages.
    """

    def __init__(self, model: nn.Module, frozen: str | tuple[str, ...] = ()) -> None:
        """`frozen`: prefixes of the names that no stage trains. A parameter that only the current stage
        freezes belongs to the average: a later stage may move it.
        """
        self._model = model
        stored = model.state_dict().keys()
        self._parameters = {k: p for k, p in model.named_parameters() if not k.startswith(frozen)}
        # By name, not by tensor: a module may give itself another tensor.
        self._buffer_names = [k for k, _ in model.named_buffers() if k in stored and not k.startswith(frozen)]
        self._averages = {
            k: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for k, p in self._parameters.items()
        }
        self._buffers = {k: model.get_buffer(k).detach().clone() for k in self._buffer_names}

    @torch.no_grad()
    def update(self, beta: float, moved: Collection[nn.Parameter] = ()) -> None:
        """Move the average towards the model: average = beta * average + (1 - beta) * weight.

        `moved`: parameters whose averages an optimizer has moved already (`of_parameters`).
        """
        names = [name for name, parameter in self._parameters.items() if parameter not in moved]
        averages = _local(self._averages[name] for name in names)
        weights = _local(self._parameters[name] for name in names)
        weights = [w.to(a.dtype) for a, w in zip(averages, weights, strict=True)]
        if averages:
            torch._foreach_lerp_(averages, weights, 1 - beta)
        _copy(self._buffers.values(), self._model_buffers())

    def of_parameters(self) -> dict[nn.Parameter, Tensor]:
        """Parameters with their averages; the tensors are this object's own, for its whole life."""
        return {parameter: self._averages[name] for name, parameter in self._parameters.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Averages and buffers by the model's names; the tensors are this object's own, not copies."""
        return {**self._averages, **self._buffers}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; ValueError where names or shapes differ."""
        own = self.state_dict()
        strangers = sorted(own.keys() ^ state.keys())
        if strangers:
            raise ValueError(
                f"the averaged weights are of another model: {len(strangers)} names are in one of the two"
                f" only, first {strangers[0]!r}"
            )
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"the averaged weights are of another model: {name} has shape {tuple(state[name].shape)}"
                    f" instead of {tuple(tensor.shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While entered, the model computes with the average; afterwards it is bit for bit as it was.

        In the model's dtype. Copies rather than exchanges tensors, so that the optimizer, FSDP2 and captured
        CUDA graphs keep theirs; costs the memory of the averaged parameters.
        """
        parameters, buffers = list(self._parameters.values()), self._model_buffers()
        with torch.no_grad():
            kept = [tensor.detach().clone() for tensor in (*parameters, *buffers)]
        try:
            self._overwrite([*parameters, *buffers], [*self._averages.values(), *self._buffers.values()])
            yield
        finally:
            self._overwrite([*parameters, *buffers], kept)

    def export(self) -> dict[str, Tensor]:
        """The model's whole state dict with the averages in place, frozen tensors included, for a file.

        Copies on the CPU, in the model's dtypes. With a sharded model every process must call it, and each
        gets the whole.
        """
        with self.applied(), torch.no_grad():
            return {name: _whole(tensor) for name, tensor in self._model.state_dict().items()}

    def _model_buffers(self) -> list[Tensor]:
        return [self._model.get_buffer(name) for name in self._buffer_names]

    @torch.no_grad()
    def _overwrite(self, targets: list[Tensor], values: list[Tensor]) -> None:
        _copy(targets, values)
        # FSDP2 may hold gathered copies of the old values between two forwards.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Detached views of what this process holds of each tensor."""
    return [t.to_local().detach() if isinstance(t, DTensor) else t.detach() for t in tensors]


def _copy(targets: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    local = _local(targets)
    if local:
        torch._foreach_copy_(local, _local(values))


def _whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU, gathered if it is sharded."""
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach().to("cpu", copy=True)
