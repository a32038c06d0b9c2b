"""Mixture: hand-computed updates, and invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.data.mixture import UPDATES, Knobs, starting_weights, update
from shearling.data.mixture_config import MOVING
from shearling.errors import NumericsError

W = np.array([0.5, 0.3, 0.2])
REFERENCE = np.array([2.0, 2.0, 2.0])
LOSSES = np.array([2.0 + math.log(2), 1.0, 2.0])  # above, below, at the reference


def test_paper_by_hand() -> None:
    # 0.5 * 2, 0.3 * 1 (clipped), 0.2 * 1: sum 1.5
    assert update("paper", W, LOSSES, REFERENCE, Knobs(smoothing=0.0)) == pytest.approx([1 / 1.5, 0.3 / 1.5, 0.2 / 1.5], abs=1e-12)
    mixed = update("paper", W, LOSSES, REFERENCE, Knobs(smoothing=0.03))
    assert mixed == pytest.approx([0.97 * 1 / 1.5 + 0.01, 0.97 * 0.2 + 0.01, 0.97 * 0.2 / 1.5 + 0.01], abs=1e-12)


def test_unclipped_by_hand() -> None:
    total = 1.0 + 0.3 * math.exp(-1) + 0.2
    expected = [1.0 / total, 0.3 * math.exp(-1) / total, 0.2 / total]
    assert update("unclipped", W, LOSSES, REFERENCE, Knobs(smoothing=0.0)) == pytest.approx(expected, abs=1e-12)


def test_step_size_scales_the_exponent() -> None:
    expected = np.array([0.5 * 2**0.5, 0.3, 0.2])
    assert update("paper", W, LOSSES, REFERENCE, Knobs(smoothing=0.0, step_size=0.5)) == pytest.approx(expected / expected.sum(), abs=1e-12)


def test_static_changes_nothing() -> None:
    assert update("static", W, LOSSES, REFERENCE) is W


def test_paper_keeps_weights_when_all_are_below_their_reference() -> None:
    assert update("paper", W, REFERENCE - 1, REFERENCE, Knobs(smoothing=0.0)) == pytest.approx(W, abs=1e-15)


shares = st.lists(st.floats(0.001, 1.0), min_size=2, max_size=7)


@settings(max_examples=100, deadline=None)
@given(shares=shares, data=st.data(), rule=st.sampled_from(sorted(UPDATES)), smoothing=st.floats(0, 0.5))
def test_update_invariants(shares: list[float], data: st.DataObject, rule: str, smoothing: float) -> None:
    n = len(shares)
    weights = np.array(shares) / sum(shares)
    losses, reference = (np.array(data.draw(st.lists(st.floats(0.1, 12), min_size=n, max_size=n))) for _ in range(2))
    before = weights.copy()
    sizes = np.arange(1.0, n + 1)
    new = update(rule, weights, losses, reference, Knobs(smoothing, tokens_D=sizes))
    assert np.array_equal(weights, before)
    assert new.sum() == pytest.approx(1.0, abs=1e-12)
    if rule in MOVING:
        assert (new >= smoothing / n - 1e-12).all()
        worst = int(np.argmax(np.maximum(losses - reference, 0) if rule == "paper" else losses - reference))
        assert new[worst] >= (1 - smoothing) * weights[worst] + smoothing / n - 1e-12
    order = np.random.default_rng(0).permutation(n)
    again = update(rule, weights[order], losses[order], reference[order], Knobs(smoothing, tokens_D=sizes[order]))
    assert again == pytest.approx(new[order], abs=1e-12)


def test_update_survives_huge_losses_and_dead_domains() -> None:
    new = update("paper", np.array([1.0, 0.0]), np.array([5000.0, 1.0]), np.array([1.0, 1.0]), Knobs(smoothing=0.0))
    assert new.tolist() == [1.0, 0.0]
    new = update("paper", np.array([1.0, 0.0]), np.array([1.0, 5000.0]), np.array([1.0, 1.0]), Knobs(smoothing=0.0))
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
