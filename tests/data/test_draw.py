"""Draws: they follow the weights, are a function of seed, step and weights, and the even ones stay within their bounds."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.data.draw import KINDS, Kind, draw, quota_counts

W = np.array([0.5, 0.3, 0.2])
every_kind = pytest.mark.parametrize("kind", KINDS)


def test_golden_draws() -> None:
    """A change of these would change every run that is resumed."""
    assert draw(W, 12, 17, 3).tolist() == [[1, 1, 0, 0, 0, 0, 0, 2, 1, 2, 0, 2]]
    assert draw(W, 12, 17, 3, 2, "low-discrepancy").tolist() == [[1, 0, 2, 0, 0, 0, 1, 0, 0, 2, 1, 2], [1, 0, 2, 0, 1, 1, 0, 2, 0, 1, 0, 0]]


@every_kind
def test_draws_match_the_weights(kind: Kind) -> None:
    n = 100_000
    counts = np.bincount(draw(W, n, seed=3, first=9, kind=kind)[0], minlength=3)
    for count, weight in zip(counts, W, strict=True):
        assert abs(count - n * weight) < 5 * math.sqrt(n * weight * (1 - weight))


@every_kind
def test_ten_thousand_draws_in_small_batches_match_the_weights(kind: Kind) -> None:
    """Each row of a step, and all together: the steps must be independent of one another, and the order in a step a chance."""
    drawn = draw(W, 8, seed=3, first=0, steps=10_000, kind=kind)
    for domain, weight in enumerate(W):
        sure = 5 * math.sqrt(weight * (1 - weight))
        assert (np.abs((drawn == domain).mean(axis=0) - weight) < sure / math.sqrt(10_000)).all()
        assert abs((drawn == domain).mean() - weight) < sure / math.sqrt(80_000)


@every_kind
def test_draws_are_a_function_of_seed_and_step(kind: Kind) -> None:
    one = draw(W, 64, 1, 2, kind=kind)
    assert one.shape == (1, 64) and one.dtype == np.int64
    assert np.array_equal(one, draw(W, 64, 1, 2, kind=kind))
    assert not np.array_equal(one, draw(W, 64, 1, 3, kind=kind))
    assert not np.array_equal(one, draw(W, 64, 2, 2, kind=kind))
    assert not np.array_equal(one, draw(W, 64, 2, 1, kind=kind))
    assert draw(W, 5, -1, 0, kind=kind).shape == (1, 5)


shares = st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1.0)), min_size=1, max_size=12).filter(any)


@settings(max_examples=100, deadline=None)
@given(
    shares=shares, n=st.integers(1, 50), seed=st.integers(-(2**64), 2**70), first=st.integers(-(2**40), 2**40), kind=st.sampled_from(KINDS)
)
def test_steps_drawn_together_are_those_drawn_apart_and_no_dead_domain_is_hit(
    shares: list[float], n: int, seed: int, first: int, kind: Kind
) -> None:
    weights = np.array(shares)
    together = draw(weights, n, seed, first, 5, kind)
    assert together.shape == (5, n) and together.min() >= 0
    assert (weights[together] > 0).all()
    assert together.tolist() == [draw(weights, n, seed, first + number, 1, kind)[0].tolist() for number in range(5)]


def deviations(weights: Any, n: int, counts_KD: Any) -> tuple[Fraction, Fraction]:
    """The largest distance of a count from n w in one step, and in any steps in a row, exactly."""
    exact = [Fraction(float(weight)) for weight in weights]
    total = sum(exact)
    alone, run = Fraction(0), Fraction(0)
    for domain, weight in enumerate(exact):
        running = [Fraction(0)]
        for count in counts_KD[:, domain].tolist():
            running.append(running[-1] + count - n * weight / total)
            alone = max(alone, abs(running[-1] - running[-2]))
        run = max(run, max(running) - min(running))
    return alone, run


@settings(max_examples=150, deadline=None)
@given(shares=shares, n=st.integers(1, 50), seed=st.integers(0, 2**32), first=st.integers(-(2**40), 2**40), steps=st.integers(1, 150))
def test_even_draws_stay_within_their_bounds_whatever_the_weights(shares: list[float], n: int, seed: int, first: int, steps: int) -> None:
    weights = np.array(shares)
    counts = quota_counts(weights, n, seed, first, steps)
    assert counts.min() >= 0 and (counts.sum(axis=1) == n).all()
    alone, run = deviations(weights, n, counts)
    assert alone < 1
    assert run < math.ceil(math.log2(len(shares))) or run == 0 == len(shares) - 1
    drawn = draw(weights, n, seed, first, steps, "low-discrepancy")
    assert [np.bincount(row, minlength=len(shares)).tolist() for row in drawn] == counts.tolist()


def test_the_bound_of_even_draws_does_not_grow_over_a_million_steps() -> None:
    weights = np.array([0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02])  # those of RedPajama, as in the paper
    running, low, high = np.zeros(7), np.zeros(7), np.zeros(7)
    for first in range(0, 1_000_000, 100_000):
        steps = quota_counts(weights, 16, 5, first, 100_000) - 16 * weights / weights.sum()
        path = running + np.cumsum(steps, axis=0)
        low, high, running = np.minimum(low, path.min(axis=0)), np.maximum(high, path.max(axis=0)), path[-1]
    assert (high - low < 3 + 1e-6).all()  # the sums are rounded
    drawn = np.bincount(draw(weights, 160_000, 5, 0)[0], minlength=7)  # a hundredth as many, independent
    assert np.abs(drawn - 160_000 * weights).max() > 10 * 3


def test_even_draws_have_the_mean_of_the_weights_over_the_seeds() -> None:
    """So that in a step where a small domain has no sequence, that is chance and not a rule."""
    weights, n, seeds = np.array([0.62, 0.2, 0.1, 0.05, 0.03]), 7, 4000
    for step in (0, 1, 1000):
        counts = np.array([quota_counts(weights, n, seed, step, 1)[0] for seed in range(seeds)])
        fraction = n * weights % 1
        assert (np.abs(counts.mean(axis=0) - n * weights) < 5 * np.sqrt(fraction * (1 - fraction) / seeds)).all()


def test_weights_that_give_whole_numbers_give_them_in_every_step() -> None:
    assert quota_counts(np.array([0.5, 0.25, 0.25]), 8, 3, 100, 20).tolist() == [[4, 2, 2]] * 20
    assert quota_counts(np.array([0.0, 2.0, 0.0]), 8, 3, 100, 20).tolist() == [[0, 8, 0]] * 20
