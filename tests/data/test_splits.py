"""Splits by name and by hash."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from vfmvae.data.splits import divide, hashed_rows, held_out, kind_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("imagenet1k-train-0000.tar", "train"),
        ("data/validation-00000-of-00014.parquet", "validation"),
        ("VAL_3", "validation"),
        ("valid", "validation"),
        ("val2017/000.tar", "validation"),
        ("test/x-train-0.tar", "train"),
        ("x.test.tar", "test"),
        ("training", None),
        ("trains-contest-value", None),
        ("", None),
    ],
)
def test_words_that_name_a_split(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("names", "training", "validation"),
    [
        ("train val test other", "train", "val"),
        ("train test other", "train", "test"),
        ("a b val", "a b", "val"),
        ("a b test", "a b", "test"),
        ("a b", "a b", ""),
        ("train0 train1 other", "train0 train1", ""),
        ("val0 val1", "val0 val1", ""),
        ("test val", "val", ""),
        ("test", "test", ""),
        ("", "", ""),
    ],
)
def test_divide(names: str, training: str, validation: str) -> None:
    assert divide(names.split()) == (training.split(), validation.split())


def test_the_hash_is_the_one_of_image_folders() -> None:
    keys = [f"a/{number}" for number in range(2000)]
    expected = [int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) % 20 == 0 for key in keys]
    assert held_out(keys).tolist() == expected and 60 < sum(expected) < 140


@pytest.mark.parametrize("count", [0, 1, 2, 3, 19])
def test_few_samples(count: int) -> None:
    for start in range(30):
        keys = [str(number) for number in range(start, start + count)]
        train, validation, everything = (hashed_rows(part, keys) for part in ("train", "validation", "all"))
        assert np.array_equal(np.sort(np.concatenate([train, validation])), everything)
        assert len(everything) == count
        assert len(train) >= 1 if count else len(train) == 0
        assert len(validation) >= 1 if count > 1 else len(validation) == 0
