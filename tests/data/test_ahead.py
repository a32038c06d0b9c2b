"""Work that is done ahead: in order, bounded, with errors in their place, and over when nobody wants it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from shearling.data.ahead import map_ahead, read_ahead


def within(seconds: float, what: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.005)
    return what()


class Numbers:
    """0, 1, 2 and so on; says how many were got, and whether it was closed. Raises `error` in place of number `bad`."""

    def __init__(self, bad: int = -1, error: BaseException | None = None) -> None:
        self.got, self.closed, self.bad, self.error = 0, False, bad, error

    def __iter__(self) -> Iterator[int]:
        try:
            while True:
                if self.got == self.bad and self.error is not None:
                    raise self.error
                self.got += 1
                yield self.got - 1
        finally:
            self.closed = True


def test_no_more_is_read_than_may_be() -> None:
    numbers = Numbers()
    with closing(read_ahead(numbers, 3)) as items:
        assert next(items) == 0
        assert within(5, lambda: numbers.got == 4)
        time.sleep(0.05)
        assert numbers.got == 4
        assert [next(items) for _ in range(20)] == list(range(1, 21))
        time.sleep(0.05)
        assert numbers.got <= 24
    assert within(5, lambda: numbers.closed)
    got = numbers.got
    time.sleep(0.05)
    assert numbers.got == got


def test_all_comes_in_order_and_threads_end() -> None:
    before = threading.active_count()
    assert list(read_ahead(iter(range(50)), 2)) == list(range(50))
    assert list(map_ahead(lambda n: n * n, iter(range(50)), 3)) == [(n, n * n) for n in range(50)]
    assert list(read_ahead([], 2)) == [] and list(map_ahead(str, [], 2)) == []
    assert within(5, lambda: threading.active_count() == before)


@pytest.mark.parametrize("error", [ValueError("x"), OSError("x")])
@pytest.mark.parametrize(
    "run",
    [
        lambda numbers: read_ahead(numbers, 2),
        lambda numbers: (n for n, _ in map_ahead(str, numbers, 2)),
        lambda numbers: (n for n, _ in map_ahead(str, read_ahead(numbers, 2), 2)),
    ],
)
def test_an_error_comes_after_all_before_it(run: Callable[[Any], Iterator[int]], error: Exception) -> None:
    received = []
    with pytest.raises(type(error)):
        for number in run(Numbers(7, error)):
            time.sleep(0.002)
            received.append(number)
    assert received == list(range(7))


def test_an_error_of_the_work_is_raised_where_its_result_is_due() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    received = []
    with pytest.raises(ValueError, match="three"):
        for number, _ in map_ahead(work, range(9), 2):
            received.append(number)
    assert received == [0, 1, 2]


def test_several_items_are_worked_on_at_once() -> None:
    """Each waits for the other, so one alone would never end."""
    both = threading.Barrier(2)
    assert len(list(map_ahead(lambda _: both.wait(20), range(6), 2))) == 6


def test_what_nobody_waits_for_is_not_begun() -> None:
    begun = []
    release = threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number:
            release.wait(20)

    items = map_ahead(work, range(100), 2)
    assert next(items)[0] == 0
    threading.Timer(0.1, release.set).start()
    items.close()
    assert set(begun) <= {0, 1, 2, 3} and len(begun) < 4


@pytest.mark.parametrize("ahead", [lambda items: read_ahead(items, 2), lambda items: map_ahead(str, items, 2)])
def test_what_cannot_be_begun_is_an_error_and_no_hang(ahead: Callable[[Any], Iterator[Any]]) -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        next(ahead(Broken()))
