"""Modules whose parameters come from a file: built without values, then given them.

Initialising a full-size model takes several times as long as reading it, and every value drawn would be
overwritten at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def without_parameters() -> Iterator[None]:
    """Modules that this thread builds inside have shapes for parameters, no values: `fill` gives those.

    Parameters go to the meta device as modules register them, where initialising does nothing. Buffers stay
    real: those outside of the state dict, such as rotary frequencies, are in no file.
    """
    builder = threading.get_ident()

    def shape_only(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        del module, name
        if threading.get_ident() != builder:  # the hook is seen by every thread
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(shape_only)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def fill(module: nn.Module, state: Mapping[str, Tensor], device: str | torch.device) -> None:
    """Sets every parameter and buffer to a copy of its tensor in `state`, on `device`, in its own dtype.

    `state` has exactly the names and shapes of `module.state_dict()`; the caller has checked that and worded
    the errors. A copy, so that a module depends neither on the caller's tensors nor on a file that stays
    mapped.
    """
    own = module.state_dict()
    assert own.keys() == state.keys(), f"names differ: {own.keys() ^ state.keys()}"
    values = {
        name: state[name].to(device, like.dtype, copy=True, memory_format=torch.contiguous_format)
        for name, like in own.items()
    }
    module.load_state_dict(values, assign=True)
