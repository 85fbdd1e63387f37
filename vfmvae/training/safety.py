"""What keeps a run from losing work: stop signals wait for the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first Ctrl-C or SIGTERM only sets `signal`, so that a loop can finish its step.

    The second one acts as usual. `notify` is called once, at the first. Enter it in the main thread, where
    Python handles signals.
    """

    def __init__(self, notify: Callable[[], None], patient: bool = False) -> None:
        """`patient`: further signals do nothing. torchrun forwards what a batch system sends to it and to
        every process, so one wish to stop arrives twice; it kills what has not ended in time."""
        self._notify = notify
        self._patient = patient
        self._previous: dict[int, Any] = {}
        self.signal = 0
        """Number of the signal that came, or 0."""

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._request) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            return
        self.signal = number
        if not self._patient:
            self._restore()
        self._notify()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
