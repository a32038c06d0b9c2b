"""Stop on a signal at the end of the step, not in the middle of it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def signal_name(number: int) -> str:
    """SIGTERM and the like."""
    return signal.Signals(number).name


class StopOnSignal:
    """While entered, the first SIGINT, SIGTERM or SIGUSR1 sets `number`; a second one acts as it would without us."""

    def __init__(self) -> None:
        self.number = 0
        """The signal that asked to stop, 0 for none."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to the main thread alone
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
