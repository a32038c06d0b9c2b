"""Shares: rules that set them, bounds that they keep to, and what an evaluation may cost; checked against other means than ours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize

from shearling.config import parse
from shearling.data.mixture import UPDATES, Knobs, bounded, start, update
from shearling.data.mixture_config import LEAST_SEQUENCES, MOVING, SETTING, MixtureConfig, PowerLawConfig
from shearling.errors import ConfigError

Floats = NDArray[np.float64]
SIZES = np.array([8e9, 1e9, 1e6])
W = np.array([0.5, 0.3, 0.2])


@st.composite
def problems(draw: st.DrawFn, least: float = 1e-6) -> tuple[Floats, Floats, Floats]:
    """(weights, floors, caps) [D] that have a solution; bounds bite often, and one of two is sometimes absent."""
    n = draw(st.integers(2, 8))
    weights = np.array(draw(st.lists(st.floats(least, 1.0), min_size=n, max_size=n)))
    assume(weights.sum() > 0)
    weights /= weights.sum()
    inside = np.array(draw(st.lists(st.floats(1e-3, 1.0), min_size=n, max_size=n)))
    inside /= inside.sum()  # some shares that the bounds allow
    down, up = (np.array(draw(st.lists(st.floats(0.0, 1.0), min_size=n, max_size=n))) for _ in range(2))
    floor = inside * down if draw(st.booleans()) else np.zeros(n)
    cap = inside + (1 - inside) * up**2 if draw(st.booleans()) else np.ones(n)
    return weights, floor, np.minimum(cap, 1.0)


def divergence(p: Floats, q: Floats) -> float:
    """KL(p || q)."""
    return float(np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0.0)))


@settings(max_examples=300, deadline=None)
@given(problem=problems(least=0.0))
def test_shares_keep_to_their_bounds_and_sum_to_one(problem: tuple[Floats, Floats, Floats]) -> None:
    weights, floor, cap = problem
    before = weights.copy()
    found = bounded(weights, floor, cap)
    assert np.array_equal(weights, before)
    assert found.sum() == pytest.approx(1.0, abs=1e-12)
    assert (found >= floor - 1e-12).all() and (found <= cap + 1e-12).all()
    assert bounded(found, floor - 1e-12, cap + 1e-12) is found, "what is within the bounds stays, bit by bit"


@settings(max_examples=300, deadline=None)
@given(problem=problems())
def test_bounded_shares_are_one_factor_and_clipped(problem: tuple[Floats, Floats, Floats]) -> None:
    """The conditions of optimality, with the factor found by bisection."""
    weights, floor, cap = problem

    def excess(log_factor: float) -> float:
        return float(np.clip(math.exp(log_factor) * weights, floor, cap).sum()) - 1.0

    assume(excess(-60) < 0 < excess(60))
    factor = math.exp(brentq(excess, -60, 60, xtol=1e-14))
    assert bounded(weights, floor, cap) == pytest.approx(np.clip(factor * weights, floor, cap), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(problem=problems(least=0.02), forward=st.booleans())
def test_bounded_shares_are_the_closest_that_a_minimiser_finds(problem: tuple[Floats, Floats, Floats], forward: bool) -> None:
    """scipy's constrained minimiser, of either divergence, does no better; and it comes to the same shares."""
    weights, floor, cap = problem
    floor, cap = np.maximum(floor, 1e-6), np.minimum(cap + 0.01, 1.0)
    assume(floor.sum() < 1 and (floor < cap).all())

    def distance(shares: Floats) -> float:
        return divergence(shares, weights) if forward else divergence(weights, shares)

    begin = np.clip(np.full(len(weights), 1 / len(weights)), floor, cap)
    best = minimize(
        distance,
        begin,
        method="SLSQP",
        bounds=list(zip(floor, cap, strict=True)),
        constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1.0},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assume(best.success and abs(best.x.sum() - 1) < 1e-9)
    found = bounded(weights, floor, cap)
    assert distance(found) <= distance(best.x) + 1e-8
    assert found == pytest.approx(best.x, abs=2e-3)


@settings(max_examples=100, deadline=None)
@given(problem=problems(least=0.0), seed=st.integers(0, 99))
def test_bounds_know_no_order(problem: tuple[Floats, Floats, Floats], seed: int) -> None:
    weights, floor, cap = problem
    order = np.random.default_rng(seed).permutation(len(weights))
    assert bounded(weights[order], floor[order], cap[order]) == pytest.approx(bounded(weights, floor, cap)[order], abs=1e-12)


def test_bounds_by_hand() -> None:
    # 0.5 is cut to 0.3; the 0.7 left over go to 0.3 and 0.2 as 3 : 2.
    assert bounded(W, cap=[0.3, 1, 1]) == pytest.approx([0.3, 0.42, 0.28], abs=1e-15)
    # The cap of the first makes the second overrun its own.
    assert bounded(W, cap=[0.3, 0.4, 1]) == pytest.approx([0.3, 0.4, 0.3], abs=1e-15)
    # 0.2 is raised to 0.36; the 0.64 left over go to 0.5 and 0.3 as 5 : 3.
    assert bounded(W, floor=[0, 0, 0.36]) == pytest.approx([0.4, 0.24, 0.36], abs=1e-15)
    assert bounded(W) is W and bounded(W, [0.2] * 3, [0.5] * 3) is W
    assert bounded(W, [1 / 3] * 3).tolist() == pytest.approx([1 / 3] * 3, abs=1e-15)
    assert bounded(W, cap=[1 / 3] * 3).tolist() == pytest.approx([1 / 3] * 3, abs=1e-15)
    assert bounded(np.full(10, 0.1), [0.1] * 10).sum() == pytest.approx(1, abs=1e-15)


def test_a_dead_domain_gets_its_floor_and_what_no_other_may_take() -> None:
    dead = np.array([0.75, 0.25, 0.0, 0.0])
    assert bounded(dead, [0, 0, 0.2, 0]) == pytest.approx([0.6, 0.2, 0.2, 0.0], abs=1e-15)
    assert bounded(dead, cap=[0.3, 0.3, 1, 1]) == pytest.approx([0.3, 0.3, 0.2, 0.2], abs=1e-15)
    assert bounded(np.array([1.0, 1e-320, 0.0]), cap=[0.5, 1, 1]) == pytest.approx([0.5, 0.5, 0.0], abs=1e-12)


losses = st.lists(st.floats(0.1, 12), min_size=3, max_size=3).map(np.array)


@settings(max_examples=100, deadline=None)
@given(found=losses, reference=losses, constant=st.floats(-5, 5), rule=st.sampled_from(sorted(UPDATES)))
def test_what_a_constant_on_all_losses_does(found: Floats, reference: Floats, constant: float, rule: str) -> None:
    """`unclipped` does not see it; `paper` does not where every domain stays above its reference; the others never look."""
    knobs = Knobs(tokens_D=SIZES, temperature=2.0)
    if rule == "paper":
        reference = np.minimum(found, found + constant) - reference
    before, after = (update(rule, W, values, reference, knobs) for values in (found, found + constant))
    assert after == pytest.approx(before, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(found=losses, reference=losses, rule=st.sampled_from(sorted(UPDATES)), floor=st.floats(0, 0.3), cap=st.floats(0.4, 1))
def test_updates_know_no_order_and_keep_to_bounds(found: Floats, reference: Floats, rule: str, floor: float, cap: float) -> None:
    def after(order: Any) -> Floats:
        knobs = Knobs(tokens_D=SIZES[order], temperature=3.0)
        return update(rule, W[order], found[order], reference[order], knobs, floor=[floor] * 3, cap=[cap] * 3)

    order = np.array([2, 0, 1])
    assert after(order) == pytest.approx(after(slice(None))[order], abs=1e-12)
    assert (after(order) >= floor - 1e-12).all() and (after(order) <= cap + 1e-12).all()
    if rule not in MOVING:
        first = start(rule, W, Knobs(tokens_D=SIZES, temperature=3.0), floor=[floor] * 3, cap=[cap] * 3)
        again = update(rule, first, found, reference, Knobs(tokens_D=SIZES, temperature=3.0), floor=[floor] * 3, cap=[cap] * 3)
        assert again == pytest.approx(first, abs=1e-15), "it never changes the shares"


def test_rules_that_set_the_shares_by_hand() -> None:
    assert start("stratified", W).tolist() == [1 / 3] * 3
    # 8e9, 1e9, 1e6: cube roots 2000, 1000, 100
    assert start("temperature", W, Knobs(temperature=3.0, tokens_D=SIZES)) == pytest.approx(np.array([2000, 1000, 100]) / 3100, abs=1e-12)
    assert start("temperature", W, Knobs(tokens_D=SIZES)) == pytest.approx(SIZES / SIZES.sum(), abs=1e-15)
    even = start("temperature", W, Knobs(temperature=1e9, tokens_D=SIZES))
    assert even == pytest.approx([1 / 3] * 3, abs=1e-6)
    for rule in set(UPDATES) - SETTING:
        assert start(rule, W, Knobs(tokens_D=SIZES)) is W
    assert start("paper", W, cap=[0.3, 1, 1]) == pytest.approx([0.3, 0.42, 0.28], abs=1e-15)


@settings(max_examples=100, deadline=None)
@given(low=st.floats(1, 20), more=st.floats(0, 20))
def test_a_higher_temperature_is_more_even(low: float, more: float) -> None:
    cold, warm = (start("temperature", W, Knobs(temperature=value, tokens_D=SIZES)) for value in (low, low + more))
    assert warm.max() <= cold.max() + 1e-12 and warm.min() >= cold.min() - 1e-12
    assert (np.argsort(warm) == np.argsort(cold)).all()


DOMAINS = ("web", "code", "wiki")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"floor": 0.4}, ("sum to 1.2", "3 domains")),
        ({"floor": {"web": 0.7, "code": 0.31}}, ("sum to 1.01",)),
        ({"cap": 0.3}, ("mixture.cap", "sum to 0.9")),
        ({"cap": {"web": 0.2}, "floor": {"web": 0.3}}, ("mixture.floor of web (0.3) is above its cap (0.2)",)),
        ({"floor": 0.3, "cap": {"code": 0.2}}, ("code (0.3)", "cap (0.2)")),
        ({"floor": {"books": 0.1}}, ("mixture.floor names books", "code, web, wiki")),
        ({"cap": {"books": 0.1}, "floor": 0.5}, ("mixture.cap names books", "sum to 1.5")),
    ],
)
def test_bounds_that_no_shares_meet_are_refused(values: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as refused:
        parse(MixtureConfig, values).bounds(DOMAINS)
    for word in words:
        assert word in str(refused.value)


def test_bounds_of_a_recipe() -> None:
    assert parse(MixtureConfig, {}).bounds(DOMAINS) == ([0.0] * 3, [1.0] * 3)
    assert parse(MixtureConfig, {"floor": 0.1, "cap": {"code": 0.2}}).bounds(DOMAINS) == ([0.1] * 3, [1.0, 0.2, 1.0])
    tenth = parse(MixtureConfig, {"floor": 0.1, "cap": 0.1})
    assert tenth.bounds([str(i) for i in range(10)]) == ([0.1] * 10, [0.1] * 10), "ten tenths are one"
    assert bounded(np.arange(1, 11) / 55, *tenth.bounds([str(i) for i in range(10)])) == pytest.approx([0.1] * 10, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"floor": -0.1}, "floor", "from 0 to 1"),
        ({"floor": 1.5}, "floor", "from 0 to 1"),
        ({"floor": True}, "floor", "from 0 to 1"),
        ({"floor": {"web": "a"}}, "floor", "from 0 to 1"),
        ({"floor": {}}, "floor", "from 0 to 1"),
        ({"floor": 10**400}, "floor", "from 0 to 1"),
        ({"cap": 0.0}, "cap", "above 0"),
        ({"cap": {"web": float("nan")}}, "cap", "above 0"),
        ({"temperature": 0.9}, "temperature", "greater than or equal to 1"),
        ({"update": "stratified", "start": "runs/other"}, "recipe", "leave start (runs/other) out"),
        ({"start": ""}, "start", "at least 1 character"),
        ({"draw": "random"}, "draw", "low-discrepancy"),
        ({"evaluation_share": 0.0}, "evaluation_share", "greater than 0"),
        ({"evaluation_share": 1.0}, "evaluation_share", "less than or equal to 0.9"),
        ({"reference": {"power_law": "p.csv", "sizes": 3}}, "reference", "sizes"),
        ({"reference": {"power_law": "p.csv", "parameters": -1}}, "reference", "parameters"),
        ({"reference": {"power_law": ""}}, "reference", "power_law"),
        ({"reference": {"power_law": True}}, "reference", "above 0, for every domain"),
        ({"reference": {"web": 10**400}}, "reference", "above 0, for every domain"),
    ],
)
def test_what_a_mixture_may_not_be(values: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(MixtureConfig, values, "mixture")
    (problem,) = refused.value.problems
    assert problem.field == field and words in problem.remedy, str(refused.value)


def test_a_power_law_and_a_domain_of_that_name_are_told_apart() -> None:
    law = parse(MixtureConfig, {"reference": {"power_law": "points.csv", "parameters": 1.3e9}})
    assert law.reference == PowerLawConfig(power_law="points.csv", parameters=1.3e9)
    assert parse(MixtureConfig, law.model_dump(mode="json")) == law
    assert parse(MixtureConfig, {"reference": {"power_law": 2.0, "web": 3.0}}).reference == {"power_law": 2.0, "web": 3.0}
    for update_ in sorted({"static"} | SETTING):
        assert parse(MixtureConfig, {"update": update_, "reference": None}).reference is None


@settings(max_examples=200, deadline=None)
@given(
    share=st.floats(0.01, 0.9), steps=st.integers(1, 5000), batch=st.integers(1, 300), every=st.integers(1, 500), domains=st.integers(1, 20)
)
def test_the_budget_of_evaluations_is_kept_and_used(share: float, steps: int, batch: int, every: int, domains: int) -> None:
    mixture = parse(MixtureConfig, {"evaluation_share": share})
    inside = len([step for step in range(1, steps) if step % every == 0])

    def part(sequences: int) -> float:
        evaluated = inside * sequences * domains
        return evaluated / (evaluated + steps * batch)

    try:
        found = mixture.update_sequences(steps, batch, every, domains)
    except ValueError as refused:
        assert "evaluate less often" in str(refused) and part(LEAST_SEQUENCES) > share * (1 - 1e-6)
        return
    assert (found is None) == (inside == 0)
    if found is not None:
        assert part(found) <= share * (1 + 1e-6) and part(found + 1) > share * (1 - 1e-6)


def test_without_a_budget_all_sequences_are_used() -> None:
    assert parse(MixtureConfig, {}).update_sequences(3200, 32, 50, 7) is None
    # The paper's stages with a twentieth: 3,200 steps of 32 and 63 evaluations; 48,000 of 256 and 119.
    budget = parse(MixtureConfig, {"evaluation_share": 0.05})
    assert budget.update_sequences(3200, 32, 50, 7) == 12 and budget.update_sequences(48000, 256, 400, 7) == 776
