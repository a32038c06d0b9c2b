"""The public functions, each also a command. Everything that is wrong with a recipe is said before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shearling.config import parse
from shearling.errors import ArtifactError, Problem
from shearling.io.files import refuse_existing
from shearling.planning import describe
from shearling.recipe import RecipeLike, load_recipe
from shearling.shapes import Target
from shearling.show import Shielded, Show, Silent
from shearling.sources import open_source
from shearling.wiring import through, write_numbers


def run(
    recipe: RecipeLike,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    accept_changed: Sequence[str] = (),
    show: Show | None = None,
) -> dict[str, Any]:
    """The whole of it: prepare, prune, cut, verify, continue pretraining, evaluate, report. Called again, it goes on where it stopped.

    Args:
        recipe: path of a YAML file, plain values, or a `Recipe`.
        out: the run directory; made if it is not there. Left out, `runs/NAME` below the current folder, NAME being the stem of the
            recipe's file.
        overrides: `a.b=c` assignments applied to the recipe.
        overwrite: delete the run that is there, and begin afresh. Leave it out to go on after an interruption.
        accept_changed: go on although these fields of the recipe, or sections of them (`train`), differ from those the run was
            begun with. Source, target, data and seed cannot be accepted; how to compute (`runtime`, without device and precision)
            need not be.
        show: where progress goes; nowhere if left out.

    Returns:
        What `report.json` holds. It has `report_error` where the pictures could not be drawn.

    Raises:
        ConfigError, ShapeError: the recipe or the target is wrong, or the run was begun with others, or with other text.
        ArtifactError, DataError: model or text is wrong. NumericsError: the numbers are.
        OutputError: `out` is in use or something else. StorageError: it cannot be written, or the disk is too small.
        Stopped: a signal asked to stop.
    """
    return through("evaluate", recipe, out, overrides, overwrite, accept_changed, show)


def prepare(
    recipe: RecipeLike,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    accept_changed: Sequence[str] = (),
    show: Show | None = None,
) -> dict[str, Any]:
    """Text by domain -> token shards in `out`/data, as `run` would make them; shards that were damaged since are made anew.

    Arguments and errors as for `run`.
    """
    return through("prepare", recipe, out, overrides, overwrite, accept_changed, show)


def prune(
    recipe: RecipeLike,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    accept_changed: Sequence[str] = (),
    show: Show | None = None,
) -> dict[str, Any]:
    """The run up to the cut and verified model in `out`/pruned. Arguments and errors as for `run`."""
    return through("prune", recipe, out, overrides, overwrite, accept_changed, show)


def train(
    recipe: RecipeLike,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    accept_changed: Sequence[str] = (),
    show: Show | None = None,
) -> dict[str, Any]:
    """The run up to the trained model in `out`/model; what is finished before it is kept. Arguments and errors as for `run`."""
    return through("train", recipe, out, overrides, overwrite, accept_changed, show)


def plan(source: str | Path, target: Mapping[str, int] | Target | None = None, *, recipe: RecipeLike | None = None) -> dict[str, Any]:
    """What a target means before any compute; a config without weights is enough.

    Args:
        source: a Hugging Face directory, a hub id, a GGUF file, or a config.json.
        target: sizes by config field; left out, the recipe's.
        recipe: gives tokens, memory and disk of its stages; left out, the defaults of a recipe.

    Returns:
        JSON values with `source`, `target`, `feasible`, `problems`, `nearest`, `pruned`, `tokens`, and in bytes `memory` (of each stage
        that trains) and `disk` (below the run directory), both by part with a `total`.
    """
    loaded = load_recipe(recipe) if recipe is not None else None
    if target is None:
        target = loaded.target if loaded else None
    asked = target if isinstance(target, Target) else parse(Target, dict(target or {}), "target")
    return describe(open_source(source), asked, loaded)


def evaluate(
    model: str | Path,
    data: str | Path | None = None,
    *,
    batch_size: int = 8,
    speed: bool = True,
    precision: str = "bfloat16",
    device: str = "auto",
    attend: str | None = None,
    tasks: str | Sequence[str] | None = None,
    task_data: str | Path | None = None,
    task_limit: int | None = None,
    out: str | Path | None = None,
    show: Show | None = None,
) -> dict[str, Any]:
    """Held-out loss by domain, in nats/token, speed in tokens/s, and zero-shot tasks of any model.

    Args:
        model: a Hugging Face directory, a hub id, or a GGUF file.
        data: a folder that `prepare` made, or the URL of one, or a run directory; left out, no losses.
        attend: what a token attends to: `sequence` or `document`, as `data.attend` of a recipe; left out, as the run directory's
            recipe says, and where `data` is none, sequence.
        tasks: names of EleutherAI's lm-evaluation-harness, a list or a text with commas; docs/evaluation.md lists them.
        task_data: the folder with the tasks' documents; left out, the harness gets them from the hub.
        task_limit: documents of each task, evenly spaced; left out, all.
        out: a JSON file that keeps each task when it is done; called again, it goes on after the last.
        show: where progress goes; nowhere if left out.

    Returns:
        `name`, `parameters`; `attend`, `loss`, `loss_error` with `data`; `speed`; `tasks`: by name, see docs/evaluation.md.

    Raises:
        ConfigError: an option is wrong, lm-eval is not installed, or `out` was begun under others. Stopped: a signal asked to stop.
        ArtifactError, DataError: model, text or a task's file is wrong. OutputError, StorageError: `out` is something else, or has no room.
    """
    from shearling.measure import measure_model

    how: dict[str, Any] = {"batch_size": batch_size, "speed": speed, "precision": precision, "device": device, "attend": attend}
    how |= {"tasks": tasks, "task_data": task_data, "task_limit": task_limit, "out": out}
    return measure_model(open_source(model), data, **how, show=Shielded(show) if show is not None else Silent())


def inspect_data(
    data: str | Path, *, sequence: str | None = None, tokenizer: str | None = None, verify: bool = False, show: Show | None = None
) -> dict[str, Any]:
    """What prepared text has of each domain, what one of its sequences says, and whether its shards are undamaged.

    Args:
        data: a run directory, a folder of prepared text, or the URL of one.
        sequence: `DOMAIN:N` or `DOMAIN/heldout:N`, N from 0: decode this sequence.
        tokenizer: the model whose tokenizer decodes it; left out, the source of the run.
        verify: read every shard and compare its sha256; `ArtifactError` names all that are wrong.
        show: where progress goes; nowhere if left out.

    Returns:
        `place`, `fingerprint`, `sequence_length` and the like; `table`: counts by domain; `notes`; `sequence`: its `ids` and `documents`;
        `verified`: how many shards and bytes.
    """
    from shearling.texts import inspect

    shown = Shielded(show) if show is not None else Silent()
    return inspect(data, sequence, tokenizer, verify, lambda done, total: shown.count("verifying", done, f"of {total} shards"))


def pad(model: str | Path, out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write a model whose blocks differ as a stock checkpoint in `out` that computes the same: every block as large as the largest.

    Returns:
        `before` and `after`: parameters; `ratio`: what that costs; `relative_difference`: of the logits, which is checked.
    """
    from shearling.export import save_padded

    final = Path(out)
    if not overwrite:
        refuse_existing(final)
    return save_padded(open_source(model), final)


def report(out: str | Path) -> dict[str, Any]:
    """Write `report.json` and `report.html` of a run directory from what its finished stages found; return the former."""
    from shearling.report import write_report

    path = Path(out)
    if not (path / "recipe.yaml").exists():
        raise ArtifactError(f"{path}: not a run directory", [Problem("out", "no recipe.yaml", "Give the --out of a run.")])
    recipe = load_recipe(path / "recipe.yaml")
    values = write_numbers(path, recipe, open_source(recipe.source))
    write_report(path)
    return values


def methods() -> dict[str, list[dict[str, Any]]]:
    """The ways to choose what to keep (`prune.method`), and the scores they are made of (`prune.scores`).

    Returns:
        `methods`: name, about, paper, and scores by axis (`*`: all that are not named); `scores`: name, about, paper, axes.
    """
    from shearling.prune.methods import listing

    return listing()


def reference(points: str | Path, parameters: float) -> dict[str, dict[str, float | None]]:
    """Reference losses by domain for a model of `parameters`: the power law L(N) = A / N^a + C of Sheared LLaMA section 2.2.

    `points` is a CSV file with the columns domain, parameters, loss: losses of one family's models at three sizes or more.

    Returns:
        {domain: {`loss`, `standard_error`}} in nats per token; the error is None where three sizes leave nothing to judge it by.
    """
    from shearling.data.reference import fit_reference, read_points

    return {domain: dict(vars(found)) for domain, found in fit_reference(read_points(points), parameters).items()}
