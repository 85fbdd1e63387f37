"""Which implementation an Op runs, and what it says when it cannot."""

from __future__ import annotations

import logging

import pytest

from vfmvae.ops.dispatch import Implementation, Op, always


def refuse(x: int) -> str | None:
    return f"{x} is too large" if x > 10 else None


def make_op() -> Op:
    return Op(
        "double",
        lambda x: ("reference", 2 * x),
        (
            Implementation("picky", lambda x: ("picky", 2 * x), refuse),
            Implementation("never", lambda x: ("never", 2 * x), lambda x: "it never works"),
        ),
    )


def test_true_takes_the_first_without_an_objection() -> None:
    assert make_op()(True, 3) == ("picky", 6)


def test_true_falls_back_to_the_reference() -> None:
    assert make_op()(True, 30) == ("reference", 60)


@pytest.mark.parametrize("fused", [False, "reference"])
def test_false_is_the_reference_whatever_applies(fused: bool | str) -> None:
    assert make_op()(fused, 3) == ("reference", 6)


def test_a_name_runs_exactly_that() -> None:
    op = Op("op", lambda: 0, (Implementation("a", lambda: 1, always), Implementation("b", lambda: 2, always)))
    assert op("b") == 2


def test_a_name_that_cannot_run_is_an_error_with_the_objection() -> None:
    with pytest.raises(
        ValueError, match="double: the implementation 'picky' cannot be used here: 30 is too large"
    ):
        make_op()("picky", 30)


def test_an_unknown_name_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no implementation 'fast'; known: picky, never, reference"):
        make_op()("fast", 3)


def test_names_are_what_fused_may_say() -> None:
    assert make_op().names() == ["picky", "never", "reference"]


def test_each_choice_is_logged_once_with_what_was_refused(caplog: pytest.LogCaptureFixture) -> None:
    op = make_op()
    with caplog.at_level(logging.DEBUG, logger="vfmvae.ops"):
        for x in (3, 4, 30, 30):
            op(True, x)
    assert caplog.messages == [
        "double: picky",
        "double: reference (picky: 30 is too large; never: it never works)",
    ]
