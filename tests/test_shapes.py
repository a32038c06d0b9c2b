"""Shapes: what can be cut and what cannot, the nearest that can, and what transformers accepts."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from models import FAMILIES, tiny_config
from shearling.arch.families import Anatomy, anatomy_of
from shearling.errors import ShapeError
from shearling.shapes import SIZES, Target, find_problems, nearest_feasible, shape_of, target_anatomy, target_config

FIELDS = SIZES


def anatomy(family: str, **sizes: Any) -> Anatomy:
    return anatomy_of(tiny_config(family, **sizes).to_dict())


targets = st.builds(
    Target,
    num_hidden_layers=st.none() | st.integers(-1, 5),
    hidden_size=st.none() | st.integers(0, 60),
    num_attention_heads=st.none() | st.integers(0, 8),
    num_key_value_heads=st.none() | st.integers(0, 4),
    intermediate_size=st.none() | st.integers(0, 50),
)


@settings(deadline=None)
@given(family=st.sampled_from(FAMILIES), target=targets)
def test_the_nearest_feasible_shape(family: str, target: Target) -> None:
    source = anatomy(family)
    nearest = nearest_feasible(source, target)
    assert not find_problems(source, Target(**{field: nearest[field] for field in FIELDS}))
    if find_problems(source, target):
        with pytest.raises(ShapeError, match="nearest"):
            target_anatomy(source, target)
    else:
        cut = shape_of(target_anatomy(source, target))
        assert nearest == {field: cut[field] for field in FIELDS}
        assert all(cut[field] == size for field, size in target.model_dump().items() if size is not None)


@settings(deadline=None)
@given(family=st.sampled_from(("llama", "mistral")), hidden=st.integers(1, 48), heads=st.integers(1, 6), groups=st.integers(1, 3))
def test_no_feasible_shape_is_nearer(family: str, hidden: int, heads: int, groups: int) -> None:
    """Against all shapes that differ in hidden size and heads, of which there are few."""
    source = anatomy(family)
    asked = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": groups}

    def cost(shape: dict[str, int]) -> float:
        return sum(abs(log(shape[field] / size)) for field, size in asked.items())

    every = (
        {"hidden_size": h, "num_attention_heads": g * q, "num_key_value_heads": g} for h in range(1, 49) for g in (1, 2, 3) for q in (1, 2)
    )
    least = min(cost(shape) for shape in every if not find_problems(source, Target(**shape)))
    assert cost(nearest_feasible(source, Target(**asked))) == pytest.approx(least)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("hidden", "heads"), [(36, 3), (37, 3), (36, 6), (40, 6)])
def test_the_rule_on_hidden_and_heads_is_that_of_transformers(family: str, hidden: int, heads: int) -> None:
    """Llama's config refuses a hidden size that its heads do not divide, even with head_dim given; the others do not."""
    config = tiny_config(family).to_dict()
    source = anatomy_of(config)
    problems = find_problems(source, Target(hidden_size=hidden, num_attention_heads=heads))
    cut = {**config, "hidden_size": hidden, "num_attention_heads": heads}
    if hidden % heads and family == "llama":
        assert [problem.field for problem in problems] == ["target.hidden_size"]
        with pytest.raises(Exception, match="multiple"):
            AutoConfig.for_model(**cut)
    else:
        assert not problems
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**cut))
        assert model(torch.arange(5)[None]).logits.shape == (1, 5, 96)


@pytest.mark.parametrize(
    ("family", "target", "fields"),
    [
        ("llama", {"hidden_size": 96}, ["target.hidden_size"]),
        ("llama", {"num_hidden_layers": 0, "intermediate_size": 41}, ["target.num_hidden_layers", "target.intermediate_size"]),
        ("mistral", {"num_attention_heads": 5, "num_key_value_heads": 2}, ["target.num_attention_heads"]),
        ("mistral", {"num_attention_heads": 6, "num_key_value_heads": 2}, ["target.num_attention_heads"]),
        ("llama", {"num_attention_heads": 4}, ["target.num_attention_heads"]),  # on the source's three groups
        ("llama", {"num_key_value_heads": 5}, ["target.num_attention_heads", "target.num_key_value_heads"]),
        ("qwen3", {}, []),
    ],
)
def test_problems_name_their_field(family: str, target: dict[str, int], fields: list[str]) -> None:
    problems = find_problems(anatomy(family), Target(**target))
    assert [problem.field for problem in problems] == fields
    assert all(problem.remedy.endswith(".") for problem in problems)


def test_one_head_count_is_enough() -> None:
    grouped, multi_head = anatomy("llama"), anatomy("llama", groups=6)
    cut = shape_of(target_anatomy(grouped, Target(num_key_value_heads=2)))
    assert (cut["num_attention_heads"], cut["num_key_value_heads"]) == (4, 2)  # each group keeps its two query heads
    cut = shape_of(target_anatomy(grouped, Target(num_attention_heads=3)))
    assert (cut["num_attention_heads"], cut["num_key_value_heads"]) == (3, 3)  # every group keeps one
    cut = shape_of(target_anatomy(multi_head, Target(num_attention_heads=4)))
    assert (cut["num_attention_heads"], cut["num_key_value_heads"]) == (4, 4)


def test_what_is_left_out_stays() -> None:
    source = anatomy("qwen2")
    assert target_anatomy(source, Target()) == source
    assert shape_of(source) == {
        **{"num_hidden_layers": 3, "hidden_size": 48, "num_key_value_heads": 3, "num_attention_heads": 6},
        **{"intermediate_size": 40, "head_dim": 8, "vocab_size": 96},
    }


LISTS: dict[str, dict[str, Any]] = {
    "qwen2": {"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"], "use_sliding_window": True},
    "qwen3": {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"], "use_sliding_window": True},
    "mistral": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
}


@pytest.mark.parametrize("family", LISTS)
def test_the_layers_lists_are_cut_with_the_layers(family: str) -> None:
    config = tiny_config(family, layers=4).to_dict() | {"sliding_window": 4, "max_window_layers": 3} | LISTS[family]
    source = anatomy_of(config)
    cut = target_config(config, source, source.with_sizes(layer=2, hidden=36, query=1, neuron=24), [1, 3])
    assert cut["layer_types"] == [config["layer_types"][1], config["layer_types"][3]]
    assert cut["max_window_layers"] == 1  # of the kept layers, 1 is among the first three
    assert {field: cut[field] for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")} == {
        **{"num_hidden_layers": 2, "hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 24}
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**cut))
    assert model.config.layer_types == cut["layer_types"]
    assert model(torch.arange(8)[None]).logits.shape == (1, 8, 96)
    assert config["num_hidden_layers"] == 4 and len(config["layer_types"]) == 4  # the source's own is not touched


def test_window_layers_without_a_list() -> None:
    """Where a config has only the count, transformers makes the same list of the cut count as the source's, cut, holds."""
    fields = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    config = {key: value for key, value in (tiny_config("qwen2", layers=4).to_dict() | fields).items() if key != "layer_types"}
    whole = AutoConfig.for_model(**config).layer_types
    assert whole == ["full_attention"] * 2 + ["sliding_attention"] * 2
    for layers in ([0, 1], [1, 2], [0, 1, 3], [2, 3]):
        source = anatomy_of(config)
        cut = target_config(config, source, source.with_sizes(layer=len(layers)), layers)
        assert AutoConfig.for_model(**cut).layer_types == [whole[layer] for layer in layers]


def test_layers_without_rotation_are_cut_and_other_lists_left() -> None:
    config = tiny_config("llama", layers=4).to_dict() | {"no_rope_layers": [1, 1, 0, 1], "eos_token_id": [1, 2, 3, 4]}
    source = anatomy_of(config)
    cut = target_config(config, source, source.with_sizes(layer=2), [2, 3])
    assert cut["no_rope_layers"] == [0, 1] and cut["eos_token_id"] == [1, 2, 3, 4]


def test_a_quantised_sources_mark_is_dropped() -> None:
    config = tiny_config("llama").to_dict() | {"quantization_config": {"bits": 4}}
    source = anatomy_of(config)
    assert "quantization_config" not in target_config(config, source, source, [0, 1, 2])
