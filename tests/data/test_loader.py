"""Loader: a batch is a function of (seed, step, weights, cursors), every sample has its turn, and each process reads its own rows.

The token sets are made of arrays in memory: the first two ids of a sequence say which sample of which domain it is.
"""

from __future__ import annotations

import gc
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.data.draw import KINDS, Kind
from shearling.data.loader import Batch, Loader
from shearling.data.mixture import Knobs, update
from shearling.data.order import sample_indices
from shearling.data.tokens import SPLITS, TokenSet

T = 4
WEIGHTS = np.array([0.7, 0.3])


def token_set(*sizes: int) -> TokenSet:
    """Domains d0, d1, ... of these sizes; row n of domain d begins with d, n."""
    arrays = {}
    for domain, size in enumerate(sizes):
        rows = np.zeros((size, T), dtype="<u2")
        rows[:, 0], rows[:, 1] = domain, np.arange(size)
        arrays |= {(f"d{domain}", split): rows for split in SPLITS}
    manifest = {"domains": {f"d{domain}": {} for domain in range(len(sizes))}, "sequence_length": T, "vocab_size": 2**16}
    return TokenSet(Path("memory"), manifest, arrays)


def saved(weights: Any, cursors: Any) -> tuple[Any, Any, str]:
    """Weights and cursors as they come back from a checkpoint, and what was written there."""
    text = json.dumps({"weights": weights.tolist(), "cursors": cursors.tolist()})
    values = json.loads(text)
    return np.array(values["weights"], np.float64), np.array(values["cursors"], np.int64), text


def drawn(batch: Batch) -> list[tuple[int, int]]:
    """(domain, sample) of each row that was read, from the ids themselves."""
    return [(domain, sample) for domain, sample, *_ in batch.ids.tolist()]


def test_two_passes_are_equal_and_any_step_can_be_resumed() -> None:
    batches = []
    for _ in range(2):
        loader = Loader(token_set(300, 90), 16, seed=5)
        cursors = loader.start()
        for step in range(20):
            batch = loader.batch(step, WEIGHTS, cursors)
            batches.append((cursors, batch))
            cursors = batch.cursors
    for (_, first), (_, second) in zip(batches[:20], batches[20:], strict=True):
        assert np.array_equal(first.ids, second.ids)
    cursors, batch = batches[13]
    assert np.array_equal(Loader(token_set(300, 90), 16, seed=5).batch(13, WEIGHTS, cursors).ids, batch.ids)


def test_batches_hold_the_samples_they_name() -> None:
    loader = Loader(token_set(300, 90), 32, seed=5)
    cursors = loader.start()
    batch = loader.batch(0, WEIGHTS, cursors)
    assert batch.ids.shape == (32, T)
    assert (batch.ids.dtype, batch.samples.dtype, batch.domains.dtype) == (np.int64,) * 3
    assert cursors.tolist() == [0, 0]  # not changed in place
    assert batch.cursors.tolist() == np.bincount(batch.domains, minlength=2).tolist()
    assert drawn(batch) == list(zip(batch.domains.tolist(), batch.samples.tolist(), strict=True))
    assert loader.epochs(np.array([150, 180])).tolist() == [0.5, 2.0]


@pytest.mark.parametrize("rows", [slice(2, 7), slice(1, None, 2), np.array([5, 0, 5]), np.array([], dtype=np.int64), slice(0, 0)])
def test_only_the_rows_asked_for_are_read(rows: Any) -> None:
    class Counted(np.ndarray):
        def __getitem__(self, index: Any) -> Any:
            read.extend(np.atleast_1d(index).tolist())
            return np.asarray(self)[index]

    read: list[int] = []
    tokens = token_set(300, 90)
    whole = Loader(tokens, 8, seed=5).batch(3, WEIGHTS, np.array([17, 4]))
    tokens = TokenSet(tokens.path, tokens.manifest, {key: ids.view(Counted) for key, ids in tokens.arrays.items()})
    part = Loader(tokens, 8, seed=5).batch(3, WEIGHTS, np.array([17, 4]), rows)
    assert np.array_equal(part.ids, whole.ids[rows])
    assert sorted(read) == sorted(whole.samples[rows].tolist())
    for name in ("domains", "samples", "cursors"):
        assert np.array_equal(getattr(part, name), getattr(whole, name))


@settings(max_examples=40, deadline=None)
@given(batch_size=st.integers(1, 9), batches=st.integers(1, 8), extra=st.integers(0, 8), seed=st.integers(0, 2**32))
def test_a_domain_that_runs_out_begins_anew_in_another_order(batch_size: int, batches: int, extra: int, seed: int) -> None:
    """In order over more than three epochs; without `extra` samples every epoch ends with a batch, else inside one."""
    size = batch_size * batches + extra
    loader, cursors, order = Loader(token_set(size), batch_size, seed), np.zeros(1, np.int64), []
    steps = -(-7 * size // (2 * batch_size))
    for step in range(steps):
        if cursors[0] % size == 0:  # stopped at the very boundary, and gone on with by another process
            loader = Loader(token_set(size), batch_size, seed)
            _, cursors, _ = saved(np.ones(1), cursors)
        batch = loader.batch(step, np.ones(1), cursors)
        order += [sample for _, sample in drawn(batch)]
        cursors = batch.cursors
    assert order == sample_indices(np.arange(steps * batch_size), size, seed, "d0").tolist()
    epochs = [order[epoch * size : (epoch + 1) * size] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))  # each sample once
    if size > 8:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_each_sample_comes_once_an_epoch_across_changing_weights() -> None:
    loader = Loader(token_set(83, 31), 7, seed=5)
    cursors, step, order = loader.start(), 0, []
    while cursors[1] < 4 * 31:
        share = 0.2 + 0.6 * (step % 3) / 2
        batch = loader.batch(step, np.array([1 - share, share]), cursors)
        order += [sample for domain, sample in drawn(batch) if domain == 1]
        cursors, step = batch.cursors, step + 1
    assert order == sample_indices(np.arange(len(order)), 31, 5, "d1").tolist()


SIZES, R, STEPS = (700, 90, 110), 40, 250


def moved(weights: Any, step: int) -> Any:
    """The shares after an evaluation with losses that swing."""
    losses = 2.0 + np.random.default_rng(step).normal(size=3)
    return update("unclipped", weights, losses, np.array([2.0, 2.0, 2.0]), Knobs(smoothing=0.05, step_size=0.5))


def run_through(kills: list[int], ranks: int = 1, every: int = 8, **how: Any) -> tuple[list[tuple[int, int]], list[Any]]:
    """(domain, sample) of every draw of a run, in order, as `ranks` processes read them, and the weights of every step.

    Before each step in `kills` all begin anew; the weights move after `every` steps.
    """

    def begin() -> list[Loader]:
        return [Loader(token_set(*SIZES), R, seed=11, **how) for _ in range(ranks)]

    loaders = begin()
    weights, cursors = np.array([0.5, 0.3, 0.2]), loaders[0].start()
    order, shares, sizes = [], [], set()
    for step in range(STEPS):
        if step in kills:
            weights, cursors, text = saved(weights, cursors)
            sizes.add(len(text))
            loaders = begin()
        shares.append(weights)
        parts = [
            loader.batch(step, weights, cursors, slice(rank * R // ranks, (rank + 1) * R // ranks)) for rank, loader in enumerate(loaders)
        ]
        order += [pair for part in parts for pair in drawn(part)]
        cursors = parts[0].cursors
        assert all(np.array_equal(part.cursors, cursors) for part in parts)
        if step % every == every - 1:
            weights = moved(weights, step)
    assert not sizes or max(sizes) < 140  # the state does not grow with the steps
    return order, shares


@pytest.fixture(scope="module")
def undisturbed() -> list[tuple[int, int]]:
    return run_through([])[0]


@pytest.mark.parametrize("workers", range(5))
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ten_thousand_draws_are_the_same_after_kills_anywhere(
    undisturbed: list[tuple[int, int]], ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the shares move; in order, and on any number of processes, with any number of threads that read ahead."""
    assert len(undisturbed) == 10_000
    for domain, size in enumerate(SIZES):
        order = [sample for other, sample in undisturbed if other == domain]
        assert len(order) > 3 * size
        assert order == sample_indices(np.arange(len(order)), size, 11, f"d{domain}").tolist()
    monkeypatch.setattr("shearling.data.loader._PAUSE", 0.0)  # or this loop, which computes nothing, would leave the threads idle
    kills = np.random.default_rng([ranks, workers]).choice(STEPS, 12, replace=False).tolist()
    assert run_through(kills, ranks, prefetch=1 + workers, workers=workers)[0] == undisturbed


@pytest.mark.parametrize("draw", KINDS)
@pytest.mark.parametrize("every", [1, 3, 50])
def test_ten_thousand_draws_match_the_shares_as_they_move(draw: Kind, every: int) -> None:
    """Independent draws within five standard deviations of a sum of binomials, even ones within less than 1 of every step."""
    order, shares = run_through([], every=every, draw=draw)
    domains = np.array([domain for domain, _ in order]).reshape(STEPS, R)
    for number, share_S in enumerate(np.array(shares).T):
        found_S = (domains == number).sum(axis=1)
        assert abs(found_S.sum() - R * share_S.sum()) < 5 * np.sqrt(R * (share_S * (1 - share_S)).sum())
        if draw == "low-discrepancy":
            assert (np.abs(found_S - R * share_S) < 1).all()


def test_what_is_kept_in_memory_does_not_grow_with_the_steps() -> None:
    loader = Loader(token_set(83, 31), 7, seed=5, prefetch=2)
    cursors, weights, held = loader.start(), WEIGHTS, []
    tracemalloc.start()
    try:
        for step in range(20_000):
            if step % 25 == 24:
                weights = weights[::-1]
            cursors = loader.batch(step, weights, cursors).cursors
            if step % 4000 == 3999:
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        loader.close()
    assert max(held[1:]) - held[1] < 2**15, held  # the samples of so many steps would be 20 times as much


def test_the_cost_of_a_start_does_not_hang_on_the_size() -> None:
    """A domain of 10^12 sequences is begun, and gone on with far inside, in the memory and about the time of one of 10^6."""

    class Endless:
        def __init__(self, size: int) -> None:
            self.shape, self.dtype = (size, T), np.dtype("<u2")

        def __len__(self) -> int:
            return self.shape[0]

        def __getitem__(self, index: int) -> Any:
            assert 0 <= index < len(self)
            return np.zeros(T, self.dtype)

    seconds = {}
    for size in (10**6, 10**12):
        tokens = token_set(1)
        tokens = TokenSet(tokens.path, tokens.manifest, {("d0", "train"): Endless(size)})  # type: ignore[dict-item]
        tries = []
        for _ in range(5):
            tracemalloc.start()
            began = time.perf_counter()
            batch = Loader(tokens, 16, seed=3).batch(10**6, np.ones(1), np.array([3 * size + size // 2]))
            tries.append(time.perf_counter() - began)
            assert tracemalloc.get_traced_memory()[1] < 2**22
            tracemalloc.stop()
        assert batch.samples.tolist() == sample_indices(3 * size + size // 2 + np.arange(16), size, 3, "d0").tolist()
        seconds[size] = min(tries)
    assert seconds[10**12] < 10 * seconds[10**6]  # up to 4 walks of the cycle each
