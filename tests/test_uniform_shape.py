"""A budget of parameters as a shape: met to a neuron, with what is given and what may be pruned; and shapes by block, there and back."""

from __future__ import annotations

from functools import cache
from math import log
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import FAMILIES, parameters_of, tiny_config
from shearling.arch.families import Anatomy, anatomy_of
from shearling.errors import ConfigError, ShapeError
from shearling.prune.methods import choose
from shearling.recipe import PruneConfig
from shearling.shapes import (
    PRUNABLE,
    SIZES,
    Target,
    anatomy_of_shape,
    budget_of,
    find_problems,
    shape_of,
    target_anatomy,
    target_config,
    uniform_shape,
)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama tied": ("llama", {"tied": True}),
    "llama multi-head": ("llama", {"groups": 6}),
    "mistral, one group": ("mistral", {"groups": 1}),
    "llama, fifty channels": ("llama", {"layers": 3, "hidden": 50, "heads": 10, "groups": 5, "neurons": 40}),
}
FIELD_OF = {
    **{"layer": "num_hidden_layers", "hidden": "hidden_size", "group": "num_key_value_heads"},
    **{"query": "num_attention_heads", "neuron": "intermediate_size"},
}


@cache
def config_of(variant: str) -> dict[str, Any]:
    family, sizes = VARIANTS[variant]
    return tiny_config(family, **{"layers": 4, "neurons": 60, **sizes}).to_dict()


def source_of(variant: str) -> Anatomy:
    return anatomy_of(config_of(variant))


subsets = st.sets(st.sampled_from(PRUNABLE), min_size=1).map(lambda chosen: tuple(axis for axis in PRUNABLE if axis in chosen))
givens = st.fixed_dictionaries(
    {},
    optional={
        "num_hidden_layers": st.integers(2, 4),
        "hidden_size": st.sampled_from((24, 36, 40, 48)),
        "num_attention_heads": st.sampled_from((3, 4, 6, 10)),
        "num_key_value_heads": st.integers(1, 3),
        "intermediate_size": st.integers(20, 60),
    },
)


@settings(max_examples=60, deadline=None)
@given(variant=st.sampled_from(sorted(VARIANTS)), axes=subsets, share=st.floats(0.2, 1), fields=st.just({}) | givens)
def test_a_budget_is_met_by_a_model_that_loads(variant: str, axes: tuple[str, ...], share: float, fields: dict[str, int]) -> None:
    source, config = source_of(variant), config_of(variant)
    target = Target(parameters=share, **fields)
    budget = budget_of(source, target)
    assert budget == int(share * source.parameters())
    try:
        found = uniform_shape(source, target, axes)
    except ShapeError as refused:
        named = {problem.field for problem in refused.problems}
        assert named and named <= {"target.parameters", *(f"target.{field}" for field in SIZES)}
        assert all(problem.remedy.endswith(".") for problem in refused.problems)
        if not fields:  # the sizes of the source can be had
            assert named == {"target.parameters"}
        return
    assert target_anatomy(source, target, axes) == found and not found.blocks
    shape, have = shape_of(found), shape_of(source)
    assert all(shape[field] == size for field, size in fields.items())
    assert all(shape[field] <= have[field] for field in have)
    for axis in PRUNABLE:
        assert axis in axes or found.sizes[axis] == source.sizes[axis], axis
    assert not find_problems(source, Target(**{field: shape[field] for field in SIZES}), axes)
    assert budget is not None and found.parameters() <= budget
    if "neuron" in axes and "intermediate_size" not in fields:
        assert found.with_sizes(neuron=found.sizes["neuron"] + 1).parameters() > budget
    layers = list(range(found.sizes["layer"]))
    assert parameters_of(target_config(config, source, found, layers)) == found.parameters()


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if "fifty" not in variant])
def test_sizes_go_down_alike(variant: str) -> None:
    """A smaller model has as much of its channels as of its neurons, but for a Llama's multiples of heads; any third or more is met."""
    source, apart = source_of(variant), 1.5 if "llama" in variant else 1.1
    for percent in range(33, 101, 11):
        found = uniform_shape(source, Target(parameters=percent / 100), ("hidden", "group", "neuron"))
        shares = [found.sizes[axis] / source.sizes[axis] for axis in ("hidden", "neuron")]
        assert abs(log(shares[0] / shares[1])) < log(apart), (percent, shares)
    assert uniform_shape(source, Target(parameters=source.parameters())) == source
    assert uniform_shape(source, Target(parameters=1.0)) == source


def test_query_heads_go_before_their_groups() -> None:
    source = source_of("qwen2")
    found = uniform_shape(source, Target(parameters=0.9), ("group", "query"))
    assert (found.sizes["group"], found.sizes["query"]) == (3, 1)
    assert uniform_shape(source, Target(parameters=0.6), ("group", "query", "neuron")).sizes["group"] == 3


def test_without_neurons_it_comes_as_near_as_it_can() -> None:
    source = source_of("mistral")
    for axis in ("layer", "hidden", "group"):
        for percent in range(60, 100, 8):
            budget = source.parameters() * percent // 100
            by_hand = [source.with_sizes(**{axis: size}).parameters() for size in range(1, source.sizes[axis] + 1)]
            fitting = [parameters for parameters in by_hand if parameters <= budget]
            if fitting:
                assert uniform_shape(source, Target(parameters=budget), (axis,)).parameters() == max(fitting)
            else:
                with pytest.raises(ShapeError, match=f"brought to {min(by_hand):,}: ask for more"):
                    uniform_shape(source, Target(parameters=budget), (axis,))


def test_channels_suit_the_heads_that_are_given() -> None:
    """Five heads do not divide the source's 48 channels: those are pruned, and go to a multiple of five."""
    source = source_of("llama multi-head")
    for percent in range(50, 90, 10):
        found = uniform_shape(source, Target(parameters=percent / 100, num_attention_heads=5))
        assert found.sizes["group"] == 5 and found.sizes["hidden"] % 5 == 0
    with pytest.raises(ShapeError, match=r"target\.hidden_size: found 48\. .* multiple of num_attention_heads \(5\)"):
        uniform_shape(source, Target(parameters=0.7, num_attention_heads=5), ("group", "neuron"))


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "too little": ({"parameters": 10}, PRUNABLE, r"target\.parameters: found 10\."),
    "too much": ({"parameters": 10**9}, PRUNABLE, r"target\.parameters: found 1,000,000,000\. The source has"),
    "what the axes leave": ({"parameters": 0.2}, ("neuron",), r"By pruning neuron it can be brought to .*: ask for more, or add axes"),
    "what is given leaves too little": ({"parameters": 0.9, "num_hidden_layers": 1}, PRUNABLE, "no nearer from below: ask for that"),
    "a size of another axis": ({"parameters": 0.5, "hidden_size": 24}, ("neuron",), r"target\.hidden_size: found 24"),
    "more than there is": ({"parameters": 0.5, "hidden_size": 60}, PRUNABLE, r"target\.hidden_size: found 60"),
    "heads": ({"parameters": 0.5, "num_attention_heads": 4, "num_key_value_heads": 3}, PRUNABLE, "num_attention_heads: found 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_met_is_named(case: str) -> None:
    fields, axes, words = REFUSED[case]
    with pytest.raises(ShapeError, match=words):
        uniform_shape(source_of("qwen3"), Target(**fields), axes)


def test_what_is_offered_instead_can_be_had() -> None:
    """Fifty channels suit five groups of a Llama, or one, and nothing between: some budgets are met by neither."""
    source, axes, seen = source_of("llama, fifty channels"), ("layer", "group", "neuron"), set()
    for percent in range(12, 100, 8):
        try:
            uniform_shape(source, Target(parameters=percent / 100), axes)
        except ShapeError as refused:
            remedy = refused.problems[0].remedy
            kind = next(words for words in ("brought to ", "comes to ") if words in remedy)
            offered = int(remedy.partition(kind)[2].partition(" ")[0].strip(":").replace(",", ""))
            assert (offered > int(percent / 100 * source.parameters())) == (kind == "brought to ")
            assert uniform_shape(source, Target(parameters=offered), axes).parameters() == offered
            seen.add(kind)
    assert seen == {"brought to ", "comes to "}


widths = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 60))


@settings(max_examples=50, deadline=None)
@given(variant=st.sampled_from(sorted(VARIANTS)), sizes=st.lists(widths, min_size=1, max_size=4), hidden=st.integers(1, 40))
def test_shapes_by_block_go_there_and_back(variant: str, sizes: list[tuple[int, int, int]], hidden: int) -> None:
    """Through a shape, and through a config, of which a real model has as many parameters."""
    source, config = source_of(variant), config_of(variant)
    hidden = hidden if len(set(sizes)) > 1 else 12  # where blocks are alike, the stock Llama wants a multiple of the heads
    blocks = [{"group": group, "query": query, "neuron": neurons} for group, query, neurons in sizes]
    anatomy = source.with_sizes(hidden=hidden).with_blocks(blocks)
    shape = shape_of(anatomy)
    assert anatomy_of_shape(source, shape) == anatomy
    assert isinstance(shape["intermediate_size"], list) == bool(anatomy.blocks) == (len(set(sizes)) > 1)
    values = target_config(config, source, anatomy, list(range(len(blocks))))
    assert anatomy_of(values) == anatomy
    assert values["model_type"] == ("sheared" if anatomy.blocks else config["model_type"])
    assert anatomy.parameters() == parameters_of(values)


def chosen(source: Anatomy, target: dict[str, Any], **prune: Any) -> Any:
    values = {"steps": 4, "batch_size": 8, "warmup": 0.0, "evaluate_every": 2, **prune}
    return choose(PruneConfig(**values), source=source, asked=Target(**target))


def test_a_choice_has_its_budget_and_its_units() -> None:
    source = source_of("llama")
    ranked = chosen(source, {"parameters": 0.7}, method="llm-pruner-global")
    assert ranked.finds_shape and not ranked.uniform and ranked.budget == int(0.7 * source.parameters())
    assert {axis: spec.target for axis, spec in ranked.specs.items()} == {"group": 3, "neuron": 60}  # all are there to begin with
    assert ranked.allocation.compare == "raw" and ranked.allocation.fluctuation == 0.0
    asked = chosen(source, {"parameters": 0.9}, method="saap", allocation={"compare": "z", "protect": [1, 1]}, axes=["neuron"])
    assert asked.allocation.compare == "z" and asked.allocation.fluctuation == 0.1 and list(asked.specs) == ["neuron"]
    alike = chosen(source, {"parameters": 0.7}, method="taylor")
    shape = uniform_shape(source, Target(parameters=0.7))
    assert not alike.finds_shape and alike.uniform and alike.budget == int(0.7 * source.parameters())
    assert {axis: spec.target for axis, spec in alike.specs.items()} == {
        axis: shape.sizes[axis] for axis in PRUNABLE if shape.sizes[axis] != source.sizes[axis]
    }
    sizes = chosen(source, {"intermediate_size": 30}, method="taylor")
    assert sizes.budget == source.with_sizes(neuron=30).parameters() and set(sizes.specs) == {"neuron"}


def test_blocks_that_stay_alike_are_not_protected() -> None:
    source, protected = source_of("llama"), {"allocation": {"protect": [1, 0]}}
    with pytest.raises(ConfigError, match=r"prune\.allocation\.protect"):
        chosen(source, {"parameters": 0.7}, method="llm-pruner-global", shape="uniform", **protected)
    with pytest.raises(ConfigError, match=r"prune\.allocation\.protect"):
        chosen(source, {"parameters": 0.7}, method="efficientllm", **protected)
    blocks = chosen(source, {"parameters": 0.7}, method="llm-pruner-global", shape="uniform", axes=["layer", "hidden"], **protected)
    assert blocks.uniform and set(blocks.specs) == {"layer", "hidden"}
    assert not chosen(source, {"parameters": 0.7}, method="llm-pruner-global", **protected).uniform


def test_a_size_that_is_null_is_left_out() -> None:
    """As in the recipe that a run writes down, which has every field: it gives the shape that the run's own recipe gave."""
    source = anatomy_of(tiny_config("llama", heads=12, groups=3, layers=6, hidden=96, neurons=160).to_dict())
    bare = Target(parameters=0.5)
    whole = Target(**bare.model_dump())
    axes = ("layer", "hidden", "group", "query", "neuron")
    budget = budget_of(source, bare)
    assert uniform_shape(source, bare.model_copy(update={"parameters": budget}), axes) == uniform_shape(
        source, whole.model_copy(update={"parameters": budget}), axes
    )
