"""The first signal asks, the second ends."""

from __future__ import annotations

import os
import signal
import time

import pytest

from shearling.train.stop import SIGNALS, StopOnSignal, signal_name


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_remembered_and_handlers_come_back(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with StopOnSignal() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), number)
        assert stop.number == number and signal_name(stop.number) == number.name
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def test_a_second_signal_ends_at_once() -> None:
    child = os.fork()
    if child == 0:
        try:
            with StopOnSignal() as stop:
                os.kill(os.getpid(), signal.SIGUSR1)
                if stop.number != signal.SIGUSR1:
                    os._exit(3)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
