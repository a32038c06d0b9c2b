"""A run from its recipe: what is checked before any work, the stages in order, each with what it needs of those before, the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearling.config import parse
from shearling.data.config import OF_PREPARED
from shearling.errors import ArtifactError, ConfigError, Problem
from shearling.io.files import check_writable, write_atomic
from shearling.planning import STAGES_THAT_TRAIN, available_memory, disk_needed, expected_target, memory_warning, stage_memory
from shearling.recipe import Recipe, RecipeLike, load_recipe
from shearling.run import RunDirectory, check_artifacts, run_path
from shearling.show import Shielded, Show, Silent
from shearling.sources import Source, open_source
from shearling.steering import check_steering
from shearling.summary import STAGES, summarise
from shearling.texts import cache_notes, read_text_of_recipe, with_domains_of
from shearling.world import World, join, restarted

if TYPE_CHECKING:
    from shearling.stages import Context


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

    Other arguments, what is returned, and errors as for `shearling.api.run`. `page`: whether to write report.html, too.
    """
    loaded, path = load_recipe(recipe, overrides), run_path(recipe, out)
    with join(loaded.runtime.device, loaded.runtime.timeout) as world:
        shown: Show = Shielded(show) if show is not None and world.first else Silent()
        return _on(world, last, loaded, path, overwrite, accept_changed, shown, page)


def _on(
    world: World, last: str, loaded: Recipe, path: Path, overwrite: bool, accept_changed: Sequence[str], shown: Show, page: bool = True
) -> dict[str, Any]:
    """The same on the processes of a world; a stage may be such a run itself."""
    with ExitStack() as held:
        source, device = world.everywhere(lambda: check_recipe(loaded, last, world, overwrite, new=not path.exists()))
        manifest = world.rank0_decides(lambda: read_text_of_recipe(loaded, source))
        loaded = world.everywhere(partial(with_domains_of, loaded, manifest))
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
            outer, world.signal = world.signal, lambda: stop.number
            held.callback(setattr, world, "signal", outer)
            context = stages.Context(loaded, source, directory.path, world, shown, manifest)
            for name in _stages(loaded, last):
                context.check_stop()
                work = _work(name, context, directory)
                directory.do(name, work, shown, again=name == last == "prepare", world=world)
        if last == "prepare":  # what was made again must be what the later stages used
            world.rank0_decides(lambda: check_artifacts(directory.path, manifest=manifest))
        return world.rank0_decides(lambda: _report(directory.path, loaded, source, shown, page))


def _stages(recipe: Recipe, last: str) -> tuple[str, ...]:
    """The stages of a recipe up to `last`, in order."""
    taught = recipe.teacher is not None and recipe.teacher.steps > 0
    return tuple(name for name in STAGES[: STAGES.index(last) + 1] if taught or name != "teacher")


def _teach(context: Context) -> dict[str, Any]:
    """Train the teacher on the run's text: a run of its own without a target, in `teacher/`, with checkpoints, log and report."""
    asked, values = context.recipe.teacher, context.recipe.model_dump(mode="json")
    assert asked is not None
    text = {key: value for key, value in values["data"].items() if key in OF_PREPARED}
    text |= {"domains": {name: {"weight": domain.weight} for name, domain in context.recipe.data.domains.items()}}
    text |= {"root": values["data"]["root"], "prepared": context.recipe.data.prepared or str((context.path / "data").absolute())}
    steps = {key: value for key, value in values["teacher"].items() if key != "model"}
    changed = {"source": asked.model or context.recipe.source, "target": None, "data": text, "teacher": None, "prune": {}, "train": steps}
    recipe = parse(Recipe, {**values, **changed, "export": {}}, "teacher")
    found = _on(context.world, "train", recipe, context.path / "teacher", False, ("train",), context.show)
    return {"loss": found["loss"]["final"], "tokens": found["tokens"]["train"]}


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
    if source.anatomy.blocks and recipe.target is not None:
        remedy = "Make a stock checkpoint of it with `shearling pad`, and give that; or leave target out to train it further."
        raise ArtifactError("this source cannot be sheared", [Problem("source", "blocks of different sizes", remedy)])
    expected_target(source, recipe)
    if overwrite or new:
        check_steering(recipe, source, _stages(recipe, last))
    if last == "prepare":
        return source, "cpu"
    from shearling.train.optim import choose_device
    from shearling.train.parallel import check_microbatches

    if recipe.train.lora:
        from shearling.train.lora import check_targets

        check_targets(recipe.train.lora, source.anatomy)
    if recipe.teacher is not None and recipe.teacher.model is not None:
        _check_teacher(recipe.teacher.model, source)
    from shearling.prune.methods import choose

    chosen = choose(recipe.prune, source.anatomy, recipe.target)
    if chosen.method.draws and recipe.target is not None and any(s.distill and s.distill.blocks for s in (recipe.prune, recipe.train)):
        remedy = "Its blocks stand for none of the source's: set it to 0, or take another method."
        raise ConfigError("there is nothing to compare", [Problem("distill.blocks", f"with {chosen.method.name}", remedy)])
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


def _check_teacher(model: str, source: Source) -> None:
    """Raise `ConfigError` where a teacher has other tokens than the source, by their number."""
    theirs, own = open_source(model).anatomy.sizes["vocab"], source.anatomy.sizes["vocab"]
    if theirs != own:
        remedy = f"The source has {own:,}: a teacher must have the same tokens, that is, be of the source's family."
        raise ConfigError("the teacher has another vocabulary", [Problem("teacher.model", f"{model}, with {theirs:,} tokens", remedy)])


def _preflight(
    directory: RunDirectory, source: Source, last: str, device: str, processes: int, here: int, manifest: Mapping[str, Any] | None
) -> list[str]:
    """Before any work of the stages up to `last` that are not done: raise for what would end them, return what may.

    `device`: `cpu`, `cuda` or `cuda:N`. `processes`: of the run; `here`: on this machine. `manifest`: of text prepared before.
    """
    import torch

    from shearling.train.parallel import frees_after_forward

    recipe, remaining = directory.recipe, directory.remaining(_stages(directory.recipe, last))
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
    from shearling import pruning, stages, training

    def found(stage: str) -> dict[str, Any]:
        result = context.world.rank0_decides(lambda: directory.result(stage))
        assert result is not None, f"{name} needs {stage}, which comes before it"
        return result

    works: dict[str, Callable[[], dict[str, Any]]] = {
        "prepare": lambda: stages.prepare_data(context),
        "source": lambda: stages.measure_source(context),
        "teacher": lambda: _teach(context),
        "prune": lambda: pruning.prune(context, found("source"), stages.starting_shares(context)),
        "train": lambda: training.train(context, found("prune"), found("source")),
        "evaluate": lambda: stages.measure_result(context),
    }

    def work() -> dict[str, Any]:
        with stages.memory_errors(name):
            return works[name]()

    return work


def _report(path: Path, recipe: Recipe, source: Source, show: Show, page: bool) -> dict[str, Any]:
    """Write report.json, and with `page` report.html if it can be: what it fails for is told and recorded, and does not end the run."""
    values = write_numbers(path, recipe, source)
    if not page:
        return values
    try:
        from shearling.report import write_report

        write_report(path)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        show.note(f"report.html could not be written ({reason}); the run is not affected. `shearling report {path}` tries again.")
        values = write_numbers(path, recipe, source, {"report_error": reason})
    return values


def write_numbers(path: Path, recipe: Recipe, source: Source, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write report.json of a run directory, and return what it holds: what its finished stages found, and `more`."""
    values = summarise(path, recipe, source.anatomy, expected_target(source, recipe)) | dict(more or {})
    write_atomic(path / "report.json", json.dumps(values, indent=1) + "\n")
    return values
