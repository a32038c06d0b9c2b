"""The plan: which indices of every axis are kept, frozen and JSON-able. Every way to prune ends in one."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shearling.arch.families import Anatomy
from shearling.errors import ArtifactError, NewerFormatError, Problem
from shearling.io.files import read_json, write_atomic
from shearling.io.tensors import shortened, shown
from shearling.shapes import PRUNABLE, shape_of

FORMAT = 1
PLAN_LIMIT, PLAN_PARTS = 64 * 2**20, 16 * 2**20
"""Largest plan that is read, in bytes, and its brackets and commas: room for 126 layers of 53 248 neurons, all kept."""
_AGAIN = "Make the plan again."


@dataclass(frozen=True)
class PrunePlan:
    """What to keep of a source.

    `keep` holds `layer` and `hidden` as lists of indices, and for every kept source layer `group` and `neuron` as lists and
    `query` as one list for each kept group. Indices are the source's, ascending, and every axis has an entry.
    """

    source_shape: Mapping[str, int]
    target_shape: Mapping[str, Any]
    """Sizes by config field; where blocks differ, those of heads and neurons are lists."""
    keep: Mapping[str, Any]
    source_fingerprint: str = ""
    made_by: Mapping[str, Any] = field(default_factory=dict)
    """How the plan was made: method, seed, steps; for the reader, not for the transform."""

    @property
    def layers(self) -> list[int]:
        """The kept source layers, in order."""
        return list(self.keep["layer"])

    def keep_in(self, layer: int | None) -> dict[str, Any]:
        """What a tensor of source block `layer` (None: outside the blocks) keeps on each axis."""
        kept = {"hidden": self.keep["hidden"]}
        if layer is not None:
            kept |= {axis: self.keep[axis][layer] for axis in ("group", "query", "neuron")}
        return kept

    def to_json(self) -> dict[str, Any]:
        """Plain values; per-layer choices under the layer's number as text."""
        keep = {axis: {str(i): c for i, c in kept.items()} if isinstance(kept, Mapping) else kept for axis, kept in self.keep.items()}
        source = {"fingerprint": self.source_fingerprint, "shape": dict(self.source_shape)}
        target = {"shape": dict(self.target_shape)}
        return {"format": FORMAT, "source": source, "target": target, "keep": keep, "made_by": dict(self.made_by)}

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically."""
        write_atomic(path, json.dumps(self.to_json()) + "\n")


def load_plan(path: Path) -> PrunePlan:
    """Read a plan; raise `ArtifactError` where it is not one, with every problem, or was written by a newer version."""
    values = read_json(path, limit=PLAN_LIMIT, parts=PLAN_PARTS)
    if not isinstance(values, dict):
        raise ArtifactError(f"{path}: not a plan", [Problem("plan", f"a JSON {type(values).__name__}", _AGAIN)])
    version = values.get("format")
    if type(version) is int and version > FORMAT:
        found, remedy = f"format {version}; this version reads up to {FORMAT}", "Use the version of Shearling that wrote it."
        raise NewerFormatError(f"{path}: a plan of a newer version", [Problem("format", found, remedy)])
    problems = [] if type(version) is int and version == FORMAT else [_wrong("format", version, f"This version reads format {FORMAT}.")]
    source, target = (values[side] if isinstance(values.get(side), dict) else {} for side in ("source", "target"))
    for name, value, kind in (
        ("source", values.get("source"), dict),
        ("source.fingerprint", source.get("fingerprint"), str),
        ("target", values.get("target"), dict),
        ("made_by", values.get("made_by"), dict),
    ):
        if not isinstance(value, kind):
            problems.append(_wrong(name, value))
    for name, shape in (("source.shape", source.get("shape")), ("target.shape", target.get("shape"))):
        if not isinstance(shape, dict) or not all(type(size) is int or _indices(size) for size in shape.values()):
            problems.append(_wrong(name, shape))
    keep, misnumbered = _with_layer_numbers(values.get("keep"))
    problems += misnumbered + _keep_problems(keep)
    if problems:
        raise ArtifactError(f"{path}: not a plan", shortened(problems))
    return PrunePlan(source["shape"], target["shape"], keep, source["fingerprint"], values["made_by"])


def _with_layer_numbers(keep: Any) -> tuple[Any, list[Problem]]:
    """`keep` of a file with the layers as numbers, and the keys that are none."""
    if not isinstance(keep, dict):
        return keep, []
    numbered, problems = dict(keep), []
    for axis, kept in keep.items():
        if isinstance(kept, dict):
            sound = [key for key in kept if key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key]
            numbered[axis] = {int(key): kept[key] for key in sound}
            wrong = sorted(kept.keys() - set(sound))
            problems += [Problem(f"keep.{shown(axis)}.{shown(key)}", "no number of a layer", _AGAIN) for key in wrong]
    return numbered, problems


def _keep_problems(keep: Any) -> list[Problem]:
    """Every way in which `keep` is not of the form that `PrunePlan` says, whatever the sizes."""
    if not isinstance(keep, Mapping):
        return [_wrong("keep", keep)]
    problems = [Problem(f"keep.{axis}", "nothing", "Every axis has an entry.") for axis in PRUNABLE if axis not in keep]
    for axis, kept in keep.items():
        where = f"keep.{shown(str(axis))}"
        if axis not in PRUNABLE:
            problems.append(Problem(where, "an axis that is not pruned", f"The axes are {', '.join(PRUNABLE)}."))
        elif axis in ("layer", "hidden"):
            problems += [] if _indices(kept) else [_wrong(where, kept, "A list of whole numbers is needed.")]
        elif not isinstance(kept, Mapping):
            problems.append(_wrong(where, kept, "An entry for every kept layer is needed."))
        elif axis == "query":
            lists = "A list of whole numbers for each kept group is needed."
            sound = {layer: _is_list(chosen) and all(map(_indices, chosen)) for layer, chosen in kept.items()}
            problems += [_wrong(f"{where}.{layer}", kept[layer], lists) for layer, fine in sound.items() if not fine]
        else:
            wrong = [layer for layer, chosen in kept.items() if not _indices(chosen)]
            problems += [_wrong(f"{where}.{layer}", kept[layer], "A list of whole numbers is needed.") for layer in wrong]
    return problems


def _is_list(values: Any) -> bool:
    return isinstance(values, list | tuple)


def _indices(values: Any) -> bool:
    return _is_list(values) and all(type(value) is int for value in values)


def _wrong(where: str, found: Any, remedy: str = _AGAIN) -> Problem:
    return Problem(where, "nothing" if found is None else reprlib.repr(found), remedy)


def plan_from_masks(
    source: Anatomy, target: Anatomy, masks: Mapping[str, Any], fingerprint: str = "", made_by: Mapping[str, Any] | None = None
) -> PrunePlan:
    """Make the plan that keeps what is open in hardened `masks` ({axis: 0/1 tensor of the gates' shape}).

    An axis without a mask is kept whole. Raises `ArtifactError` where a vector does not hold exactly the target count.
    """
    sizes = source.sizes
    layers = _open(masks["layer"]) if "layer" in masks else list(range(sizes["layer"]))
    keep: dict[str, Any] = {
        "layer": layers,
        "hidden": _open(masks["hidden"]) if "hidden" in masks else list(range(sizes["hidden"])),
        "group": {},
        "query": {},
        "neuron": {},
    }
    for layer in layers:
        block = source.sizes_in(layer)
        for axis in ("group", "neuron"):
            keep[axis][layer] = _open(masks[axis][layer]) if axis in masks else list(range(block[axis]))
        every_query = list(range(block["query"]))
        keep["query"][layer] = [_open(masks["query"][layer][g]) if "query" in masks else every_query for g in keep["group"][layer]]
    plan = PrunePlan(shape_of(source), shape_of(target), keep, fingerprint, dict(made_by or {}))
    check_plan(plan, source, target)
    return plan


def check_plan(plan: PrunePlan, source: Anatomy, target: Anatomy) -> None:
    """Raise one `ArtifactError` with everything in which `plan` is no way from `source` to `target`."""
    problems = _keep_problems(plan.keep)
    if problems:
        raise ArtifactError("the plan is not of the form of a plan", shortened(problems))

    def check(where: str, indices: Sequence[int], axis: str, position: int | None = None) -> None:
        due = target.sizes_in(position)[axis]
        if len(indices) != due:
            problems.append(Problem(where, f"{len(indices)} kept", f"The target has {due}."))
        if list(indices) != sorted(set(indices)) or any(not 0 <= i < source.sizes[axis] for i in indices):
            problems.append(Problem(where, f"{list(indices)[:8]}...", f"Indices must ascend within 0..{source.sizes[axis] - 1}."))

    for side, shape, anatomy in (("source", plan.source_shape, source), ("target", plan.target_shape, target)):
        if dict(shape) != shape_of(anatomy):
            problems.append(Problem(f"{side}.shape", str(dict(shape)), f"This {side} has {shape_of(anatomy)}."))
    check("keep.layer", plan.keep["layer"], "layer")
    check("keep.hidden", plan.keep["hidden"], "hidden")
    for place, layer in enumerate(plan.keep["layer"]):
        position = min(place, target.sizes["layer"] - 1)
        for axis in ("group", "neuron"):
            check(f"keep.{axis}.{layer}", plan.keep[axis].get(layer, []), axis, position)
        queries = plan.keep["query"].get(layer, [])
        if len(queries) != target.sizes_in(position)["group"]:
            problems.append(Problem(f"keep.query.{layer}", f"{len(queries)} lists", "There is one list for each kept group."))
        for number, chosen in enumerate(queries):
            check(f"keep.query.{layer}.{number}", chosen, "query", position)
    for axis in ("group", "query", "neuron"):
        others = [layer for layer in plan.keep[axis] if layer not in plan.keep["layer"]]
        problems += [Problem(f"keep.{axis}.{layer}", "a layer that is not kept", "Only kept layers have an entry.") for layer in others]
    if problems:
        raise ArtifactError("the plan does not fit source and target", shortened(problems))


def _open(mask: Any) -> list[int]:
    return [index for index, value in enumerate(mask.tolist()) if value > 0]
