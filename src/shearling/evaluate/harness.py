"""Running tasks in EleutherAI's lm-evaluation-harness (the extra `eval`), on a model that is loaded already.

A task is the harness's own configuration; with local documents only where they come from is replaced. So prompts, targets and metrics
are the harness's. Ours are: log-softmax in fp32 whatever the logits' precision is, and the standard error of a perplexity.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from shearling.errors import ArtifactError, ConfigError, DataError, Problem
from shearling.evaluate.tasks import TASKS, Document, Documents, limits, marked, spaced

Watch = Callable[[int, int], None]
"""Told of the sequences that are done, and how many there are (0: documents are being prepared); may raise to stop."""
SEED = 1234
"""The harness's own for few-shot examples; zero-shot tasks draw none."""


@dataclass(frozen=True)
class LoadedTask:
    """A task of the harness with its documents, ready to be asked."""

    name: str
    parts: dict[str, Any]
    """The harness's tasks: itself, or its subtasks."""
    group: Any
    """The harness's rule of how subtasks become one number; None for a task without."""
    size: int
    """Documents that there are, before the limit."""
    mark: str
    """SHA-256 (hex) of the chosen documents."""


def harness_version() -> str:
    """The version of the harness that is installed; `ConfigError` where none is."""
    if importlib.util.find_spec("lm_eval") is None:
        remedy = "Install it: pip install 'shearling[eval]'."
        raise ConfigError("tasks need EleutherAI's lm-evaluation-harness", [Problem("tasks", "no package lm_eval", remedy)])
    return version("lm_eval")


def load_tasks(names: Sequence[str], local: Mapping[str, Documents] | None, limit: int | None) -> list[LoadedTask]:
    """The harness's tasks of these names.

    Args:
        names: of `TASKS`.
        local: documents of each; None: the harness gets them from the hub.
        limit: documents of each task that are taken from the hub, by `spaced`; local ones are chosen already.

    Raises:
        ConfigError: the harness is not installed, or is one without these tasks.
        DataError: a file has other subtasks than the harness, or the hub did not give a task.
    """
    harness_version()
    with _quiet():
        import lm_eval.tasks

        root = Path(lm_eval.tasks.__file__).parent
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=sorted({root / TASKS[name].folder for name in names}))
        if problems := [
            Problem("tasks", name, "Install a version of lm-eval that has it.") for name in names if name not in manager.all_tasks
        ]:
            raise ConfigError(f"lm-eval {harness_version()} does not have all of these tasks", problems)
        return [_load(manager, name, None if local is None else local[name], limit) for name in names]


def _load(manager: Any, name: str, local: Documents | None, limit: int | None) -> LoadedTask:
    config = manager.task_index[name].cfg
    expected: list[str] = config["task"] if TASKS[name].subtask else [name]
    if local is not None and set(local.chosen) != set(expected):
        missing, unknown = sorted(set(expected) - set(local.chosen)), sorted(set(local.chosen) - set(expected))
        found = "; ".join(f"{what} {', '.join(parts[:5])}" for what, parts in (("without", missing), ("with", unknown)) if parts)
        remedy = f"The harness's {name} has {len(expected)} subtasks, and each must be there: the field {TASKS[name].subtask}."
        raise DataError(f"{name}: the file has other subtasks than the harness", [Problem(TASKS[name].file, found[:400], remedy)])
    members = [{"task": part} | ({} if local is None else _in_place(manager, part, local.chosen[part])) for part in expected]
    try:
        # a group of our own, since the harness joins a task's file with changes only for members of a group
        parts = dict(manager.load([{"group": f"shearling_{name}", "task": members}])["tasks"])
    except Exception as error:  # hub, HTTP client and datasets each have errors of their own
        if local is not None:
            raise
        found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        remedy = "Check the network, or give the documents as files, by --task-data DIR."
        raise DataError(f"{name}: its documents cannot be fetched from the Hugging Face hub", [Problem("tasks", found, remedy)]) from error
    for part in parts.values():
        part.set_config(key="num_fewshot", value=0)
        part.set_fewshot_seed(SEED)
    group = _group(config) if TASKS[name].subtask else None
    if local is not None:
        return LoadedTask(name, parts, group, local.size, local.mark)
    size, mark = _choose(parts, limit)
    return LoadedTask(name, parts, group, size, mark)


def _in_place(manager: Any, name: str, documents: list[Document]) -> dict[str, Any]:
    """What to change in the configuration of a task so that it reads `documents`: the rest stays the harness's."""
    config = manager.task_index[name].cfg
    splits = [split for split in (config.get("validation_split"), config.get("test_split")) if split]

    def local_documents(**ignored: Any) -> dict[str, Any]:
        from datasets import Dataset

        dataset = Dataset.from_list(documents)
        return dict.fromkeys(splits, dataset)  # the harness wants every split that is named, and asks the last

    return {"custom_dataset": local_documents, "training_split": None}


def _group(config: Mapping[str, Any]) -> Any:
    from lm_eval.api.group import Group

    return Group.from_config({key: value for key, value in config.items() if key in ("group", "aggregate_metric_list", "metadata")})


def _choose(parts: Mapping[str, Any], limit: int | None) -> tuple[int, str]:
    """Leave in tasks from the hub the documents that `limit` takes; returns how many there were, and the mark of those left."""
    splits = {name: part.config.test_split or part.config.validation_split for name, part in parts.items()}
    sizes = [len(part.dataset[splits[name]]) for name, part in parts.items()]
    for (name, part), size, most in zip(parts.items(), sizes, limits(sizes, limit), strict=True):
        part.dataset[splits[name]] = part.dataset[splits[name]].select(spaced(size, most))
    return sum(sizes), marked({name: list(part.dataset[splits[name]]) for name, part in parts.items()})


def harness_model(model: Any, tokenizer: Any, *, batch_size: int, bfloat16: bool, watch: Watch) -> Any:
    """The model as the harness takes it: computed as `evaluate` computes losses, watched, and refusing what it cannot answer.

    Args:
        model: of transformers, on its device, fp32.
        batch_size: sequences of one forward pass.
        bfloat16: compute under autocast.
        watch: called for each document that is prepared, before each forward pass, and after the last.

    Raises `ArtifactError` for a tokenizer without a token that begins or ends a text.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        remedy = "Tasks without a prompt begin with one of them; set bos_token or eos_token in tokenizer_config.json."
        raise ArtifactError("the tokenizer cannot be used for tasks", [Problem("tokenizer", "no token that begins or ends a text", remedy)])
    with _quiet():
        from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):  # type: ignore[misc]
        """The harness's own model class, without its progress bars."""

        truncated = 0
        """Sequences that were longer than the model's context and lost their beginning."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
            longest = max(len(answer) for _, _, answer in requests)
            if longest > self.max_length:
                remedy = "Take a model with a longer context, or leave this task out."
                raise ArtifactError("an answer is longer than the model's context", [Problem("answer", f"{longest} tokens", remedy)])
            self.truncated += sum(len(prompt) + len(answer) > self.max_length + 1 for _, prompt, answer in requests)
            # answers that differ in their last token alone are read off one forward pass
            self.done, self.total = 0, len({hash((*prompt, *answer[:-1])) for _, prompt, answer in requests})
            found = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            watch(self.done, self.total)
            return found

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            watch(self.done, self.total)
            try:
                logits_BTV = super()._model_call(inps, attn_mask, labels)
            except torch.OutOfMemoryError:
                found = f"{inps.shape[0]} sequences of {inps.shape[1]} tokens"
                raise ConfigError("the GPU's memory is too small", [Problem("batch_size", found, "Give a smaller --batch-size.")]) from None
            self.done += len(inps)
            return logits_BTV

    with _quiet():
        wrapped = Watched(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            softmax_dtype=torch.float32,
            mixed_precision_dtype=torch.bfloat16 if bfloat16 else None,
        )
    wrapped.watch = watch
    return wrapped


def run_task(task: LoadedTask, model: Any) -> dict[str, Any]:
    """Ask a model (of `harness_model`) a task.

    Returns:
        For each metric M of the harness `M` and `M_stderr` (None for a single document); `samples`: documents asked; `of`: documents there
        are; `version`: the harness's of the task. A task of several has the group's, and `subtasks`: each one's accuracy. `truncated`:
        sequences that lost their beginning, where there are any.

        Standard errors: of a mean, the harness's, s / sqrt(n) with s over n - 1. Of a perplexity exp(-m), exp(-m) times that of m (the
        delta method; the harness draws 100,000 bootstrap samples). Of the unweighted mean of k subtasks, the harness's,
        sqrt(sum of squared errors) / k: subtasks are fixed, and only their documents drawn.
    """
    from lm_eval.api.metrics import mean_stderr, perplexity

    truncated = model.truncated
    with _quiet(lambda: model.watch(0, 0)):
        from lm_eval.evaluator import evaluate

        found = evaluate(model, {"tasks": task.parts, "groups": {}, "group_map": {}}, bootstrap_iters=0, log_samples=True)
    results: dict[str, dict[str, Any]] = {}
    for name, part in task.parts.items():
        asked = found["samples"][name]
        results[name] = {"sample_len": len(asked)}
        for metric, aggregation in part.aggregation().items():
            value = float(found["results"][name][f"{metric},none"])
            error = float(mean_stderr([sample[metric] for sample in asked])) if len(asked) > 1 else None
            if aggregation is perplexity and error is not None:
                error *= value
            results[name] |= {f"{metric},none": value, f"{metric}_stderr,none": error}
    told = results[task.name] if task.group is None else _grouped(task, results)
    values = {key.removesuffix(",none"): value for key, value in told.items() if key.endswith(",none")}
    any_part = next(iter(task.parts.values()))
    summary = values | {"samples": sum(result["sample_len"] for result in results.values()), "of": task.size}
    summary["version"] = str(any_part.VERSION if task.group is None else task.group.version)
    if task.group is not None:
        summary["subtasks"] = {name.removeprefix(f"{task.name}_"): result["acc,none"] for name, result in results.items()}
    return summary | ({"truncated": model.truncated - truncated} if model.truncated > truncated else {})


def _grouped(task: LoadedTask, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The harness's aggregation of a group, with numbers of Python."""
    for part in task.parts.values():
        task.group.add(part)
    told = task.group.aggregate(results)
    keys = [key for key in told if key.endswith(",none")]
    return {key: float(told[key]) if isinstance(told[key], float) and math.isfinite(told[key]) else None for key in keys}


@contextmanager
def _quiet(check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Without the harness's and datasets' progress bars and the harness's log; `check` is called at each document that is prepared."""
    import datasets
    import lm_eval.api.task as preparing

    def watched(documents: Any, **ignored: Any) -> Iterator[Any]:
        for document in documents:
            check()
            yield document

    log, bar, bars = logging.getLogger("lm_eval"), preparing.tqdm, datasets.utils.are_progress_bars_disabled()
    level = log.level
    log.setLevel(logging.ERROR)
    preparing.tqdm = watched
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        preparing.tqdm = bar
        log.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
