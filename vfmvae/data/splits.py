"""Which files and samples of a data set train and which validate: by their names, else by a hash."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from vfmvae.data.samples import Part

HELD_OUT_ONE_IN = 20
Kind = Literal["train", "validation", "test"]
_WORDS: dict[str, Kind] = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


def check_part(part: str) -> None:
    if part not in get_args(Part):
        raise ValueError(f"unknown part {part!r}; choose one of {', '.join(get_args(Part))}")


def kind_of(name: str) -> Kind | None:
    """The split that a path names in one of its words (`imagenet1k-train-0000.tar`, `val2017/0.parquet`).

    Words end at whatever is no letter or digit, and at digits; the last one that names a split counts.
    """
    words = (word.rstrip("0123456789") for word in re.split(r"[^a-z0-9]+", name.lower()))
    return next((_WORDS[word] for word in reversed(list(words)) if word in _WORDS), None)


def divide(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names that train and those that validate; none validates where the names tell no two splits apart.

    Those named validation validate, or if there are none, those named test. Those named train do train, or
    if there are none, those that name no split. The others are left out: test where there is validation.
    """
    kinds = [kind_of(name) for name in names]
    of = {
        kind: [n for n, k in zip(names, kinds, strict=True) if k == kind] for kind in (*_WORDS.values(), None)
    }
    training, validation = of["train"] or of[None], of["validation"] or of["test"]
    return (training, validation) if training and validation else (training or validation, [])


def held_out(keys: Iterable[str]) -> np.ndarray:
    """bool [N]: about a twentieth of the samples, at least one and never all, chosen by a hash of each key.

    The choice is the same on every machine and stays when samples are added.
    """
    hashes = np.fromiter(map(stable_hash, keys), np.uint64)
    chosen = hashes % HELD_OUT_ONE_IN == 0
    if len(hashes) and not chosen.any():
        chosen[hashes.argmin()] = True
    if len(hashes) and chosen.all():
        chosen[hashes.argmax()] = False
    return chosen


def hashed_rows(part: Part, keys: Sequence[str]) -> np.ndarray:
    """int64 [N]: the numbers of the samples of `part`, where a hash of their keys divides them."""
    if part == "all":
        return np.arange(len(keys))
    return np.flatnonzero(held_out(keys) == (part == "validation"))


def stable_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")
