"""Slicing on the way, through the whole pipeline: killed at any point of it, stopped, on two processes: the same bits."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shearling
from faults import KILLED, die, in_child
from models import save_tiny_source
from ranks import Ranks
from runs import Notes, SignalAt, command, contents, metrics, recipe_values, write_text
from shearling import pruning, stages, subject
from shearling.errors import Stopped
from shearling.io import files
from shearling.prune import verify
from shearling.train import checkpoint
from tiny_stage import saved

SOURCES: dict[str, dict[str, Any]] = {"llama": {"tied": True, "layers": 4}, "qwen3": {"layers": 4}}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "in training": ("llama", {"method": "efficientllm", "cuts": 3, "steps": 6}),  # sliced after steps 2 and 4
    "before and after steps": ("qwen3", {"method": "taylor", "cuts": 3, "steps": 6, "keep_moments": False}),  # and after 0, 2 and 4
}


def values_of(source: Path, domains: dict[str, str], name: str, **more: Any) -> dict[str, Any]:
    fit = {"microbatches": 2, "gates": {"calibration_sequences": 4}, "evaluate_every": 2, "slice_every": 1}
    runtime, evaluate = {"precision": "float32", "save_every": 5}, {"speed": False}
    prune, train = {**fit, **METHODS[name][1], **more}, {"microbatches": 2}
    return recipe_values(source, domains, target={"parameters": 0.7}, prune=prune, train=train, runtime=runtime, evaluate=evaluate)


def state_of(out: Path) -> dict[str, Any]:
    """All that a run that is pruned leaves behind."""
    assert not [path for kind in (".tmp-*", ".aside-*") for path in out.rglob(kind)]
    return {
        "pruned": contents(out / "pruned"),
        "plan": (out / "plan.json").read_bytes(),
        "log": metrics(out),
        "saved": saved(out / "checkpoints" / "prune"),
    }


@pytest.fixture(scope="module")
def whole_of(sources: Callable[[str], Path], domains: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Of a method, plain values of the recipe, and what an uninterrupted run leaves behind."""
    done: dict[str, Any] = {}

    def run(name: str) -> Any:
        if name not in done:
            values, out = values_of(sources(METHODS[name][0]), domains, name), tmp_path_factory.mktemp("whole") / "run"
            shearling.prune(values, out)
            done[name] = values, state_of(out)
        return done[name]

    return run


# Each of these arms a child: it dies at that place of the slicing of that number, from 1.


def nth(number: int) -> Callable[[], bool]:
    """A function that says at its `number`-th call that this is it."""
    calls = [0]

    def now() -> bool:
        calls[0] += 1
        return calls[0] == number

    return now


def once_saved(number: int) -> None:
    now, original = nth(number), pruning._slice
    pruning._slice = lambda *arguments: die() if now() else original(*arguments)  # type: ignore[func-returns-value,assignment,return-value]


def in_the_rewritten_part(number: int) -> None:
    now, rewrite, write_part = nth(number), checkpoint.rewrite, checkpoint.write_part

    def half(staged: Path, rank: int, tensors: Any) -> Any:
        part = write_part(staged, rank, tensors)
        os.truncate(staged / part["name"], part["bytes"] // 2)
        die()
        return part

    def rewritten(*arguments: Any) -> Path:
        if now():
            checkpoint.write_part = half
        return rewrite(*arguments)

    checkpoint.rewrite = rewritten


def between_two_names(number: int) -> None:
    """The old one is set aside, the new one has no name yet."""
    now, rewrite, rename = nth(number), checkpoint.rewrite, os.rename

    def half(one: Any, other: Any) -> None:
        if Path(one).name.startswith(".tmp-step-"):
            die()
        rename(one, other)

    def rewritten(*arguments: Any) -> Path:
        if now():
            files.os.rename = half  # type: ignore[attr-defined]
        return rewrite(*arguments)

    checkpoint.rewrite = rewritten


def once_rewritten(number: int) -> None:
    now, rewrite = nth(number), checkpoint.rewrite

    def rewritten(*arguments: Any) -> Path:
        final = rewrite(*arguments)
        if now():
            die()
        return final

    checkpoint.rewrite = rewritten


def in_the_next_step(number: int) -> None:
    now, original = nth(number), subject.of_shape

    def opened(*arguments: Any) -> Any:
        model = original(*arguments)
        if now():
            model.register_forward_pre_hook(lambda module, args: die())
        return model

    subject.of_shape = opened


POINTS = (once_saved, in_the_rewritten_part, between_two_names, once_rewritten, in_the_next_step)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_killed_anywhere_and_gone_on(name: str, point: Callable[[int], None], whole_of: Callable[[str], Any], tmp_path: Path) -> None:
    """In the first slicing, then in the second of what goes on; then to the end."""
    values, whole = whole_of(name)

    def work(number: int) -> None:
        torch.set_num_threads(1)
        point(number)
        shearling.prune(values, tmp_path / "run")

    assert in_child(lambda: work(1)) == KILLED
    assert in_child(lambda: work(1 if point is once_rewritten else 2)) == KILLED
    shearling.prune(values, tmp_path / "run")
    assert state_of(tmp_path / "run") == whole


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_gone_on(name: str, whole_of: Callable[[str], Any], tmp_path: Path) -> None:
    """At the steps of slicings and between them."""
    values, whole = whole_of(name)
    for step in (1, 2, 3, 4, 5):
        with pytest.raises(Stopped):
            shearling.prune(values, tmp_path / "run", show=SignalAt(("prune", step), signal.SIGTERM))
    shearling.prune(values, tmp_path / "run")
    assert state_of(tmp_path / "run") == whole


def test_the_log_tells_what_trains(whole_of: Callable[[str], Any]) -> None:
    for name, first in (("in training", 3), ("before and after steps", 1)):
        log = [line for line in whole_of(name)[1]["log"] if line["step"]]
        sizes = [line["model_parameters"] for line in log]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
        for step in (2, 4):  # the line of a step tells what it was taken with, and what its cut has left
            assert log[step]["model_parameters"] == log[step - 1]["parameters"] < sizes[step - 1]
        assert (sizes[first - 1] < sizes[0]) == (first > 1)


def test_notes_say_so(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    notes = Notes()
    shearling.prune(values_of(sources("llama"), domains, "in training"), tmp_path / "run", show=notes)
    log = metrics(tmp_path / "run")
    expected = [f"the model is sliced after step {step}: {log[step]['parameters']:,} parameters train on" for step in (2, 4)]
    assert [note for note in notes.notes if "sliced" in note] == expected


def test_slicing_can_be_taken_up_and_left_off_on_the_way(
    sources: Callable[[str], Path], domains: dict[str, str], whole_of: Callable[[str], Any], tmp_path: Path
) -> None:
    """The same plan, and weights as near as rounding lets them be."""
    for began in (0, 1):
        out = tmp_path / str(began)
        values = values_of(sources("llama"), domains, "in training", slice_every=began)
        with pytest.raises(Stopped):
            shearling.prune(values, out, show=SignalAt(("prune", 3), signal.SIGTERM))
        values["prune"]["slice_every"] = 1 - began
        shearling.prune(values, out, accept_changed=["prune.slice_every"])
        assert (out / "plan.json").read_bytes() == whole_of("in training")[1]["plan"]
        losses = [[line["loss"] for line in log if line["step"]] for log in (metrics(out), whole_of("in training")[1]["log"])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        sizes = {line["step"]: line["model_parameters"] for line in metrics(out) if "model_parameters" in line}
        in_whole = {line["step"]: line["model_parameters"] for line in whole_of("in training")[1]["log"] if line["step"]}
        assert sizes == {step: in_whole[step] for step in ((1, 2, 3) if began else (4, 5, 6))}


@pytest.mark.parametrize("rotate", ["no", "tied", "untied"])
def test_turned_and_compensated(rotate: str, sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """What is fitted stands in for what was closed since the last slicing; also where it is stopped on the way."""
    values = values_of(sources("llama"), domains, "in training", rotate=rotate, compensate=12)
    report = shearling.prune(values, tmp_path / "run")
    assert report["verify"]["relative_difference"] <= 1e-4 or report["verify"]["relative_difference_float64"] <= 1e-8
    with pytest.raises(Stopped):
        shearling.prune(values, tmp_path / "broken", show=SignalAt(("prune", 5), signal.SIGTERM))
    again = shearling.prune(values, tmp_path / "broken")
    assert state_of(tmp_path / "broken") == state_of(tmp_path / "run") and again["tokens"] == report["tokens"]


def test_where_nothing_goes_nothing_is_sliced(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    for every in (0, 1):
        values = values_of(sources("qwen3"), domains, "before and after steps", slice_every=every)
        report = shearling.prune({**values, "target": {"parameters": 1.0}}, tmp_path / str(every))
        assert report["model"]["parameters"] == report["source"]["parameters"]


def test_no_two_models_are_in_memory(
    sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the next is made, those before are gone."""
    models, original, place = [], subject.of_shape, stages.Context.place

    def placed(self: stages.Context, load: Callable[[], Any]) -> Any:
        models.append(weakref.ref(model := place(self, load)))
        return model

    def opened(*arguments: Any) -> Any:
        gc.collect()
        assert models and not [model for model in models if model() is not None]
        return original(*arguments)

    monkeypatch.setattr(stages.Context, "place", placed)
    monkeypatch.setattr(subject, "of_shape", opened)
    for name in METHODS:
        shearling.prune(values_of(sources(METHODS[name][0]), domains, name), tmp_path / name)
    assert len(models) == sum(3 + slicings for slicings in (2, 3))  # measured, pruned, cut; and one for each slicing


def stop_at_3(rank: int) -> None:
    """On process 1, in the first step after the first slicing."""
    from shearling.train import loop

    original, seen = loop.train_step, [0]

    def train_step(*arguments: Any, **how: Any) -> Any:
        seen[0] += 1
        if (rank, seen[0]) == (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **how)

    loop.train_step = train_step  # type: ignore[assignment]


def look_closely(rank: int) -> None:
    """Masked and cut model are compared in fp64, whatever fp32 says."""
    verify.TOLERANCE = 0.0


def test_two_processes_give_the_same_bits_as_one(tmp_path: Path) -> None:
    """All along, and where two begin and one goes on."""
    save_tiny_source(tmp_path / "source", "llama", **SOURCES["llama"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values_of(tmp_path / "source", write_text(tmp_path), "in training")))

    def arguments(out: str) -> list[str]:
        return ["prune", str(recipe), "--out", str(tmp_path / out)]

    assert command(arguments("alone"), tmp_path / "alone.txt") == 0, (tmp_path / "alone.txt").read_text()
    together = Ranks(arguments("two"), tmp_path / "ranks", inject="test_slicing:look_closely")
    assert together.codes() == [0, 0], together.text()
    assert 0 < json.loads((tmp_path / "two" / "stages" / "prune.json").read_text())["verify"]["relative_difference_float64"] < 1e-11
    stopped = Ranks(arguments("mixed"), tmp_path / "stopped", inject="test_slicing:stop_at_3")
    assert len(set(stopped.codes())) == 1 and "stopped by SIGTERM after step 3 of 6" in stopped.text(), stopped.text()
    assert command(arguments("mixed"), tmp_path / "mixed.txt") == 0, (tmp_path / "mixed.txt").read_text()
    alone = state_of(tmp_path / "alone")
    assert state_of(tmp_path / "two") == alone and state_of(tmp_path / "mixed") == alone
