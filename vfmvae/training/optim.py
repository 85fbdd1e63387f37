"""The optimizer: its configuration, how it is built, its learning-rate schedule; what clips gradients.

Parameters are put into groups by name, each with a factor of the learning rate. Parameters of one group must
have been trained together from the first update on, because apex counts the updates of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vfmvae.ops import why_no_adam_average
from vfmvae.serialization import check_fields
from vfmvae.training.averaging_adam import AveragingAdam


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam or AdamW; the rate follows the share of the run that is done."""

    kind: Literal["adam", "adamw"] = "adam"
    """What weight decay does: part of the gradient (adam), or apart from it (adamw, arXiv 1711.05101)."""
    learning_rate: float = 1e-4
    """The highest rate of the run."""
    betas: tuple[float, float] = (0.0, 0.99)
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.0
    """Pull of every parameter towards 0."""
    warmup: float = 0.0
    """Share of the run over which the rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The rate after the warmup: constant, or half a cosine down to 0."""
    implementation: Literal["torch", "triton", "apex"] = "torch"
    """torch's fused kernels; a kernel of this package, on a GPU, that moves the average of the weights in the
    same pass; or FusedAdam of NVIDIA apex, which must be installed. The same mathematics."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"optimizer.learning_rate is {self.learning_rate}; it must be above 0 and finite"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}; both must lie in [0, 1)")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"optimizer.eps is {self.eps}; it must be above 0 and finite")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"optimizer.weight_decay is {self.weight_decay}; it must be finite and not negative"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optimizer.warmup is {self.warmup}; it must lie in [0, 1)")


FACTOR = "factor"
"""The key of a group's factor in an optimizer's `param_groups`."""


class Group(NamedTuple):
    """Where a parameter belongs."""

    name: str = ""
    factor: float = 1.0
    """Of the learning rate; the same for all parameters of a group."""


ONE_GROUP: Mapping[nn.Parameter, Group] = {}


def check_available(config: OptimizerConfig, device: torch.device, capturable: bool = False) -> None:
    """ValueError where what is asked for cannot update parameters on `device`, with the reason."""
    if config.implementation == "triton" and (objection := why_no_adam_average(device)):
        raise _triton_refused(objection)
    if config.implementation != "apex":
        return
    # An unrelated package on PyPI is called apex too.
    if find_spec("apex") is None or find_spec("apex.optimizers") is None:
        raise _apex_refused("NVIDIA apex is not installed")
    if device.type != "cuda":
        raise _apex_refused("it needs parameters on a CUDA device")
    if capturable:
        raise _apex_refused("engine.graphs records updates, and apex counts them on the host")


def build_optimizer(
    config: OptimizerConfig,
    parameters: Iterable[nn.Parameter],
    groups: Mapping[nn.Parameter, Group] = ONE_GROUP,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer of these parameters, at the highest rate of the schedule.

    Args:
        groups: of the parameters; those that are not in it are a group together.
        capturable: updates can be recorded in a CUDA graph; the rates are tensors then.

    Raises:
        ValueError: what is asked for cannot be used, with the reason.
    """
    parameters = list(parameters)
    if config.implementation == "apex":
        place = next((p.device for p in parameters if not p.is_cuda), torch.device("cuda"))
        check_available(config, place, capturable)
        return _apex_adam(config, parameters, groups)
    optimizer = _adam(config, parameters)(
        _groups(config, parameters, groups),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if capturable:
        for group in optimizer.param_groups:
            rate = torch.tensor(group["lr"], device=group["params"][0].device)
            group |= {"lr": rate, "capturable": True}
        optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]  # is meant so
    return optimizer


def next_optimizer(
    config: OptimizerConfig,
    parameters: Sequence[nn.Parameter],
    earlier: torch.optim.Optimizer | None,
    groups: Mapping[nn.Parameter, Group] = ONE_GROUP,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """As `build_optimizer`, with the moments that an earlier optimizer of the same kind has."""
    optimizer = build_optimizer(config, parameters, groups, capturable)
    if earlier is None or _state_of(earlier) != _state_of(optimizer):
        return optimizer
    for parameter in parameters:
        if parameter in earlier.state:
            optimizer.state[parameter] = earlier.state[parameter]
    counted = {p: group["step"] for group in earlier.param_groups if "step" in group for p in group["params"]}
    for group in optimizer.param_groups:
        first = group["params"][0]
        if first in counted:
            group["step"] = counted[first]
    return optimizer


def _state_of(optimizer: torch.optim.Optimizer) -> tuple[type, bool | None]:
    """What the moments belong to: those of `AveragingAdam` and of torch's classes are the same."""
    adam = torch.optim.Adam
    kind = adam if isinstance(optimizer, adam) else type(optimizer)
    return kind, optimizer.defaults.get("decoupled_weight_decay")


def _adam(
    config: OptimizerConfig, parameters: Sequence[nn.Parameter]
) -> Callable[..., torch.optim.Optimizer]:
    if config.implementation == "triton":
        if parameters and (objection := why_no_adam_average(parameters[0].device, parameters)):
            raise _triton_refused(objection)
        return partial(AveragingAdam, decoupled_weight_decay=config.kind == "adamw")
    return partial(torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam, fused=True)


def _groups(
    config: OptimizerConfig, parameters: Sequence[nn.Parameter], groups: Mapping[nn.Parameter, Group]
) -> list[dict[str, Any]]:
    """Sharded parameters apart from whole ones: one fused operation cannot take both."""
    found: dict[tuple[Group, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        key = groups.get(parameter, Group()), isinstance(parameter, DTensor)
        found.setdefault(key, []).append(parameter)
    return [
        {"params": members, "lr": config.learning_rate * group.factor, FACTOR: group.factor}
        for (group, _), members in found.items()
    ]


def _apex_adam(
    config: OptimizerConfig, parameters: Sequence[nn.Parameter], groups: Mapping[nn.Parameter, Group]
) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    try:
        return FusedAdam(
            _groups(config, parameters, groups),
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            adam_w_mode=config.kind == "adamw",
            weight_decay=config.weight_decay,
        )
    except RuntimeError as error:  # apex built without its CUDA extensions
        raise _apex_refused(str(error)) from None


def _triton_refused(why: str) -> ValueError:
    return ValueError(
        f"optimizer.implementation 'triton' cannot be used: {why}; use --optimizer.implementation torch"
    )


def _apex_refused(why: str) -> ValueError:
    return ValueError(
        f"optimizer.implementation 'apex' cannot be used: {why}; build apex from its source with its CUDA"
        f" extensions, or use --optimizer.implementation torch"
    )


def learning_rate(config: OptimizerConfig, progress: float) -> float:
    """The rate at `progress` in [0, 1] of the run: a linear rise, then constant or half a cosine to 0."""
    if progress < config.warmup:
        return config.learning_rate * progress / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    after_warmup = (progress - config.warmup) / (1 - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * after_warmup))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate`, times the factor of its group, for every parameter from the next step on."""
    for group in optimizer.param_groups:
        of_group = rate * group.get(FACTOR, 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(of_group)
        else:
            group["lr"] = of_group


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients as one vector, over every process that holds shards of them.

    A scalar on the gradients' device; NaN or infinite where a gradient is; 0 without any gradient. Does not
    wait for the device. A collective if the parameters are sharded.
    """
    parameters = list(parameters)
    gradients = _gradients(parameters)
    if not gradients:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    # One operation cannot mix the two kinds.
    norms = [torch.nn.utils.get_total_norm(kind) for kind in (plain, sharded) if kind]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients by a scalar on their device, in place, without waiting for it.

    Clipping to a norm c is the factor min(1, c / gradient_norm(parameters)).
    """
    shards = [g.to_local() if isinstance(g, DTensor) else g for g in _gradients(parameters)]
    if shards:
        torch._foreach_mul_(shards, factor)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
