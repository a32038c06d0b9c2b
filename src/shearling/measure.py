"""Evaluate any model: held-out loss by domain on prepared text, speed, and zero-shot tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from shearling.config import parse
from shearling.data.config import Attend
from shearling.data.elsewhere import fetch_heldout, model_problems
from shearling.data.remote import shown_place
from shearling.data.tokens import TokenSet
from shearling.errors import ArtifactError, ConfigError, Problem, Stopped
from shearling.evaluate.harness import LoadedTask, harness_model, harness_version, load_tasks, run_task
from shearling.evaluate.kept import Kept, model_mark
from shearling.evaluate.loss import heldout_losses
from shearling.evaluate.speed import measure_speed
from shearling.evaluate.tasks import chosen_names, find_task_files, read_documents
from shearling.objectives.lm import token_losses
from shearling.recipe import load_recipe
from shearling.run import RECIPE_FILE
from shearling.show import Show
from shearling.sources import Source
from shearling.texts import find_text, open_text
from shearling.train.config import RuntimeConfig
from shearling.train.optim import choose_device, in_precision
from shearling.train.stop import StopOnSignal, signal_name


def measure_model(
    source: Source,
    data: str | Path | None,
    *,
    batch_size: int,
    speed: bool,
    precision: str,
    device: str,
    attend: str | None,
    tasks: str | Sequence[str] | None,
    task_data: str | Path | None,
    task_limit: int | None,
    out: str | Path | None,
    show: Show,
) -> dict[str, Any]:
    """Loss, speed and tasks of one model; see `shearling.api.evaluate`. What can be known to be wrong is told before it is loaded."""
    _check(data, attend, tasks, task_data, task_limit, out)
    runtime = parse(RuntimeConfig, {"device": device, "precision": precision}, "evaluate")
    place = choose_device(runtime)
    text = None if data is None else _open(source, data, attend)
    asked = None if tasks is None else _Tasks(source, tasks, task_data, task_limit, precision, out, show)
    if text is not None:
        fetch_heldout(text[0])
    model = source.load_model().to(place)
    found: dict[str, Any] = {"name": source.name, "parameters": source.anatomy.parameters()}
    if text is not None:
        tokens, attend = text
        losses = in_precision(partial(token_losses, document_end=tokens.document_end if attend == "document" else None), place, runtime)
        heldout = {domain: tokens.sequences(domain, "heldout") for domain in tokens.domains}
        measured = heldout_losses(model, heldout, losses, batch_size=batch_size, device=place)
        found |= {"attend": attend, "loss": measured.losses, "loss_error": measured.errors}
    if speed:
        found["speed"] = measure_speed({"model": model})["model"]
    if asked is not None:
        found["tasks"] = asked.answer(model, batch_size)
    return found


def _check(
    data: str | Path | None,
    attend: str | None,
    tasks: str | Sequence[str] | None,
    task_data: str | Path | None,
    task_limit: int | None,
    out: str | Path | None,
) -> None:
    """Raise for options that are wrong by themselves, all at once."""
    problems = []
    if attend is not None and attend not in get_args(Attend):
        problems.append(Problem("attend", repr(attend), f"Use {' or '.join(get_args(Attend))}."))
    if data is None and tasks is None:
        problems.append(Problem("data", "neither text nor tasks", "Give --data DIR, --tasks NAME,NAME,... or both."))
    if task_limit is not None and task_limit < 1:
        problems.append(Problem("task_limit", str(task_limit), "It must be at least 1, or left out for all documents."))
    if tasks is None:
        for field, value in (("task_data", task_data), ("task_limit", task_limit), ("out", out)):
            if value is not None:
                problems.append(Problem(field, str(value), "It is of tasks alone: name them by --tasks."))
    if problems:
        raise ConfigError("the model cannot be measured", problems)


def _open(source: Source, data: str | Path, attend: str | None) -> tuple[TokenSet, str]:
    """The prepared text, known to be of this model, and what a token of it attends to."""
    text = find_text(data)
    attend = attend or (load_recipe(text.run / RECIPE_FILE).data.attend if text.run else "sequence")
    tokens = open_text(text)
    if problems := model_problems(tokens.manifest, source.tokenizer(), source.anatomy.sizes["vocab"]):
        raise ArtifactError(f"{shown_place(text.where)}: prepared for another model", problems)
    return tokens, attend


class _Tasks:
    """Tasks that are to be asked; making one checks everything that can be checked without the model."""

    def __init__(
        self,
        source: Source,
        tasks: str | Sequence[str],
        folder: str | Path | None,
        limit: int | None,
        precision: str,
        out: str | Path | None,
        show: Show,
    ) -> None:
        names = chosen_names(tasks)
        local = None
        if folder is not None:
            local = {name: read_documents(name, path, limit) for name, path in find_task_files(names, folder).items()}
        harness, self._tokenizer, self._show, self._bfloat16 = harness_version(), source.tokenizer(), show, precision == "bfloat16"
        source.check()
        self._kept = None
        if out is not None:
            asked = {"model": model_mark(source), "limit": limit, "precision": precision, "lm_eval": harness}
            self._kept = Kept(Path(out), asked)
        self._loaded = load_tasks(names, local, limit)
        self._done = {task.name: result for task in self._loaded if (result := self._before(task)) is not None}

    def answer(self, model: Any, batch_size: int) -> dict[str, Any]:
        """Each task's result; those that were kept before are taken from there."""
        with StopOnSignal() as stop:
            watching = _Watching(self._show, lambda: stop.number, None if self._kept is None else self._kept.path)
            asked = harness_model(model, self._tokenizer, batch_size=batch_size, bfloat16=self._bfloat16, watch=watching)
            for task in self._loaded:
                if task.name in self._done:
                    self._show.note(f"{task.name}: done before")
                    continue
                watching.name = task.name
                result = self._done[task.name] = run_task(task, asked)
                if self._kept is not None:
                    self._kept.keep(task.name, task.mark, result)
                self._show.note(f"{task.name}: {describe_task(result)}")
        return {task.name: self._done[task.name] for task in self._loaded}

    def _before(self, task: LoadedTask) -> dict[str, Any] | None:
        return None if self._kept is None else self._kept.result(task.name, task.mark)


class _Watching:
    """Shows how far a task is, and ends it where a signal asked to."""

    def __init__(self, show: Show, signal: Callable[[], int], kept: Path | None) -> None:
        self.name = ""
        self._show, self._signal, self._kept = show, signal, kept

    def __call__(self, done: int, total: int) -> None:
        if number := self._signal():
            kept = f"finished tasks are kept in {self._kept}. Run the same command to go on."
            left = "nothing is kept. Give --out FILE.json to keep finished tasks." if self._kept is None else kept
            raise Stopped(f"stopped by {signal_name(number)} in {self.name}; {left}")
        self._show.count(self.name, done, f"of {total:,} sequences" if total else "sequences; preparing")


def describe_task(result: dict[str, Any]) -> str:
    """A task's result in one line, metrics with their standard errors."""
    parts = []
    for metric in [key for key in result if f"{key}_stderr" in result]:
        value, error = result[metric], result[f"{metric}_stderr"]
        parts.append(f"{metric} {value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
    cut = f", {result['truncated']} sequences cut at their beginning" if "truncated" in result else ""
    return f"{', '.join(parts)} on {result['samples']:,} of {result['of']:,} documents{cut}"
