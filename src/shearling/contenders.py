"""What is compared: names such as `taylor+compensate` or `checkpoint:PATH`, and the recipe that each comes to.

Imports no torch before a method is looked up.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shearling.budget import settings
from shearling.config import override
from shearling.data.mixture_config import PowerLawConfig
from shearling.errors import ConfigError, Problem
from shearling.planning import expected_target
from shearling.prune.config import LEARNED
from shearling.recipe import Recipe, covers, load_recipe
from shearling.sources import Source

AS_IT_STANDS, DEFAULT, CHECKPOINT, SCRATCH = "recipe", "default", "checkpoint:", "from-scratch"
SUFFIXES = ("compensate", "rotate", "lora", "distill")
"""What can be done around a method's cut: its output projections fitted, the stream turned first, recovery through adapters, or from the
source's predictions beside the text."""
OF_ONE_METHOD = (
    *("method", "scores", "shape", "allocation", "steps", "cuts", "share", "slice_every", "keep_moments"),
    *("rotate", "compensate"),
)
"""Fields of a recipe's prune section that are its own method's, and so no other's."""


@dataclass(frozen=True)
class Contender:
    """One way to a smaller model."""

    name: str
    """As it is asked for; of a checkpoint with its whole path."""
    label: str
    """In tables and names of folders."""
    method: str | None = None
    """A name of the registry; None for the recipe as it stands, and for a checkpoint."""
    suffixes: tuple[str, ...] = ()
    checkpoint: str | None = None
    """Where another tool's model lies."""

    @property
    def folder(self) -> str:
        """The label as a part of a file's name."""
        return re.sub(r"[^\w.+-]", "-", self.label)


def contenders(names: Sequence[str]) -> list[Contender]:
    """Those of `names`, each once; raise one `ConfigError` for all that are none, with suggestions, or that could not be told apart."""
    from shearling.prune.methods import listing

    known = [AS_IT_STANDS, DEFAULT, *(entry["name"] for entry in listing()["methods"])]
    found: dict[str, Contender] = {}
    problems = [] if names else [Problem("methods", "nothing", f"Name one or more of {', '.join(known)}, {CHECKPOINT}PATH.")]
    for name in dict.fromkeys(name.strip() for name in names):
        contender = _checkpoint(name) if name.startswith(CHECKPOINT) else _method(name, known, problems)
        if contender is None:
            continue
        if (other := found.get(contender.folder.casefold())) and other.name != contender.name:
            remedy = f"{other.name} would have the same name in the table: rename one of the folders."
            problems.append(Problem("methods", repr(name), remedy))
        found[contender.folder.casefold()] = contender
    if problems:
        raise ConfigError("these cannot be compared", problems)
    return list(found.values())


def _checkpoint(name: str) -> Contender:
    place = name.removeprefix(CHECKPOINT)
    path = Path(place).expanduser()
    place = str(path.absolute()) if path.exists() else place
    return Contender(f"{CHECKPOINT}{place}", Path(place).stem if place.endswith(".gguf") else Path(place).name or place, checkpoint=place)


def _method(name: str, known: Sequence[str], problems: list[Problem]) -> Contender | None:
    """A method with its suffixes; None, and the problems, where it is none."""
    method, *suffixes = name.split("+")
    before = len(problems)
    if method not in known:
        close = difflib.get_close_matches(method, known, n=1)
        remedy = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(known)}, and {CHECKPOINT}PATH."
        problems.append(Problem("methods", repr(name), remedy))
    for suffix in suffixes:
        if suffix not in SUFFIXES:
            close = difflib.get_close_matches(suffix, SUFFIXES, n=1)
            remedy = (
                f"Did you mean '{method}+{close[0]}'?" if close else f"What can follow a method is {', '.join(f'+{s}' for s in SUFFIXES)}."
            )
            problems.append(Problem("methods", repr(name), remedy))
    if suffixes and method in (AS_IT_STANDS, DEFAULT, SCRATCH):
        remedy = "Random weights have nothing to turn, fit or adapt." if method == SCRATCH else "It stands as it is written."
        problems.append(Problem("methods", repr(name), f"{remedy} Leave out what follows the +."))
    if len(problems) > before:
        return None
    ordered = tuple(suffix for suffix in SUFFIXES if suffix in suffixes)
    label = "+".join((method, *ordered))
    return Contender(label, label, None if method in (AS_IT_STANDS, DEFAULT) else method, ordered)


@dataclass(frozen=True)
class Setting:
    """What all rows of a comparison have in common."""

    recipe: Recipe
    """With what was set on the command line."""
    source: Source
    sets: tuple[str, ...]
    """The assignments of the command line."""
    tokens: int
    """That a row may spend in all."""
    scratch_tokens: int
    """The same of the row that begins with random weights."""
    recover: bool = True
    """Whether rows are recovered with what is left of their tokens."""

    def tokens_of(self, contender: Contender) -> int:
        """What this contender's rows may spend."""
        return self.scratch_tokens if contender.method == SCRATCH else self.tokens

    @property
    def batch_tokens(self) -> int:
        """Of one step of recovery."""
        return self.recipe.train.batch_size * self.recipe.data.sequence_length


def recipe_tokens(recipe: Recipe) -> int:
    """Tokens that a recipe spends: its steps, and those on which scores are measured once."""
    pruning = recipe.prune.steps * recipe.prune.batch_size + recipe.prune.gates.calibration_sequences if recipe.target else 0
    return (pruning + recipe.train.steps * recipe.train.batch_size) * recipe.data.sequence_length


def recipe_of(contender: Contender, setting: Setting, seed: int, rate: float | None = None, **more: Any) -> Recipe:
    """The recipe of one row, but for its steps of recovery, which hang on what its pruning spends.

    Args:
        contender: what the row is of.
        setting: what all rows have in common.
        seed: of the row. The text keeps that of the recipe.
        rate: peak learning rate of recovery; left out, the recipe's.
        more: whole sections in the place of the recipe's: `data`, and of a checkpoint's row `mixture`.
    """
    values = {**setting.recipe.model_dump(mode="json"), "seed": seed, **more}
    length, assignments = setting.recipe.data.sequence_length, [] if rate is None else [f"train.learning_rate={rate!r}"]
    if contender.name == DEFAULT:
        train = {name: values["train"][name] for name in ("batch_size", "microbatches", "evaluate_every")}
        values |= {"tokens": setting.tokens, "prune": {}, "train": train}
    if contender.method is not None or contender.checkpoint is not None:
        method = contender.method or "random"  # of a checkpoint nothing is cut
        prune = {field: value for field, value in values["prune"].items() if field not in OF_ONE_METHOD}
        if method != LEARNED:
            prune["gates"] = {field: value for field, value in prune["gates"].items() if field != "start"}
        values["prune"] = {**prune, "method": method}
        batch = setting.recipe.prune.batch_size * length
        assignments += settings(method, setting.tokens_of(contender), batch, length, "compensate" in contender.suffixes)
    if contender.checkpoint is not None:
        values |= {"source": contender.checkpoint, "target": None}
    elif contender.method is not None:
        sets = [text for text in setting.sets if covers(("prune",), text.partition("=")[0].strip())]
        around: dict[str, list[str]] = {"compensate": [], "rotate": ["prune.rotate=untied"]}
        around |= {name: [f"train.{name}={{}}"] if getattr(setting.recipe.train, name) is None else [] for name in ("lora", "distill")}
        assignments += [*(text for suffix in contender.suffixes for text in around[suffix]), *sets]
    recipe = load_recipe(override(values, assignments))
    return _same_size(contender, setting, recipe)


def _same_size(contender: Contender, setting: Setting, recipe: Recipe) -> Recipe:
    """The recipe with the target's number of parameters for a budget, where its method cannot take the sizes or would end with more."""
    source, target = setting.source, recipe.target
    if contender.method is None or target is None or target.parameters is not None:
        return recipe
    from shearling.prune.methods import find

    method, plain = find(contender.method), recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"rotate": "no"})})
    wanted, changed = expected_target(source, plain), expected_target(source, recipe)
    axes = {axis for axis, size in wanted.sizes.items() if size != source.anatomy.sizes[axis]}
    if method.rule == "shape" and axes <= set(method.axes) and changed.parameters() <= wanted.parameters():
        return recipe
    return recipe.model_copy(update={"target": type(target)(parameters=wanted.parameters())})


def reference_of_checkpoint(setting: Setting, source_losses: dict[str, float]) -> dict[str, Any]:
    """The mixture section for a model that is not cut here: towards the reference that all other rows have, as plain values."""
    mixture = setting.recipe.mixture.model_dump(mode="json")
    given = setting.recipe.mixture.reference
    if given == "source":
        mixture["reference"] = {domain: loss for domain, loss in source_losses.items() if domain != "mean"}
    elif isinstance(given, PowerLawConfig) and given.parameters is None:
        mixture["reference"]["parameters"] = float(expected_target(setting.source, setting.recipe).parameters())
    return mixture


def most_pruning_tokens(recipe: Recipe, source: Source) -> int:
    """Tokens that the pruning of a recipe spends at most: its steps, measurements of scores, turning, and compensation.

    A method that adapts blocks measures until the budget is met, which is counted as its inner steps and one a cut.
    Raises `ConfigError` or `ShapeError` where source and recipe do not go together.
    """
    from shearling.prune.methods import choose

    prune = recipe.prune
    choice = choose(prune, source.anatomy, recipe.target)
    if not choice.specs or choice.method.draws:
        return 0
    measurements = 1 if choice.method.learns and prune.steps else prune.cuts
    measurements += prune.allocation.inner_steps if choice.method.rule == "adapted" else 0
    sequences = prune.steps * prune.batch_size + measurements * choice.sequences(prune) + prune.compensate
    sequences += prune.gates.calibration_sequences if prune.rotate != "no" else 0
    return sequences * recipe.data.sequence_length
