"""A frozen encoder's linear layers in float8: `use_fp8`.

For SigLIP2-L they are six sevenths of the arithmetic. Patch embedding, attention's product, norms, residual
sums and the pooling of SigLIP stay as they are, in bfloat16 and float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmvae import ops
from vfmvae.encoders.base import FrozenEncoder
from vfmvae.ops.fp8 import MULTIPLE


def use_fp8(encoder: FrozenEncoder, emulate: bool = False) -> None:
    """Let the linear layers of the encoder's blocks multiply in float8 (`vfmvae.ops.fp8_linear`), in place.

    Parameters stay where they are, with their names and values, so that state dicts and saved models do not
    know of it; their float8 numbers are kept beside them, a byte per number. From now on the encoder
    runs under bfloat16 autocast on every device, and takes no gradients.

    Args:
        emulate: allow devices without float8, where the reference multiplies the same numbers in float32:
            slower than without, but with the same effect on features.

    Raises:
        ValueError: where the encoder trains, or its device has no float8.
    """
    name = encoder.config.name
    trained = [n for n, p in encoder.named_parameters() if p.requires_grad]
    if trained:
        raise ValueError(
            f"encoder {name}: {trained[0]} requires gradients, and float8 weights cannot train; freeze the"
            f" encoder or leave float8 out"
        )
    objection = None if emulate else ops.why_no_fp8(next(encoder.parameters()).device)
    if objection is not None:
        raise ValueError(f"encoder {name} cannot compute in float8: {objection}; leave float8 out")
    for block in encoder.blocks:
        for module in block.modules():
            if type(module) is nn.Linear:
                module.__class__ = Fp8Linear
                module.quantise()  # type: ignore[operator]
    encoder.always_bfloat16 = True


class Fp8Linear(nn.Linear):
    """[..., K] -> [..., N] in bfloat16; the weight is frozen, and has its float8 numbers beside it.

    These are made anew where the weight is loaded or moved. They are no buffers: they belong in no state
    dict, and are the same in all processes.
    """

    values: Tensor  # [N', K'] float8, both rounded up to a multiple of 16
    scale: Tensor  # [N', 1] float32
    shift: Tensor | None  # [N'] bfloat16, the bias

    @torch.no_grad()
    def quantise(self) -> None:
        outputs, inputs = self.weight.shape
        weight = F.pad(self.weight.float(), (0, -inputs % MULTIPLE, 0, -outputs % MULTIPLE))
        self.values, self.scale = ops.quantise_rows(weight, fused=False)
        self.shift = None if self.bias is None else _as_shift(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.shift)

    def product(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """x [..., K] times the weight, plus `shift`, as the layer's own or another one."""
        return ops.fp8_linear(x, self.values, self.scale, shift)[..., : self.out_features]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Fp8Linear:
        super()._apply(fn, recurse)
        self.quantise()
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.quantise()


def linear_with(layer: nn.Linear, x: Tensor, bias: Tensor) -> Tensor:
    """A layer's product with a bias that is kept elsewhere."""
    if isinstance(layer, Fp8Linear):
        return layer.product(x, _as_shift(bias))
    return F.linear(x, layer.weight, bias)


def _as_shift(bias: Tensor) -> Tensor:
    """A bias [N] as `fp8_linear` takes it, [N']."""
    missing = -len(bias) % MULTIPLE
    return F.pad(bias.bfloat16(), (0, missing)) if missing else bias.bfloat16()
