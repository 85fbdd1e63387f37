"""Which implementation an Op runs, and what it says when it cannot."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vfmvae.ops import native
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


def make_accelerated_op() -> Op:
    def why_not(x: Tensor) -> str | None:
        return "it takes no float64" if x.dtype == torch.float64 else native.why_no_triton(x)

    return Op(
        "double",
        lambda x: 2 * x,
        (Implementation("triton", lambda x: x + x, why_not), Implementation("gemm", lambda x: x * 2, always)),
    )


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_has_triton", lambda: False)
    monkeypatch.setattr(native, "_not_built", lambda: "vfmvae._C is not built")


@pytest.mark.usefixtures("no_triton")
def test_a_part_that_the_installation_lacks_is_a_warning_on_cuda_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    op = make_accelerated_op()
    for _ in range(2):
        op.choose(True, x)
    assert caplog.messages == [
        "fused double runs as 'gemm', which is slower here (triton: the package triton is not installed)"
    ]
    assert caplog.records[0].levelname == "WARNING" and caplog.records[0].name == "vfmvae.ops"


def cuda_tensor(dtype: torch.dtype = torch.float32) -> Tensor:
    with FakeTensorMode():
        return torch.empty(2, device="cuda", dtype=dtype)


@pytest.mark.usefixtures("no_triton")
def test_the_cpu_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vfmvae.ops"):
        make_accelerated_op()(True, torch.ones(2))
    assert caplog.messages == []


def test_unfit_arguments_are_a_warning_on_cuda_once(caplog: pytest.LogCaptureFixture) -> None:
    op = make_accelerated_op()
    for _ in range(2):
        op.choose(True, cuda_tensor(torch.float64))
    assert caplog.messages == [
        "fused double runs as 'gemm', which is slower here (triton: it takes no float64)"
    ]


@pytest.mark.parametrize(
    "implementations",
    [
        # What is slower, whether or not it could run; what is for another device; what warns by itself.
        (Implementation("triton", abs, always, lambda x: "slower"), Implementation("gemm", abs, always)),
        (Implementation("triton", abs, lambda x: "odd", lambda x: "slower"),),
        (Implementation("cpu", abs, lambda x: "the tensor is on cuda"), Implementation("gemm", abs, always)),
        (Implementation("triton", abs, lambda x: "odd"), Implementation("separate", abs, always)),
    ],
)
def test_choices_that_lose_nothing_are_no_warning(
    implementations: tuple[Implementation, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="vfmvae.ops"):
        Op("double", abs, implementations).choose(True, cuda_tensor())
    assert caplog.messages == []
