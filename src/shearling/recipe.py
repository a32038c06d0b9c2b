"""The recipe: everything that a run needs to know, as one strict configuration. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from shearling.budget import filled
from shearling.config import Config, override, parse, read_yaml
from shearling.data.config import DataConfig
from shearling.data.mixture_config import MixtureConfig
from shearling.data.remote import is_url
from shearling.prune.config import LEARNED, LEAST_FITTED, AllocationConfig, GateConfig
from shearling.shapes import Target
from shearling.sources import open_source
from shearling.train.config import Count, Fraction, RuntimeConfig, StageConfig, TeacherConfig, TrainConfig


class PruneConfig(StageConfig):
    """Targeted structured pruning: gates and weights trained together until the source has the target's shape."""

    method: str = LEARNED
    """How to choose what to keep; `shearling methods` lists them."""
    scores: str | dict[str, str] | None = None
    """Scores in the place of the method's own: one for all axes, or {axis: score}; `shearling methods` lists them."""
    axes: Annotated[list[Literal["layer", "hidden", "group", "query", "neuron"]], Field(min_length=1)] | None = None
    """What may be pruned: [layer] is depth pruning. Left out, what the target names, or, under a budget, what the method prunes."""
    shape: Literal["uniform", "per_layer"] | None = None
    """Under a budget: whether blocks stay alike, or get sizes of their own (and the checkpoint our model class); else the method's."""
    allocation: AllocationConfig = AllocationConfig()
    """How a method that finds its own shape spreads a budget."""
    steps: Annotated[int, Field(ge=0)] = 3200
    """Optimizer steps: of learning gates, or between and after the cuts of other methods (0 if left out); with 0, scores decide alone."""
    cuts: Count = 1
    """In how many cuts a method that does not learn gates reaches the target, each with scores of its own."""
    share: Literal["constant", "linear"] = "constant"
    """Steps after each cut: equally many, or growing linearly (Adapt-Pruner's)."""
    slice_every: Annotated[int, Field(ge=0)] = 0
    """Every how many cuts the model in training becomes smaller itself, moments included, where blocks stay alike: the same results,
    faster. 0: only at the end."""
    keep_moments: bool = True
    """Keep Adam's moments of what is left at every cut; false: they begin anew (as in Adapt-Pruner's code)."""
    batch_size: Count = 32
    """Sequences of one step."""
    microbatches: Count = 8
    """Forward and backward passes that make up one step; fixed, so that results do not hang on the machine."""
    warmup: Fraction = 0.1
    """Share of the steps over which the learning rate rises."""
    evaluate_every: Count = 50
    """Steps between held-out evaluations, each followed by an update of the mixture; there is one after the last step, too."""
    rotate: Literal["no", "tied", "untied"] = "no"
    """Turn the residual stream to its principal axes first, so that hidden drops the directions that carry least (unless prune.scores
    says otherwise): a tied head stays tied, as nearly as can be, or gets a matrix of its own, which counts as parameters."""
    compensate: Annotated[int, Field(ge=0)] = 0
    """Sequences on which what is kept of heads and neurons is fitted to stand in for what goes, shared among the cuts; 0: it is not."""
    gates: GateConfig = GateConfig()
    """The gates and their constraints."""

    @model_validator(mode="before")
    @classmethod
    def _no_steps_but_for_learning(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("method", LEARNED) != LEARNED:
            return {"steps": 0, **values}
        return values

    @model_validator(mode="after")
    def _cuts_fit(self) -> PruneConfig:
        if self.cuts > 1 and self.method == LEARNED:
            raise ValueError(f"the method {LEARNED} narrows at every step: leave cuts ({self.cuts}) out")
        if self.slice_every and self.distill is not None and self.distill.states:
            raise ValueError(f"states are compared with the source's block by block: leave slice_every ({self.slice_every}) out")
        if 0 < self.compensate < LEAST_FITTED * self.cuts:
            raise ValueError(
                f"each of the cuts ({self.cuts}) needs {LEAST_FITTED} sequences to compensate on, so {LEAST_FITTED * self.cuts} in all"
            )
        if self.steps and self.cuts > self.steps:
            raise ValueError(f"cuts ({self.cuts}) must not be more than steps ({self.steps})")
        return self


class EvaluateConfig(Config):
    """What is measured of source and result."""

    batch_size: Count = 8
    """Sequences of one forward pass of an evaluation."""
    speed: bool = True
    """Measure tokens/s of generation and prefill, source and result side by side."""
    prompt_tokens: Count = 256
    """Length of the prompt in the measurement of speed."""
    generate_tokens: Count = 32
    """Tokens generated in the measurement of speed."""


class ExportConfig(Config):
    """The published checkpoint."""

    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    """Type of the weights of `model/`; source: as the source's config says."""
    pad_to_uniform: bool = False
    """Where blocks differ in size, write `padded/`, too: a stock checkpoint of the same function, padded with zeros."""


class Recipe(Config):
    """One shearing: source, target, data, and the two stages of training."""

    source: str = Field(min_length=1)
    """A Hugging Face directory, a hub id, or a GGUF file."""
    target: Target | None = None
    """The shape to shear to; left out, nothing is pruned and the source is trained further."""
    tokens: Count | None = None
    """What pruning and recovery may spend in all: what `prune` and `train` leave out of method, steps, rates, batch and distillation then
    follows from it, see docs/recipes.md; left out, they have their own defaults."""
    data: DataConfig
    """Text by domain."""
    mixture: MixtureConfig = MixtureConfig()
    """How the shares of the domains move (dynamic batch loading)."""
    teacher: TeacherConfig | None = None
    """The model that stages with `distill` learn from; left out, the source as it is."""
    prune: PruneConfig = PruneConfig()
    """The pruning stage."""
    train: TrainConfig = TrainConfig()
    """Continued pretraining of the cut model."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Measurements."""
    export: ExportConfig = ExportConfig()
    """The published checkpoint."""
    runtime: RuntimeConfig = RuntimeConfig()
    """How to compute."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    """Everything random follows from it: data order, gate noise, held-out split."""

    @model_validator(mode="after")
    def _references_name_every_domain(self) -> Recipe:
        given = self.mixture.reference
        if self.data.domains and isinstance(given, dict) and set(given) != set(self.data.domains):
            raise ValueError(
                f"mixture.reference has losses for {', '.join(sorted(given))} where the domains are {', '.join(sorted(self.data.domains))}"
            )
        return self

    @model_validator(mode="after")
    def _shares_are_possible(self) -> Recipe:
        if self.data.domains:  # else it is prepared text that names them
            self.mixture.bounds(list(self.data.domains))
            for config in ([] if self.target is None else [self.prune]) + [self.train]:
                self.mixture.update_sequences(config.steps, config.batch_size, config.evaluate_every, len(self.data.domains))
        return self

    @model_validator(mode="after")
    def _a_teacher_has_pupils(self) -> Recipe:
        found = [stage.distill for stage in (self.prune, self.train) if stage.distill is not None]
        if self.teacher is not None and not found:
            raise ValueError("there is a teacher, and nothing learns from it: set prune.distill or train.distill, or leave teacher out")
        if self.teacher is not None and self.teacher.model is not None and any("blocks" in distill.states for distill in found):
            raise ValueError("blocks are compared with the source's own: leave teacher.model out, or set distill.blocks to 0")
        return self

    @model_validator(mode="after")
    def _something_decides(self) -> Recipe:
        if self.target is not None and self.prune.steps == 0 and self.prune.gates.start == "constant":
            raise ValueError("with prune.steps 0 the scores decide alone: leave prune.gates.start out")
        return self


RecipeLike = Recipe | Mapping[str, Any] | str | Path
"""A recipe, its plain values, or the path of its YAML file."""


def load_recipe(recipe: RecipeLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; `overrides` are `a.b=c` assignments.

    Relative paths start from the recipe's folder; those that are given as overrides, from the current one.

    Raises one `ConfigError` that names every problem with field, value found and remedy.
    """
    if isinstance(recipe, Recipe):
        values, base, where = recipe.model_dump(mode="json"), Path.cwd(), "recipe"
    elif isinstance(recipe, Mapping):
        values, base, where = dict(recipe), Path.cwd(), "recipe"
    else:
        values, base, where = read_yaml(recipe), Path(recipe).resolve().parent, str(recipe)
    overridden = {assignment.partition("=")[0].strip() for assignment in overrides}

    def start(field: str) -> Path:
        return Path.cwd() if covers(overridden, field) else base

    def opened(model: str, field: str) -> str:
        path = start(field) / Path(model).expanduser()
        return str(path.absolute()) if path.exists() or model.startswith((".", "/", "~")) else model

    given = override(values, overrides)
    parsed = parse(Recipe, filled(given, lambda: open_source(opened(str(given.get("source")), "source")).anatomy.sizes["hidden"]), where)
    places = {name: getattr(parsed.data, name) for name in ("prepared", "cache") if f"data.{name}" in overridden}
    here = {name: str(Path.cwd() / Path(place).expanduser()) for name, place in places.items() if place and not is_url(place)}
    data = parsed.data.model_copy(update=here).resolved(Path.cwd() if "data.root" in overridden else base)
    changed: dict[str, Any] = {
        "source": opened(parsed.source, "source"),
        "data": data,
        "mixture": parsed.mixture.resolved(lambda field: start(f"mixture.{field}")),
    }
    if parsed.teacher is not None and parsed.teacher.model is not None:
        changed["teacher"] = parsed.teacher.model_copy(update={"model": opened(parsed.teacher.model, "teacher.model")})
    for name in ("prune", "train"):
        stage = getattr(parsed, name)
        if stage.distill is not None and stage.distill.cache is not None:
            cache = str((start(f"{name}.distill.cache") / Path(stage.distill.cache).expanduser()).absolute())
            changed[name] = stage.model_copy(update={"distill": stage.distill.model_copy(update={"cache": cache})})
    return parsed.model_copy(update=changed)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every field, so that reading it gives the same recipe anywhere on this machine."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


FREE_SECTION = "runtime"
"""The section that says how to compute. Its fields may differ from one try to the next, unasked, ..."""
NOT_FREE = ("runtime.device", "runtime.precision")
"""... but for these, on which the numbers hang."""
FREE_PLACES = ("data.prepared", "data.cache", "data.cache_gib", "prune.distill.cache", "train.distill.cache")
"""Where prepared text and predictions lie: they may move, as what they hold is compared with what it should be."""
FIXED = ("source", "target", "data", "seed")
"""What everything in a run directory was made from; where one of them differs, only a run begun afresh is right."""


def differences(before: Recipe, after: Recipe) -> list[tuple[str, str, str]]:
    """(field, before, after) of every field that differs and bears on the result; how to compute does not (`is_free`)."""
    old, new = _flat(before.model_dump(mode="json")), _flat(after.model_dump(mode="json"))
    keys = sorted(set(old) | set(new))
    return [(key, _shown(old, key), _shown(new, key)) for key in keys if old.get(key) != new.get(key) and not is_free(key)]


def is_free(field: str) -> bool:
    """Whether a field may differ from one try of a run to the next without being accepted: how to compute, and no more."""
    return covers((FREE_SECTION, *FREE_PLACES), field) and field not in NOT_FREE


def covers(names: Iterable[str], field: str) -> bool:
    """Whether one of `names` is the field, or one of the sections that it lies in: `train` covers `train.steps`."""
    return any(field == name or field.startswith(f"{name}.") for name in names)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {path: leaf for key, value in values.items() for path, leaf in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "nothing"
