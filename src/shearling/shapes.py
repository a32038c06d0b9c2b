"""Shapes: what a target means, whether it can be cut from the source, and the nearest one that can."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import inf, log
from typing import Annotated, Any

from pydantic import Field

from shearling.arch.families import LAYER_COUNTS, PER_BLOCK, PER_LAYER_LISTS, SHEARED, SIZE_FIELDS, Anatomy
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
    parameters: Annotated[int | float, Field(gt=0)] | None = None
    """Parameters to shear to: a number, or, up to 1, a share of the source's. The method finds the sizes that are not given."""


def shape_of(anatomy: Anatomy) -> dict[str, Any]:
    """The sizes of a model under their config names; a list by block where blocks differ."""
    shape: dict[str, Any] = {field: anatomy.sizes[axis] for axis, field in SIZE_FIELDS.items()}
    shape["num_attention_heads"] = anatomy.sizes["group"] * anatomy.sizes["query"]
    if anatomy.blocks:
        shape["num_key_value_heads"] = [block["group"] for block in anatomy.blocks]
        shape["num_attention_heads"] = [block["group"] * block["query"] for block in anatomy.blocks]
        shape["intermediate_size"] = [block["neuron"] for block in anatomy.blocks]
    return shape


def anatomy_of_shape(source: Anatomy, shape: Mapping[str, Any]) -> Anatomy:
    """The inverse of `shape_of`, for a model of the source's family and flags."""
    sizes = {axis: shape[field] for axis, field in SIZE_FIELDS.items() if not isinstance(shape[field], list)}
    columns = [shape[field] if isinstance(shape[field], list) else [shape[field]] * sizes["layer"] for field in PER_BLOCK]
    blocks = [{"group": g, "query": h // g, "neuron": n} for h, g, n in zip(*columns, strict=True)]
    return source.with_sizes(**sizes).with_blocks(blocks)


def turned(source: Anatomy, target: Target, rotate: str) -> tuple[Anatomy, Target]:
    """What is pruned, and to what, where the stream is turned first (`prune.rotate`): `untied` gives a tied head a matrix of its own.

    That matrix counts against the budget, of which a share is one of the source as it was.
    """
    target = target.model_copy(update={"parameters": budget_of(source, target)})
    return (replace(source, flags={**source.flags, "tie_word_embeddings": False}) if rotate == "untied" else source), target


def budget_of(source: Anatomy, target: Target) -> int | None:
    """The number of parameters that `target` allows; None where it gives sizes alone."""
    asked = target.parameters
    return None if asked is None else int(asked * source.parameters()) if asked <= 1 else int(asked)


def target_anatomy(source: Anatomy, target: Target, axes: Collection[str] = PRUNABLE) -> Anatomy:
    """The anatomy that `target` asks for; raise `ShapeError` with every problem and the nearest feasible shape.

    Of a budget of parameters: the uniform shape that meets it with all of `axes` whose sizes are not given scaled alike, see
    `uniform_shape`; a method that finds its own shape starts from the source and ends within the same budget.
    """
    if target.parameters is not None:
        return uniform_shape(source, target, axes)
    if target == Target():  # also of blocks of different sizes
        return source
    problems = find_problems(source, target, axes)
    if problems:
        nearest = ", ".join(f"{field}={size}" for field, size in nearest_feasible(source, target).items())
        raise ShapeError(f"this target cannot be cut from the source (the nearest that can: {nearest})", problems)
    wanted = _wanted(source, target)
    query = wanted["num_attention_heads"] // wanted["num_key_value_heads"]
    return source.with_sizes(query=query, **{axis: wanted[SIZE_FIELDS[axis]] for axis in PRUNABLE if axis != "query"})


def uniform_shape(source: Anatomy, target: Target, axes: Collection[str] = PRUNABLE) -> Anatomy:
    """The shape, alike in all blocks, that comes nearest to a budget of parameters from below, by scaling `axes` alike.

    Every size that `target` leaves open goes down by one share, to the nearest that is feasible; where neurons are among them, their
    number then takes up what is left of the budget, so that it is met within one neuron a block. Of the shapes that meet the budget
    so, the one whose neurons are nearest to their share is taken. Key/value heads stay as many as they can: query heads go first.
    Raises `ShapeError` where a size that is given cannot be had, or the budget cannot be met.
    """
    budget, sizes_alone = budget_of(source, target), target.model_copy(update={"parameters": None})
    assert budget is not None, "a target without a budget has a shape already"
    problems = find_problems(source, sizes_alone, axes)
    if target.hidden_size is None and "hidden" in axes:  # it goes to what suits the heads
        problems = [problem for problem in problems if problem.field != "target.hidden_size"]
    if not problems and budget > source.parameters():
        problems = [Problem("target.parameters", f"{budget:,}", f"The source has {source.parameters():,}; ask for at most that.")]
    if problems:
        raise ShapeError("this target cannot be cut from the source", problems)
    fills = "neuron" in axes and target.intermediate_size is None
    best, best_cost, reached, most = None, inf, [], source.sizes["neuron"]
    for step in range(_SHARES if fills else _SHARES + 1):
        share = 1 - step / _SHARES
        shape = _scaled(source, sizes_alone, axes, share)
        if shape is None:
            continue
        if fills:
            least = shape.with_sizes(neuron=0).parameters()
            each = shape.with_sizes(neuron=1).parameters() - least
            room = (budget - least) // each
            neurons = min(max(room, 1), most)
            shape = shape.with_sizes(neuron=neurons)
            cost = abs(log(neurons / (share * most))) if neurons == room else inf
        else:
            cost = float(budget - shape.parameters()) if shape.parameters() <= budget else inf
        reached.append(shape.parameters())
        if cost < best_cost:
            best, best_cost = shape, cost
    if best is None:
        remedy = f"By pruning {', '.join(axes)} it can be brought to {min(reached, default=source.parameters()):,}: ask for more"
        if below := [parameters for parameters in reached if parameters <= budget]:
            remedy = f"By pruning {', '.join(axes)} it comes to {max(below):,} and no nearer from below: ask for that, give fewer sizes"
        remedy += ", or add axes to prune.axes."
        raise ShapeError("this budget cannot be met", [Problem("target.parameters", f"{budget:,}", remedy)])
    return best


_SHARES = 256


def _scaled(source: Anatomy, target: Target, axes: Collection[str], share: float) -> Anatomy | None:
    """Every size that is not given scaled, made feasible; None where that would touch what is given or not among `axes`."""
    have, heads_given = shape_of(source), target.num_attention_heads is not None or target.num_key_value_heads is not None
    scaled = {_FIELD_OF[axis] for axis in axes}
    wanted = {field: max(1, round(size * share)) if field in scaled else size for field, size in have.items() if field in SIZES}
    groups, query = source.sizes["group"], source.sizes["query"]
    if "query" in axes and query > 1:
        wanted["num_key_value_heads"] = min(groups, wanted["num_attention_heads"]) if "group" in axes else groups
    elif "group" in axes:
        wanted["num_attention_heads"] = wanted["num_key_value_heads"] * query
    given = {field: size for field, size in target.model_dump().items() if size is not None}
    if heads_given:
        given |= {field: size for field, size in _wanted(source, target).items() if "heads" in field}
    fitting = nearest_feasible(source, Target(**{**wanted, **given}))
    fixed = {**{field: have[field] for field in SIZES if field not in scaled and "heads" not in field}, **given}
    if any(fitting[field] != size for field, size in fixed.items()):
        return None
    kept = fitting["num_key_value_heads"], fitting["num_attention_heads"] // fitting["num_key_value_heads"]
    if not heads_given and (("group" not in axes and kept[0] != groups) or ("query" not in axes and kept[1] != query)):
        return None
    return source.with_sizes(
        layer=fitting["num_hidden_layers"], hidden=fitting["hidden_size"], group=kept[0], query=kept[1], neuron=fitting["intermediate_size"]
    )


def find_problems(source: Anatomy, target: Target, axes: Collection[str] = PRUNABLE) -> list[Problem]:
    """Why the sizes of `target` cannot be cut from `source` by pruning `axes`; empty when they can."""
    have, want = shape_of(source), _wanted(source, target)
    problems = []
    allowed = {_FIELD_OF[axis] for axis in axes}
    for field, size in want.items():
        if size != have[field] and field not in allowed and not (field == "num_attention_heads" and "group" in axes):
            remedy = f"prune.axes has only {', '.join(axes)}: leave this size as it is ({have[field]}), or add its axis."
            problems.append(Problem(f"target.{field}", str(size), remedy))
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
    cut.update(shape_of(target), tie_word_embeddings=bool(target.flags["tie_word_embeddings"]))
    if target.blocks:
        cut.update(base_model_type=target.family.model_type, model_type=SHEARED)
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
    have, asked = shape_of(source), {field: getattr(target, field) for field in SIZES if getattr(target, field) is not None}
    query = source.sizes["query"]
    if "num_key_value_heads" in asked:
        asked.setdefault("num_attention_heads", asked["num_key_value_heads"] * query)
    elif "num_attention_heads" in asked and query == 1:
        asked["num_key_value_heads"] = asked["num_attention_heads"]
    return {field: asked.get(field, have[field]) for field in SIZES}


_FIELD_OF = {axis: SIZE_FIELDS.get(axis, "num_attention_heads") for axis in PRUNABLE}
SIZES = tuple(field for field in Target.model_fields if field != "parameters")
"""The fields of a target that are sizes."""
