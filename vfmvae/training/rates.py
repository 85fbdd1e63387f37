"""Learning rates of a tokenizer's parts: a stage may train a part at a factor of its own rate.

Fine-tuning a pretrained encoder beside a new decoder wants a lower rate for the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vfmvae.serialization import check_fields
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.parts import module_names
from vfmvae.training.optim import Group


@dataclass(frozen=True)
class PartRate:
    """The learning rate of one part, in the stage that has this."""

    part: str
    """A part that the stage trains: "encoder", "decoder", "decoder>32", ..."""
    factor: float
    """Of the stage's learning rate, at every point of its schedule."""

    def __post_init__(self) -> None:
        check_fields(self, "rates")
        if not 0 < self.factor < math.inf:
            raise ValueError(
                f"rates.factor of {self.part!r} is {self.factor}; it must be above 0 and finite (what is not"
                f" to move is left out of trains)"
            )


def check_parts(trains: Sequence[str], rates: Sequence[PartRate], resolution: int) -> None:
    """ValueError for a part that does not exist, and for a rate of one that does not train or has another.

    `resolution`: the tokenizer's, at training.
    """
    trained = {name for part in trains for name in module_names(part, resolution)}
    given: dict[str, str] = {}
    for rate in rates:
        for name in module_names(rate.part, resolution):
            if name not in trained:
                raise ValueError(
                    f"rates has {rate.part!r}, but {name} does not train; trains is {' '.join(trains)}"
                )
            if name in given:
                raise ValueError(
                    f"rates has {given[name]!r} and {rate.part!r}, which both give {name} a rate; give each"
                    f" parameter one"
                )
            given[name] = rate.part


def parameter_groups(
    tokenizer: Tokenizer, trains: Sequence[str], rates: Sequence[PartRate]
) -> dict[nn.Parameter, Group]:
    """The group of every parameter that a stage trains: one for each module that parts are made of.

    The modules do not depend on the rates, so a resumed run may change these.
    """
    resolution = tokenizer.config.resolution
    factors = {name: rate.factor for rate in rates for name in module_names(rate.part, resolution)}
    return {
        parameter: Group(name, factors.get(name, 1.0))
        for part in trains
        for name in module_names(part, resolution)
        for parameter in tokenizer.get_submodule(name).parameters()
    }
