"""What a checkpoint holds, as torch.distributed.checkpoint asks for it."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict


class TrainingState:
    """A model's trained parameters and buffers, its optimizer, the step, and numbers to keep.

    Random draws are functions of (seed, step), and data of the position, so neither has a state of its own.
    """

    def __init__(self, model: nn.Module, frozen: str, optimizer: torch.optim.Optimizer) -> None:
        """`frozen`: prefix of the parameters that never change and are not stored."""
        self._model = model
        self._frozen = frozen
        self._optimizer = optimizer
        self.step = 0
        """Updates done."""
        self.initial: dict[str, float] = {}
        """Quality before the first step."""

    def state_dict(self) -> dict[str, Any]:
        """Everything by name; the tensors are the model's own, not copies."""
        model = {k: v for k, v in self._model.state_dict().items() if not k.startswith(self._frozen)}
        optimizer = get_optimizer_state_dict(self._model, self._optimizer)
        # As one string: of a dict, the reader fills only the keys that are there already.
        initial = json.dumps(self.initial)
        return {"model": model, "optimizer": optimizer, "step": self.step, "initial": initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what a checkpoint's reader filled: the model's tensors in place, the rest here."""
        set_optimizer_state_dict(self._model, self._optimizer, state["optimizer"])
        self.step = state["step"]
        self.initial = json.loads(state["initial"])
