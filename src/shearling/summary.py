"""What a run found, stage by stage, as the values of `report.json`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from shearling.arch.families import Anatomy
from shearling.planning import sizes
from shearling.recipe import Recipe
from shearling.run import stage_result
from shearling.shapes import anatomy_of_shape
from shearling.steering import reported_losses
from shearling.texts import described

STAGES = ("prepare", "source", "teacher", "prune", "train", "evaluate")
"""The stages of a run, in order; a report can be made after any of them. `teacher` is there where a recipe has it trained."""


def summarise(path: Path, recipe: Recipe, source: Anatomy, target: Anatomy) -> dict[str, Any]:
    """What `report.json` holds: whatever the finished stages of a run directory found; `target` is what pruning was expected to give."""
    found = {name: result for name in STAGES if (result := stage_result(path, name)) is not None}
    if "shape" in found.get("prune", {}):
        target = anatomy_of_shape(target, found["prune"]["shape"])
    values: dict[str, Any] = {
        "shearling": version("shearling"),
        "seed": recipe.seed,
        "source": {"name": recipe.source, **sizes(source)},
        "model": {"path": "model" if "train" in found else None, **sizes(target)},
        "tokens": {stage: found[stage]["tokens"] for stage in ("teacher", "prune", "train") if stage in found},
        "seconds": {stage: result["seconds"] for stage, result in found.items()},
    }
    if "prepare" in found:
        values["data"] = described(recipe, found["prepare"])
    values |= reported_losses(recipe, found)
    if "prune" in found:
        values["verify"] = found["prune"]["verify"]
    if "train" in found:
        values |= {key: found["train"][key] for key in ("epochs", "padded") if key in found["train"]}
    measured = found.get("evaluate", {})
    return values | {key: measured[key] for key in ("speed", "speed_dtype", "speed_device", "speed_error") if key in measured}
