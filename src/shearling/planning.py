"""What a target means before any compute: feasibility, parameters by part, what is pruned, tokens and memory. Imports no torch."""

from __future__ import annotations

from typing import Any

from shearling.arch.axes import PER_LAYER
from shearling.arch.families import Anatomy
from shearling.data.config import DataConfig
from shearling.recipe import PruneConfig, Recipe
from shearling.shapes import PRUNABLE, Target, find_problems, nearest_feasible, shape_of, target_anatomy
from shearling.sources import Source
from shearling.train.config import FitConfig, TrainConfig

DEFAULT_SEQUENCE_LENGTH: int = DataConfig.model_fields["sequence_length"].default


def describe(source: Source, target: Target, recipe: Recipe | None = None) -> dict[str, Any]:
    """The plan as JSON values; see `shearling.api.plan`."""
    anatomy = source.anatomy
    problems = find_problems(anatomy, target)
    found: dict[str, Any] = {
        "source": {"name": source.name, **sizes(anatomy)},
        "feasible": not problems,
        "problems": [vars(problem) for problem in problems],
        "nearest": nearest_feasible(anatomy, target) if problems else None,
        "target": None,
    }
    if problems:
        return found
    cut = target_anatomy(anatomy, target)
    prune, train = (recipe.prune, recipe.train) if recipe else (PruneConfig(), TrainConfig())
    length = recipe.data.sequence_length if recipe else DEFAULT_SEQUENCE_LENGTH
    bfloat16 = recipe is None or recipe.runtime.precision == "bfloat16"
    return found | {
        "target": sizes(cut),
        "ratio": round(cut.parameters() / anatomy.parameters(), 4),
        "pruned": {axis: _pruned(anatomy, cut, axis) for axis in PRUNABLE},
        "tokens": {"prune": prune.steps * prune.batch_size * length, "train": train.steps * train.batch_size * length},
        "memory": {"prune": training_memory(anatomy, prune, length, bfloat16), "train": training_memory(cut, train, length, bfloat16)},
    }


def sizes(anatomy: Anatomy) -> dict[str, Any]:
    """Parameters, parameters by part, and shape of a model."""
    parts = anatomy.parameters_by_part()
    return {"parameters": anatomy.parameters(), "shape": shape_of(anatomy), "parameters_by_part": parts}


def training_memory(anatomy: Anatomy, config: FitConfig, sequence_length: int, bfloat16: bool = True) -> dict[str, int]:
    """Bytes of training on one device: fp32 weights, gradients and two moments, and an estimate of one microbatch's activations.

    Activations: of each block what its backward pass reads (inputs of norms and matrices, attention's query, key, value and
    output, the MLP's three activations), without recomputation; and the logits with their fp32 copy and gradient.
    """
    parameters, axes = anatomy.parameters(), anatomy.sizes
    tokens = config.batch_size // config.microbatches * sequence_length
    width = 2 if bfloat16 else 4
    heads = axes["group"] * axes["query"] * axes["head_dim"]
    keys = 2 * axes["group"] * axes["head_dim"]
    block = 4 * 4 * axes["hidden"] + width * (2 * axes["hidden"] + 3 * heads + 2 * keys + 4 * axes["neuron"])
    parts = {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "moments": 8 * parameters,
        "low_precision_copy": 2 * parameters if bfloat16 else 0,
        "activations": tokens * (axes["layer"] * block + axes["vocab"] * (width + 8)),
    }
    return parts | {"total": sum(parts.values())}


def _pruned(source: Anatomy, target: Anatomy, axis: str) -> dict[str, Any]:
    have, keep = source.sizes[axis], target.sizes[axis]
    where = "each group of each layer" if axis == "query" else "each layer" if axis in PER_LAYER else "the model"
    return {"source": have, "target": keep, "per": where, "dropped": round(1 - keep / have, 4)}


def describe_text(found: dict[str, Any]) -> str:
    """What `describe` found, for reading."""
    lines = [f"source  {found['source']['name']}: {found['source']['parameters']:,} parameters"]
    if not found["feasible"]:
        nearest = ",".join(f"{field}={size}" for field, size in found["nearest"].items())
        problems = [f"  - {p['field']}: found {p['found']}. {p['remedy']}" for p in found["problems"]]
        return "\n".join([*lines, "this target cannot be cut:", *problems, f"the nearest that can: --target {nearest}"])
    lines += [f"target  {found['target']['parameters']:,} parameters, {found['ratio']:.1%} of the source", ""]
    lines += [f"{'part':12s}{'source':>16s}{'target':>16s}"]
    for part, count in found["source"]["parameters_by_part"].items():
        lines.append(f"{part:12s}{count:16,}{found['target']['parameters_by_part'][part]:16,}")
    lines += ["", f"{'axis':12s}{'source':>16s}{'target':>16s}  kept in"]
    for axis, cut in found["pruned"].items():
        lines.append(f"{axis:12s}{cut['source']:16,}{cut['target']:16,}  {cut['per'] if cut['dropped'] else 'untouched'}")
    lines += ["", f"{'stage':12s}{'tokens':>16s}{'memory, GiB':>16s}"]
    for stage, tokens in found["tokens"].items():
        lines.append(f"{stage:12s}{tokens:16,}{found['memory'][stage]['total'] / 2**30:16.2f}")
    return "\n".join(lines)
