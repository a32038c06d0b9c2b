"""Shapes: what a target means, whether it can be cut from the source, and the nearest one that can."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, log
from typing import Any

from shearling.arch.families import LAYER_COUNTS, PER_LAYER_LISTS, SIZE_FIELDS, Anatomy
from shearling.config import Config
from shearling.errors import Problem, ShapeError

PRUNABLE = ("layer", "hidden", "group", "query", "neuron")


class Target(Config):
    """The shape to shear to, in the field names of a Hugging Face config. What is left out stays as in the source."""

    num_hidden_layers: int | None = None
    """Number of blocks."""
    hidden_size: int | None = None
    """Channels of the residual stream."""
    num_attention_heads: int | None = None
    """Query heads in all."""
    num_key_value_heads: int | None = None
    """Key/value heads; each keeps num_attention_heads / num_key_value_heads query heads."""
    intermediate_size: int | None = None
    """Neurons of every block's MLP."""


def shape_of(anatomy: Anatomy) -> dict[str, int]:
    """The sizes of a model under their config names."""
    shape = {field: anatomy.sizes[axis] for axis, field in SIZE_FIELDS.items()}
    shape["num_attention_heads"] = anatomy.sizes["group"] * anatomy.sizes["query"]
    return shape


def target_anatomy(source: Anatomy, target: Target) -> Anatomy:
    """The anatomy that `target` asks for; raise `ShapeError` with every problem and the nearest feasible shape."""
    problems = find_problems(source, target)
    if problems:
        nearest = ", ".join(f"{field}={size}" for field, size in nearest_feasible(source, target).items())
        raise ShapeError(f"this target cannot be cut from the source (the nearest that can: {nearest})", problems)
    wanted = _wanted(source, target)
    query = wanted["num_attention_heads"] // wanted["num_key_value_heads"]
    return source.with_sizes(query=query, **{axis: wanted[SIZE_FIELDS[axis]] for axis in PRUNABLE if axis != "query"})


def find_problems(source: Anatomy, target: Target) -> list[Problem]:
    """Why `target` cannot be cut from `source`; empty when it can."""
    have, want = shape_of(source), _wanted(source, target)
    problems = []
    for field, size in want.items():
        if size < 1:
            problems.append(Problem(f"target.{field}", str(size), "A size must be at least 1."))
        elif size > have[field]:
            problems.append(Problem(f"target.{field}", str(size), f"The source has {have[field]}; ask for at most that."))
    if problems:
        return problems
    heads, groups = want["num_attention_heads"], want["num_key_value_heads"]
    if heads % groups:
        remedy = f"Every key/value head keeps the same number of query heads: ask for a multiple of {groups}."
        problems.append(Problem("target.num_attention_heads", str(heads), remedy))
    elif heads // groups > source.sizes["query"]:
        remedy = (
            f"Each key/value head of the source has {source.sizes['query']} query heads: ask for at most {groups * source.sizes['query']}."
        )
        problems.append(Problem("target.num_attention_heads", f"{heads} on {groups} key/value heads", remedy))
    if source.family.hidden_divisible_by_heads and want["hidden_size"] % heads:
        remedy = f"Transformers loads {source.family.model_type} only where hidden_size is a multiple of num_attention_heads ({heads})."
        problems.append(Problem("target.hidden_size", str(want["hidden_size"]), remedy))
    return problems


def nearest_feasible(source: Anatomy, target: Target) -> dict[str, int]:
    """The feasible shape nearest to `target`: least sum over fields of |log(size / asked size)|."""
    have, want = shape_of(source), _wanted(source, target)
    clamped = {field: min(max(size, 1), have[field]) for field, size in want.items()}
    best, best_cost = clamped, inf
    for groups in range(1, source.sizes["group"] + 1):
        for query in range(1, source.sizes["query"] + 1):
            step = groups * query if source.family.hidden_divisible_by_heads else 1
            below = clamped["hidden_size"] // step * step
            for hidden in (below, below + step):
                if not 1 <= hidden <= have["hidden_size"]:
                    continue
                shape = {**clamped, "num_key_value_heads": groups, "num_attention_heads": groups * query, "hidden_size": hidden}
                cost = sum(abs(log(size / max(want[field], 1))) for field, size in shape.items())
                if cost < best_cost - 1e-12:
                    best, best_cost = shape, cost
    return best


def target_config(config: Mapping[str, Any], source: Anatomy, target: Anatomy, layers: list[int]) -> dict[str, Any]:
    """The Hugging Face config of the cut model: sizes replaced, per-layer lists cut to `layers` (kept source layers)."""
    cut = {key: value for key, value in config.items() if key != "quantization_config"}
    cut.update(shape_of(target))
    for field in PER_LAYER_LISTS:
        values = cut.get(field)
        if isinstance(values, list) and len(values) == source.sizes["layer"]:
            cut[field] = [values[layer] for layer in layers]
    for field in LAYER_COUNTS:
        if isinstance(cut.get(field), int):
            cut[field] = sum(layer < cut[field] for layer in layers)
    return cut


def _wanted(source: Anatomy, target: Target) -> dict[str, int]:
    """Every field of the target filled in. Of the two head counts, one given leaves the query heads of a group as they are."""
    have, asked = shape_of(source), {field: size for field, size in target.model_dump().items() if size is not None}
    query = source.sizes["query"]
    if "num_key_value_heads" in asked:
        asked.setdefault("num_attention_heads", asked["num_key_value_heads"] * query)
    elif "num_attention_heads" in asked and query == 1:
        asked["num_key_value_heads"] = asked["num_attention_heads"]
    return {field: asked.get(field, have[field]) for field in Target.model_fields}
