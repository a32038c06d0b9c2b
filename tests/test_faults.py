"""Whatever happens to a stage of training, the same command goes on to the same bits: kills, full disks, what is optional failing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import KILLED, die, full_disk, in_child, in_children, largest_file
from shearling.errors import StorageError
from shearling.io.files import storage_errors
from shearling.train import checkpoint
from shearling.train.log import RunLog
from shearling.train.step import GradientSums
from tiny_stage import KINDS, MICROBATCHES, STEPS, Stage, finished, result_of, saved

KILLED_STEPS = 4
"""Steps of the stages that are killed: few, since each is killed at every point of each."""
SAVES = (2, 4)
"""Steps after which they save; after the last one never in the background."""


def test_a_finished_stage_shows_all_that_is_compared() -> None:
    """Lest the comparisons below compare nothing."""
    plain, gated = finished("plain"), finished("lagrangian")
    assert [line["step"] for line in plain["log"]] == list(range(STEPS + 1))
    assert plain["saved"]["state"]["progress"].keys() >= {"weights", "cursors", "tokens", "heldout", "bad_steps"}
    assert {name.split("/")[0] for name in plain["saved"]["tensors"]} == {"model", "optimizer"}
    names = {name for name in gated["saved"]["tensors"] if name.startswith("gates/")}
    assert names > {"gates/log_alpha.hidden", "gates/lambda_1.neuron", "gates/first/lambda_2.hidden", "gates/steps"}
    assert set(plain["saved"]["state"]["optimizer"]["step"].values()) == {float(STEPS)}
    assert gated["log"][-1]["multipliers"]["hidden"].keys() == {"lambda_1", "lambda_2"}
    assert finished("projected")["log"][-1]["multipliers"]["hidden"].keys() == {"shift"}
    assert plain["log"][1]["weights"] != plain["log"][-1]["weights"]


# Each of these arms a child: it dies at that place of the step.


def after_a_forward_pass(stage: Stage, step: int) -> None:
    moment = (step, step % MICROBATCHES)
    stage.after_forward = lambda at, found: die() if at == moment else found  # type: ignore[func-returns-value,return-value]


def after_a_backward_pass(stage: Stage, step: int) -> None:
    original = GradientSums.add

    def add(self: GradientSums, last: bool) -> None:
        if stage.at == (step, (step + 1) % MICROBATCHES):
            die()
        original(self, last)

    GradientSums.add = add  # type: ignore[method-assign]


def between_weights_and_gates(stage: Stage, step: int) -> None:
    original = torch.optim.AdamW.step

    def update(self: torch.optim.AdamW) -> None:
        original(self)
        if stage.at[0] == step:
            die()

    torch.optim.AdamW.step = update  # type: ignore[method-assign,assignment]


def in_a_line_of_the_log(stage: Stage, step: int) -> None:
    original = RunLog.step

    def half(self: RunLog, metrics: Any) -> None:
        if metrics["step"] == step:
            self._file.write(json.dumps({"stage": stage.name, "step": step, "loss": 1.0})[:-8])
            self._file.flush()
            die()
        original(self, metrics)

    RunLog.step = half  # type: ignore[method-assign]


def in_a_part_of_a_save(stage: Stage, step: int) -> None:
    original = checkpoint.write_part

    def half(staged: Path, rank: int, tensors: Any) -> Any:
        part = original(staged, rank, tensors)
        if staged.name.startswith(f".tmp-step-{step:08d}-"):
            os.truncate(staged / part["name"], part["bytes"] // 2)
            die()
        return part

    checkpoint.write_part = half


def before_a_save_gets_its_name(stage: Stage, step: int) -> None:
    original = checkpoint.replace_directory

    def rename(staged: Path, final: Path) -> None:
        if final.name == f"step-{step:08d}":
            die()
        original(staged, final)

    checkpoint.replace_directory = rename


def after_a_save(stage: Stage, step: int) -> None:
    original = checkpoint.publish

    def published(staged: Path, number: int, *rest: Any) -> Path:
        final = original(staged, number, *rest)
        if number == step:
            die()
        return final

    checkpoint.publish = published


Arm = Callable[[Stage, int], None]
IN_A_STEP: dict[Arm, tuple[str, ...]] = {
    after_a_forward_pass: KINDS,
    after_a_backward_pass: KINDS,
    between_weights_and_gates: ("lagrangian",),
    in_a_line_of_the_log: ("plain",),
}
IN_A_SAVE: dict[Arm, tuple[str, ...]] = {
    in_a_part_of_a_save: KINDS,
    before_a_save_gets_its_name: ("projected",),
    after_a_save: KINDS,
}
"""Which kinds of stage die there; where it can make no difference, one."""


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_point_of_a_step(kind: str, tmp_path: Path) -> None:
    """Weights, moments, gates, multipliers, shares, cursors and the log are bitwise those of an uninterrupted stage."""
    every = [(arm, step, step % 2 == 0) for arm, kinds in IN_A_STEP.items() if kind in kinds for step in range(1, KILLED_STEPS + 1)]
    every += [
        (arm, step, background)
        for arm, kinds in IN_A_SAVE.items()
        if kind in kinds
        for step in SAVES
        for background in (True, False)
        if step < KILLED_STEPS or not background
    ]
    cases = {f"{arm.__name__}-{step}{'-background' * background}": (arm, step, background) for arm, step, background in every}
    stages = {background: Stage(kind, {"async_save": background}, steps=KILLED_STEPS) for background in (True, False)}

    def killed(arm: Arm, step: int, background: bool, run: Path) -> None:
        arm(stages[background], step)
        stages[background].fit(run)

    codes = in_children(partial(killed, *case, tmp_path / name) for name, case in cases.items())
    for (name, (arm, step, background)), code in zip(cases.items(), codes, strict=True):
        assert code == KILLED, f"{name} was not killed"
        stage = Stage(kind, {"async_save": background}, steps=KILLED_STEPS)
        stage.fit(tmp_path / name)
        assert result_of(stage, tmp_path / name) == finished(kind, KILLED_STEPS), name
        # It went on from what was saved, not from the start; of an arm that kills in a step, a thread may still have been at it.
        due = step if arm is after_a_save else max(done for done in (0, *SAVES) if done < step)
        racing = 2 if background and arm in IN_A_STEP else 0
        first = stage.steps[0] if stage.steps else KILLED_STEPS + 1
        assert due - racing < first <= due + 1 and stage.steps == list(range(first, KILLED_STEPS + 1)), name


def test_killed_again_and_again(tmp_path: Path) -> None:
    """Every step of one run is killed once; what goes on was gone on with before."""
    arms = [after_a_forward_pass, in_a_part_of_a_save, in_a_line_of_the_log, before_a_save_gets_its_name, after_a_backward_pass]
    for step, arm in enumerate(arms, 1):
        stage = Stage("projected")

        def killed(stage: Stage = stage, step: int = step, arm: Callable[[Stage, int], None] = arm) -> None:
            arm(stage, step)
            stage.fit(tmp_path)

        assert in_child(killed) == KILLED, step
    stage = Stage("projected")
    stage.fit(tmp_path)
    assert result_of(stage, tmp_path) == finished("projected")


class Disk:
    """Fails the writing of some checkpoints, in the middle of their tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *full: int) -> None:
        self.full = full
        original = checkpoint.write_tensors

        def write(path: Path, tensors: Any) -> Any:
            written = original(path, tensors)
            if any(f"step-{step:08d}" in path.parent.name for step in self.full):
                os.truncate(path, written.size // 2)
                with storage_errors(path, written.size):
                    raise full_disk(path)
            return written

        monkeypatch.setattr(checkpoint, "write_tensors", write)


def test_a_full_disk_at_one_periodic_save_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch, 2)
    stage = Stage("projected")
    stage.fit(tmp_path)
    (note,) = stage.notes
    assert "disk is full" in note and "There is no checkpoint yet" in note and "a second failure ends it" in note
    assert list(checkpoint.steps(stage.checkpoints(tmp_path))) == [4, STEPS]
    assert result_of(stage, tmp_path) == finished("projected")


def test_a_second_failure_in_a_row_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, 2, 3)
    stage = Stage("plain", {"save_every": 1})
    with pytest.raises(StorageError, match=r"two checkpoints in a row.*disk is full") as caught:
        stage.fit(tmp_path)
    assert caught.value.exit_code == 6
    last = checkpoint.directory_of(stage.checkpoints(tmp_path), 1)
    assert f"The last checkpoint is {last}." in str(caught.value) and f"The last checkpoint is {last}." in stage.notes[0]
    assert [path.name for path in stage.checkpoints(tmp_path).iterdir()] == [last.name]  # and nothing half written
    assert saved(stage.checkpoints(tmp_path))["step"] == 1
    disk.full = ()
    again = Stage("plain")
    again.fit(tmp_path)
    assert result_of(again, tmp_path) == finished("plain")


def test_a_save_that_goes_well_makes_up_for_one_that_did_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch, 1, 3, 5)
    stage = Stage("plain", {"save_every": 1}, steps=6)
    assert stage.fit(tmp_path).step == 6
    assert len(stage.notes) == 3 and list(checkpoint.steps(stage.checkpoints(tmp_path))) == [4, 6]


def test_a_full_disk_at_the_last_save_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch, STEPS)
    stage = Stage("plain")
    with pytest.raises(StorageError, match="disk is full"):
        stage.fit(tmp_path)
    assert not stage.notes
    assert sorted(path.name for path in stage.checkpoints(tmp_path).iterdir()) == ["step-00000002", "step-00000004"]
    assert saved(stage.checkpoints(tmp_path))["step"] == 4


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """As far as a limit on the size of files goes; the log and what TensorBoard writes are smaller than it."""
    stage = Stage("plain")

    def limited() -> None:
        largest_file(20_000)
        with pytest.raises(StorageError, match="two checkpoints in a row could not be saved"):
            stage.fit(tmp_path)
        assert len(stage.notes) == 1

    assert in_child(limited) == 0
    assert list(stage.checkpoints(tmp_path).iterdir()) == []
    stage.fit(tmp_path)
    assert result_of(stage, tmp_path) == finished("plain")


@pytest.mark.parametrize("last", [3, STEPS])
def test_a_log_that_cannot_be_written_ends_the_run(last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained on is logged: the run ends before the next step, and before a last checkpoint that would hide the gap."""
    stage = Stage("plain")
    original = RunLog.step

    def step(self: RunLog, metrics: Any) -> None:
        if metrics["step"] == last:
            self._file.close()
            self._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115 (the log closes it)
        original(self, metrics)

    monkeypatch.setattr(RunLog, "step", step)
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot write: the disk is full"):
        stage.fit(tmp_path)
    assert stage.at[0] == last and STEPS not in checkpoint.steps(stage.checkpoints(tmp_path))
    monkeypatch.undo()
    again = Stage("plain")
    again.fit(tmp_path)
    assert result_of(again, tmp_path) == finished("plain")
