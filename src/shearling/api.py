"""The public functions, each also a command. Everything that is wrong with a recipe is said before torch is imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearling.config import parse
from shearling.errors import ArtifactError, ConfigError, Problem
from shearling.io.files import check_writable, refuse_existing, write_atomic
from shearling.planning import (
    STAGES_THAT_TRAIN,
    available_memory,
    describe,
    disk_needed,
    expected_target,
    memory_warning,
    stage_memory,
)
from shearling.recipe import Recipe, RecipeLike, load_recipe
from shearling.run import RunDirectory, check_artifacts, run_path
from shearling.shapes import Target
from shearling.show import Shielded, Show, Silent
from shearling.sources import Source, open_source
from shearling.steering import check_steering
from shearling.summary import STAGES, summarise
from shearling.texts import cache_notes, read_text_of_recipe, with_domains_of
from shearling.world import World, join, restarted

if TYPE_CHECKING:
    from shearling.stages import Context


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
    data: str | Path,
    *,
    batch_size: int = 8,
    speed: bool = True,
    precision: str = "bfloat16",
    device: str = "auto",
    attend: str | None = None,
) -> dict[str, Any]:
    """Held-out loss by domain, in nats/token, and speed in tokens/s of any model.

    Args:
        model: a Hugging Face directory, a hub id, or a GGUF file.
        data: a folder that `prepare` made, or the URL of one, or a run directory.
        attend: what a token attends to: `sequence` or `document`, as `data.attend` of a recipe; left out, as the run directory's
            recipe says, and where `data` is none, sequence.
    """
    from shearling.measure import measure_model

    how: dict[str, Any] = {"batch_size": batch_size, "speed": speed, "precision": precision, "device": device, "attend": attend}
    return measure_model(open_source(model), data, **how)


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
    values = _write_numbers(path, recipe, open_source(recipe.source))
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


def through(
    last: str,
    recipe: RecipeLike,
    out: str | Path | None,
    overrides: Sequence[str],
    overwrite: bool,
    accept_changed: Sequence[str],
    show: Show | None,
    page: bool = True,
) -> dict[str, Any]:
    """Do every stage up to `last` (of `STAGES`) that is not done, and write the report; on as many processes as there are.

    Other arguments, what is returned, and errors as for `run`. `page`: whether to write report.html, too.
    """
    loaded = load_recipe(recipe, overrides)
    path, names = run_path(recipe, out), STAGES[: STAGES.index(last) + 1]
    with join(loaded.runtime.device, loaded.runtime.timeout) as world, ExitStack() as held:
        shown: Show = Shielded(show) if show is not None and world.first else Silent()
        source, device = world.everywhere(lambda: check_recipe(loaded, last, world, overwrite, new=not path.exists()))
        manifest = world.rank0_decides(lambda: read_text_of_recipe(loaded, source))
        loaded = world.everywhere(lambda: with_domains_of(loaded, manifest))
        afresh = overwrite and not restarted()  # what a launcher starts again is to go on
        directory = RunDirectory(path, loaded, overwrite=afresh, accept_changed=accept_changed)

        def enter() -> list[str]:
            held.enter_context(directory)
            return [*directory.notes, *_preflight(directory, source, last, device, world.size, world.local_size, manifest)]

        for note in world.rank0_decides(enter):
            shown.note(note)
        from shearling import stages
        from shearling.train.stop import StopOnSignal

        with StopOnSignal() as stop:
            world.signal = lambda: stop.number
            context = stages.Context(loaded, source, directory.path, world, shown, manifest)
            for name in names:
                context.check_stop()
                work = _work(name, context, directory)
                directory.do(name, work, shown, again=name == last == "prepare", world=world)
        if last == "prepare":  # what was made again must be what the later stages used
            world.rank0_decides(lambda: check_artifacts(directory.path, manifest=manifest))
        return world.rank0_decides(lambda: _report(directory.path, loaded, source, shown, page))


def check_recipe(recipe: Recipe, last: str, world: World, overwrite: bool, new: bool, opened: Source | None = None) -> tuple[Source, str]:
    """The source, and the device of this process; raises what can be known to be wrong without the run directory.

    Args:
        recipe: of the run.
        last: the stage up to which it is to go.
        world: the processes of the run.
        overwrite: whether a run that is there is to be deleted.
        new: whether none is there.
        opened: its source, where that is open already.
    """
    source = opened or open_source(recipe.source)
    if source.anatomy.blocks and last != "prepare":
        remedy = "Make a stock checkpoint of it with `shearling pad`, and give that."
        raise ArtifactError("this source cannot be sheared", [Problem("source", "blocks of different sizes", remedy)])
    expected_target(source, recipe)
    if overwrite or new:
        check_steering(recipe, source, STAGES[: STAGES.index(last) + 1])
    if last == "prepare":
        return source, "cpu"
    from shearling.train.optim import choose_device
    from shearling.train.parallel import check_microbatches

    if recipe.train.lora:
        from shearling.train.lora import check_targets

        check_targets(recipe.train.lora, source.anatomy)
    from shearling.prune.methods import choose

    choose(recipe.prune, source.anatomy, recipe.target)
    around_the_cut = {"prune.rotate": recipe.prune.rotate, "prune.compensate": recipe.prune.compensate}
    if world.size > 1 and any(value not in ("no", 0) for value in around_the_cut.values()):
        remedy = "It needs the whole model in one process: start one, or leave it out."
        problems = [Problem(field, repr(value), remedy) for field, value in around_the_cut.items() if value not in ("no", 0)]
        raise ConfigError("this works with one process alone", problems)
    check_microbatches({"prune": recipe.prune, "train": recipe.train}, world.size)
    device = choose_device(recipe.runtime, world.local_rank, world.local_size)
    if overwrite:  # before anything is deleted
        source.check()
    return source, str(device)


def _preflight(
    directory: RunDirectory, source: Source, last: str, device: str, processes: int, here: int, manifest: Mapping[str, Any] | None
) -> list[str]:
    """Before any work of the stages up to `last` that are not done: raise for what would end them, return what may.

    `device`: `cpu`, `cuda` or `cuda:N`. `processes`: of the run; `here`: on this machine. `manifest`: of text prepared before.
    """
    import torch

    from shearling.train.parallel import frees_after_forward

    recipe, remaining = directory.recipe, directory.remaining(STAGES[: STAGES.index(last) + 1])
    if "prune" in remaining:
        source.check()
    opens_source = not {"prune", "train"}.isdisjoint(remaining) or ("evaluate" in remaining and recipe.evaluate.speed)
    opens_tokens = not {"source", "prune", "train"}.isdisjoint(remaining)
    fingerprint = source.fingerprint if opens_source else None
    check_artifacts(directory.path, tokens=opens_tokens, fingerprint=fingerprint, manifest=manifest)
    check_writable(directory.path, disk_needed(source, recipe, remaining, directory.half_done())["total"])
    free = available_memory(device, here)
    training = [stage for stage in STAGES_THAT_TRAIN if stage in remaining]
    keeps = not frees_after_forward(recipe.runtime, torch.device(device))
    needed = {stage: stage_memory(source, recipe, stage, world_size=processes, keeps_gathered=keeps)["total"] for stage in training}
    notes = [text for stage, size in needed.items() if (text := memory_warning(stage, size, free))]
    return check_steering(recipe, source, remaining) + notes + cache_notes(recipe, manifest)


def _work(name: str, context: Context, directory: RunDirectory) -> Callable[[], dict[str, Any]]:
    """The work of one stage, with what it needs of the stages before it."""
    from shearling import pruning, stages

    def found(stage: str) -> dict[str, Any]:
        result = context.world.rank0_decides(lambda: directory.result(stage))
        assert result is not None, f"{name} needs {stage}, which comes before it"
        return result

    works: dict[str, Callable[[], dict[str, Any]]] = {
        "prepare": lambda: stages.prepare_data(context),
        "source": lambda: stages.measure_source(context),
        "prune": lambda: pruning.prune(context, found("source"), stages.starting_shares(context)),
        "train": lambda: stages.train(context, found("prune"), found("source")),
        "evaluate": lambda: stages.measure_result(context),
    }

    def work() -> dict[str, Any]:
        with stages.memory_errors(name):
            return works[name]()

    return work


def _report(path: Path, recipe: Recipe, source: Source, show: Show, page: bool) -> dict[str, Any]:
    """Write report.json, and with `page` report.html if it can be: what it fails for is told and recorded, and does not end the run."""
    values = _write_numbers(path, recipe, source)
    if not page:
        return values
    try:
        from shearling.report import write_report

        write_report(path)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        show.note(f"report.html could not be written ({reason}); the run is not affected. `shearling report {path}` tries again.")
        values = _write_numbers(path, recipe, source, {"report_error": reason})
    return values


def _write_numbers(path: Path, recipe: Recipe, source: Source, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    values = summarise(path, recipe, source.anatomy, expected_target(source, recipe)) | dict(more or {})
    write_atomic(path / "report.json", json.dumps(values, indent=1) + "\n")
    return values
