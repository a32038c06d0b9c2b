"""Mixture: hand-computed updates, invariants, and draws that follow the weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.data.mixture import UPDATES, draw, starting_weights, update
from shearling.errors import NumericsError

W = np.array([0.5, 0.3, 0.2])
REFERENCE = np.array([2.0, 2.0, 2.0])
LOSSES = np.array([2.0 + math.log(2), 1.0, 2.0])  # above, below, at the reference


def test_paper_by_hand() -> None:
    # 0.5 * 2, 0.3 * 1 (clipped), 0.2 * 1: sum 1.5
    assert update("paper", W, LOSSES, REFERENCE, smoothing=0.0) == pytest.approx([1 / 1.5, 0.3 / 1.5, 0.2 / 1.5], abs=1e-12)
    mixed = update("paper", W, LOSSES, REFERENCE, smoothing=0.03)
    assert mixed == pytest.approx([0.97 * 1 / 1.5 + 0.01, 0.97 * 0.2 + 0.01, 0.97 * 0.2 / 1.5 + 0.01], abs=1e-12)


def test_unclipped_by_hand() -> None:
    total = 1.0 + 0.3 * math.exp(-1) + 0.2
    expected = [1.0 / total, 0.3 * math.exp(-1) / total, 0.2 / total]
    assert update("unclipped", W, LOSSES, REFERENCE, smoothing=0.0) == pytest.approx(expected, abs=1e-12)


def test_step_size_scales_the_exponent() -> None:
    expected = np.array([0.5 * 2**0.5, 0.3, 0.2])
    assert update("paper", W, LOSSES, REFERENCE, smoothing=0.0, step_size=0.5) == pytest.approx(expected / expected.sum(), abs=1e-12)


def test_static_changes_nothing() -> None:
    assert update("static", W, LOSSES, REFERENCE) is W


def test_paper_keeps_weights_when_all_are_below_their_reference() -> None:
    assert update("paper", W, REFERENCE - 1, REFERENCE, smoothing=0.0) == pytest.approx(W, abs=1e-15)


shares = st.lists(st.floats(0.001, 1.0), min_size=2, max_size=7)


@settings(max_examples=100, deadline=None)
@given(shares=shares, data=st.data(), rule=st.sampled_from(sorted(UPDATES)), smoothing=st.floats(0, 0.5))
def test_update_invariants(shares: list[float], data: st.DataObject, rule: str, smoothing: float) -> None:
    n = len(shares)
    weights = np.array(shares) / sum(shares)
    losses, reference = (np.array(data.draw(st.lists(st.floats(0.1, 12), min_size=n, max_size=n))) for _ in range(2))
    before = weights.copy()
    new = update(rule, weights, losses, reference, smoothing=smoothing)
    assert np.array_equal(weights, before)
    assert new.sum() == pytest.approx(1.0, abs=1e-12)
    if rule != "static":
        assert (new >= smoothing / n - 1e-12).all()
        worst = int(np.argmax(np.maximum(losses - reference, 0) if rule == "paper" else losses - reference))
        assert new[worst] >= (1 - smoothing) * weights[worst] + smoothing / n - 1e-12
    order = np.random.default_rng(0).permutation(n)
    assert update(rule, weights[order], losses[order], reference[order], smoothing=smoothing) == pytest.approx(new[order], abs=1e-12)


def test_update_survives_huge_losses_and_dead_domains() -> None:
    new = update("paper", np.array([1.0, 0.0]), np.array([5000.0, 1.0]), np.array([1.0, 1.0]), smoothing=0.0)
    assert new.tolist() == [1.0, 0.0]
    new = update("paper", np.array([1.0, 0.0]), np.array([1.0, 5000.0]), np.array([1.0, 1.0]), smoothing=0.0)
    assert new.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_update_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(NumericsError, match=r"domain code: the held-out loss is (nan|inf)"):
        update("paper", W, np.array([1.0, bad, 1.0]), REFERENCE, domains=("web", "code", "wiki"))
    with pytest.raises(NumericsError, match="reference loss"):
        update("paper", W, LOSSES, np.array([1.0, bad, 1.0]))


def test_starting_weights() -> None:
    assert starting_weights([None, None]).tolist() == [0.5, 0.5]
    assert starting_weights([3.0, 1.0]).tolist() == [0.75, 0.25]


def test_draws_match_the_weights() -> None:
    n = 100_000
    counts = np.bincount(draw(W, n, seed=3, step=9), minlength=3)
    for count, weight in zip(counts, W, strict=True):
        assert abs(count - n * weight) < 5 * math.sqrt(n * weight * (1 - weight))


def test_draws_over_steps_match_the_weights() -> None:
    """Small batches, many steps: the steps must be independent of one another."""
    drawn = np.concatenate([draw(W, 8, seed=3, step=step) for step in range(5000)])
    for domain, weight in enumerate(W):
        assert abs((drawn == domain).sum() - len(drawn) * weight) < 5 * math.sqrt(len(drawn) * weight * (1 - weight))


def test_draws_are_a_function_of_seed_and_step() -> None:
    assert np.array_equal(draw(W, 64, 1, 2), draw(W, 64, 1, 2))
    assert not np.array_equal(draw(W, 64, 1, 2), draw(W, 64, 1, 3))
    assert not np.array_equal(draw(W, 64, 1, 2), draw(W, 64, 2, 2))
    assert not np.array_equal(draw(W, 64, 1, 2), draw(W, 64, 2, 1))
    assert len(draw(W, 5, -1, 0)) == 5


@settings(max_examples=50, deadline=None)
@given(shares=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=1, max_size=9), step=st.integers(0, 2**40))
def test_draws_never_hit_a_dead_domain(shares: list[float], step: int) -> None:
    weights = np.array(shares)
    if weights.sum() == 0:
        return
    drawn = draw(weights, 200, 0, step)
    assert drawn.min() >= 0
    assert (weights[drawn] > 0).all()
