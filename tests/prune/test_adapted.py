"""The other rules from scores to masks: a share of each block by its importance, a given shape, and scores that count fluctuation."""

from __future__ import annotations

from math import ceil, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shearling.arch.families import Anatomy
from shearling.errors import ShapeError
from shearling.prune.allocate import Masks, adapted, all_open, centred, left, steadied, to_shape
from shearling.prune.config import AllocationConfig
from shearling.prune.gates import GateSpec, gate_specs, unit_specs
from shearling.shapes import PRUNABLE
from test_allocate import HEADS_AND_NEURONS, drawn, levels, rule, seeds, source_of, subsets
from tiny_gates import same


def kept(values: Tensor, number: int) -> Tensor:
    """A mask of the largest of every vector; of equal ones the last."""
    order = torch.tensor(
        [sorted(range(len(row)), key=lambda unit: (row[unit], unit)) for row in values.reshape(-1, values.shape[-1]).tolist()]
    )
    mask = torch.zeros(order.shape).scatter_(1, order[:, order.shape[1] - number :], 1.0)
    return mask.reshape(values.shape)


def zeros() -> Tensor:
    return torch.zeros(4, dtype=torch.float64)


def trail(source: Anatomy, axes: Any, scores: dict[str, Tensor], budget: int, how: AllocationConfig) -> list[tuple[Masks, Tensor]]:
    """Masks and shares after each inner step."""
    masks, shares, found, there = all_open(source, axes), zeros(), [], False
    while not there:
        masks, there = adapted(source, masks, scores, budget, how, shares)
        found.append((masks, shares.clone()))
        assert (left(source, masks).parameters() <= budget) == there and len(found) < 1000
    return found


@given(values=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=8))
def test_importance_has_mean_0_and_reaches_1(values: list[float]) -> None:
    importance_L = centred(torch.tensor(values))
    assert abs(float(importance_L.sum())) < 1e-4 * len(values)
    if max(values) - min(values) > 1e-3:
        assert float(importance_L.abs().max()) == pytest.approx(1)
    elif len(set(values)) == 1:
        assert not importance_L.any()
    torch.testing.assert_close(centred(torch.tensor([1.0, 3.0, 2.0])), torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_without_adaptation_it_is_uniform(family: str) -> None:
    """A = 0: every block loses the same share, its own least; of a budget that a uniform shape meets, what a plain cut to it leaves."""
    source, how = source_of(family), rule(adaptation=0.0, inner_steps=16)
    scores = drawn(source, ("layer", *HEADS_AND_NEURONS), seed=1)
    shapes = [(ceil(3 * step / 16), 20 * step // 16) for step in range(15, 0, -1)]
    for last, (groups, neurons) in enumerate(shapes, start=1):
        target = source.with_sizes(group=groups, neuron=neurons)
        steps = trail(source, HEADS_AND_NEURONS, scores, target.parameters(), how)
        for number, ((masks, shares), (heads, others)) in enumerate(zip(steps, shapes, strict=False), start=1):
            assert number == last or torch.equal(shares, zeros() + number / 16)
            assert same(masks, {"group": kept(scores["group"], heads), "neuron": kept(scores["neuron"], others)})
        assert len(steps) == last
        found = steps[-1][0]
        uniform = to_shape(all_open(source, found), scores, {axis: GateSpec(axis, (), target.sizes[axis]) for axis in found}, 1.0)
        assert same(found, uniform)


def test_without_adaptation_blocks_differ_by_one_neuron_at_most() -> None:
    source = source_of("mistral")
    for budget in range(source.with_sizes(neuron=1).parameters(), source.parameters(), 97):
        scores = drawn(source, ("layer", "neuron"), budget)
        masks, _ = trail(source, ["neuron"], scores, budget, rule(adaptation=0.0))[-1]
        sizes = masks["neuron"].sum(-1)
        assert sizes.max() - sizes.min() <= 1
        assert (sizes[scores["layer"].argsort()].diff() >= 0).all()  # the least important first
        assert budget - 3 * 24 < left(source, masks).parameters() <= budget


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(("llama", "qwen3")),
    axes=st.sampled_from((["neuron"], ["group", "neuron"])),
    share=st.floats(0.35, 1),
    adaptation=st.floats(0, 0.1),
    inner=st.integers(5, 60),
    protect=st.sampled_from(((0, 0), (1, 0), (0, 1))),
    **{"seed": seeds, "number": levels},
)
def test_shares_follow_the_recurrence(
    family: str, axes: list[str], share: float, adaptation: float, inner: int, protect: tuple[int, int], seed: int, number: int
) -> None:
    """s <- clip(s + 1/K - A I, 0, 0.99); the more a block turns the stream, the less it loses; the budget is met to a neuron."""
    source, how = source_of(family), rule(adaptation=adaptation, inner_steps=inner, protect=protect)
    scores, budget = drawn(source, ("layer", *axes), seed, number), int(share * source.parameters())
    masks, shares, expected = all_open(source, axes), zeros(), [0.0] * 4
    importance = centred(scores["layer"]).tolist()
    free = range(protect[0], 4 - protect[1])
    there = False
    while not there:
        before, wanted = masks, list(expected)
        for layer in free:
            wanted[layer] = min(max(expected[layer] + 1 / inner - adaptation * importance[layer], 0.0), 0.99)
        try:
            masks, there = adapted(source, before, scores, budget, how, shares)
        except ShapeError:
            assert all(new <= old + 1e-12 for new, old in zip(wanted, expected, strict=True))
            return
        assert all((masks[axis] <= before[axis]).all() and (masks[axis].sum(-1) >= 1).all() for axis in axes)
        assert all(masks[axis][layer].all() for axis in axes for layer in {*range(4)} - {*free})
        if not there:
            assert shares.tolist() == pytest.approx(wanted, abs=1e-12)
            expected = shares.tolist()
        assert ((shares >= 0) & (shares <= 0.99)).all()
        for one in free:
            for other in free:
                if importance[one] > importance[other]:
                    assert shares[one] <= shares[other]
                    assert there or all(masks[axis][one].sum() >= masks[axis][other].sum() for axis in axes)
    anatomy = left(source, masks)
    spare = sum(int(masks["neuron"][layer].sum()) - 1 for layer in free)
    assert anatomy.parameters() <= budget
    if spare > 20 or axes == ["neuron"]:
        assert budget - anatomy.parameters() < 3 * 24 or budget >= source.parameters()


def test_what_is_met_already_stays() -> None:
    """Where the cut before went further than it had to."""
    source = source_of("llama")
    masks = all_open(source, HEADS_AND_NEURONS)
    masks["group"][1, 0] = 0.0
    shares = zeros() + 0.1
    for budget in (left(source, masks).parameters(), left(source, masks).parameters() + 1000):
        found, there = adapted(source, masks, drawn(source, ("layer", *masks), 0), budget, rule(), shares)
        assert there and same(found, masks) and torch.equal(shares, zeros() + 0.1)


def test_the_limit_is_said() -> None:
    source = source_of("llama")
    with pytest.raises(ShapeError, match="at its limit"):
        trail(source, HEADS_AND_NEURONS, drawn(source, ("layer", *HEADS_AND_NEURONS), 0), 100, rule())


@given(
    axes=subsets(*PRUNABLE),
    sizes=st.fixed_dictionaries(
        {
            "layer": st.integers(1, 4),
            "hidden": st.integers(1, 24),
            "group": st.integers(1, 3),
            "query": st.integers(1, 2),
            "neuron": st.integers(1, 20),
        }
    ),
    fractions=st.lists(st.floats(0, 1), max_size=4),
    **{"seed": seeds, "number": levels},
)
@settings(max_examples=60, deadline=None)
def test_a_shape_keeps_the_best_of_every_vector(
    axes: list[str], sizes: dict[str, int], fractions: list[float], seed: int, number: int
) -> None:
    source = source_of("qwen3")
    specs = gate_specs(source, source.with_sizes(**{axis: sizes[axis] for axis in axes}))
    scores, masks = drawn(source, specs, seed, number), all_open(source, specs)
    assert same(to_shape(masks, scores, specs, 1.0), {axis: kept(scores[axis], specs[axis].target) for axis in specs})
    for cut, fraction in enumerate([*sorted(fractions), 1.0]):  # other scores at every cut
        found = to_shape(masks, drawn(source, specs, seed + cut, number), specs, fraction)
        for axis, mask in found.items():
            size, target = mask.shape[-1], specs[axis].target
            assert (mask <= masks[axis]).all()
            assert (mask.sum(-1) == size - int((size - target) * fraction + 1e-9)).all()
        masks = found
    assert all((mask.sum(-1) == specs[axis].target).all() for axis, mask in masks.items())


def test_fluctuation_by_hand() -> None:
    """Of a block: means 2, 4, 6, and their fluctuation 1/4 (of 1 and 3), 0, 1/9 (of 4 and 8); a closed unit counts for nothing."""
    batches = [{"neuron": torch.tensor([[1.0, 4.0, 4.0, 999.0]])}, {"neuron": torch.tensor([[3.0, 4.0, 8.0, 0.0]])}]
    masks = {"neuron": torch.tensor([[1.0, 1.0, 1.0, 0.0]])}
    # fluctuations in 36ths: 9, 0, 4, mean 13/3, squared distances (14^2 + 13^2 + 1^2) / 9
    mean, fluctuation = torch.tensor([-sqrt(1.5), 0.0, sqrt(1.5)]), torch.tensor([14.0, -13.0, -1.0]) / sqrt(122)
    for weight in (0.0, 0.5, 2.0):
        torch.testing.assert_close(steadied(batches, weight, masks)["neuron"][0, :3], mean - weight * fluctuation)
    # without a mask all count; a second block has its own mean
    twice = [{"neuron": torch.cat([batch["neuron"][:, :3], 7 + 100 * batch["neuron"][:, :3]])} for batch in batches]
    found = steadied(twice, 0.5, {})["neuron"]
    torch.testing.assert_close(found[0], mean - 0.5 * fluctuation)
    torch.testing.assert_close(steadied(twice, 0.0, {})["neuron"][1], mean)


@settings(deadline=None)
@given(seed=seeds, number=st.integers(2, 5), factor=st.sampled_from((1e-6, 0.3, 5e4)))
def test_fluctuation_does_not_change_with_the_scale(seed: int, number: int, factor: float) -> None:
    """And of weight 0 it leaves the order of the mean inside a block; more of it, and what fluctuates sinks."""
    source = source_of("llama")
    batches = [drawn(source, ("hidden", "query", "neuron"), seed + batch) for batch in range(number)]
    scaled = [{axis: factor * values for axis, values in batch.items()} for batch in batches]
    for axis, values in steadied(batches, 0.3, {}).items():
        torch.testing.assert_close(steadied(scaled, 0.3, {})[axis], values, rtol=1e-4, atol=1e-5)
    for axis, values in steadied(batches, 0.0, {}).items():
        mean = torch.stack([batch[axis].double() for batch in batches]).mean(0)
        rows = zip(values.reshape(1 if values.dim() == 1 else 4, -1), mean.reshape(1 if values.dim() == 1 else 4, -1), strict=True)
        for found, plain in rows:
            assert (found[plain.argsort()].diff() >= 0).all()


def test_units_are_those_of_the_source() -> None:
    source = source_of("qwen2")
    specs = unit_specs(source, PRUNABLE)
    assert {axis: (spec.shape, spec.target) for axis, spec in specs.items()} == {
        **{"layer": ((4,), 4), "hidden": ((24,), 24), "group": ((4, 3), 3), "query": ((4, 3, 2), 2), "neuron": ((4, 20), 20)}
    }
    assert left(source, all_open(source, PRUNABLE)) == source


def test_what_masks_leave_by_hand() -> None:
    """Of blocks and of heads that are closed, nothing counts."""
    source, ones = source_of("qwen2"), all_open(source_of("qwen2"), PRUNABLE)
    ones["layer"][1] = ones["group"][0, 2] = ones["group"][2, :2] = ones["hidden"][:5] = ones["neuron"][3, 4:] = 0.0
    ones["group"][1], ones["neuron"][1] = 0.0, 0.0
    ones["query"][0, :2, 0] = ones["query"][2, 2, 1] = 0.0
    found = left(source, ones)
    assert [dict(block) for block in found.blocks] == [
        {"group": 2, "query": 1, "neuron": 20},
        {"group": 1, "query": 1, "neuron": 20},
        {"group": 3, "query": 2, "neuron": 4},
    ]
    assert found.sizes == {**source.sizes, "layer": 3, "hidden": 19, "group": 3, "query": 2, "neuron": 20}
