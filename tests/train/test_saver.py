"""Saving: killed at any call of the file system, in the background, from several processes, onto a full disk."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from faults import KILLED, dying_at, full_disk, in_child, in_children, largest_file
from shearling.errors import PeerError, StorageError
from shearling.train import checkpoint, saver
from shearling.train.checkpoint import load, steps
from shearling.train.saver import Saver
from shearling.world import World, opened, sealed
from tiny_stage import Place, bits


def tensors(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(5, 7, generator=draw), "half": torch.randn(3, generator=draw).bfloat16(), "count": torch.tensor(seed)}


def save(folder: Path, step: int, seed: int, *, background: bool = False, keep: int = 2) -> Path:
    with Saver(folder, keep) as saver:
        saver.save(step, tensors(seed), {"n": seed}, background=background)
    return checkpoint.directory_of(folder, step)


def holds(folder: Path, step: int | None, *seeds: int) -> bool:
    """Whether the checkpoint of a step (None: the newest) is whole, and one of those saved with these seeds."""
    found = load(folder, step)
    assert found is not None
    content = {name: bits(found.whole(name)) for name in found.shapes}
    return found.state["n"] in seeds and content == {name: bits(tensor) for name, tensor in tensors(found.state["n"]).items()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Killed.


@pytest.mark.parametrize(("again", "background"), [(False, True), (True, False)])
def test_killed_at_any_filesystem_call_leaves_old_or_new(tmp_path: Path, again: bool, background: bool) -> None:
    """Two checkpoints and the rubbish of an earlier kill are there; one more is saved, or (`again`) the newer of them anew."""
    start = tmp_path / "start"
    save(start, 10, 1)
    save(start, 20, 2)
    (start / ".tmp-step-00000015-0123456789ab").mkdir()
    (start / ".tmp-step-00000015-0123456789ab" / "rank-00000.safetensors").write_bytes(b"half")
    new = 20 if again else 30

    def works() -> Iterator[Callable[[], None]]:
        for k in itertools.count(1):
            folder = Path(shutil.copytree(start, tmp_path / str(k)))
            yield dying_at(k, partial(save, folder, new, 3, background=background))

    for k, code in enumerate(in_children(works()), 1):
        folder = tmp_path / str(k)
        # The newest is the old or the new one; or the one before, while the old and the new of one step change places.
        assert holds(folder, None, *((1, 2, 3) if again else (2, 3))), k
        left = [step for step in steps(folder) if (folder / f"step-{step:08d}" / "manifest.json").exists()]
        assert all(holds(folder, step, 1, 2, 3) for step in left), k
        assert len(left) >= 2 or again, "of the last two complete ones, one is gone"
        save(folder, new, 4, background=background)  # the next save of the same step goes well and sweeps up
        assert holds(folder, new, 4) and holds(folder, 10 if again else 20, 1 if again else 2), k
        # A step's second save deletes nothing more: what was half deleted goes with the save after it.
        assert all(path.startswith("step-") for path in names(folder)), k
        save(folder, 40, 5)
        assert names(folder) == [f"step-{new:08d}", "step-00000040"]
        if code == 0:
            break
        assert code == KILLED
    assert k > 15


def test_killed_while_the_bytes_are_written(tmp_path: Path) -> None:
    """Torn files lie in a directory that has no name yet."""
    save(tmp_path, 10, 1)

    def torn(file: str) -> None:
        original = os.rename

        def rename(source: Any, target: Any) -> None:
            if Path(target).name == file:
                staged = Path(source) if Path(source).is_file() else Path(source) / "rank-00000.safetensors"
                os.truncate(staged, staged.stat().st_size // 2)
                os._exit(9)
            original(source, target)

        os.rename = rename  # type: ignore[assignment]
        save(tmp_path, 20, 2)

    for file in ("state.json", "manifest.json", "step-00000020"):
        assert in_child(lambda file=file: torn(file)) == 9  # type: ignore[misc]
        assert list(steps(tmp_path)) == [10] and holds(tmp_path, None, 1) and len(names(tmp_path)) == 2
    save(tmp_path, 20, 3)
    assert holds(tmp_path, None, 3) and names(tmp_path) == ["step-00000010", "step-00000020"]


# In the background.


class Held:
    """Holds up the writing of parts until told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.there = threading.Event(), threading.Event()
        original = checkpoint.write_part

        def write(*args: Any) -> Any:
            self.there.set()
            assert self.go.wait(20)
            return original(*args)

        monkeypatch.setattr(checkpoint, "write_part", write)


def test_what_is_saved_in_the_background_is_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller goes on at once, and changes its tensors; leaving the saver waits."""
    held = Held(monkeypatch)
    values = tensors(1)
    with Saver(tmp_path) as saver:
        saver.save(10, values, {"n": 1}, background=True)
        assert held.there.wait(20) and saver.stall_seconds < 10
        for tensor in values.values():
            tensor.zero_()
        assert steps(tmp_path) == {} and not saver.failed
        held.go.set()
    assert holds(tmp_path, 10, 1) and names(tmp_path) == ["step-00000010"]


def test_one_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    with Saver(tmp_path) as saver:
        saver.save(10, tensors(1), {"n": 1}, background=True)
        timer = threading.Timer(0.1, held.go.set)
        timer.start()
        saver.save(10, tensors(2), {"n": 2}, background=True)  # of the same step, even
        assert holds(tmp_path, 10, 1, 2)
        saver.save(20, tensors(3), {"n": 3})
        assert holds(tmp_path, 10, 2) and holds(tmp_path, 20, 3)
        timer.join()


def test_an_error_waits_for_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    timer = threading.Timer(0.1, held.go.set)
    with pytest.raises(KeyError), Saver(tmp_path) as saver:
        saver.save(10, tensors(1), {"n": 1}, background=True)
        timer.start()
        raise KeyError("of the loop")
    assert holds(tmp_path, 10, 1)
    timer.join()


# A disk that is full, or fails otherwise.


def failing_at(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Lets one place of a save raise that the disk is full."""

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        raise full_disk(path)

    if place == "flush of a part":
        original = os.fsync
        # the first flush of a save is that of its part
        monkeypatch.setattr(os, "fsync", lambda fd: refuse("rank") if not (flushed := original(fd)) else flushed)
    elif place == "rename":
        rename = os.rename
        monkeypatch.setattr(os, "rename", lambda a, b: refuse(b) if Path(b).name.startswith("step-") else rename(a, b))
    elif place == "directory":
        mkdir = os.mkdir
        monkeypatch.setattr(os, "mkdir", lambda path, *args: refuse(path) if ".tmp-step" in str(path) else mkdir(path, *args))


PLACES = ("directory", "flush of a part", "rename")


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_ends_a_save_with_its_own_error(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, 1)
    failing_at(monkeypatch, place)
    with pytest.raises(StorageError, match="the disk is full; free space there") as caught, Saver(tmp_path) as one:
        one.save(20, tensors(2), {"n": 2})
    assert caught.value.exit_code == 6
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000010"] and holds(tmp_path, None, 1)


@pytest.mark.parametrize("place", PLACES)
def test_in_the_background_the_second_failure_in_a_row_ends_it(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, 1)
    told: list[str] = []
    failing_at(monkeypatch, place)
    with pytest.raises(StorageError, match="two checkpoints in a row could not be saved"), Saver(tmp_path, warn=told.append) as saver:
        saver.save(20, tensors(2), {"n": 2}, background=True)
        while not (saver.failed or told):  # which the loop looks at after every step
            time.sleep(0.001)
        saver.settle()
        assert len(told) == 1 and "the disk is full" in told[0] and f"The last checkpoint is {tmp_path / 'step-00000010'}." in told[0]
        assert not saver.failed
        saver.save(30, tensors(3), {"n": 3}, background=True)
        saver.settle()
    monkeypatch.undo()
    assert len(told) == 1 and names(tmp_path) == ["step-00000010"] and holds(tmp_path, None, 1)


def test_leaving_tells_of_a_last_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    failing_at(monkeypatch, "rename")
    with Saver(tmp_path, warn=told.append) as saver:
        saver.save(10, tensors(1), {"n": 1}, background=True)
    assert len(told) == 1 and "There is no checkpoint yet." in told[0] and names(tmp_path) == []


def test_a_success_between_resets_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with Saver(tmp_path, warn=told.append) as saver:
        for step in range(6):
            with monkeypatch.context() as patch:
                if step % 2:
                    failing_at(patch, "rename")
                saver.save(step, tensors(step), {"n": step}, background=True)
                saver.settle()
    assert len(told) == 3 and list(steps(tmp_path)) == [2, 4]


def test_a_disk_that_is_really_full_keeps_the_old_and_leaves_no_rubbish(tmp_path: Path) -> None:
    save(tmp_path, 10, 1)
    large = {"w": torch.zeros(100_000)}

    def limited() -> None:
        largest_file(100_000)
        with pytest.raises(StorageError, match=r"cannot write \(40\d+ bytes are needed\)"), Saver(tmp_path) as saver:
            saver.save(20, large, {})

    assert in_child(limited) == 0
    assert names(tmp_path) == ["step-00000010"]


# Several processes: threads that share a board.


class Boarder(Place):
    """One of several threads. A decision is read from the board, as between processes."""

    def __init__(self, rank: int, size: int, board: dict[str, Any], changed: threading.Condition) -> None:
        super().__init__(rank, size)
        self._board, self._changed, self._decided = board, changed, 0

    def post(self, key: str, value: Any) -> None:
        with self._changed:
            assert key not in self._board, f"{key} is used twice"
            self._board[key] = value
            self._changed.notify_all()

    def read(self, key: str, rank: int) -> Any:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._board, 20):
                raise PeerError(f"nobody posts {key}")
            return self._board[key]

    def rank0_decides(self, work: Callable[[], Any]) -> Any:
        self._decided += 1
        key = f"decision/{self._decided}"
        if self.first:
            try:
                self.post(key, sealed(work()))
            except Exception as error:
                self.post(key, sealed(None, error))
        return opened(self.read(key, 0))


def together(size: int, work: Callable[[World], Any]) -> list[Exception | None]:
    """Do it on so many; what each raised."""
    board: dict[str, Any] = {}
    changed = threading.Condition()
    raised: list[Exception | None] = [None] * size

    def one(rank: int) -> None:
        try:
            work(Boarder(rank, size, board, changed))
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
def test_every_process_writes_its_file_and_the_first_publishes(background: bool, tmp_path: Path) -> None:
    def work(world: World) -> None:
        with Saver(tmp_path, world=world) as saver:
            for step in (10, 20, 30):
                saver.save(step, tensors(step), {"n": step}, background=background)

    assert together(3, work) == [None] * 3
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    assert names(tmp_path / "step-00000030") == ["manifest.json", *(f"rank-0000{rank}.safetensors" for rank in range(3)), "state.json"]
    assert holds(tmp_path, 20, 20) and holds(tmp_path, 30, 30)  # each tensor once, of the first process, as none is sharded


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
def test_one_process_without_space_is_the_same_error_on_all(
    background: bool, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10, 1)
    original = checkpoint.write_part

    def write(staged: Path, number: int, rows: Any) -> Any:
        if number == rank:
            raise StorageError(f"{staged}: full")
        return original(staged, number, rows)

    monkeypatch.setattr(checkpoint, "write_part", write)
    told: list[list[str]] = [[], []]

    def work(world: World) -> None:
        with Saver(tmp_path, world=world, warn=told[world.rank].append) as saver:
            for step in (20, 30):
                saver.save(step, tensors(step), {"n": step}, background=background)

    raised = together(2, work)
    assert [type(error) for error in raised] == [StorageError] * 2 and "full" in str(raised[0])
    assert [len(texts) for texts in told] == [int(background)] * 2
    assert names(tmp_path) == ["step-00000010"] and holds(tmp_path, None, 1)


def test_what_another_process_writes_is_not_deleted_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first fails at once, it waits for the others' files, tidies up, and then tells."""
    there: list[bool] = []

    def write(staged: Path, number: int, rows: Any) -> Any:
        if number == 0:
            raise StorageError("full")
        time.sleep(0.1)
        there.append(staged.exists())
        return {}

    monkeypatch.setattr(checkpoint, "write_part", write)

    def work(world: World) -> None:
        with Saver(tmp_path, world=world) as saver:
            saver.save(20, tensors(1), {})

    raised = together(2, work)
    assert there == [True] and [type(error) for error in raised] == [StorageError] * 2 and names(tmp_path) == []


def test_rubbish_that_cannot_be_deleted_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise full_disk("there")

    def work(world: World) -> None:
        with Saver(tmp_path, world=world) as saver:
            saver.save(20, tensors(1), {})

    monkeypatch.setattr(checkpoint, "publish", lambda *args: opened(sealed(None, StorageError("full"))))
    with monkeypatch.context() as patch:
        patch.setattr(saver, "remove_tree", refuse)
        raised = together(2, work)
    assert [str(error) for error in raised] == ["full"] * 2 and names(tmp_path)[0].startswith(".tmp-step-00000020-")
    monkeypatch.undo()
    save(tmp_path, 20, 2)
    assert names(tmp_path) == ["step-00000020"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 10, 1)
    save(tmp_path, 10, 2)
    assert holds(tmp_path, None, 2) and names(tmp_path) == ["step-00000010"]
