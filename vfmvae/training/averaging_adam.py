"""torch.optim.Adam and AdamW by kernels that move the averages of the weights in the same pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vfmvae.ops import AdamAverage, AdamSettings, AdamTensors


class AveragingAdam(torch.optim.Adam):
    """Adam of float32 parameters in two kernel launches per group, which also move their averages.

    State, settings and what `found_inf` does are those of torch.optim.Adam(fused=True): each takes the
    other's state dict. The averages belong to somebody else (vfmvae.training.ema), and are no part of the
    state. They move in every step, also where there is no gradient and where found_inf skips the update.
    `vfmvae.ops.why_no_adam_average` says which parameters the kernels do not take.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
    ) -> None:
        """`decoupled_weight_decay`: AdamW."""
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            fused=True,
        )
        self._step_supports_amp_scaling = False  # a GradScaler takes its scale off before
        self._passes: defaultdict[int, AdamAverage] = defaultdict(AdamAverage)
        self._averages: dict[nn.Parameter, Tensor] = {}
        self.averaged: frozenset[nn.Parameter] = frozenset()
        """Parameters whose averages this moves."""
        self._weight: Tensor | None = None

    def follow(self, averages: Mapping[nn.Parameter, Tensor]) -> None:
        """Move these averages, float32 in the parameters' layout, from the next step on."""
        self._averages = dict(averages)
        self.averaged = frozenset(averages)
        if self._weight is None and averages:
            self._weight = torch.zeros((), device=next(iter(averages)).device)

    def set_average_weight(self, weight: float) -> None:
        """Weight of the new parameters in the averages from the next step on: 1 - beta. Does not wait."""
        if self._weight is not None:
            self._weight.fill_(weight)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            if group["amsgrad"] or group["maximize"]:
                raise ValueError(f"{type(self).__name__} knows neither amsgrad nor maximize")
            settings = AdamSettings(*(group[name] for name in AdamSettings._fields))
            skip = getattr(self, "found_inf", None)
            gradients = [p.grad for p in group["params"]]
            tensors = self._tensors(group["params"], gradients)
            self._passes[number](tensors, gradients, settings, group["lr"], skip, self._weight)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of torch.optim.Adam or AdamW, or of this."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            state["step"] = state["step"].to(parameter.device, torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.empty_like(parameter, requires_grad=False).copy_(state[name])

    def _tensors(self, parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> AdamTensors:
        """With moments for whatever has its first gradient."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and not self.state[parameter]:
                zeros = torch.zeros_like(parameter, requires_grad=False)
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": zeros,
                    "exp_avg_sq": zeros.clone(),
                }
        states = [self.state.get(parameter, {}) for parameter in parameters]
        return AdamTensors(
            parameters,
            exp_avgs=[state.get("exp_avg") for state in states],
            exp_avg_sqs=[state.get("exp_avg_sq") for state in states],
            averages=[self._averages.get(parameter) for parameter in parameters],
            steps=[state.get("step") for state in states],
        )
