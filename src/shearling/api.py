"""The public functions, each also a command. Everything that is wrong with a recipe is said before torch is imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearling.arch.families import Anatomy
from shearling.config import parse
from shearling.errors import ArtifactError, Problem
from shearling.io.files import read_json, write_atomic
from shearling.planning import describe, sizes
from shearling.recipe import Recipe, RecipeLike, load_recipe
from shearling.run import RunDirectory, Show, Silent
from shearling.shapes import Target, target_anatomy
from shearling.sources import Source, open_source

if TYPE_CHECKING:
    from shearling.stages import Context

STAGES = ("prepare", "source", "prune", "train", "evaluate")
"""The stages of a run, in order; a report can be made after any of them."""


def run(recipe: RecipeLike, out: str | Path, *, overrides: Sequence[str] = (), show: Show | None = None) -> dict[str, Any]:
    """The whole of it: prepare, prune, cut, verify, continue pretraining, evaluate, report. Called again, it goes on where it stopped.

    Args:
        recipe: path of a YAML file, plain values, or a `Recipe`.
        out: the run directory; made if it is not there.
        overrides: `a.b=c` assignments applied to the recipe.
        show: where progress goes; nowhere if left out.

    Returns:
        What `report.json` holds.

    Raises:
        ConfigError, ShapeError: the recipe or the target is wrong. ArtifactError, DataError: model or text is.
        OutputError: `out` is in use or something else. StorageError: it cannot be written. Stopped: a signal asked to stop.
    """
    return _through("evaluate", recipe, out, overrides, show)


def prepare(recipe: RecipeLike, out: str | Path, *, overrides: Sequence[str] = (), show: Show | None = None) -> dict[str, Any]:
    """Text by domain -> token shards in `out`/data, as `run` would make them. Arguments and errors as for `run`."""
    return _through("prepare", recipe, out, overrides, show)


def prune(recipe: RecipeLike, out: str | Path, *, overrides: Sequence[str] = (), show: Show | None = None) -> dict[str, Any]:
    """The run up to the cut and verified model in `out`/pruned. Arguments and errors as for `run`."""
    return _through("prune", recipe, out, overrides, show)


def train(recipe: RecipeLike, out: str | Path, *, overrides: Sequence[str] = (), show: Show | None = None) -> dict[str, Any]:
    """The run up to the trained model in `out`/model; what is finished before it is kept. Arguments and errors as for `run`."""
    return _through("train", recipe, out, overrides, show)


def plan(source: str | Path, target: Mapping[str, int] | Target | None = None, *, recipe: RecipeLike | None = None) -> dict[str, Any]:
    """What a target means before any compute; a config without weights is enough.

    Args:
        source: a Hugging Face directory, a hub id, a GGUF file, or a config.json.
        target: sizes by config field; left out, the recipe's.
        recipe: gives tokens and memory of its stages; left out, the defaults of a recipe.

    Returns:
        JSON values with `source`, `target`, `feasible`, `problems`, `nearest`, `pruned`, `tokens` and `memory`.
    """
    loaded = load_recipe(recipe) if recipe is not None else None
    if target is None:
        target = loaded.target if loaded else None
    asked = target if isinstance(target, Target) else parse(Target, dict(target or {}), "target")
    return describe(open_source(source), asked, loaded)


def evaluate(
    model: str | Path, data: str | Path, *, batch_size: int = 8, speed: bool = True, precision: str = "bfloat16", device: str = "auto"
) -> dict[str, Any]:
    """Held-out loss by domain, in nats/token, and speed in tokens/s of any model.

    Args:
        model: a Hugging Face directory, a hub id, or a GGUF file.
        data: a folder that `prepare` made (or a run directory that holds one).
    """
    from shearling.measure import measure_model

    return measure_model(open_source(model), Path(data), batch_size=batch_size, speed=speed, precision=precision, device=device)


def report(out: str | Path) -> dict[str, Any]:
    """Write `report.json` and `report.html` of a run directory from what its finished stages found; return the former."""
    path = Path(out)
    if not (path / "recipe.yaml").exists():
        raise ArtifactError(f"{path}: not a run directory", [Problem("out", "no recipe.yaml", "Give the --out of a run.")])
    recipe = load_recipe(path / "recipe.yaml")
    return _report(path, recipe, open_source(recipe.source))


def reference(points: str | Path, parameters: float) -> dict[str, float]:
    """Reference losses by domain for a model of `parameters`: the power law L(N) = A / N^a + C of Sheared LLaMA section 2.2.

    `points` is a CSV file with the columns domain, parameters, loss: losses of one family's models at three sizes or more.
    """
    from shearling.data.reference import fit_reference, read_points

    return fit_reference(read_points(points), parameters)


def _through(last: str, recipe: RecipeLike, out: str | Path, overrides: Sequence[str], show: Show | None) -> dict[str, Any]:
    """Do every stage up to `last` that is not done, and write the report."""
    loaded = load_recipe(recipe, overrides)
    shown: Show = show or Silent()
    source = open_source(loaded.source)
    target_anatomy(source.anatomy, loaded.target or Target())
    if last != "prepare":
        from shearling.train.optim import choose_device

        choose_device(loaded.runtime)
    with RunDirectory(out, loaded) as directory:
        from shearling import stages
        from shearling.train.stop import StopOnSignal

        if last != "prepare" and directory.result("prune") is None:
            source.check()
        with StopOnSignal() as stop:
            context = stages.Context(loaded, source, directory.path, stop, shown)
            for name in STAGES[: STAGES.index(last) + 1]:
                context.check_stop()
                directory.do(name, _work(name, context, directory), shown)
        return _report(directory.path, loaded, source)


def _work(name: str, context: Context, directory: RunDirectory) -> Callable[[], dict[str, Any]]:
    """The work of one stage, with what it needs of the stages before it."""
    from shearling import stages

    def found(stage: str) -> dict[str, Any]:
        result = directory.result(stage)
        assert result is not None, f"{name} needs {stage}, which comes before it"
        return result

    works: dict[str, Callable[[], dict[str, Any]]] = {
        "prepare": lambda: stages.prepare_data(context),
        "source": lambda: stages.measure_source(context),
        "prune": lambda: stages.prune(context, found("source"), stages.starting_shares(context)),
        "train": lambda: stages.train(context, found("prune"), found("source")),
        "evaluate": lambda: stages.measure_result(context),
    }
    return works[name]


def _report(path: Path, recipe: Recipe, source: Source) -> dict[str, Any]:
    from shearling.report import write_report

    target = target_anatomy(source.anatomy, recipe.target or Target())
    values = summarise(path, recipe, source.anatomy, target)
    write_atomic(path / "report.json", json.dumps(values, indent=1) + "\n")
    write_report(path)
    return values


def summarise(path: Path, recipe: Recipe, source: Anatomy, target: Anatomy) -> dict[str, Any]:
    """What `report.json` holds: whatever the finished stages of a run directory found."""
    found = {name: read_json(path / "stages" / f"{name}.json") for name in STAGES if (path / "stages" / f"{name}.json").exists()}
    values: dict[str, Any] = {
        "shearling": version("shearling"),
        "seed": recipe.seed,
        "source": {"name": recipe.source, **sizes(source)},
        "model": {"path": "model" if "train" in found else None, **sizes(target)},
        "loss": {},
        "tokens": {stage: found[stage]["tokens"] for stage in ("prune", "train") if stage in found},
        "seconds": {stage: result["seconds"] for stage, result in found.items()},
    }
    if "prepare" in found:
        values["data"] = {key: value for key, value in found["prepare"].items() if key != "seconds"}
    if "source" in found:
        losses = found["source"]["loss"]
        given = recipe.mixture.reference
        reference_losses = {k: v for k, v in losses.items() if k != "mean"} if given == "source" else given
        values["loss"] |= {"source": losses, "reference": reference_losses}
    if "prune" in found:
        values["loss"] |= {k: v for k, v in found["prune"]["loss"].items() if v is not None}
        values["verify"] = found["prune"]["verify"]
    if "train" in found:
        values["loss"] |= found["train"]["loss"]
        values["epochs"] = found["train"]["epochs"]
    measured = found.get("evaluate", {})
    return values | {key: measured[key] for key in ("speed", "speed_dtype", "speed_device") if key in measured}
