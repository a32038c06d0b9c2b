"""The plan: which indices of every axis are kept, frozen and JSON-able. Every way to prune ends in one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shearling.arch.families import Anatomy
from shearling.errors import ArtifactError, Problem
from shearling.io.files import read_json, write_atomic
from shearling.shapes import PRUNABLE, shape_of

FORMAT = 1


@dataclass(frozen=True)
class PrunePlan:
    """What to keep of a source.

    `keep` holds `layer` and `hidden` as lists of indices, and for every kept source layer `group` and `neuron` as lists and
    `query` as one list for each kept group. Indices are the source's, ascending, and every axis has an entry.
    """

    source_shape: Mapping[str, int]
    target_shape: Mapping[str, int]
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
    """Read a plan; raise `ArtifactError` where it is not one."""
    values = read_json(path)
    try:
        if values["format"] != FORMAT:
            raise ArtifactError(
                f"{path}: a plan of another format",
                [Problem("format", repr(values["format"]), f"This version reads format {FORMAT}; use the version that wrote it.")],
            )
        keep = {a: {int(i): c for i, c in k.items()} if isinstance(k, dict) else k for a, k in values["keep"].items()}
        source = values["source"]
        return PrunePlan(source["shape"], values["target"]["shape"], keep, source["fingerprint"], values["made_by"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: not a plan", [Problem("plan", repr(error)[:200], "Make the plan again.")]) from None


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
        for axis in ("group", "neuron"):
            keep[axis][layer] = _open(masks[axis][layer]) if axis in masks else list(range(sizes[axis]))
        every_query = list(range(sizes["query"]))
        keep["query"][layer] = [_open(masks["query"][layer][g]) if "query" in masks else every_query for g in keep["group"][layer]]
    plan = PrunePlan(shape_of(source), shape_of(target), keep, fingerprint, dict(made_by or {}))
    check_plan(plan, source, target)
    return plan


def check_plan(plan: PrunePlan, source: Anatomy, target: Anatomy) -> None:
    """Raise one `ArtifactError` with everything in which `plan` is no way from `source` to `target`."""
    problems: list[Problem] = []

    def check(where: str, indices: Sequence[int], axis: str) -> None:
        if len(indices) != target.sizes[axis]:
            problems.append(Problem(where, f"{len(indices)} kept", f"The target has {target.sizes[axis]}."))
        if list(indices) != sorted(set(indices)) or any(not 0 <= i < source.sizes[axis] for i in indices):
            problems.append(Problem(where, f"{list(indices)[:8]}...", f"Indices must ascend within 0..{source.sizes[axis] - 1}."))

    missing = [axis for axis in PRUNABLE if axis not in plan.keep]
    if missing:
        raise ArtifactError("the plan is incomplete", [Problem(f"keep.{axis}", "nothing", "Every axis has an entry.") for axis in missing])
    if dict(plan.source_shape) != shape_of(source):
        problems.append(Problem("source.shape", str(dict(plan.source_shape)), f"This source has {shape_of(source)}."))
    check("keep.layer", plan.keep["layer"], "layer")
    check("keep.hidden", plan.keep["hidden"], "hidden")
    for layer in plan.keep["layer"]:
        for axis in ("group", "neuron"):
            check(f"keep.{axis}.{layer}", plan.keep[axis].get(layer, []), axis)
        queries = plan.keep["query"].get(layer, [])
        if len(queries) != target.sizes["group"]:
            problems.append(Problem(f"keep.query.{layer}", f"{len(queries)} lists", "There is one list for each kept group."))
        for number, chosen in enumerate(queries):
            check(f"keep.query.{layer}.{number}", chosen, "query")
    if problems:
        raise ArtifactError("the plan does not fit source and target", problems[:20])


def _open(mask: Any) -> list[int]:
    return [index for index, value in enumerate(mask.tolist()) if value > 0]
