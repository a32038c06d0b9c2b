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
from typing import TYPE_CHECKING, Any

from shearling.arch.axes import PER_LAYER
from shearling.arch.families import Anatomy
from shearling.errors import ConfigError, Problem
from shearling.prune import scores
from shearling.prune.allocate import check_budget
from shearling.prune.config import LEARNED, AllocationConfig
from shearling.prune.gates import GateSpec, gate_specs, unit_specs
from shearling.shapes import PRUNABLE, SIZES, Target, budget_of, target_anatomy, turned

if TYPE_CHECKING:
    from shearling.recipe import PruneConfig

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
    rule: str = "shape"
    """How scores become masks, by name (`shearling.prune.allocate`): to the `shape` given or scaled, by `rank` or `adapted`."""
    shape: str = "uniform"
    """Whether blocks stay alike (`uniform`) or get sizes of their own (`per_layer`), unless the recipe says otherwise."""
    axes: tuple[str, ...] = PRUNABLE
    """What is pruned under a budget of parameters, unless the recipe says otherwise."""
    from_training: bool = False
    """Whether scores come from training's own gradients, and not from calibration sequences."""
    draws: bool = False
    """Whether nothing of the source is kept but its shape: weights are drawn at random, and no score decides."""
    compare: str = "parameters"
    """See `AllocationConfig.compare`."""
    fluctuation: float = 0.0
    """See `AllocationConfig.fluctuation`."""

    @property
    def learns(self) -> bool:
        """Whether gates are trained; if not, the scores decide at once."""
        return self.name == LEARNED


HEADS_AND_NEURONS = ("group", "neuron")
METHODS: dict[str, Method] = {}
"""Every method by its name."""


def register(name: str, paper: str, about: str, *, how: Mapping[str, Any] | None = None, **by_axis: str) -> Method:
    """Register a method by the scores it takes on each axis (`layer="block-influence"`), or on all that are not named (`every=...`).

    `how`: other fields of `Method`, where it does not cut to a given shape.
    """
    named = {EVERY_AXIS if axis == "every" else axis: score for axis, score in by_axis.items()}
    axes = PRUNABLE if EVERY_AXIS in named else tuple(axis for axis in PRUNABLE if axis in named)
    METHODS[name] = Method(name, paper, about, named, **{"axes": axes, **(how or {})})
    return METHODS[name]


register(LEARNED, "Xia et al. 2024, arXiv 2310.06694", "gates learned end to end with the weights, to exactly the target", every="taylor")
register("taylor", "Molchanov et al. 2017, arXiv 1611.06440", "gates whose closing changes the loss least", every="taylor")
register("llm-pruner", "Ma et al. 2023, arXiv 2305.11627", "first-order Taylor of each weight, summed over a unit", every="taylor-element")
register(
    "llm-pruner-global",
    "Ma et al. 2023, arXiv 2305.11627",
    "the same, over all blocks' heads and neurons in one line",
    how={"rule": "rank", "shape": "per_layer", "axes": HEADS_AND_NEURONS, "compare": "raw"},
    every="taylor-element",
)
register(
    "adapt-pruner",
    "Adapt-Pruner, arXiv 2502.03460",
    "each block's share by how little it turns the stream, in cuts with training between",
    how={"rule": "adapted", "shape": "per_layer", "axes": HEADS_AND_NEURONS},
    every="taylor-element",
    layer="block-influence",
)
register(
    "efficientllm",
    "EfficientLLM, arXiv 2502.06663",
    "the least salient heads, neurons and channels all along training, by its own gradients",
    how={"rule": "rank", "axes": ("hidden", *HEADS_AND_NEURONS), "from_training": True},
    every="taylor-element",
)
register(
    "saap",
    "after SAAP, arXiv 2412.15127",
    "vector and element Taylor, fused; what fluctuates goes first, over all blocks",
    how={"rule": "rank", "shape": "per_layer", "axes": HEADS_AND_NEURONS, "compare": "raw", "fluctuation": 0.1},
    every="fused",
)
register("magnitude", "Li et al. 2017, arXiv 1608.08710", "smallest weights", every="magnitude-l1")
register("minitron", "Muralidharan et al. 2024, arXiv 2407.14679", "smallest activations", every="activation", layer="block-influence")
register(
    "flap",
    "An et al. 2024, arXiv 2312.11983",
    "steadiest inputs of the projections",
    how={"axes": HEADS_AND_NEURONS},
    every="fluctuation",
)
register("shortgpt", "Men et al. 2024, arXiv 2403.03853", "blocks that change the stream least", layer="block-influence")
register("last-blocks", "Gromov et al. 2024, arXiv 2403.17887", "the blocks before the last, without looking", layer="last-blocks")
register("every-nth", "a control", "blocks evenly spread over the depth", layer="every-nth")
register("random", "the control that every other has to beat", "chance", every="random")
register("from-scratch", "the control without a source", "random weights in the target's shape", how={"draws": True, "axes": PRUNABLE})


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
    rows = [
        {"name": m.name, "about": m.about, "paper": m.paper, "scores": dict(m.scores), "rule": m.rule, "shape": m.shape}
        for m in METHODS.values()
    ]
    known = [
        {"name": s.name, "about": s.about, "paper": s.paper, "axes": [axis for axis in PRUNABLE if axis in s.axes]}
        for s in scores.SCORES.values()
    ]
    return {"methods": rows, "scores": known}


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


@dataclass(frozen=True)
class Choice:
    """A method as a recipe asks for it, for one source: everything that is known before a weight is read."""

    method: Method
    source: Anatomy
    """What is pruned: the source, or what turning its stream makes of it."""
    budget: int
    """Parameters that the result may have."""
    specs: Mapping[str, GateSpec]
    """The units that may go, by axis."""
    scores: Mapping[str, str]
    """Axis -> score; with `layer`'s where the rule weighs blocks by it."""
    allocation: AllocationConfig
    uniform: bool
    """Whether blocks stay alike."""
    layers: GateSpec
    """The blocks, for a rule that weighs them."""

    @property
    def finds_shape(self) -> bool:
        """Whether the method's scores decide on the shape, too."""
        return self.method.rule != "shape"

    def sequences(self, prune: PruneConfig) -> int:
        """Sequences of one measurement; none where scores look at the weights alone, or at nothing, or at what training sees anyway."""
        needs = {need for name in self.scores.values() for need in scores.SCORES[name].needs}
        if not self.specs or not needs - {"weights"} or self.method.from_training or prune.gates.start == "constant":
            return 0
        return prune.gates.calibration_sequences


_OF_A_CUT = ("scores", "cuts", "slice_every", "keep_moments", "rotate", "compensate")
"""Fields of the prune section that say something of a cut."""


def _without_a_cut(prune: PruneConfig, method: Method) -> list[Problem]:
    """What is asked for of a cut, or of training before it, where weights are drawn."""
    given = {name: getattr(prune, name) for name in _OF_A_CUT if getattr(prune, name) != type(prune).model_fields[name].default}
    given |= {"steps": prune.steps} if prune.steps else {}
    remedy = f"The method {method.name} draws its weights and cuts nothing: leave it out."
    return [Problem(f"prune.{name}", str(value), remedy) for name, value in given.items()]


def _on_the_way(prune: PruneConfig, method: Method, uniform: bool) -> list[Problem]:
    """What is wrong about what is asked for of the cuts that are made along training."""
    found, problems = str(prune.slice_every), []
    if prune.slice_every and method.learns:
        remedy = f"The method {method.name} makes one cut, at the end: leave it out."
        problems.append(Problem("prune.slice_every", found, remedy))
    elif prune.slice_every and not uniform:
        also = "leave it out" if method.rule == "adapted" else "take prune.shape uniform, or leave it out"
        problems.append(Problem("prune.slice_every", found, f"Only a model whose blocks stay alike is sliced on the way: {also}."))
    elif prune.slice_every and not prune.steps:
        remedy = "It makes training after a cut faster, and nothing is trained in 0 steps: give prune.steps, or leave it out."
        problems.append(Problem("prune.slice_every", found, remedy))
    if not prune.keep_moments and method.learns:
        remedy = f"The method {method.name} makes no cut along training: leave it out."
        problems.append(Problem("prune.keep_moments", "false", remedy))
    return problems


def choose(prune: PruneConfig, source: Anatomy, asked: Target | None) -> Choice:
    """What the prune section of a recipe means for a source. Raises `ConfigError` or `ShapeError`."""
    method, wanted = find(prune.method), asked or Target()
    if asked is not None:
        source, wanted = turned(source, asked, prune.rotate)
    axes = tuple(axis for axis in PRUNABLE if axis in (prune.axes or (method.axes if wanted.parameters is not None else PRUNABLE)))
    given = [field for field in SIZES if getattr(wanted, field) is not None]
    uniform, finds = (prune.shape or method.shape) == "uniform", method.rule != "shape" and asked is not None
    problems = []
    if method.rule == "shape" and not uniform:
        remedy = f"The method {method.name} cuts every block to one shape: leave it out, or take llm-pruner-global, adapt-pruner or saap."
        problems.append(Problem("prune.shape", "per_layer", remedy))
    if finds:
        if wanted.parameters is None or given:
            found = ", ".join(given) or "no budget"
            remedy = f"The method {method.name} finds its own shape: give target.parameters alone."
            problems.append(Problem("target", found, remedy))
        if method.rule == "adapted" and (uniform or not {"group", "neuron"}.issuperset(axes)):
            remedy = "It adapts heads and neurons to each block: leave prune.shape out, and of prune.axes name group and neuron alone."
            problems.append(Problem("prune.shape", f"{'uniform' if uniform else 'per_layer'} with {', '.join(axes)}", remedy))
        if uniform and any(prune.allocation.protect) and not set(PER_LAYER).isdisjoint(axes):
            remedy = "Blocks that stay alike lose the same: protect none, or take prune.shape per_layer."
            problems.append(Problem("prune.allocation.protect", f"{list(prune.allocation.protect)} with prune.shape uniform", remedy))
        if not uniform and "query" in axes:
            remedy = "Blocks of different sizes lose whole key/value heads with their query heads: leave query out."
            problems.append(Problem("prune.axes", ", ".join(axes), remedy))
    if method.from_training and not prune.steps and asked is not None:
        remedy = f"The method {method.name} scores by training's own gradients: give the number of steps."
        problems.append(Problem("prune.steps", "0", remedy))
    if method.draws:
        problems += _without_a_cut(prune, method)
    elif asked is not None:
        problems += _on_the_way(prune, method, uniform)
    if problems:
        raise ConfigError("this method cannot be used so", problems)
    target = source if finds else target_anatomy(source, wanted, axes)
    specs = unit_specs(source, axes) if finds else gate_specs(source, target)
    blocks = unit_specs(source, ("layer",))
    weighed = blocks if finds and method.rule == "adapted" else {}
    asked_scores = prune.scores
    if prune.rotate != "no" and "hidden" in specs and not isinstance(asked_scores, str):  # by what the axes carry, unless asked
        asked_scores = {"hidden": "first-channels", **(asked_scores or {})}
    chosen = {} if method.draws else choose_scores(method, asked_scores, {**specs, **weighed})
    more = {name for name in chosen.values() if scores.SCORES[name].needs - {"weights", "weight_gradients"}}
    if method.from_training and more:
        remedy = "Training has weights and their gradients alone: take taylor-element, taylor-vector, or a magnitude."
        raise ConfigError("this method cannot be used so", [Problem("prune.scores", ", ".join(sorted(more)), remedy)])
    budget = budget_of(source, wanted)
    if finds:
        check_budget(source, specs, budget or 0, prune.allocation, adapts=method.rule == "adapted", uniform=uniform)
    own = {name: getattr(method, name) for name in ("compare", "fluctuation") if getattr(prune.allocation, name) is None}
    allocation = prune.allocation.model_copy(update=own)
    return Choice(method, source, budget or target.parameters(), specs, chosen, allocation, uniform, blocks["layer"])
