"""Stop signals wait for the loop, and broken weights are noticed before they are stored."""

from __future__ import annotations

import math
import signal

import pytest
import torch
from torch import nn

from vfmvae.training.safety import STOP_SIGNALS, StopRequest, check_finite


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_a_request(number: signal.Signals) -> None:
    notices: list[str] = []
    with StopRequest(lambda: notices.append("once")) as stop:
        assert stop.signal == 0
        signal.raise_signal(number)
        assert stop.signal == number
    assert notices == ["once"]


def test_the_second_interrupt_acts_as_usual() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest(lambda: None):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_patient_run_ignores_the_second_signal() -> None:
    notices: list[str] = []
    with StopRequest(lambda: notices.append("once"), patient=True) as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.signal == signal.SIGTERM
    assert notices == ["once"]


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest(lambda: None):
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    check_finite(model, 7)
    with torch.no_grad():
        model[1].weight[0, 1] = value
    with pytest.raises(FloatingPointError, match="parameter 1.weight is not finite after step 7"):
        check_finite(model, 7)
    model.requires_grad_(False)
    check_finite(model, 7)  # frozen parameters are not what training breaks
