"""The ways to choose what to keep, by name: which score decides on each axis, or which starting logits gates learn from.

A method is one line here, or in any module of yours that is imported (a package can name such a module as an entry point of the group
`shearling.methods`). All end in the same plan, the same cut, and the same continued pretraining.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from shearling.errors import ConfigError, Problem
from shearling.prune import scores
from shearling.prune.config import LEARNED
from shearling.prune.gates import GateSpec
from shearling.shapes import PRUNABLE

EVERY_AXIS = "*"


@dataclass(frozen=True)
class Method:
    """One way to choose what to keep."""

    name: str
    paper: str
    about: str
    """What it does, in a line."""
    scores: Mapping[str, str]
    """Axis -> name of its score; `*` for those that are not named. Of a method that learns gates: what they start from."""

    @property
    def learns(self) -> bool:
        """Whether gates are trained; if not, the scores decide at once."""
        return self.name == LEARNED


METHODS: dict[str, Method] = {}
"""Every method by its name."""


def register(name: str, paper: str, about: str, **by_axis: str) -> Method:
    """Register a method by the scores it takes on each axis (`layer="block-influence"`), or on all that are not named (`every=...`)."""
    named = {EVERY_AXIS if axis == "every" else axis: score for axis, score in by_axis.items()}
    METHODS[name] = Method(name, paper, about, named)
    return METHODS[name]


register(LEARNED, "Xia et al. 2024, arXiv 2310.06694", "gates learned end to end with the weights, to exactly the target", every="taylor")
register("taylor", "Molchanov et al. 2017, arXiv 1611.06440", "gates whose closing changes the loss least", every="taylor")
register("llm-pruner", "Ma et al. 2023, arXiv 2305.11627", "first-order Taylor of each weight, summed over a unit", every="taylor-element")
register("saap", "after SAAP, arXiv 2412.15127", "vector and element Taylor, fused", every="fused")
register("magnitude", "Li et al. 2017, arXiv 1608.08710", "smallest weights", every="magnitude-l1")
register("minitron", "Muralidharan et al. 2024, arXiv 2407.14679", "smallest activations", every="activation", layer="block-influence")
register("flap", "An et al. 2024, arXiv 2312.11983", "steadiest inputs of the projections", every="fluctuation")
register("shortgpt", "Men et al. 2024, arXiv 2403.03853", "blocks that change the stream least", layer="block-influence")
register("last-blocks", "Gromov et al. 2024, arXiv 2403.17887", "the blocks before the last, without looking", layer="last-blocks")
register("every-nth", "a control", "blocks evenly spread over the depth", layer="every-nth")
register("random", "the control that every other has to beat", "chance", every="random")


@cache
def _load_plugins() -> None:
    for entry in entry_points(group="shearling.methods"):
        entry.load()


def find(name: str) -> Method:
    """The method of that name; raises `ConfigError` with a suggestion where there is none."""
    _load_plugins()
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        remedy = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(METHODS)}; `shearling methods` says what they do."
        raise ConfigError("no such method", [Problem("prune.method", repr(name), remedy)])
    return METHODS[name]


def listing() -> dict[str, list[dict[str, Any]]]:
    """All methods and all scores, as plain values."""
    _load_plugins()
    rows = [{"name": m.name, "about": m.about, "paper": m.paper, "scores": dict(m.scores)} for m in METHODS.values()]
    axes = {name: [axis for axis in PRUNABLE if axis in score.axes] for name, score in scores.SCORES.items()}
    return {
        "methods": rows,
        "scores": [{"name": s.name, "about": s.about, "paper": s.paper, "axes": axes[s.name]} for s in scores.SCORES.values()],
    }


def choose_scores(method: Method, asked: str | Mapping[str, str] | None, specs: Mapping[str, GateSpec]) -> dict[str, str]:
    """Axis -> name of the score that decides on it: as `asked` for (one name, or some axes'), else as the method has it.

    Raises `ConfigError` that names every axis on which nothing would decide, or every score that is not there or not for its axis.
    """
    _load_plugins()
    table = {EVERY_AXIS: asked} if isinstance(asked, str) else {**method.scores, **(asked or {})}
    chosen = {axis: name for axis in specs if (name := table.get(axis, table.get(EVERY_AXIS)))}
    problems = []
    for axis in specs:
        if axis not in chosen:
            fitting = ", ".join(score.name for score in scores.SCORES.values() if axis in score.axes)
            remedy = f"The target changes it: keep its size, or set prune.scores.{axis} to one of {fitting}."
            problems.append(Problem(f"prune.scores.{axis}", f"no score of this axis in the method {method.name}", remedy))
    if problems:
        raise ConfigError(f"the method {method.name} cannot decide on every axis that the target changes", problems)
    extra = set(asked or ()) - set(specs) - {EVERY_AXIS} if not isinstance(asked, str) else set()
    scores.check(chosen | {axis: table[axis] for axis in sorted(extra)}, specs)
    return chosen
