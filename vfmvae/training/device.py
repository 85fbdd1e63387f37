"""The device and the compute dtype of a run, from what the user asked for."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU; other names must be usable devices (ValueError)."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # `meta` has no values, an absent GPU no memory
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"device {name!r} cannot be used: {reason}; try --device cpu or --device auto"
        ) from None
    return device


def compute_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype that activations take beside fp32 parameters; None where they are fp32 too.

    `name` is "fp32", "bf16" or "auto": bf16 on CUDA, fp32 elsewhere.
    """
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return torch.bfloat16 if name == "bf16" else None
