"""Packed strings are the strings."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from vfmvae.data.packed import PackedStrings

STRINGS = ["", "plain", "bär", "", "日本語", "a" * 1000, ""]


@pytest.mark.parametrize("strings", [STRINGS, [], [""]])
def test_there_and_back(strings: list[str]) -> None:
    packed = PackedStrings.pack(strings)
    assert list(packed) == strings == [packed[number] for number in range(len(packed))]
    assert list(pickle.loads(pickle.dumps(packed))) == strings
    assert list(PackedStrings.split(packed.text, packed.ends)) == strings


def test_parts_and_wholes() -> None:
    packed = PackedStrings.pack(STRINGS)
    taken = packed.take(np.array([4, 1, 1]))
    assert list(taken) == ["日本語", "plain", "plain"] and taken.text is packed.text
    parts = [taken, PackedStrings.pack([]), packed]
    assert list(PackedStrings.concatenate(parts)) == list(taken) + STRINGS
    assert list(PackedStrings.concatenate([])) == []
