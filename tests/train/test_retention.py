"""How many checkpoints stay, and that deleting the others can hurt neither those nor the run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from shearling.errors import ArtifactError
from shearling.io.files import remove_tree
from shearling.train import checkpoint
from shearling.train.checkpoint import load, steps
from shearling.train.saver import Saver


def save(folder: Path, step: int, keep: int = 2) -> None:
    with Saver(folder, keep) as saver:
        saver.save(step, {"w": torch.full((3, 2), float(step))}, {"n": step})


def holds(folder: Path, *expected: int) -> bool:
    """Whether these checkpoints and no others are there, and whole."""
    found = [load(folder, step) for step in steps(folder)]
    assert all(one is not None and one.state["n"] == one.step and bool((one.whole("w") == one.step).all()) for one in found)
    return [one.step for one in found if one is not None] == list(expected)


def test_keeps_the_newest_two_whole_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=1)
    assert holds(tmp_path, 30, 40)
    (tmp_path / "step-00000040" / "state.json").unlink()  # broken ones do not count
    save(tmp_path, 50)
    assert list(steps(tmp_path)) == [30, 40, 50]
    save(tmp_path, 60)
    assert list(steps(tmp_path)) == [50, 60]
    save(tmp_path, 45)  # gone back to an earlier step: it is kept
    assert holds(tmp_path, 45, 50, 60)


def test_keeps_as_many_as_asked(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=4)
        assert holds(tmp_path, *range(max(1, step - 3), step + 1))


def test_the_manifest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an old checkpoint whose deletion is cut short never looks complete."""
    save(tmp_path, 10)
    save(tmp_path, 20)
    seen: list[list[str]] = []

    def look(path: Path) -> None:
        if path.name == "step-00000010":
            seen.append(sorted(file.name for file in path.iterdir()))
            os.unlink(path / "state.json")
            raise OSError("cut short")
        remove_tree(path)

    monkeypatch.setattr(checkpoint, "remove_tree", look)
    with pytest.warns(UserWarning, match="step-00000010: an old checkpoint could not be deleted"):
        save(tmp_path, 30)
    assert seen == [["rank-00000.safetensors", "state.json"]]
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        load(tmp_path, 10)
    monkeypatch.undo()
    save(tmp_path, 40)  # the next one deletes what is left of it
    assert holds(tmp_path, 30, 40)


def test_a_failed_delete_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "refused")

    monkeypatch.setattr(checkpoint, "remove_tree", refuse)
    with pytest.warns(UserWarning, match="could not be deleted"):
        save(tmp_path, 30)
    (found,) = [found for found in [load(tmp_path)] if found is not None]
    assert found.step == 30 and list(steps(tmp_path)) == [10, 20, 30]
