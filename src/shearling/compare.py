"""`shearling compare`: methods from one source, to as many parameters, with the same text, tokens and recovery, a row in a run of its own.

In the folder of a comparison:

    settings.json     what all rows have in common, and what is compared; a command that would make rows unequal is refused by it
    text/             a run that prepares the text and measures the source, once for all rows
    NAME-SEED/        the run of a row; NAME-SEED-lrRATE/ where learning rates are tried, which go on from the one cut in NAME-SEED/
    rows/*.json       what is known of each row that is done; its run may then be deleted
    comparison.json, comparison.md, comparison.png

A row is cut first, then recovered with what is left of its tokens, in whole steps.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shearling.comparison import best_rate, summarise, table
from shearling.contenders import (
    SCRATCH,
    Contender,
    Setting,
    contenders,
    most_pruning_tokens,
    recipe_of,
    recipe_tokens,
    reference_of_checkpoint,
)
from shearling.data.elsewhere import read_prepared
from shearling.errors import ArtifactError, ConfigError, NumericsError, OutputError, Problem, ProblemsError, ShapeError
from shearling.io.files import (
    RunLock,
    publish_directory,
    read_json,
    remove_tree,
    stage_directory,
    storage_errors,
    sweep_temporary,
    write_atomic,
)
from shearling.planning import expected_target
from shearling.recipe import Recipe, RecipeLike, differences, load_recipe
from shearling.run import stage_result
from shearling.show import Shielded, Show, Silent
from shearling.sources import Source, open_source
from shearling.train.log import METRICS_FILE, read_metrics
from shearling.wiring import check_recipe, through
from shearling.world import World

FORMAT = 1
SETTINGS_FILE, JSON_FILE, TABLE_FILE, PICTURE_FILE = "settings.json", "comparison.json", "comparison.md", "comparison.png"
TEXT, ROWS = "text", "rows"
FEW_POINTS = 3
"""Held-out evaluations of a recovery below which its curve says little."""


def compare(
    recipe: RecipeLike,
    out: str | Path,
    methods: Sequence[str],
    *,
    seeds: int = 1,
    tokens: int | None = None,
    learning_rates: Sequence[float] = (),
    scratch_tokens: int | None = None,
    cuts_only: bool = False,
    overrides: Sequence[str] = (),
    show: Show | None = None,
) -> dict[str, Any]:
    """Methods side by side, from one source to as many parameters, with the same text, tokens in all, and recovery.

    Called again, it goes on where it stopped: rows that are done are not done again, methods and seeds that are new are added.

    Args:
        recipe: path of a YAML file, plain values, or a `Recipe`: source, target, text, recovery, and how to compute.
        out: folder of the comparison; made if it is not there.
        methods: names of `shearling.methods`, also with `+compensate`, `+rotate`, `+lora`, `+distill` behind them; `recipe`, which is
            its own prune section as it stands; `default`, what the target and the tokens make of it by themselves; `from-scratch`;
            `checkpoint:PATH`, a model that another tool made, which is recovered with all tokens.
        seeds: rows of each, with the recipe's seed and those after it. The held-out text is the same for all.
        tokens: that a row may spend in all, on scores, gates, stages, compensation and recovery; left out, what the recipe spends.
        learning_rates: of recovery, each tried on the first seed; the other seeds take the one that ended lowest.
        scratch_tokens: in the place of `tokens` for `from-scratch`, to see how long it takes to come to where the others end.
        cuts_only: recover nothing: what a cut costs by itself. `tokens` then says what those that train while they cut go by.
        overrides: `a.b=c` assignments applied to the recipe; those of the prune section hold for every method.
        show: where progress goes; nowhere if left out.

    Returns:
        What `comparison.json` holds: `source`, `contenders` (by final loss, best first), `rows`. It has `picture_error` where the picture
        could not be drawn.

    Raises:
        ConfigError: a method, option or recipe is wrong, or the folder was begun with others; all of it before the first row.
        OutputError: `out` is in use or something else. Stopped: a signal asked to stop. And what `run` raises.
    """
    loaded, path = load_recipe(recipe, overrides), Path(out).absolute()
    shown: Show = Shielded(show) if show is not None else Silent()
    asked = contenders(methods)
    source = open_source(loaded.source)
    spend = recipe_tokens(loaded) if tokens is None else tokens
    _check_options(loaded, asked, seeds, spend, learning_rates, scratch_tokens, overrides)
    setting = Setting(loaded, source, tuple(overrides), spend, scratch_tokens or spend, recover=not cuts_only)
    for note in _check_rows(setting, asked):
        shown.note(note)
    with _entered(path):
        options = {
            "tokens": spend,
            "learning_rates": list(learning_rates),
            "scratch_tokens": scratch_tokens,
            "seeds": seeds,
            "cuts_only": cuts_only,
        }
        options["methods"] = [contender.name for contender in asked]
        recorded = _match(path, loaded, source, options)
        before = loaded.prune.steps * loaded.prune.batch_size * loaded.data.sequence_length
        likely = _recovering(loaded, max(1, (spend - before) // setting.batch_tokens))  # by which repeated text is told
        report = through("source", likely, path / TEXT, (), False, (), shown, page=False)
        measured = {**report["source"], "loss": report["loss"]["source"], "loss_error": report["loss_error"]["source"]}
        comparison = _Comparison(path, setting, measured, {**options, **recorded}, shown)
        comparison.make(asked, seeds, learning_rates)
        return comparison.publish(picture=True)


class _Comparison:
    """The rows of one folder, as far as they are done."""

    def __init__(self, path: Path, setting: Setting, source: Mapping[str, Any], about: Mapping[str, Any], show: Show) -> None:
        self.path, self.setting, self.source, self.about, self.show = path, setting, dict(source), about, show
        data = setting.recipe.data
        self._data = {
            "prepared": data.prepared or str(path / TEXT / "data"),
            "domains": {name: {"weight": domain.weight} for name, domain in data.domains.items()},
            "root": os.path.abspath(os.sep),  # of no account, and the same wherever the folder is moved to
            **data.model_dump(mode="json", include={"sequence_length", "attend", "cache", "cache_gib"}),
        }

    def make(self, asked: Sequence[Contender], seeds: int, rates: Sequence[float]) -> None:
        """Make every row that is missing: all of the first seed, then those of the others."""
        first = self.setting.recipe.seed
        count, number = len(asked) * (max(len(rates), 1) + seeds - 1), 0
        best: dict[str, float | None] = {}
        for seed in range(first, first + seeds):
            for contender in asked:
                trials: Sequence[float | None] = (rates or [None]) if seed == first else [best[contender.name]]
                if rates and trials == [None]:
                    self.show.note(f"{contender.label}: failed at every learning rate, so it has no row of seed {seed}")
                    number += 1
                    continue
                for rate in trials:
                    number += 1
                    at = f", seed {seed}" + ("" if rate is None else f", learning rate {rate:g}")
                    self._row(f"row {number} of {count}: {contender.label}{at}", contender, seed, rate)
                if seed == first:
                    own = [row for row in self.rows() if row["name"] == contender.name and row["seed"] == seed]
                    best[contender.name] = best_rate(own) if rates else None
        if all("failed" in row for row in self.rows()):
            raise NumericsError("every row failed:\n" + "\n".join(f"  - {row['label']}: {row['failed']}" for row in self.rows()))

    def publish(self, *, picture: bool = False) -> dict[str, Any]:
        """Write what the rows that are done say; with `picture` draw it, too."""
        rows = self.rows()
        found: dict[str, Any] = {"shearling": version("shearling"), **self.about, "source": self.source}
        found |= {**summarise(rows, self.source), "rows": rows}
        if picture:
            try:
                from shearling.comparison_picture import draw

                write_atomic(self.path / PICTURE_FILE, draw(found))
            except Exception as error:
                found["picture_error"] = f"{type(error).__name__}: {error}"
                self.show.note(f"{PICTURE_FILE} could not be drawn ({found['picture_error']}); the numbers are not affected")
        write_atomic(self.path / JSON_FILE, json.dumps(found, indent=1) + "\n")
        write_atomic(self.path / TABLE_FILE, table(found))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """What is known of every row that is done, in the order of their names."""
        return [dict(read_json(path)) for path in sorted((self.path / ROWS).glob("*.json"))]

    def _row(self, title: str, contender: Contender, seed: int, rate: float | None) -> None:
        """Make one row, unless it is done. Numbers that go wrong, and a shape that its method does not come to, are its result."""
        cut = self.path / f"{contender.folder}-{seed}"
        place = cut if rate is None else self.path / f"{cut.name}-lr{rate:g}"
        record = self.path / ROWS / f"{place.name}.json"
        if record.exists():
            self.show.note(f"{title}: done before")
            return
        self.show.note(title)
        about = {"name": contender.name, "label": contender.label, "seed": seed, "learning_rate": rate, "folder": place.name}
        about["checkpoint"] = contender.checkpoint is not None
        try:
            found = about | self._made(contender, seed, rate, cut, place)
        except (NumericsError, ShapeError) as error:
            found = about | {"failed": str(error)}
            self.show.note(f"{title} failed, and the others go on: {error}")
        write_atomic(record, json.dumps(found, indent=1) + "\n")
        for run in {cut, place}:  # nothing is gone on with from there
            remove_tree(run / "checkpoints")
        self.publish()

    def _made(self, contender: Contender, seed: int, rate: float | None, cut: Path, place: Path) -> dict[str, Any]:
        """Cut in the run at `cut`, recover in the one at `place`, and say what came of it."""
        more: dict[str, Any] = {"data": self._data}
        if contender.checkpoint is not None:
            more["mixture"] = reference_of_checkpoint(self.setting, self.source["loss"])
        given, batch = self.setting.tokens_of(contender), self.setting.batch_tokens
        recipe = _recovering(recipe_of(contender, self.setting, seed, None, **more), given // batch)
        if stage_result(cut, "prune") is None:
            through("prune", recipe, cut, (), False, (), self.show, page=False)
        pruned = stage_result(cut, "prune")
        assert pruned is not None
        spent = pruned["tokens"]
        steps = (given - spent) // batch if self.setting.recover else 0
        if steps < 1 and self.setting.recover:
            remedy = f"Give the rows more tokens (--tokens), in another --out, or leave {contender.label} out."
            problem = Problem("tokens", f"{spent:,} spent on pruning of {given:,}", remedy)
            raise ConfigError(f"{contender.label}: nothing is left for recovery", [problem])
        if place != cut and not place.exists():
            _branch(cut, place)
        chosen = recipe.train.learning_rate if rate is None else rate
        report = through("evaluate", _recovering(recipe, steps, learning_rate=chosen), place, (), False, ["train"], self.show)
        return _measured(report, place)


def _recovering(recipe: Recipe, steps: int, **more: float) -> Recipe:
    """The recipe with so many steps of recovery, and `more` of its fields."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps, **more})})


def _measured(report: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """What a row says of its run; `curve`: [tokens in all, {domain: held-out loss}] from after the cut to the end."""
    spent = report["tokens"]["prune"]
    lines = [line for line in read_metrics(place) if line["stage"] == "train" and line.get("heldout")]
    return {
        "parameters": report["model"]["parameters"],
        "shape": "by block" if isinstance(report["model"]["shape"]["intermediate_size"], list) else "alike",
        "sizes": report["model"]["shape"],
        "pruning_tokens": spent,
        "tokens": sum(report["tokens"].values()),
        "seconds": {stage: report["seconds"][stage] for stage in ("prune", "train")},
        "loss": {"cut": report["loss"]["pruned"], "final": report["loss"]["final"]},
        "loss_error": {"cut": report["loss_error"]["pruned"], "final": report["loss_error"]["final"]},
        "speed": report.get("speed"),
        "curve": [[spent + line.get("tokens", 0), line["heldout"]] for line in lines],
    }


def _branch(cut: Path, place: Path) -> None:
    """A run at `place` that goes on from the cut of the one at `cut`. Weights are linked if they can be: none is ever written in place."""
    staged = stage_directory(place)
    with storage_errors(place):
        for name in ("recipe.yaml", METRICS_FILE, "plan.json"):
            with suppress(FileNotFoundError):
                shutil.copyfile(cut / name, staged / name)
        shutil.copytree(cut / "stages", staged / "stages")
        shutil.copytree(cut / "pruned", staged / "pruned", copy_function=_link)
    publish_directory(staged, place)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
    return target


def _check_options(
    recipe: Recipe,
    asked: Sequence[Contender],
    seeds: int,
    tokens: int,
    rates: Sequence[float],
    scratch_tokens: int | None,
    overrides: Sequence[str],
) -> None:
    """Raise one `ConfigError` for all that is wrong about the options by themselves."""
    problems = []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        remedy = "Start it without a launcher; single rows can be made on several processes with `shearling run`."
        problems.append(Problem("processes", os.environ["WORLD_SIZE"], remedy))
    if not 1 <= seeds <= 2**32 - recipe.seed:
        problems.append(Problem("seeds", str(seeds), "At least 1, and no seed of 2^32 or more."))
    if tokens < 1:
        problems.append(Problem("tokens", str(tokens), "Give how many tokens each row may spend."))
    problems += [Problem("learning_rates", str(rate), "Give rates above 0.") for rate in rates if not 0 < rate < float("inf")]
    if len({f"{rate:g}" for rate in rates}) < len(rates):
        problems.append(Problem("learning_rates", ", ".join(map(str, rates)), "Give each once; six digits count."))
    if scratch_tokens is not None and not any(contender.method == SCRATCH for contender in asked):
        problems.append(Problem("scratch_tokens", str(scratch_tokens), f"It is for the method {SCRATCH}: name that, or leave it out."))
    if scratch_tokens is not None and scratch_tokens < 1:
        problems.append(Problem("scratch_tokens", str(scratch_tokens), "Give how many tokens it may spend."))
    if any(text.partition("=")[0].strip() == "prune.method" for text in overrides):
        problems.append(Problem("--set", "prune.method", "The methods are named with --methods; `recipe` has that of the recipe."))
    if recipe.target is None and any(contender.checkpoint is None for contender in asked):
        problems.append(Problem("target", "nothing", "Give the recipe a target, so that there is something to compare."))
    if problems:
        raise ConfigError("this cannot be compared", problems)


def _check_rows(setting: Setting, asked: Sequence[Contender]) -> list[str]:
    """Raise for everything that is known to be wrong about any row before the first is made; returns what the user should know."""
    problems, kinds, notes = [], set(), []
    wanted = expected_target(setting.source, setting.recipe).parameters()
    for contender in asked:
        try:
            recipe = recipe_of(contender, setting, setting.recipe.seed)
            opened = setting.source if contender.checkpoint is None else None
            source, _ = check_recipe(recipe, "evaluate", World(), False, True, opened)
            source.check()
            needed = most_pruning_tokens(recipe, source) + (setting.batch_tokens if setting.recover else 0)
            if needed > (given := setting.tokens_of(contender)):
                besides = " and one step of recovery take" if setting.recover else " takes"
                remedy = f"Its pruning{besides} up to {needed:,}: give more, or leave it out."
                raise ConfigError("too few tokens", [Problem("tokens", f"{given:,}", remedy)])
            steps = (given - needed) // setting.batch_tokens + 1 if setting.recover else 0
            load_recipe(_recovering(recipe, steps))  # on which a budget of evaluations hangs
            if contender.checkpoint is not None:
                _check_vocabulary(source, setting.source)
                notes += _size_notes(contender, source, wanted, setting.recipe)
        except ProblemsError as error:
            own = error.problems or (Problem("recipe", error.headline, "Mend it, or leave this method out."),)
            problems += [Problem(f"{contender.label}: {problem.field}", problem.found, problem.remedy) for problem in own]
            kinds.add(type(error))
    if problems:
        kind = kinds.pop() if len(kinds) == 1 else ConfigError
        raise kind("these rows cannot be made, so none is", problems)
    points = (setting.tokens - 1) // setting.batch_tokens // setting.recipe.train.evaluate_every
    if points < FEW_POINTS and setting.recover:
        every = setting.recipe.train.evaluate_every
        notes.append(f"train.evaluate_every is {every}, so the curves have few points; --set train.evaluate_every=... gives them more")
    return notes


def _check_vocabulary(checkpoint: Source, source: Source) -> None:
    """Raise `ArtifactError` where a checkpoint cannot be given the source's text."""
    from shearling.data.encode import tokenizer_fingerprint

    remedy, problems = "Only models with the source's vocabulary have losses that can be compared: leave it out.", []
    if tokenizer_fingerprint(checkpoint.tokenizer()) != tokenizer_fingerprint(source.tokenizer()):
        problems.append(Problem("tokenizer", "another than the source's", remedy))
    if (own := checkpoint.anatomy.sizes["vocab"]) < (due := source.anatomy.sizes["vocab"]):
        problems.append(Problem("vocab_size", f"{own} where the source has {due}", remedy))
    if problems:
        raise ArtifactError(f"{checkpoint.name}: another vocabulary", problems)


def _size_notes(contender: Contender, checkpoint: Source, wanted: int, recipe: Recipe) -> list[str]:
    own = checkpoint.anatomy.parameters()
    if recipe.target is None or own <= wanted:
        return []
    return [f"{contender.label} has {own:,} parameters, more than the target's {wanted:,}"]


@contextmanager
def _entered(path: Path) -> Iterator[None]:
    """Hold the folder of a comparison; raise `OutputError` where it is another's, or something else."""
    if path.is_dir() and not (path / SETTINGS_FILE).exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise OutputError(f"{path}: exists and is not a comparison. Choose another --out, or an empty folder.")
    if os.path.lexists(path) and not path.is_dir():
        raise OutputError(f"{path}: is a file. Choose another --out.")
    with RunLock(path / ".lock"):
        with storage_errors(path):
            (path / ROWS).mkdir(exist_ok=True)
        sweep_temporary(path)
        sweep_temporary(path / ROWS)
        yield


def _match(path: Path, recipe: Recipe, source: Source, options: dict[str, Any]) -> dict[str, Any]:
    """Record what all rows have in common, or raise `ConfigError` where it differs from what those of the folder have; returns it."""
    values: dict[str, Any] = {"format": FORMAT, "recipe": recipe.model_dump(mode="json"), **options}
    values |= {"source": source.fingerprint(), "text": read_prepared(recipe.data.prepared)["fingerprint"] if recipe.data.prepared else None}
    file = path / SETTINGS_FILE
    if file.exists():
        before = read_json(file)
        if not isinstance(before, dict) or before.get("format") != FORMAT:
            found = f"format {before.get('format')!r}" if isinstance(before, dict) else type(before).__name__
            raise ArtifactError(f"{file}: cannot be read", [Problem("format", found, f"This version reads format {FORMAT}.")])
        changed = differences(load_recipe(before["recipe"]), recipe)
        both = SCRATCH in before["methods"] and SCRATCH in values["methods"]
        own = ["source", "text", "tokens", "learning_rates", "cuts_only", *(["scratch_tokens"] if both else [])]
        changed += [(name, str(before[name]), str(values[name])) for name in own if before[name] != values[name]]
        if changed:
            remedy = "Rows would no longer be equal: put it back as it was, or choose another --out."
            problems = [Problem(name, f"{old} -> {new}", remedy) for name, old, new in changed]
            raise ConfigError(f"{path}: begun with other settings (before -> now)", problems)
        values["scratch_tokens"] = (before if SCRATCH in before["methods"] else values)["scratch_tokens"]
        values["methods"] = list(dict.fromkeys([*before["methods"], *values["methods"]]))
        values["seeds"] = max(before["seeds"], values["seeds"])
        contenders(values["methods"])  # those that are new may have names that are taken
    write_atomic(file, json.dumps(values, indent=1) + "\n")
    return {name: values[name] for name in ("methods", "seeds", "scratch_tokens")}
