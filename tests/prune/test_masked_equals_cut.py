"""Masked logits equal cut logits, for every family, with random masks on every axis at once; where not, the tensor is named."""

from __future__ import annotations

import re
from dataclasses import replace
from math import inf
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from models import FAMILIES, tiny_config, tiny_model
from shearling.arch.axes import parse_pattern
from shearling.arch.families import Anatomy, anatomy_of
from shearling.errors import NumericsError, ShapeError
from shearling.export import publish_model
from shearling.io.tensors import MemoryReader, ShardWriter
from shearling.prune.plan import PrunePlan, plan_from_masks
from shearling.prune.transform import transform
from shearling.prune.verify import (
    TOLERANCE,
    TOLERANCE_FLOAT64,
    Difference,
    blame,
    compare_in_float64,
    compare_logits,
    masked_logits,
    require_equal,
    worst_tensor,
)
from shearling.shapes import SIZES, Target, find_problems, shape_of, target_anatomy, target_config
from tiny_gates import random_masks

FULL = Target(num_hidden_layers=2, hidden_size=36, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24)
VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILIES},
    **{f"{family} tied": {"family": family, "tied": True} for family in FAMILIES},
    "llama multi-head": {"family": "llama", "groups": 6},
    "mistral multi-query": {"family": "mistral", "groups": 1},
}


def cut_model(model: Any, config: dict[str, Any], source: Anatomy, target: Anatomy, masks: dict[str, torch.Tensor]) -> Any:
    """The cut model, made in memory by the plan and the transform."""
    plan = plan_from_masks(source, target, masks)
    state = dict(transform(plan, source, target, MemoryReader(model.state_dict())))
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == target.shapes()
    return model_of(state, target_config(config, source, target, plan.layers), model.dtype)


def model_of(state: dict[str, torch.Tensor], values: dict[str, Any], dtype: torch.dtype) -> Any:
    """A stock model of this config that holds exactly these tensors."""
    small = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).to(dtype)
    missing, unexpected = small.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    small.tie_weights()
    assert {name: tuple(p.shape) for name, p in small.named_parameters()} == {n: tuple(t.shape) for n, t in state.items()}
    return small.eval()


def wholly_double(model: Any) -> Any:
    """The model, of which the norms compute in fp64: the stock ones round their input to fp32 whatever its dtype, about 1e-7."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward, module)
    return model


def difference(variant: dict[str, Any], asked: Target, seed: int, dtype: torch.dtype) -> float:
    """Relative difference between masked and cut logits of a tiny model."""
    sizes = {key: value for key, value in variant.items() if key != "family"}
    model = tiny_model(variant["family"], seed=seed, **sizes).to(dtype)
    config = tiny_config(variant["family"], **sizes).to_dict()
    source = anatomy_of(config)
    target = target_anatomy(source, asked)
    ids = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(seed))
    masks = {axis: mask.to(dtype) for axis, mask in random_masks(source, target, seed).items()}
    cut = cut_model(model, config, source, target, masks)
    if dtype == torch.float64:
        wholly_double(model)
        wholly_double(cut)
    return compare_logits(cut, masked_logits(model, source, masks, ids), ids).relative_difference


def adapted(variant: dict[str, Any]) -> Target:
    groups = variant.get("groups", 3)
    kept = min(groups, 2)
    query = 6 // groups
    return FULL.model_copy(update={"num_key_value_heads": kept, "num_attention_heads": kept * max(1, query - 1)})


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_axis_at_once(name: str, dtype: torch.dtype, tolerance: float) -> None:
    for seed in range(3):
        assert difference(VARIANTS[name], adapted(VARIANTS[name]), seed, dtype) <= tolerance


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    tied=st.booleans(),
    layers=st.integers(1, 3),
    groups=st.integers(1, 3),
    query=st.integers(1, 2),
    multiple=st.integers(1, 8),
    neurons=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_any_feasible_shape(family: str, tied: bool, layers: int, groups: int, query: int, multiple: int, neurons: int, seed: int) -> None:
    heads = groups * query
    asked = Target(
        num_hidden_layers=layers,
        hidden_size=min(48 // heads * heads, heads * multiple),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=neurons,
    )
    # In fp64, since the norm of a stream of one or two channels is too ill-conditioned for a bound in fp32.
    assert difference({"family": family, "tied": tied}, asked, seed, torch.float64) <= 1e-10


# Mostly what can be cut, and on every field some that cannot.
WILD = st.builds(
    Target,
    num_hidden_layers=st.none() | st.integers(1, 3) | st.integers(-2, 5),
    hidden_size=st.none() | st.sampled_from((6, 12, 24, 36, 48)) | st.integers(-1, 60),
    num_attention_heads=st.none() | st.integers(1, 6) | st.integers(-1, 9),
    num_key_value_heads=st.none() | st.integers(1, 3) | st.integers(-1, 7),
    intermediate_size=st.none() | st.integers(1, 40) | st.integers(-1, 10**9),
)


@settings(max_examples=60, deadline=None)
@given(family=st.sampled_from(FAMILIES), tied=st.booleans(), asked=WILD, seed=st.integers(0, 1000))
def test_any_target_is_cut_exactly_or_refused_with_the_nearest(family: str, tied: bool, asked: Target, seed: int) -> None:
    """Feasible: the result has this very shape, and computes what the gated model does. Else: `ShapeError`, and a shape that is."""
    source = anatomy_of(tiny_config(family, tied=tied).to_dict())
    try:
        target = target_anatomy(source, asked)
    except ShapeError as error:
        assert error.exit_code == 2 and error.problems and find_problems(source, asked)
        nearest = {field: int(size) for field, size in re.findall(r"(\w+)=(\d+)", error.headline.partition("nearest")[2])}
        assert set(nearest) == set(SIZES)
        asked = Target(**nearest)
        target = target_anatomy(source, asked)
    given = {field: size for field, size in asked.model_dump().items() if size is not None}
    assert given.items() <= shape_of(target).items()
    assert difference({"family": family, "tied": tied}, asked, seed, torch.float64) <= 1e-10  # and its shapes are the target's


def test_a_wrong_index_is_seen() -> None:
    """The check can fail: a plan with one other channel gives other logits."""
    model = tiny_model("qwen3")
    config = tiny_config("qwen3").to_dict()
    source = anatomy_of(config)
    target = target_anatomy(source, FULL)
    ids = torch.arange(16).reshape(1, 16)
    masks = random_masks(source, target, 0)
    expected = masked_logits(model, source, masks, ids)
    wrong = {**masks, "hidden": masks["hidden"].roll(1)}
    assert compare_logits(cut_model(model, config, source, target, wrong), expected, ids).relative_difference > 1e-2


class Case:
    """A tiny model, masks on every axis, its plan and its cut tensors."""

    def __init__(self, family: str, dtype: torch.dtype = torch.float32, tied: bool = False) -> None:
        self.model, self.config = tiny_model(family, tied=tied).to(dtype), tiny_config(family, tied=tied).to_dict()
        self.source = anatomy_of(self.config)
        self.target = target_anatomy(self.source, FULL)
        self.masks = {axis: mask.to(dtype) for axis, mask in random_masks(self.source, self.target, 0).items()}
        self.reader, self.ids = MemoryReader(self.model.state_dict()), torch.arange(32).reshape(2, 16)
        self.plan = plan_from_masks(self.source, self.target, self.masks)
        self.good = self.cut(self.plan)
        self.values = target_config(self.config, self.source, self.target, self.plan.layers)
        if dtype == torch.float64:
            wholly_double(self.model)
        self.expected = masked_logits(self.model, self.source, self.masks, self.ids)

    def cut(self, plan: PrunePlan) -> dict[str, torch.Tensor]:
        return dict(transform(plan, self.source, self.target, self.reader))

    def difference(self, state: dict[str, torch.Tensor]) -> Difference:
        """Of a stock model with these tensors from the gated one."""
        small = model_of(state, self.values, self.model.dtype)
        if self.model.dtype == torch.float64:
            wholly_double(small)
        return compare_logits(small, self.expected, self.ids)

    def worst(self, state: dict[str, torch.Tensor]) -> Any:
        return worst_tensor(self.masks, self.source, self.target, self.reader, state)

    def bent(self, axis: str, layer: int | None) -> PrunePlan:
        """The plan with one index of one axis (in one layer) that is not the masks'."""

        def other(kept: list[int]) -> list[int]:
            dropped = [index for index in range(self.source.sizes[axis]) if index not in kept]
            return sorted([*kept[1:], dropped[0]])

        keep = {name: dict(kept) if isinstance(kept, dict) else kept for name, kept in self.plan.keep.items()}
        if axis == "hidden":
            keep["hidden"] = other(keep["hidden"])
        elif axis == "query":
            keep["query"][layer] = [other(keep["query"][layer][0]), *keep["query"][layer][1:]]
        else:
            keep[axis][layer] = other(keep[axis][layer])
        return replace(self.plan, keep=keep)

    def wrong_cuts(self) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
        """(tensor, axis) -> all tensors, of which this one is cut with one wrong index; every tensor, every axis it is cut on."""
        cuts: dict[tuple[str, int | None], dict[str, torch.Tensor]] = {}
        found = {}
        for name, pattern in self.target.tensors().items():
            number = re.search(r"layers\.(\d+)\.", name)
            layer = self.plan.layers[int(number[1])] if number else None
            for axis in {axis for dimension in parse_pattern(pattern) for axis in dimension} & {"hidden", "group", "query", "neuron"}:
                where = (axis, None if axis == "hidden" else layer)
                if where not in cuts:
                    cuts[where] = self.cut(self.bent(*where))
                found[name, axis] = {**self.good, name: cuts[where][name]}
        return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensor_with_a_wrong_index_is_named(family: str, tied: bool) -> None:
    """The cut by boolean masks agrees with the plan's in every tensor, and finds the one that the transform got wrong."""
    case = Case(family, tied=tied)
    assert case.worst(case.good) is None
    wrong = case.wrong_cuts()
    assert {name for name, _ in wrong} == {name for name in case.good if "q_norm" not in name and "k_norm" not in name}
    for (name, _axis), state in wrong.items():
        worst = case.worst(state)
        assert worst.name == name and worst.max_abs_difference == float((state[name].double() - case.good[name].double()).abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_one_wrong_index_is_far_beyond_the_tolerance(dtype: torch.dtype, tolerance: float) -> None:
    """In any tensor, on any axis; and without one the tolerance is kept."""
    case = Case("qwen2", dtype)
    require_equal(case.difference(case.good), tolerance)
    for (name, axis), state in case.wrong_cuts().items():
        assert case.difference(state).relative_difference > max(10 * tolerance, TOLERANCE), (name, axis)


def test_a_layer_of_another_place_is_named() -> None:
    case = Case("llama")
    dropped = next(layer for layer in range(3) if layer not in case.plan.layers)
    keep = {axis: {**kept, dropped: kept[case.plan.layers[1]]} if isinstance(kept, dict) else kept for axis, kept in case.plan.keep.items()}
    for axis in ("group", "query", "neuron"):
        del keep[axis][case.plan.layers[1]]
    layers = sorted([case.plan.layers[0], dropped])
    worst = case.worst(case.cut(replace(case.plan, keep={**keep, "layer": layers})))
    assert worst is not None and worst.name.startswith("model.layers.") and 0 < worst.max_abs_difference < inf


def test_what_else_a_tensor_can_be() -> None:
    case = Case("mistral")
    name = "model.layers.1.mlp.up_proj.weight"

    def worst(change: torch.Tensor | None, **masks: torch.Tensor) -> tuple[str, float, str]:
        state = {**case.good, name: change} if change is not None else {n: t for n, t in case.good.items() if n != name}
        found = worst_tensor({**case.masks, **masks}, case.source, case.target, case.reader, state)
        assert found is not None
        return found.name, found.max_abs_difference, found.found

    good = case.good[name]
    assert worst(None) == (name, inf, "it is missing")
    assert worst(good[:-1]) == (name, inf, f"it has shape {(good.shape[0] - 1, 36)} where {tuple(good.shape)} is due")
    assert worst(torch.full_like(good, torch.nan))[:2] == (name, inf)
    changed = good.clone()
    changed[3, 4] += 0.5
    assert worst(changed) == (name, pytest.approx(0.5, abs=1e-6), "0.116% of its values differ, by up to 0.5")
    assert "masks leave only 1 layers" in worst(good, layer=torch.tensor([1.0, 0, 0]))[2]
    assert case.worst({n: t.bfloat16() for n, t in case.good.items()}) is None  # cast, as an export may be
    open_ = worst_tensor({}, case.source, case.source, case.reader, case.model.state_dict())
    assert open_ is None


def test_a_wrong_cut_is_not_published_and_its_tensor_is_named(tmp_path: Path) -> None:
    """As the pruning stage does it: reloaded from disk, compared, refused."""
    case = Case("llama")
    (name, _), state = next(item for item in case.wrong_cuts().items() if "down_proj" in item[0][0])

    def write(writer: ShardWriter) -> None:
        for key, tensor in state.items():
            writer.add(key, tensor)

    def verify(cut: Any) -> None:
        difference = compare_logits(cut, case.expected, case.ids)
        require_equal(difference, detail=lambda: blame(case.masks, case.source, case.target, case.reader, cut.state_dict()))

    with pytest.raises(NumericsError, match=rf"nothing was published\. The tensor.* is {re.escape(name)}: \d.*differ, by up to") as refused:
        publish_model(write, case.values, lambda folder: None, tmp_path / "pruned", torch.float32, verify)
    assert refused.value.exit_code == 4 and list(tmp_path.iterdir()) == []
    state = case.good
    publish_model(write, case.values, lambda folder: None, tmp_path / "pruned", torch.float32, verify)


def test_the_detail_is_asked_for_only_when_needed() -> None:
    def forbidden() -> str:
        raise AssertionError("there is nothing to explain")

    require_equal(Difference(1.0, 1e-6), detail=forbidden)
    for detail in ("Because.", lambda: "Because."):
        with pytest.raises(NumericsError, match=r"nothing was published\. Because\. This is a bug"):
            require_equal(Difference(1.0, 1.0), detail=detail)
    with pytest.raises(NumericsError, match=r"nothing was published\. This is a bug"):
        require_equal(Difference(inf, float("nan")))
    case = Case("qwen3")
    assert "it is the gates that compute otherwise" in blame(case.masks, case.source, case.target, case.reader, case.good)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_told_from_a_mistake_in_fp64(family: str) -> None:
    """Attention that is all but a maximum grows fp32's rounding a hundredfold; in fp64 one value that is off by 1e-4 still shows."""
    case = Case(family)
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(30)
    case.reader = MemoryReader({name: tensor.clone() for name, tensor in case.model.state_dict().items()})
    good = case.cut(case.plan)
    other = tiny_model(family, seed=1)
    for parameter in other.parameters():  # its weights do not count, nor does their dtype
        parameter.data = parameter.data.bfloat16()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}

    def difference(state: dict[str, torch.Tensor]) -> float:
        small = model_of(state, case.values, torch.float32)
        found = compare_in_float64(other, case.source, case.masks, case.reader, small, case.ids)
        assert all(torch.equal(tensor, state[name]) for name, tensor in small.state_dict().items() if name in state)
        return found.relative_difference

    assert difference(good) < 1e-11
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = good[name].clone()
    wrong[2, 3] *= 1.0001
    assert TOLERANCE_FLOAT64 < difference({**good, name: wrong}) < TOLERANCE
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
