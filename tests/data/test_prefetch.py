"""Reading ahead changes nothing but the time: the same batches whatever the depth, errors where they belong, no thread left."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.data import loader as loading
from shearling.data.draw import KINDS, Kind
from shearling.data.loader import Batch, Loader
from shearling.data.tokens import TokenSet
from tiny_stage import Stage, finished, result_of

WEIGHTS = np.array([0.7, 0.3])
NAME = "shearling-loader"


class Text:
    """Rows that hold their own number, and tell who reads them."""

    def __init__(self, size: int, length: int, read: Callable[[int], None] = lambda sample: None) -> None:
        self.shape, self.dtype, self.read = (size, length), np.dtype("<u4"), read

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Any:
        self.read(index)
        return np.full(self.shape[1], index, self.dtype)


def token_set(*texts: Text) -> TokenSet:
    """Domains d0, d1, ... of these texts."""
    arrays: Any = {(f"d{number}", "train"): text for number, text in enumerate(texts)}
    manifest = {"domains": {domain: {} for domain, _ in arrays}, "sequence_length": texts[0].shape[1], "vocab_size": 2**16}
    return TokenSet(Path("memory"), manifest, arrays)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(NAME)]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


@pytest.fixture
def _always_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads read ahead for a caller who is back at once, too."""
    monkeypatch.setattr(loading, "_PAUSE", 0.0)


def same(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("ids", "domains", "samples", "cursors"))


moves = st.lists(st.sampled_from(["go on", "weights", "a hair", "again", "jump", "rows", "cursors"]), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(
    moves=moves,
    prefetch=st.integers(1, 5),
    workers=st.integers(1, 3),
    length=st.sampled_from([3, 2**15]),
    batch_size=st.integers(1, 9),
    draw=st.sampled_from(KINDS),
    aways=st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_whatever_is_asked_for_next_is_what_a_new_loader_gives(
    moves: list[str], prefetch: int, workers: int, length: int, batch_size: int, draw: Kind, aways: list[bool]
) -> None:
    """Weights that move by much or by the last bit, steps again or far off, other rows, other cursors; the caller back at once, or not."""
    tokens = token_set(Text(50, length), Text(7, length))
    step, weights, rows = 0, WEIGHTS, np.arange(batch_size)
    with (
        pytest.MonkeyPatch.context() as patch,
        Loader(tokens, batch_size, 5, draw=draw, prefetch=prefetch, workers=workers) as loader,
    ):
        cursors = loader.start()
        for number, move in enumerate(moves):
            patch.setattr(loading, "_PAUSE", 0.0 if aways[number % len(aways)] else 1e9)
            if move == "weights":
                weights = weights[::-1]
            elif move == "a hair":
                weights = np.nextafter(weights, 1)
            elif move == "jump":
                step += 1000
            elif move == "rows":
                rows = np.arange(batch_size)[len(rows) == batch_size :: 2]
            elif move == "cursors":
                cursors = cursors + 1
            batch = loader.batch(step, weights, cursors, rows)
            assert same(batch, Loader(tokens, batch_size, 5, draw=draw).batch(step, weights, cursors, rows))
            assert batch.ids[:, 0].tolist() == batch.samples[rows].tolist()
            if move != "again":
                step, cursors = step + 1, batch.cursors


def test_threads_read_as_far_ahead_as_asked_and_no_further() -> None:
    """Rows so long that no batches are read in groups."""
    reads: list[tuple[str, int]] = []
    length = 2**16
    text = Text(1000, length, lambda sample: reads.append((threading.current_thread().name, sample)))
    with Loader(token_set(text), 2, 5, prefetch=3, workers=2) as loader:
        batch = loader.batch(0, np.ones(1), loader.start())
        deadline = time.monotonic() + 10
        while len(reads) < 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(reads) == 8
        ahead = [sample for name, sample in reads if name.startswith(NAME)]
        assert sorted(sample for name, sample in reads if not name.startswith(NAME)) == sorted(batch.samples.tolist())
        due = []
        for step in (1, 2, 3):
            batch = loader.batch(step, np.ones(1), batch.cursors)
            due += batch.samples.tolist()
        assert sorted(ahead) == sorted(due)
        assert len([name for name, _ in reads if not name.startswith(NAME)]) == 2
    assert len(threads()) == 0


def test_a_slow_disk_is_hidden_behind_steps_that_take_time() -> None:
    """Only the first batch is waited for: 20 ms of reading each fit into steps of 60 ms."""
    readers: list[str] = []

    def read(sample: int) -> None:
        readers.append(threading.current_thread().name)
        time.sleep(0.01)

    waits = []
    with Loader(token_set(Text(100, 2**16, read)), 2, 5, prefetch=2) as loader:
        cursors = loader.start()
        for step in range(6):
            began = time.monotonic()
            cursors = loader.batch(step, np.ones(1), cursors).cursors
            waits.append(time.monotonic() - began)
            time.sleep(0.06)
    assert waits[0] >= 0.02
    assert sum(waits[1:]) < 0.05
    assert readers.count(threading.main_thread().name) == 2


def test_who_is_back_at_once_reads_for_itself_and_who_stays_away_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As handing over takes longer than reading what is in memory."""
    reads: list[tuple[str, int]] = []
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loading, "time", SimpleNamespace(monotonic=lambda: clock.now))
    text = Text(1000, 2**17, lambda sample: reads.append((threading.current_thread().name, sample)))
    by_threads = []
    with Loader(token_set(text), 1, 5, prefetch=2) as loader:
        cursors = loader.start()
        for step, pause in enumerate([0, 0, 0, 0, 0, 2e-3, 2e-3, 0, 0, 0]):
            clock.now += pause
            batch = loader.batch(step, np.ones(1), cursors)
            cursors = batch.cursors
            (reader,) = [name for name, sample in reads if sample == batch.samples[0]]
            by_threads.append(reader.startswith(NAME))
    # Two are read ahead for who asks for the first time, and for who comes back after a pause.
    assert by_threads == [False, True, True, False, False, False, True, True, True, False]


@pytest.mark.parametrize(("prefetch", "workers"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_is_read_ahead_without_depth_or_threads(prefetch: int, workers: int) -> None:
    reads: list[int] = []
    loader = Loader(token_set(Text(100, 4, reads.append)), 3, 5, prefetch=prefetch, workers=workers)
    batch = loader.batch(0, np.ones(1), loader.start())
    assert not threads() and reads == batch.samples.tolist()


@pytest.mark.usefixtures("_always_ahead")
def test_an_error_is_raised_by_the_batch_that_needs_the_row_and_by_no_other() -> None:
    def read(sample: int) -> None:
        if sample == bad:
            raise OSError(f"row {sample} is gone")

    bad = -1
    plain = Loader(token_set(Text(100, 2**16, read)), 2, 5)
    cursors, due = plain.start(), []
    for step in range(6):
        batch = plain.batch(step, np.ones(1), cursors)
        due.append(batch)
        cursors = batch.cursors
    bad = int(due[4].samples[1])
    with Loader(token_set(Text(100, 2**16, read)), 2, 5, prefetch=3, workers=2) as loader:
        cursors = loader.start()
        for step in range(4):
            batch = loader.batch(step, np.ones(1), cursors)
            assert same(batch, due[step])
            cursors = batch.cursors
        for _ in range(2):  # asked for again it is read again
            with pytest.raises(OSError, match=f"row {bad} is gone"):
                loader.batch(4, np.ones(1), cursors)
        bad = -1
        assert same(loader.batch(4, np.ones(1), cursors), due[4])
        assert same(loader.batch(5, np.ones(1), due[4].cursors), due[5])


def test_an_error_in_what_is_not_asked_for_is_no_error() -> None:
    """The weights moved, so the rows that are gone are not needed."""
    failed = threading.Event()

    def read(sample: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            failed.set()
            raise OSError("gone")

    with Loader(token_set(Text(100, 2**16), Text(100, 2**16, read)), 2, 5, prefetch=2) as loader:
        batch = loader.batch(0, np.array([0.0, 1.0]), loader.start())
        assert failed.wait(10)
        assert loader.batch(1, np.array([1.0, 0.0]), batch.cursors).domains.tolist() == [0, 0]


def test_threads_end_with_the_loader() -> None:
    loader = Loader(token_set(Text(100, 4)), 3, 5, prefetch=2, workers=1)
    loader.batch(0, np.ones(1), loader.start())
    assert len(threads()) == 1
    loader.close()
    assert not threads()
    batch = loader.batch(0, np.ones(1), loader.start())  # it may be used again
    assert len(threads()) == 1 and batch.ids.shape == (3, 4)
    del loader  # and let go without a word; see the fixture


@pytest.mark.usefixtures("_always_ahead")
def test_an_interrupt_while_waiting_loses_nothing() -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupt

    def read(sample: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            opened.wait(10)

    opened = threading.Event()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Loader(token_set(Text(100, 2**16, read)), 2, 5, prefetch=2) as loader:
            first = loader.batch(0, np.ones(1), loader.start())
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(Interrupt):
                loader.batch(1, np.ones(1), first.cursors)
            opened.set()
            for step in range(1, 6):
                plain = Loader(loader.tokens, 2, 5).batch(step, np.ones(1), first.cursors)
                first = loader.batch(step, np.ones(1), first.cursors)
                assert same(first, plain)
    finally:
        opened.set()
        signal.signal(signal.SIGALRM, before)


def test_a_forked_child_reads_for_itself() -> None:
    """The threads are the parent's: to wait for them would be to wait for ever."""
    tokens = token_set(Text(100, 4))
    with Loader(tokens, 3, 5, prefetch=2) as loader:
        batch = loader.batch(0, np.ones(1), loader.start())
        due = Loader(tokens, 3, 5).batch(1, np.ones(1), batch.cursors)
        child = os.fork()
        if not child:
            signal.alarm(10)
            os._exit(0 if same(loader.batch(1, np.ones(1), batch.cursors), due) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert same(loader.batch(1, np.ones(1), batch.cursors), due)


@pytest.mark.parametrize("how", [{"prefetch": 0}, {"prefetch": 1, "loader_workers": 4}, {"prefetch": 4, "loader_workers": 2}])
def test_a_stage_is_the_same_whatever_the_depth_and_ends_its_threads(how: dict[str, int], tmp_path: Path) -> None:
    """Shares move at every third step, and a second try begins from a checkpoint; ended by an error it leaves no thread either."""

    def fail(step: int) -> None:
        if step == 3:
            assert bool(threads()) == bool(how["prefetch"])
            raise KeyError("a bug")

    failing = Stage("plain", how)
    failing.after_step = fail
    with pytest.raises(KeyError, match="a bug"):
        failing.fit(tmp_path)
    assert not threads()
    stage = Stage("plain", how)
    stage.fit(tmp_path)
    assert not threads()
    assert result_of(stage, tmp_path) == finished("plain")
