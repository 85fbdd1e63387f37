"""The check of tensor arguments that the operations share.

Compiled code reads memory at the addresses it is given: a tensor of another shape or on another device than
it is told would crash the process.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_maps(x: Tensor) -> None:
    """ValueError unless x is a floating point [B, C, H, W]."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be a floating point [B, C, H, W], not {x.dtype} {list(x.shape)}")


def check_tensors(x: Tensor, *rows: tuple[str, Tensor | None, Sequence[int]]) -> None:
    """Checks arguments beside x, each given as its name, the tensor (or None) and the shape it must have.

    Raises:
        ValueError: another shape, or another device than x's.
    """
    device = x.device
    for name, tensor, shape in rows:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}; for x {list(x.shape)} it must be {list(shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, x on {device}; they must be on one device")
