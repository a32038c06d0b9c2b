"""`fit`: stopped in the middle of an evaluation it ends the same, and what only shows a run does not bear on it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from faults import KILLED, die, in_child
from runs import CLOCK, metrics
from shearling.errors import Stopped
from shearling.io.files import sha256_file
from shearling.show import Shielded, Silent
from shearling.train import checkpoint
from tiny_stage import STEPS, AskedToStop, Stage, finished, poisoned, result_of, saved


def stopped_in_the_evaluation(stage: Stage, run: Path, step: int) -> None:
    """Fit until a signal comes on the way through the evaluation of `step`."""
    world = stage.world = AskedToStop()
    looked: list[int] = []

    def ask(at: int) -> None:
        looked.append(at or step)  # a stage that goes on with an evaluation has begun no step yet
        if looked.count(step) == 2:  # its first batch is behind
            world.ask()

    stage.before_evaluation = ask
    with pytest.raises(Stopped, match=f"stopped by SIGTERM after step {step} of {stage.config.steps} of {stage.name}"):
        stage.fit(run)
    assert looked.count(step) == 2, "it went on evaluating"


@pytest.mark.parametrize(("kind", "every"), [("plain", 1), ("projected", 1), ("plain", 3), ("lagrangian", 3)])
def test_stopped_in_an_evaluation_and_gone_on(kind: str, every: int, tmp_path: Path) -> None:
    """The step is done and saved, its line waits for the evaluation; this is so at the first step, at the last, and again and again."""
    whole = Stage(kind, evaluate_every=every)
    returned = whole.fit(tmp_path / "whole")
    for step in (1, 2, STEPS) if every == 1 else (3, STEPS):
        stage, run = Stage(kind, evaluate_every=every), tmp_path / str(step)
        stopped_in_the_evaluation(stage, run, step)
        found = checkpoint.load(stage.checkpoints(run))
        assert found is not None and found.step == step
        assert found.state["progress"]["unlogged"]["step"] == step
        assert [line["step"] for line in metrics(run)] == list(range(step))

        again = Stage(kind, evaluate_every=every)
        stopped_in_the_evaluation(again, run, step)  # once more, with nothing done in between
        assert not again.steps
        last = Stage(kind, evaluate_every=every)
        ended = last.fit(run)
        assert last.steps == list(range(step + 1, STEPS + 1))
        assert metrics(run) == metrics(tmp_path / "whole")
        clock = dict.fromkeys(CLOCK, 0)
        assert {**ended.to_json(), **clock} == {**returned.to_json(), **clock}
        one, other = (saved(stage.checkpoints(path)) for path in (run, tmp_path / "whole"))
        assert one["tensors"] == other["tensors"] and one["step"] == other["step"] == STEPS
        if step < STEPS:  # nothing is trained after the last evaluation, so nothing is saved anew
            assert one == other


def test_stopped_between_steps_and_gone_on(tmp_path: Path) -> None:
    """At every step in turn, from before the first on."""
    for step in range(STEPS):
        stage = Stage("projected")
        world = stage.world = AskedToStop()
        stage.after_step = lambda at, world=world, step=step: world.ask() if at == step else None  # type: ignore[misc]
        if step == 0:
            world.ask()
        with pytest.raises(Stopped, match=f"after step {step} of {STEPS}"):
            stage.fit(tmp_path)
        assert saved(stage.checkpoints(tmp_path))["step"] == step and stage.steps == ([step] if step else [])
    stage = Stage("projected")
    stage.fit(tmp_path)
    assert stage.steps == [STEPS] and result_of(stage, tmp_path) == finished("projected")


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    Stage("lagrangian").fit(tmp_path)
    stage = Stage("lagrangian")
    assert stage.fit(tmp_path).step == STEPS
    assert not stage.steps and result_of(stage, tmp_path) == finished("lagrangian")


def test_a_stage_that_saves_nothing_saves_when_stopped(tmp_path: Path) -> None:
    stage = Stage("plain", {"save_every": None})
    world = stage.world = AskedToStop()
    stage.after_step = lambda step: world.ask() if step == 3 else None
    with pytest.raises(Stopped, match="everything is saved"):
        stage.fit(tmp_path)
    assert list(checkpoint.steps(stage.checkpoints(tmp_path))) == [3]
    stage = Stage("plain", {"save_every": None})
    stage.fit(tmp_path)
    assert stage.steps == [4, 5] and metrics(tmp_path) == finished("plain")["log"]
    assert list(checkpoint.steps(stage.checkpoints(tmp_path))) == [3]


def test_killed_while_the_only_checkpoint_is_saved_anew(tmp_path: Path) -> None:
    """A signal just after a save saves the same step again; for a moment the old one is aside and the new one has no name."""
    stage = Stage("plain")

    def killed() -> None:
        world = stage.world = AskedToStop()
        stage.after_step = lambda step: world.ask() if step == 2 else None
        original = os.rename

        def rename(source: Any, target: Any) -> None:
            original(source, target)
            if Path(target).name.startswith(".aside-"):
                die()

        os.rename = rename  # type: ignore[assignment]
        stage.fit(tmp_path)

    assert in_child(killed) == KILLED
    assert not checkpoint.steps(stage.checkpoints(tmp_path))
    stage.fit(tmp_path)
    assert stage.steps == [3, 4, 5] and result_of(stage, tmp_path) == finished("plain")


def test_a_damaged_checkpoint_is_passed_over_and_made_anew(tmp_path: Path) -> None:
    """The run goes on from the one before, to the same end."""
    first = Stage("projected")
    first.fit(tmp_path)
    file = checkpoint.directory_of(first.checkpoints(tmp_path), STEPS) / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(bytes(data))
    stage = Stage("projected")
    with pytest.warns(UserWarning, match=r"passed over(.|\n)*rank-00000"):
        stage.fit(tmp_path)
    assert stage.steps == [STEPS] and result_of(stage, tmp_path) == finished("projected")


def test_a_run_of_the_first_format_goes_on(tmp_path: Path) -> None:
    """With every tensor whole in one file, and without what has come into the state since."""
    first = Stage("lagrangian", {"save_every": 4})
    first.fit(tmp_path)
    folder = first.checkpoints(tmp_path)
    path, found = checkpoint.directory_of(folder, 4), checkpoint.load(folder, 4)
    assert found is not None
    tensors = {name: found.whole(name).clone() for name in found.shapes}
    shutil.rmtree(checkpoint.directory_of(folder, STEPS))
    shutil.rmtree(path)
    path.mkdir()
    save_file(tensors, path / "tensors.safetensors")
    for field in ("recent", "bad_steps", "unlogged"):
        del found.state["progress"][field]
    (path / "state.json").write_text(json.dumps(found.state))
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in path.iterdir()}
    body = json.dumps({"format": 1, "step": 4, "files": files})
    (path / "manifest.json").write_text(hashlib.sha256(body.encode()).hexdigest() + "\n" + body)
    stage = Stage("lagrangian")
    stage.fit(tmp_path)
    assert stage.steps == [STEPS] and result_of(stage, tmp_path) == finished("lagrangian")


class BrokenWriter:
    """TensorBoard's writer, failing where asked to: opened, at the n-th scalar, or when it is closed."""

    def __init__(self, where: str) -> None:
        self.where, self.scalars = where, 0

    def __call__(self, *args: Any, **kwargs: Any) -> BrokenWriter:
        if self.where == "opening":
            raise OSError("no space for events")
        return self

    def add_scalar(self, *args: Any) -> None:
        self.scalars += 1
        if self.where == "scalar" and self.scalars >= 20:
            raise RuntimeError("the writer's thread died")

    def close(self) -> None:
        if self.where == "closing":
            raise OSError("gone")


@pytest.mark.parametrize("where", ["opening", "scalar", "closing"])
def test_tensorboard_failing_is_told_once(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = BrokenWriter(where)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", writer)
    stage = Stage("projected")
    stage.fit(tmp_path)
    (note,) = stage.notes
    assert "TensorBoard's files cannot be written" in note and "metrics.jsonl has it all" in note
    assert writer.scalars == {"opening": 0, "scalar": 20}.get(where, writer.scalars)
    assert result_of(stage, tmp_path) == finished("projected")


class BrokenShow(Silent):
    """A display whose terminal goes away at the first call of one kind."""

    def __init__(self, fails: str) -> None:
        self.fails, self.calls = fails, list[str]()

    def step(self, stage: str, step: int, steps: int, line: Mapping[str, Any]) -> None:
        self._called("step")

    def note(self, text: str) -> None:
        self._called("note")

    def _called(self, kind: str) -> None:
        self.calls.append(kind)
        if kind == self.fails:
            raise OSError("the terminal is gone")


@pytest.mark.parametrize(("fails", "calls"), [("step", ["step"]), ("note", ["step", "step", "note"]), ("nothing", 5 * ["step"] + ["note"])])
def test_a_display_failing_is_told_once(fails: str, calls: list[str], tmp_path: Path) -> None:
    results = []
    for broken in (BrokenShow(fails), None):
        stage, run = Stage("projected"), tmp_path / str(broken is None)
        stage.after_forward = poisoned({2: float("nan")})  # which is noted
        if broken is None:
            stage.fit(run)
        else:
            shown = Shielded(broken)
            stage.note, stage.after_step = shown.note, lambda step, shown=shown: shown.step("prune", step, STEPS, {})  # type: ignore[misc]
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                stage.fit(run)
            assert ["the terminal is gone" in str(warning.message) for warning in told] == [True] * (fails != "nothing")
            assert sorted(broken.calls) == sorted(calls)
        results.append(result_of(stage, run))
    assert results[0] == results[1]
