"""Which class each image of a set of samples has; the protocol is part of every number measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from vfmvae.cli import UsageError

Protocol = Literal["random", "balanced"]
LABEL_DRAW = 2**63
"""Of a sample's random numbers, beyond those of its noise."""


def class_numbers(classes: str, known: int) -> list[int]:
    """The classes to sample, of a model with `known` ones: "all", or numbers with commas between them.

    UsageError for one that the model does not have, or that comes twice.
    """
    chosen = list(range(known)) if classes == "all" else [int(part) for part in classes.split(",")]
    for number in chosen:
        if number >= known:
            raise UsageError(f"--classes: class {number} does not exist; this model has 0 to {known - 1}")
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"--classes {classes} names a class twice")
    return chosen


def check_even(protocol: Protocol, count: int, classes: int) -> None:
    """UsageError where images cannot be divided among the classes as the protocol wants."""
    if protocol == "balanced" and count % classes:
        raise UsageError(
            f"--labels balanced: {count} images cannot be divided among {classes} classes evenly; give a"
            f" multiple as --count"
        )


def label_of(number: int, chosen: Sequence[int], protocol: Protocol, seed: int) -> int:
    """The class of an image: in turns, so that the first of them show many, or drawn from (seed, number)."""
    if protocol == "balanced":
        return chosen[number % len(chosen)]
    counter = np.array([0, LABEL_DRAW, 0, number], dtype=np.uint64)
    drawn = np.random.Generator(np.random.Philox(counter=counter, key=seed)).integers(len(chosen))
    return chosen[int(drawn)]


def describe_labels(protocol: Protocol, count: int, classes: int) -> str:
    """The protocol in words."""
    if protocol == "balanced":
        each = count // classes
        return f"exactly {each} image{'s' if each > 1 else ''} of each of {classes} classes"
    return f"the class of each image drawn at random from {classes}"
