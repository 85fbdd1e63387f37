"""The parts that stages name cover the tokenizer, each parameter once."""

from __future__ import annotations

import pytest

from tests.tokenizer.tiny import tiny_tokenizer
from vfmvae.tokenizer.parts import PARTS, module_names, part_modules, set_trained


def test_every_parameter_is_in_exactly_one_part() -> None:
    tokenizer = tiny_tokenizer()
    found = [id(p) for part in PARTS for m in part_modules(tokenizer, part) for p in m.parameters()]
    assert sorted(found) == sorted(id(p) for p in tokenizer.parameters())


@pytest.mark.parametrize("part", PARTS)
def test_only_what_is_named_trains(part: str) -> None:
    tokenizer = tiny_tokenizer().requires_grad_(True)
    trained = set_trained(tokenizer, (part,))
    assert list(trained) == [name for name, p in tokenizer.named_parameters() if p.requires_grad]
    assert all(name.startswith(f"{part}.") for name in trained)
    assert bool(trained) == (part != "bottleneck"), "a Gaussian one has no parameters"


@pytest.mark.parametrize(("above", "first"), [(1, 0), (2, 1), (31, 4), (32, 5)])
def test_blocks_above_a_size(above: int, first: int) -> None:
    # The blocks of a tokenizer of 64 px work at 2, 4, ... 64 px.
    trained = set_trained(tiny_tokenizer(), (f"decoder>{above}",))
    assert {name.split(".")[2] for name in trained} == {str(n) for n in range(first, 6)}
    assert all(name.startswith("decoder.blocks.") for name in trained)


def test_parts_that_overlap_have_modules_in_common() -> None:
    above = [set(module_names(f"decoder>{limit}", 64)) for limit in (1, 8, 32)]
    assert set(module_names("decoder", 64)) == above[0] > above[1] > above[2] == {"decoder.blocks.5"}
    assert module_names("decoder>8", 128) == tuple(f"decoder.blocks.{n}" for n in (2, 3, 4, 5))
    assert all(module_names(part, 64) == (part,) for part in PARTS if part != "decoder")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("decodr", r"unknown part 'decodr'; known: encoder, .*, decoder and 'decoder>N' \(N in pixels\)"),
        ("decoder>", "unknown part 'decoder>'"),
        ("decoder>64", r"no decoder block lies above 64 px; their sizes are \[2, 4, 8, 16, 32, 64\]"),
    ],
)
def test_unknown_parts_are_refused(part: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_trained(tiny_tokenizer(), (part,))
