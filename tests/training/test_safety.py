"""Stop signals wait for the loop, and broken weights are noticed before they are stored."""

from __future__ import annotations

import signal

import pytest

from vfmvae.training.safety import STOP_SIGNALS, StopRequest


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
