"""Adam and the moving average of the weights, over all tensors of a group at once.

The plain form is torch.optim.Adam or AdamW followed by torch.lerp, with which the tests compare this. An
update works in place, on what lies at addresses, and is no part of a graph that torch.compile sees; so it is
a plain call and no registered operation.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vfmvae.ops import native

if TYPE_CHECKING:
    from vfmvae.kernels.optimizer import Numbers

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AdamSettings(NamedTuple):
    """Of a group of parameters; the names are those of torch.optim.Adam."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool


class AdamTensors(NamedTuple):
    """One group's, in the same order: float32, each in the memory layout of its parameter.

    Moments and step are there wherever there is a gradient; a parameter need not have an average.
    """

    parameters: Sequence[Tensor]
    exp_avgs: Sequence[Tensor | None]
    exp_avg_sqs: Sequence[Tensor | None]
    averages: Sequence[Tensor | None]
    steps: Sequence[Tensor | None]


def why_no_adam_average(device: torch.device, parameters: Iterable[Tensor] = ()) -> str | None:
    """Why `AdamAverage` cannot update these parameters on this device, or None."""
    if objection := native.why_no_triton(torch.empty(0, device=device)):
        return objection
    for p in parameters:
        if isinstance(p, DTensor):
            return "it takes whole parameters, and engine.parallel 'fsdp' shards them"
        if p.device != device:
            return f"its parameters lie on {device} and on {p.device}"
        if p.dtype != torch.float32:
            return f"it takes parameters of float32, not {p.dtype}"
        if torch.empty_like(p, device="meta").stride() != p.stride():
            return f"it takes dense parameters, not one of {list(p.shape)} with strides {list(p.stride())}"
    return None


class AdamAverage:
    """Updates a group of parameters, their moments and their averages in two launches of a kernel.

    Where tensors lie stands in tables on the device, which are made anew when one has moved. Gradients may
    move in every step. Their addresses travel as arguments of kernels: the host does not wait for the device,
    and a CUDA graph repeats them. Every recorded update has a table of gradients of its own.
    """

    def __init__(self) -> None:
        self._standing: list[list[int]] = []
        self._moving: list[int] = []

    @torch.no_grad()
    def __call__(
        self,
        tensors: AdamTensors,
        gradients: Sequence[Tensor | None],
        settings: AdamSettings,
        lr: float | Tensor,
        skip: Tensor | None = None,
        average_weight: Tensor | None = None,
    ) -> None:
        """One update in place.

        Args:
            gradients: of one dtype; without one a parameter stays, and its average moves.
            lr: a number, or float32 [] on the device.
            skip: float32 [] on the device: with 1.0 nothing but the averages moves.
            average_weight: float32 [] on the device, of the new parameters in the averages; None: 0.

        Raises:
            ValueError: tensors of other dtypes, layouts or devices than they should have.
            RuntimeError: a CUDA graph would record the first update of these tensors.
        """
        from vfmvae.kernels.optimizer import Tables, adam_average

        if not tensors.parameters:
            return
        gradients = [
            g if g is None or g.stride() == p.stride() else _laid_out(g, p)
            for p, g in zip(tensors.parameters, gradients, strict=True)
        ]
        dtype = _dtype(gradients)
        standing = [_addresses(row) for row in tensors]
        if standing != self._standing:
            self._build(tensors, standing)
        where = self._gradient_table(_addresses(gradients))
        skip = self._zero if skip is None else skip
        weight = self._zero if average_weight is None else average_weight
        tables = Tables(self._table, where, self._blocks, self._numbers)
        adam_average(tables, lr, skip, weight, _in_float32(settings), dtype)

    def _build(self, tensors: AdamTensors, addresses: list[list[int]]) -> None:
        """The tables of what does not move. Waits for the device."""
        from vfmvae.kernels.optimizer import SIZE

        device = tensors.parameters[0].device
        if _recording(device):
            raise RuntimeError("the first update of an optimizer cannot be recorded; let it run once before")
        _check(tensors)
        elements = torch.tensor([p.numel() for p in tensors.parameters])
        counts = (elements + SIZE - 1) // SIZE
        begins = counts.cumsum(0) - counts
        self._table = torch.stack([*torch.tensor(addresses), elements, begins]).to(device)
        self._blocks = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts).to(device)
        self._numbers = torch.empty(3, len(counts), device=device)
        self._gradients = torch.zeros_like(self._table[0])
        self._places = list(self._gradients.unbind())
        self._zero = torch.zeros((), device=device)
        self._standing, self._moving = addresses, [0] * len(counts)

    def _gradient_table(self, addresses: list[int]) -> Tensor:
        if _recording(self._gradients.device):
            recorded = torch.zeros_like(self._gradients)
            torch._foreach_add_(list(recorded.unbind()), addresses)
            return recorded
        if addresses != self._moving:
            self._gradients.zero_()
            torch._foreach_add_(self._places, addresses)
            self._moving = addresses
        return self._gradients


def _recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """0 for none; empty tensors have that address too, and get another one."""
    return [0 if t is None else t.data_ptr() or 1 for t in tensors]


def _dtype(gradients: Sequence[Tensor | None]) -> torch.dtype:
    found = {g.dtype for g in gradients if g is not None} or {torch.float32}
    if len(found) > 1 or not found <= set(GRADIENT_DTYPES):
        names = ", ".join(sorted(str(dtype) for dtype in found))
        raise ValueError(f"gradients must all be of float32, of bfloat16 or of float16; these are of {names}")
    return found.pop()


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the parameter's order of elements; a copy where that is another one."""
    if _same_layout(gradient, parameter):
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether elements lie in the same order; strides of dimensions of size 1 say nothing."""
    return a.shape == b.shape and all(
        x == y for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size != 1
    )


def _check(tensors: AdamTensors) -> None:
    """ValueError where a moment, an average or a step is not as `AdamTensors` says."""
    device = tensors.parameters[0].device
    if objection := why_no_adam_average(device, tensors.parameters):
        raise ValueError(f"adam_average: {objection}")
    for name, row in zip(tensors._fields[1:], tensors[1:], strict=True):
        for p, t in zip(tensors.parameters, row, strict=True):
            if t is None:
                continue
            fits = t.numel() == 1 if name == "steps" else _same_layout(t, p)
            if t.dtype != torch.float32 or t.device != device or not fits:
                raise ValueError(
                    f"adam_average: of a float32 parameter {list(p.shape)} with strides {list(p.stride())} on"
                    f" {device}, {name} has a {t.dtype} {list(t.shape)} with strides {list(t.stride())} on"
                    f" {t.device}"
                )


def _in_float32(settings: AdamSettings) -> Numbers:
    """The logarithms are those of the betas as float32 rounds them, or bias corrections would not fit."""
    from vfmvae.kernels.optimizer import Numbers

    first, second = struct.unpack("2f", struct.pack("2f", *settings.betas))
    logs = [math.log(beta) if beta else -math.inf for beta in (first, second)]
    return Numbers(
        (first, second),
        (logs[0], logs[1]),
        settings.eps,
        settings.weight_decay,
        settings.decoupled_weight_decay,
    )
