"""Learning rates of parts: what is refused, and the groups they make."""

from __future__ import annotations

import pytest

from tests.tokenizer.tiny import tiny_tokenizer
from vfmvae.tokenizer.parts import PARTS
from vfmvae.training.optim import Group
from vfmvae.training.rates import PartRate, check_parts, parameter_groups


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_factors_are_positive_and_finite(factor: float) -> None:
    with pytest.raises(ValueError, match="rates.factor "):
        PartRate("encoder", factor)


@pytest.mark.parametrize(
    ("trains", "parts", "message"),
    [
        (("fusion", "decodr"), (), "unknown part 'decodr'; known: encoder, fusion, "),
        (("fusion", "decoder>64"), (), "no decoder block lies above 64 px"),
        (PARTS, ("head",), "unknown part 'head'"),
        (
            ("fusion", "decoder"),
            ("encoder",),
            "rates has 'encoder', but encoder does not train; trains is fu",
        ),
        (("decoder>32",), ("decoder",), "rates has 'decoder', but decoder.blocks.0 does not train"),
        (("decoder>8",), ("decoder>4",), "'decoder>4', but decoder.blocks.2 does not train"),
        (("style",), ("style", "style"), "rates has 'style' and 'style', which both give style a rate"),
        (
            ("decoder",),
            ("decoder>32", "decoder>8"),
            "'decoder>32' and 'decoder>8', which both give decoder.b",
        ),
    ],
)
def test_rates_that_cannot_be_are_refused(
    trains: tuple[str, ...], parts: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_parts(trains, [PartRate(part, 0.5) for part in parts], 64)


def test_a_part_of_what_trains_may_have_a_rate() -> None:
    check_parts(("encoder", "decoder"), [PartRate("decoder>32", 0.5), PartRate("encoder", 0.1)], 64)
    check_parts(("decoder>8",), [PartRate("decoder>16", 0.5)], 64)


def test_every_trained_parameter_is_in_the_group_of_its_module() -> None:
    tokenizer = tiny_tokenizer()
    rates = [PartRate("decoder>32", 0.5), PartRate("encoder", 0.1)]
    groups = parameter_groups(tokenizer, ("encoder", "fusion", "decoder"), rates)
    expected = {
        "encoder": Group("encoder", 0.1),
        "fusion": Group("fusion", 1.0),
        **{f"decoder.blocks.{n}": Group(f"decoder.blocks.{n}", 0.5 if n == 5 else 1.0) for n in range(6)},
    }
    for name, parameter in tokenizer.named_parameters():
        module = next((each for each in expected if name.startswith(f"{each}.")), None)
        assert groups.get(parameter) == expected.get(module or ""), name
    names = {group.name for group in parameter_groups(tokenizer, ("encoder", "decoder"), ()).values()}
    assert names == expected.keys() - {"fusion"}, "the same groups without rates"
