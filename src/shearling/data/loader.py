"""The batch of a step: which domains, which samples, their ids. A function of (seed, step, weights, cursors); there is no other state.

What is kept between calls only saves time: which samples the next steps would have, and their ids, if nothing changed. It is kept under
all that it was computed from, and used where exactly that is asked for.

Legend: D domains, R sequences in a batch, N of them that this process reads, T tokens in a sequence, K steps that are planned at once.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shearling.data import draw as drawing
from shearling.data.order import Order
from shearling.data.rows import Rows
from shearling.data.tokens import TokenSet

_PLANNED = 1024
"""Sequences that are planned at once, at least a step: enough that a plan costs little, and little is lost when the weights move."""


@dataclass(frozen=True)
class Batch:
    """What one step trains on. All but the ids is of the whole batch, and the same in every process."""

    ids: NDArray[np.int64]
    """[N, T] token ids of the rows that were asked for."""
    domains: NDArray[np.int64]
    """[R] index of each sequence's domain."""
    samples: NDArray[np.int64]
    """[R] index of each sequence in its domain's training text."""
    cursors: NDArray[np.int64]
    """[D] samples of each domain used up to and including this batch: what the next step passes in."""


_GROUP, _GROUP_BYTES = 8, 2**20
"""Batches, and bytes of ids, up to which small ones are read ahead in one go: to hand them to a thread takes as long as to read 16 rows."""
_PAUSE = 1e-3
"""Seconds that a caller must stay away between two batches for the next ones to be read ahead meanwhile. To hand a group to a thread and
to wait for it takes 0.1 to 0.5 ms more than to read it, as both threads want the interpreter; behind less there is nothing to hide."""
_Key = tuple[int, bytes, bytes]
"""Step, weights, cursors: all that the composition of a step hangs on, beside what a loader is made with."""


class _Plan(NamedTuple):
    """What a step is made of."""

    domains_R: NDArray[np.int64]
    samples_R: NDArray[np.int64]
    cursors_D: NDArray[np.int64]
    """After the step."""
    after: bytes
    """The same, for the key of the next step."""
    places: list[tuple[int, int]]
    """(domain, sample) of each of the R sequences."""


class Loader:
    """Draws batches from a token set. A domain that is used up begins anew in another order.

    With `prefetch` and `workers`, threads read the next steps' batches while the step loop computes, on the assumption that the weights
    stay. Where they did not, or another step or other cursors are asked for, what was read is dropped and the batch is read when asked
    for; so batches are the same whatever the depth, and new weights hold from the step that they are first passed in. The threads end
    with `close`, at the end of a `with` block, or with the loader; the next batch starts them again. For one thread's calls.

    A caller who is back within a millisecond computes nothing that reading could be hidden behind. It then reads its batches itself,
    which is quicker than to wait for a thread, until it stays away for longer again.

    Args:
        tokens: the prepared text.
        batch_size: R, sequences in a batch over all processes.
        seed: of the order of the samples and of the draws of the domains.
        draw: how the domains of a step are drawn; see `shearling.data.draw.draw`.
        prefetch: batches that are read ahead at least, each of N T 8 bytes; small ones are read in groups of up to
            8 and 1 MiB. 0: none.
        workers: threads that read ahead; 0: none.
    """

    def __init__(
        self, tokens: TokenSet, batch_size: int, seed: int, *, draw: drawing.Kind = "multinomial", prefetch: int = 0, workers: int = 1
    ) -> None:
        self.tokens = tokens
        self.batch_size = batch_size
        self.seed = seed
        self.draw = draw
        self.prefetch, self.workers = (prefetch, workers) if prefetch and workers else (0, 0)
        self._texts = [tokens.sequences(name, "train") for name in tokens.domains]
        self.sizes = np.array([len(text) for text in self._texts], dtype=np.int64)
        """[D] training samples of each domain."""
        self._orders = [Order(len(text), seed, name) for name, text in zip(tokens.domains, self._texts, strict=True)]
        self._rows = np.arange(batch_size)
        self._plans: dict[_Key, _Plan] = {}
        self._ahead: dict[tuple[_Key, bytes], tuple[Future[NDArray[np.int64]], int]] = {}
        """What is being read of the steps after the last: the group, and the number in it, by key and rows."""
        self._pool: ThreadPoolExecutor | None = None
        self._left = -math.inf
        """When the last batch was given out, in seconds; before the first, long ago."""
        self._process = os.getpid()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drop what was read ahead and end the threads; waits for the rows that one is reading."""
        self._drop()
        self._left = -math.inf
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def start(self) -> NDArray[np.int64]:
        """The cursors [D] before the first step."""
        return np.zeros(len(self.sizes), dtype=np.int64)

    def batch(
        self, step: int, weights: NDArray[np.float64], cursors: NDArray[np.int64], rows: NDArray[np.int64] | slice | None = None
    ) -> Batch:
        """The batch of `step`.

        Args:
            step: any number, another for each batch of a run; reading ahead supposes that the next one is `step + 1`.
            weights: [D] shares by which the domains are drawn.
            cursors: [D] how far each domain has been read.
            rows: which of the R sequences this process reads, as [N] indices or a slice; None for all of them.

        Raises what the reading of a row raised, ahead or not.
        """
        away = time.monotonic() - self._left
        self._leave_the_parents()
        weights, cursors = np.asarray(weights, dtype=np.float64), np.asarray(cursors, dtype=np.int64)
        rows_N = self._rows[slice(None) if rows is None else rows]
        key = (step, weights.tobytes(), cursors.tobytes())
        if key not in self._plans:
            self._plans.clear()
        plan = self._planned(key, weights)
        del self._plans[key]
        found = self._ahead.pop((key, rows_N.tobytes()), None)
        if found is None:
            self._drop()
        if self.prefetch and away >= _PAUSE:
            self._read_ahead(step, plan, weights, rows_N)
        if found is None:
            (ids_NT,) = self._read(self._texts, [plan], rows_N)
        else:
            future, number = found
            ids_NT = future.result()[number]
        self._left = time.monotonic()
        return Batch(ids_NT, plan.domains_R, plan.samples_R, plan.cursors_D)

    def epochs(self, cursors: NDArray[np.int64]) -> NDArray[np.float64]:
        """How often each domain [D] has been gone through; above 1 its samples repeat."""
        return np.asarray(cursors / self.sizes)

    def _planned(self, key: _Key, weights_D: NDArray[np.float64]) -> _Plan:
        """The plan of a step; where there is none, those of K steps from it on are made, on the assumption that the weights stay."""
        if key not in self._plans:
            self._plan(key, weights_D)
        return self._plans[key]

    def _plan(self, key: _Key, weights_D: NDArray[np.float64]) -> None:
        step, weights, cursors = key
        steps = -(-_PLANNED // self.batch_size)
        before_D = np.frombuffer(cursors, dtype=np.int64)
        domains_KR = drawing.draw(weights_D, self.batch_size, self.seed, step, steps, self.draw)
        domain_by_row, sample_by_row = domains_KR.ravel(), np.empty(domains_KR.size, dtype=np.int64)
        counts_KD = np.empty((steps, len(before_D)), dtype=np.int64)
        for index, (order, cursor) in enumerate(zip(self._orders, before_D.tolist(), strict=True)):
            where = np.flatnonzero(domain_by_row == index)
            sample_by_row[where] = order.samples(cursor, len(where))
            counts_KD[:, index] = np.bincount(where // self.batch_size, minlength=steps)
        samples_KR, after_KD = sample_by_row.reshape(domains_KR.shape), before_D + counts_KD.cumsum(axis=0)
        places = list(zip(domain_by_row.tolist(), sample_by_row.tolist(), strict=True))
        for number, (domains_R, samples_R, after_D) in enumerate(zip(domains_KR, samples_KR, after_KD, strict=True)):
            after = after_D.tobytes()
            own = places[number * self.batch_size : (number + 1) * self.batch_size]
            self._plans[step + number, weights, cursors] = _Plan(domains_R, samples_R, after_D, after, own)
            cursors = after

    def _read_ahead(self, step: int, plan: _Plan, weights_D: NDArray[np.float64], rows_N: NDArray[np.int64]) -> None:
        """Let the threads read the batches after `step`, which `plan` is of."""
        if len(self._ahead) >= self.prefetch:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers, "shearling-loader")
        weights, rows = weights_D.tobytes(), rows_N.tobytes()
        size = min(max(1, _GROUP_BYTES // max(1, len(rows_N) * self._texts[0].shape[1] * 8)), _GROUP)
        group: list[tuple[_Key, _Plan]] = []
        while len(self._ahead) < self.prefetch:
            step += 1
            key = (step, weights, plan.after)
            plan = self._planned(key, weights_D)
            if (key, rows) in self._ahead:
                continue
            group.append((key, plan))
            if len(group) == size:
                future = self._pool.submit(self._read, self._texts, [plan for _, plan in group], rows_N)
                self._ahead |= {(key, rows): (future, number) for number, (key, _) in enumerate(group)}
                group = []

    def _drop(self) -> None:
        for future, _ in self._ahead.values():
            future.cancel()
        self._ahead.clear()

    def _leave_the_parents(self) -> None:
        """In a forked child: the threads are the parent's, and what they were to read never comes."""
        if self._process != os.getpid():
            self._process, self._pool, self._ahead = os.getpid(), None, {}

    @staticmethod
    def _read(texts: Sequence[Rows], plans: Sequence[_Plan], rows_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids [plans, N, T]. Takes no loader, so that one that is let go ends while a thread reads for it."""
        rows = rows_N.tolist()
        found = [texts[domain][sample] for plan in plans for domain, sample in [plan.places[row] for row in rows]]
        length = texts[0].shape[1]
        if not found:
            return np.empty((len(plans), 0, length), dtype=np.int64)
        # A cast of each row while it is copied would take longer than one of all.
        return np.concatenate(found).astype(np.int64).reshape(len(plans), len(rows), length)
