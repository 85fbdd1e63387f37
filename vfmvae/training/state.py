"""What a checkpoint holds: the state of a run, as named tensors and a few numbers.

There is no state of random generators. Every draw is a function of (seed, step), and every batch of its
position, so the step says it all; generators that the engine does not seed itself have no part in training.
Hyper-parameters (learning rates, betas) are not state either: they are the configuration's, which a resumed
run may have changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from vfmvae.training.optim import FACTOR

FORMAT = 1


class TensorState(Protocol):
    """Anything whose state is named tensors: averaged weights, a step guard, statistics."""

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass
class TrainingState:
    """The parts of a run that change while it trains, by name; a stage may bring parts and take them away.

    Modules may be wrapped by DistributedDataParallel or sharded by FSDP2: their tensors have the same names
    and shapes as those of the plain module, so a checkpoint fits any number of processes.
    """

    modules: dict[str, nn.Module]
    """Their parameters and persistent buffers, trained now or in another stage."""
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    """Their parameters must belong to `modules`."""
    others: dict[str, TensorState] = field(default_factory=dict)
    """Averaged weights and the like."""
    frozen: tuple[str, ...] = ()
    """Prefixes, "<module>.<parameter>", of what never changes in any stage and is not stored."""
    step: int = 0
    """Updates done."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """What else to keep, as JSON knows it: position in the stages, counts, quality before the first step."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, by name; these are the parts' own, not copies.

        An optimizer has state only for parameters that it has updated.
        """
        found = self._fixed_tensors()
        for slot, (optimizer, parameter) in self._slots().items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if value is not None:  # momentum of SGD without momentum
                    assert isinstance(value, Tensor), f"{slot}.{key} is a {type(value).__name__}"
                    found[f"{slot}.{key}"] = value
        return found

    def record(self) -> str:
        """Everything that is no tensor, as JSON."""
        counters = {name: _counters(optimizer) for name, optimizer in self.optimizers.items()}
        record = {"format": FORMAT, "step": self.step, "numbers": self.numbers, "optimizers": counters}
        return json.dumps(record)

    def targets(self, stored: Mapping[str, TensorStorageMetadata]) -> dict[str, Tensor]:
        """A tensor for each stored one, for a reader to fill: the parts' own, and new ones for optimizers.

        Changes nothing. Raises ValueError, naming the first difference, if the stored tensors are not of
        these parts.
        """
        targets, slots = self._fixed_tensors(), self._slots()
        _check_parts({_part(name) for name in stored if _is_fixed(name)}, {_part(name) for name in targets})
        missing = sorted(targets.keys() - stored.keys())
        if missing:
            raise ValueError(f"it lacks {_first_of(missing)}")
        strangers = []
        for name, metadata in stored.items():
            slot, _, key = name.rpartition(".")
            if slot in slots:
                targets[name] = _optimizer_tensor(*slots[slot], key, metadata)
            elif name not in targets:
                strangers.append(name)
        if strangers:
            raise ValueError(f"it holds {_first_of(sorted(strangers))}, which this run does not have")
        for name, target in targets.items():
            there, here = stored[name], target
            if there.size != here.shape or there.properties.dtype != here.dtype:
                raise ValueError(
                    f"{name} is {list(there.size)} {_dtype(there.properties.dtype)} there and"
                    f" {list(here.shape)} {_dtype(here.dtype)} here"
                )
        return targets

    def restore(self, filled: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Take over what a reader filled `targets` with, and the record.

        Modules have it already: their own tensors were filled.
        """
        for name, other in self.others.items():
            prefix = f"others.{name}."
            of_it = {k.removeprefix(prefix): v for k, v in filled.items() if k.startswith(prefix)}
            other.load_state_dict(of_it)
        slots = self._slots()
        for name, optimizer in self.optimizers.items():
            state: dict[Tensor, dict[str, Tensor]] = {}
            for key, value in filled.items():
                slot, _, what = key.rpartition(".")
                owner, parameter = slots.get(slot, (None, None))
                if owner is optimizer and parameter is not None:
                    state.setdefault(parameter, {})[what] = value
            _load_optimizer(optimizer, state, record["optimizers"].get(name, []))
        self.step = record["step"]
        self.numbers = record["numbers"]

    def _fixed_tensors(self) -> dict[str, Tensor]:
        """The tensors that are there whatever has been trained."""
        found = {}
        for part, module in self.modules.items():
            for name, tensor in _unwrapped(module).state_dict().items():
                if not f"{part}.{_plain(name)}".startswith(self.frozen):
                    found[f"modules.{part}.{_plain(name)}"] = tensor
        for part, other in self.others.items():
            found |= {f"others.{part}.{name}": tensor for name, tensor in other.state_dict().items()}
        return found

    def _slots(self) -> dict[str, tuple[Optimizer, nn.Parameter]]:
        """The place of every optimized parameter's state: "optimizers.<optimizer>.<module>.<parameter>"."""
        names = {id(parameter): name for name, parameter in self._parameters()}
        slots = {}
        for optimizer_name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    assert id(parameter) in names, f"optimizer {optimizer_name}: a parameter of no module"
                    slots[f"optimizers.{optimizer_name}.{names[id(parameter)]}"] = (optimizer, parameter)
        return slots

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for part, module in self.modules.items():
            for name, parameter in _unwrapped(module).named_parameters():
                yield f"{part}.{_plain(name)}", parameter


def _unwrapped(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def _plain(name: str) -> str:
    """A parameter's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def _is_fixed(name: str) -> bool:
    return not name.startswith("optimizers.")


def _part(name: str) -> str:
    """ "modules.tokenizer.fusion.weight" -> "tokenizer"."""
    return name.split(".")[1]


def _check_parts(there: set[str], here: set[str]) -> None:
    if there != here:
        raise ValueError(f"it holds {_list(there)}, and this run has {_list(here)}")


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _optimizer_tensor(
    optimizer: Optimizer, parameter: nn.Parameter, key: str, metadata: TensorStorageMetadata
) -> Tensor:
    """Room for a tensor of a parameter's state: what is there, one like the parameter, or a scalar."""
    dtype, size = metadata.properties.dtype, metadata.size
    here = optimizer.state.get(parameter, {}).get(key)
    if isinstance(here, Tensor) and here.dtype == dtype and here.shape == size:
        return here
    if size == parameter.shape and key != "step":
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)  # sharded as it is
    if size.numel() == 1:
        return torch.empty(size, dtype=dtype)
    raise ValueError(
        f"an optimizer's {key} is {list(size)} there, for a parameter of {list(parameter.shape)} here"
    )


def _counters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What the parameter groups carry that is no hyper-parameter; apex counts its steps there."""
    settings = {"params", FACTOR, *optimizer.defaults}
    return [{k: v for k, v in group.items() if k not in settings} for group in optimizer.param_groups]


def _load_optimizer(
    optimizer: Optimizer, state: Mapping[Tensor, dict[str, Tensor]], counters: list[dict[str, Any]]
) -> None:
    """Replace the optimizer's state by `state`, unless that is what it has, filled in place."""
    if not any(counters) and _is_state_of(optimizer, state):
        return
    packed = optimizer.state_dict()
    packed["state"] = {}
    for packed_group, group in zip(packed["param_groups"], optimizer.param_groups, strict=True):
        for number, parameter in zip(packed_group["params"], group["params"], strict=True):
            if parameter in state:
                packed["state"][number] = state[parameter]
    for packed_group, counted in zip(packed["param_groups"], counters, strict=False):
        packed_group.update(counted)
    optimizer.load_state_dict(packed)  # which knows on what device each tensor must lie


def _is_state_of(optimizer: Optimizer, state: Mapping[Tensor, dict[str, Tensor]]) -> bool:
    return optimizer.state.keys() == state.keys() and all(
        optimizer.state[parameter].get(key) is value
        for parameter, values in state.items()
        for key, value in values.items()
    )
