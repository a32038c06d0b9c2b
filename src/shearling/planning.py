"""What a target means before any compute: feasibility, parameters by part, what is pruned, tokens, memory and disk.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from shearling.arch.axes import PER_LAYER, count
from shearling.arch.families import Anatomy
from shearling.data.config import DataConfig, DomainConfig
from shearling.errors import ShapeError
from shearling.recipe import Recipe
from shearling.shapes import PRUNABLE, Target, nearest_feasible, shape_of, target_anatomy, turned
from shearling.sources import Source, open_source
from shearling.train.config import FitConfig, StageConfig

STAGES_THAT_TRAIN = ("prune", "train")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NO_TARGET = Target()
_DEFAULTS = Recipe(source="source", data=DataConfig(domains={"text": DomainConfig(train=["text"])}))
"""A recipe that says nothing of its own."""


def describe(source: Source, target: Target, recipe: Recipe | None = None) -> dict[str, Any]:
    """The plan as JSON values; see `shearling.api.plan`."""
    anatomy = source.anatomy
    asked = (recipe or _DEFAULTS).model_copy(update={"target": target})
    try:
        cut, problems = expected_target(source, asked), []
    except ShapeError as error:
        cut, problems = anatomy, list(error.problems)
    found: dict[str, Any] = {
        "source": {"name": source.name, **sizes(anatomy)},
        "feasible": not problems,
        "problems": [vars(problem) for problem in problems],
        "nearest": nearest_feasible(anatomy, target) if problems and target.parameters is None else None,
        "target": None,
    }
    if problems:
        return found
    length = asked.data.sequence_length
    return found | {
        "target": sizes(cut),
        "ratio": round(cut.parameters() / anatomy.parameters(), 4),
        "pruned": {axis: _pruned(anatomy, cut, axis) for axis in PRUNABLE},
        "tokens": {stage: config.steps * config.batch_size * length for stage, config in _configs(asked).items()},
        "memory": {stage: stage_memory(source, asked, stage) for stage in STAGES_THAT_TRAIN},
        "disk": disk_needed(source, asked, ("prepare", *STAGES_THAT_TRAIN)),
    }


def expected_target(source: Source, recipe: Recipe) -> Anatomy:
    """The shape that a recipe asks for. Of a budget of parameters the uniform one that meets it, which a method may depart from."""
    if recipe.target is None:
        return source.anatomy
    anatomy, target = turned(source.anatomy, recipe.target, recipe.prune.rotate)
    return target_anatomy(anatomy, target, recipe.prune.axes or PRUNABLE)


def sizes(anatomy: Anatomy) -> dict[str, Any]:
    """Parameters, parameters by part, and shape of a model."""
    parts = anatomy.parameters_by_part()
    return {"parameters": anatomy.parameters(), "shape": shape_of(anatomy), "parameters_by_part": parts}


def stage_memory(source: Source, recipe: Recipe, stage: str, *, world_size: int = 1, keeps_gathered: bool = False) -> dict[str, int]:
    """Bytes that `prune` or `train` takes on each of `world_size` processes; see `training_memory`.

    Where it learns from a teacher, there is a part `teacher`, too: its weights, in the precision of the run.
    """
    cut, config = expected_target(source, recipe), _configs(recipe)[stage]
    pruning = stage == "prune"
    found = training_memory(
        source.anatomy if pruning else cut,
        config,
        recipe.data.sequence_length,
        recipe.runtime.precision == "bfloat16",
        world_size=world_size,
        activation_checkpointing=recipe.runtime.activation_checkpointing,
        keeps_gathered=keeps_gathered,
        target=cut if pruning else None,
        masked=recipe.data.attend == "document",
    )
    if config.distill is None or not config.steps:
        return found
    teacher, width = _teacher(source, recipe), 2 if recipe.runtime.precision == "bfloat16" else 4
    head = teacher.sizes["vocab"] * teacher.sizes["hidden"] if world_size > 1 else 0  # whole on every process
    size = width * (-(-teacher.parameters() // world_size) + head)
    return found | {"teacher": size, "total": found["total"] + size}


def training_memory(
    anatomy: Anatomy,
    config: FitConfig,
    sequence_length: int,
    bfloat16: bool = True,
    *,
    world_size: int = 1,
    activation_checkpointing: bool = False,
    keeps_gathered: bool = False,
    target: Anatomy | None = None,
    masked: bool = False,
) -> dict[str, int]:
    """Bytes of training on each process by part, with their `total`: what must be there, and an estimate of the activations.

    weights, gradients, moments: fp32, divided among the processes. low_precision_copy: what autocast makes of the weights, whole on
    each, or with `activation_checkpointing` of one block.
    gathered: on several processes one whole block, fp32 and its copy; all weights with `keeps_gathered`. gates: fp32 logits,
    gradient and two moments. gated_copies: of the attention output and MLP down projections, whole and fp32, which the backward
    pass needs (under autocast it needs their low-precision copies, counted above, so one block's are there at a time).

    activations: of one microbatch, of each block what its backward pass reads (inputs of norms and matrices, attention's query,
    key, value and output, the MLP's three activations), or with `activation_checkpointing` each block's input and one block's
    activations; and the logits with their fp32 copy and gradient. Where attention is `masked`, a mask of truth values of
    sequence_length^2 a sequence, and each block's copy of it as numbers, which torch's attention keeps for its backward pass.

    Args:
        anatomy: of the model that trains.
        config: its stage.
        sequence_length: tokens of a sequence.
        bfloat16: whether to compute under autocast.
        world_size: processes.
        keeps_gathered: whether gathered weights are kept from the forward pass to the backward pass.
        target: what the model is pruned to; None where it has no gates.
        masked: whether attention stays inside documents.
    """
    axes, parameters = anatomy.sizes, anatomy.parameters()
    tokens, layers = config.batch_size // config.microbatches * sequence_length, axes["layer"]
    width, stream = 2 if bfloat16 else 4, 4 * axes["hidden"]
    heads, keys = axes["group"] * axes["query"] * axes["head_dim"], 2 * axes["group"] * axes["head_dim"]
    block = 4 * stream + width * (2 * axes["hidden"] + 3 * heads + 2 * keys + 4 * axes["neuron"])
    blocks = layers * stream + block if activation_checkpointing else layers * block
    masks = sequence_length * (1 + width * (1 if activation_checkpointing else layers)) if masked else 0
    gates = _gates(anatomy, target) if target else 0
    gated = 4 * axes["hidden"] * (heads + axes["neuron"]) if gates else 0
    gathered = 4 * parameters if keeps_gathered else (6 if bfloat16 else 4) * _block_parameters(anatomy)
    parts = {
        "weights": -(-4 * parameters // world_size),
        "gradients": -(-4 * parameters // world_size),
        "moments": -(-8 * parameters // world_size),
        "low_precision_copy": 0 if not bfloat16 else 2 * (_block_parameters(anatomy) if activation_checkpointing else parameters),
        "gathered": gathered if world_size > 1 else 0,
        "gates": 16 * gates,
        "gated_copies": gated * (1 if bfloat16 or activation_checkpointing else layers),
        "activations": tokens * (blocks + masks + axes["vocab"] * (width + 8)),
    }
    return parts | {"total": sum(parts.values())}


def memory_warning(stage: str, needed: int, available: int | None) -> str | None:
    """A sentence for the user where a stage is likely to need more memory than there is, in bytes; None where it is not known."""
    if available is None or needed <= available:
        return None
    return (
        f"{stage} takes about {needed / 2**30:.1f} GiB of memory in each process, by estimate, and {available / 2**30:.1f} GiB are "
        f"free: it may run out. More {stage}.microbatches, runtime.activation_checkpointing=true or more processes make it less."
    )


def available_memory(device: str, processes: int = 1, meminfo: str | Path = "/proc/meminfo") -> int | None:
    """Bytes that one of `processes` on this machine may still take on `device` (`cpu`, `cuda` or `cuda:N`); None if not known."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", Path(meminfo).read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return int(found[1]) * 1024 // processes if found else None


def disk_needed(source: Source, recipe: Recipe, stages: Collection[str], there: Mapping[str, int] | None = None) -> dict[str, int]:
    """Bytes that these stages, not done yet, still write below the run directory, by part, with their `total`; an estimate.

    data: token shards, where max_train_sequences bounds them; else 0. checkpoints: weights and two moments, fp32, of as many as are
    kept and the one being saved; those of `prune` stay while `train` saves its own. pruned: fp32. model: in its dtype.

    Args:
        source: gives the sizes and the dtype.
        recipe: gives everything else.
        stages: of `prepare`, `prune` and `train` those that are not done; others write next to nothing.
        there: stage -> bytes there already of what it writes, which it goes on from or replaces.
    """
    cut = expected_target(source, recipe)
    data, runtime, there = recipe.data, recipe.runtime, there or {}
    peak = staying = 0
    for stage in (stage for stage in STAGES_THAT_TRAIN if stage in stages):
        steps, parameters = _configs(recipe)[stage].steps, (source.anatomy if stage == "prune" else cut).parameters()
        if not steps or (stage == "prune" and cut.sizes == source.anatomy.sizes):
            continue
        saves = (steps - 1) // runtime.save_every + 2 if runtime.save_every else 1  # the last one, and one where a signal asks for it
        written, kept = (12 * parameters * min(saves, copies) for copies in (runtime.keep_checkpoints + 1, runtime.keep_checkpoints))
        peak = max(peak, staying + written - there.get(stage, 0))
        staying += max(0, kept - there.get(stage, 0))
    shards = 0
    if "prepare" in stages and data.max_train_sequences is not None:
        sequences = len(data.domains) * (data.max_train_sequences + data.heldout_sequences)
        shards = sequences * data.sequence_length * (2 if source.anatomy.sizes["vocab"] <= 2**16 else 4)
    parts = {
        "data": max(0, shards - there.get("prepare", 0)),
        "checkpoints": peak,
        "pruned": 4 * cut.parameters() if "prune" in stages else 0,
        "model": _BYTES.get(export_dtype(source, recipe), 4) * cut.parameters() if "train" in stages else 0,
    }
    return parts | {"total": sum(parts.values())}


def export_dtype(source: Source, recipe: Recipe) -> str:
    """Name of the type in which `model/` is published, without `torch.`: the recipe's, or the source's."""
    asked = recipe.export.dtype
    name = str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32") if asked == "source" else asked
    return name.removeprefix("torch.")


def _teacher(source: Source, recipe: Recipe) -> Anatomy:
    """The model that stages with `distill` learn from."""
    other = None if recipe.teacher is None else recipe.teacher.model
    return source.anatomy if other is None else open_source(other).anatomy


def _configs(recipe: Recipe) -> dict[str, StageConfig]:
    return {"prune": recipe.prune, "train": recipe.train}


def _block_parameters(anatomy: Anatomy) -> int:
    """Parameters of one block."""
    return sum(count(row.pattern, anatomy.sizes) for row in anatomy.rows(anatomy.family.block))


def _gates(source: Anatomy, target: Anatomy) -> int:
    """How many gates the way from source to target needs; as `shearling.prune.gates.gate_specs`, without torch."""
    own = {axis: source.sizes[axis] for axis in PRUNABLE}
    own["query"] *= own["group"]
    return sum(own[axis] * (own["layer"] if axis in PER_LAYER else 1) for axis in PRUNABLE if target.sizes[axis] != source.sizes[axis])


def _pruned(source: Anatomy, target: Anatomy, axis: str) -> dict[str, Any]:
    have, keep = source.sizes[axis], target.sizes[axis]
    where = "each group of each layer" if axis == "query" else "each layer" if axis in PER_LAYER else "the model"
    return {"source": have, "target": keep, "per": where, "dropped": round(1 - keep / have, 4)}


def describe_text(found: dict[str, Any]) -> str:
    """What `describe` found, for reading."""
    lines = [f"source  {found['source']['name']}: {found['source']['parameters']:,} parameters"]
    if not found["feasible"]:
        nearest = ",".join(f"{field}={size}" for field, size in (found["nearest"] or {}).items())
        problems = [f"  - {p['field']}: found {p['found']}. {p['remedy']}" for p in found["problems"]]
        ending = [f"the nearest that can: --target {nearest}"] if nearest else []
        return "\n".join([*lines, "this target cannot be cut:", *problems, *ending])
    lines += [f"target  {found['target']['parameters']:,} parameters, {found['ratio']:.1%} of the source", ""]
    lines += [f"{'part':12s}{'source':>16s}{'target':>16s}"]
    for part, number in found["source"]["parameters_by_part"].items():
        lines.append(f"{part:12s}{number:16,}{found['target']['parameters_by_part'][part]:16,}")
    lines += ["", f"{'axis':12s}{'source':>16s}{'target':>16s}  kept in"]
    for axis, cut in found["pruned"].items():
        lines.append(f"{axis:12s}{cut['source']:16,}{cut['target']:16,}  {cut['per'] if cut['dropped'] else 'untouched'}")
    lines += ["", f"{'stage':12s}{'tokens':>16s}{'memory, GiB':>16s}"]
    for stage, tokens in found["tokens"].items():
        lines.append(f"{stage:12s}{tokens:16,}{found['memory'][stage]['total'] / 2**30:16.2f}")
    disk = found["disk"]
    parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in disk.items() if size and part != "total")
    lines += ["", f"disk, GiB   {disk['total'] / 2**30:16.2f}  {parts}{'' if disk['data'] else '; and the token shards'}"]
    return "\n".join(lines)
