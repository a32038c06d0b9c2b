"""The log of a run: each step once, also after an interruption."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from shearling.errors import ArtifactError, StorageError
from shearling.train.log import NoLog, RunLog, read_metrics


def write(run: Path, stage: str, steps: range, after_step: int = 0, offset: int = 0) -> None:
    with RunLog(run, stage, after_step=after_step, offset=offset) as log:
        for step in steps:
            log.step({"step": step, "loss": 3.0 - step / 10, "heldout": {"web": step / 7, "mean": step / 7}})


def steps(run: Path) -> list[tuple[str, int]]:
    return [(line["stage"], line["step"]) for line in read_metrics(run)]


def test_log_holds_what_was_logged(tmp_path: Path) -> None:
    with RunLog(tmp_path / "new" / "run", "prune") as log:
        log.step({"step": 1, "loss": torch.tensor(2.5), "weights": {"wéb": 0.25}, "gradient_norm": float("nan")})
        line = (tmp_path / "new" / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    expected = {"stage": "prune", "step": 1, "loss": 2.5, "weights": {"wéb": 0.25}, "gradient_norm": None}
    assert line.endswith("\n")
    assert json.loads(line) == expected == read_metrics(tmp_path / "new" / "run")[0]


def test_no_log_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(whole, "prune", range(0, 7))
    write(whole, "train", range(0, 5), offset=6)
    write(broken, "prune", range(0, 6))
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "prune", "step": 6, "lo')
    write(broken, "prune", range(4, 7), after_step=3)
    write(broken, "train", range(0, 3), offset=6)
    write(broken, "train", range(3, 5), after_step=2, offset=6)
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert sorted(p.name for p in broken.iterdir()) == ["events", "metrics.jsonl"]


def test_an_earlier_stage_cuts_later_ones(tmp_path: Path) -> None:
    write(tmp_path, "prune", range(1, 4))
    write(tmp_path, "train", range(0, 3), offset=3)
    write(tmp_path, "prune", range(3, 4), after_step=2)
    assert steps(tmp_path) == [("prune", 1), ("prune", 2), ("prune", 3)]


def test_a_stage_begun_anew_writes_step_0_once(tmp_path: Path) -> None:
    for _ in range(2):
        write(tmp_path, "prune", range(0, 3))
    assert steps(tmp_path) == [("prune", 0), ("prune", 1), ("prune", 2)]


@pytest.mark.parametrize("tail", ['{"stage": "tr', "\0\0\0\0", '{"stage": "train", "step": 3, "loss": "é'.encode()[:-1]])
def test_a_torn_last_line_is_passed_over(tmp_path: Path, tail: str | bytes) -> None:
    write(tmp_path, "train", range(1, 3))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail if isinstance(tail, bytes) else tail.encode())
    assert steps(tmp_path) == [("train", 1), ("train", 2)]
    write(tmp_path, "train", range(3, 4), after_step=2)
    assert steps(tmp_path) == [("train", 1), ("train", 2), ("train", 3)]


def test_a_whole_last_line_without_its_end_is_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "train", "step": 1, "loss": 2.0}')
    write(tmp_path, "train", range(2, 3), after_step=1)
    assert steps(tmp_path) == [("train", 1), ("train", 2)]


def test_a_damaged_line_inside_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "train", "step": 1}\n{"st\n{"stage": "train", "step": 3}\n')
    with pytest.raises(ArtifactError, match="line 2"):
        read_metrics(tmp_path)


def test_a_step_is_taken_once_and_forwards(tmp_path: Path) -> None:
    with RunLog(tmp_path, "train", after_step=4) as log:
        with pytest.raises(ValueError, match="at step 4"):
            log.step({"step": 4, "loss": 1.0})
        log.step({"step": 5, "loss": 1.0})
        with pytest.raises(ValueError, match="prune"):
            log.step({"stage": "prune", "step": 6, "loss": 1.0})
    with pytest.raises(ValueError, match="stages"):
        RunLog(tmp_path, "serve")


def test_tensorboard_has_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, "prune", range(0, 5))
    write(tmp_path, "prune", range(3, 5), after_step=2)
    write(tmp_path, "train", range(1, 4), offset=4)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [event.value for event in events.Scalars("heldout/web")][5:] == pytest.approx([1 / 7, 2 / 7, 3 / 7])
    assert "step" not in events.Tags()["scalars"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        RunLog(tmp_path / "file" / "run", "prune")


def test_a_line_that_cannot_be_written_is_told_when_asked(tmp_path: Path) -> None:
    """Not before, so that all processes of a run can end together; until then nothing more is written, in TensorBoard neither."""
    with RunLog(tmp_path, "train") as log:
        log.step({"step": 1, "loss": 1.0})
        log.check()
        whole = log._file
        with contextlib.suppress(OSError), open("/dev/full", "a", encoding="utf-8") as full:
            log._file = full
            log.step({"step": 2, "loss": 2.0})
        assert log.failed
        log._file = whole  # there is space again
        log.step({"step": 3, "loss": 3.0})
        for _ in range(2):
            with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot write: the disk is full") as caught:
                log.check()
        assert caught.value.exit_code == 6
    assert steps(tmp_path) == [("train", 1)]
    assert [event.step for event in EventAccumulator(str(tmp_path / "events")).Reload().Scalars("loss")] == [1]
    write(tmp_path, "train", range(2, 4), after_step=1)
    assert steps(tmp_path) == [("train", 1), ("train", 2), ("train", 3)]


@pytest.mark.parametrize("fails", ["__init__", "add_scalar", "close"])
def test_without_tensorboard_the_log_goes_on(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the writer's calls may fail; it is told once, with what failed, and not called again."""
    calls: list[str] = []

    def fail(self: SummaryWriter, *args: Any, **kwargs: Any) -> None:
        calls.append(fails)
        raise ValueError("no\n  events" + "!" * 500)

    monkeypatch.setattr(SummaryWriter, fails, fail)
    told: list[str] = []
    with RunLog(tmp_path, "train", warn=told.append) as log:
        for step in (1, 2, 3):
            log.step({"step": step, "loss": 1.0})
    assert steps(tmp_path) == [("train", 1), ("train", 2), ("train", 3)] and len(calls) == 1
    assert len(told) == 1 and "(ValueError: no events!!!" in told[0] and len(told[0]) < 320
    if fails == "close":
        monkeypatch.undo()
        log._events.close()


def test_without_a_listener_it_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events").write_text("in the way")
    with pytest.warns(UserWarning, match="TensorBoard's files cannot be written"):
        write(tmp_path, "train", range(3))
    assert steps(tmp_path) == [("train", 0), ("train", 1), ("train", 2)]


def test_a_process_that_keeps_no_log_can_be_asked_all_the_same() -> None:
    with NoLog() as log:
        log.step({"step": 1})
        log.check()
        assert log.failed is False
