"""A run directory: where it lies, who may enter it, how it is begun afresh, and what may change between one try and the next."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import shearling
from faults import in_child_killed_at
from runs import WHOLE_VALUES, Silent, contents, recipe_values
from shearling import cli
from shearling.errors import ArtifactError, ConfigError, OutputError, ShapeError, StorageError
from shearling.io.files import RunLock
from shearling.recipe import Recipe, dump_recipe, load_recipe
from shearling.run import RunDirectory, run_path, stage_result

OLD = load_recipe(WHOLE_VALUES)
NEW = load_recipe(WHOLE_VALUES, ["seed=3"])


def enter(out: Path, recipe: Recipe = OLD, **options: Any) -> list[str]:
    with RunDirectory(out, recipe, **options) as directory:
        return directory.notes


def begin(out: Path) -> dict[str, bytes]:
    """A run directory with something of a run in it; returns its contents without the lock's."""
    enter(out)
    for name in ("stages/prepare.json", "model/model.safetensors", "checkpoints/train/step-00000001/state.json", "metrics.jsonl"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"the old {name}")
    return kept(out)


def kept(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name != ".lock"}


@pytest.fixture(scope="module")
def values(good_source: Path, domains: dict[str, str]) -> dict[str, Any]:
    return recipe_values(good_source, domains)


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of the command line."""
    monkeypatch.setattr("sys.argv", ["shearling", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), " ".join(capsys.readouterr().err.split())


# Where it lies


def test_a_run_that_is_not_told_where_to_go() -> None:
    assert run_path("recipes/tiny.yaml", None) == run_path(Path("/x/tiny.yml"), None) == Path("runs/tiny")
    assert run_path("tiny.yaml", "there") == run_path(WHOLE_VALUES, Path("there")) == Path("there")
    for function in (shearling.run, shearling.prepare, shearling.prune, shearling.train):
        for recipe in (WHOLE_VALUES, OLD):
            with pytest.raises(ConfigError, match=r"out: found nothing\. Give the directory"):
                function(recipe)


def test_the_command_without_out_and_with_another_recipe(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(values))
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, capsys, "prepare", "tiny.yaml")[0] == 0
    assert (tmp_path / "runs" / "tiny" / "data").is_dir()
    code, message = command(monkeypatch, capsys, "prepare", "tiny.yaml", "--set", "seed=3", "--set", "train.steps=11")
    assert code == 2 and "seed: found 17 -> 3." in message and "train.steps: found 10 -> 11." in message
    for remedy in ("--overwrite", "--accept-changed train.steps", "another --out"):
        assert remedy in message
    code, message = command(monkeypatch, capsys, "prepare", "tiny.yaml", "--set", "train.steps=11", "--accept-changed", "train")
    assert code == 0 and "accepted: train.steps 10 -> 11" in message
    shards = contents(tmp_path / "runs" / "tiny" / "data")
    code, message = command(monkeypatch, capsys, "prepare", "tiny.yaml", "--set", "seed=3", "--overwrite")
    assert code == 0 and "leave --overwrite out" in message
    assert load_recipe(tmp_path / "runs" / "tiny" / "recipe.yaml").seed == 3
    assert contents(tmp_path / "runs" / "tiny" / "data")["a.heldout.00000.bin"] != shards["a.heldout.00000.bin"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]


# Beginning afresh


def test_overwriting_begins_afresh(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert enter(out, OLD, overwrite=True) == [], "there is nothing to overwrite"
    begin(out)
    assert enter(out) == []
    (note,) = enter(out, NEW, overwrite=True)
    assert "leave --overwrite out" in note
    assert kept(out) == {"recipe.yaml": dump_recipe(NEW).encode()}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_overwriting_through_a_link_stays_on_its_disk(tmp_path: Path) -> None:
    begin(tmp_path / "large" / "run")
    (tmp_path / "run").symlink_to(tmp_path / "large" / "run")
    enter(tmp_path / "run", NEW, overwrite=True)
    assert (tmp_path / "run").is_symlink() and kept(tmp_path / "large" / "run") == {"recipe.yaml": dump_recipe(NEW).encode()}
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name != ".lock") == ["large", "recipe.yaml", "run", "run"]


def test_a_kill_while_overwriting_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    k, killed, seen = 0, True, set()
    while killed:
        k += 1
        out, other = tmp_path / str(k) / "run", tmp_path / f"{k}b" / "run"
        before = begin(out)
        killed = in_child_killed_at(k, lambda out=out: enter(out, NEW, overwrite=True))  # type: ignore[misc]
        shutil.copytree(out.parent, other.parent)
        try:
            enter(other, OLD)  # without --overwrite the old run goes on, or it is gone whole
            assert kept(other) == before
            seen.add("old")
        except ConfigError:
            enter(other, NEW)
            assert kept(other) == {"recipe.yaml": dump_recipe(NEW).encode()}
            seen.add("new")
        enter(out, NEW, overwrite=True)  # the same command
        assert kept(out) == {"recipe.yaml": dump_recipe(NEW).encode()}
        for run in (out, other):
            assert [path.name for path in run.parent.iterdir()] == ["run"]
    assert seen == {"old", "new"} and k > 25


FOREIGN: list[tuple[str, Callable[[Path], Any]]] = [
    ("thesis.tex, which is no part of a run", lambda out: (out / "thesis.tex").write_text("mine")),
    ("src, which is no part of a run", lambda out: (out / "src").mkdir()),
    ("not one that a run wrote", lambda out: (out / "recipe.yaml").write_text("# my own\n" + (out / "recipe.yaml").read_text())),
    ("not one that a run wrote", lambda out: (out / "recipe.yaml").write_text("source: {")),
    ("no run was", lambda out: (out / ".lock").unlink()),
    ("not a run of Shearling", lambda out: (out / "recipe.yaml").unlink()),
]


@pytest.mark.parametrize(("words", "change"), FOREIGN, ids=[str(i) for i in range(len(FOREIGN))])
def test_what_is_no_run_is_not_overwritten(words: str, change: Callable[[Path], Any], tmp_path: Path) -> None:
    begin(tmp_path / "run")
    change(tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=words) as refused:
        enter(tmp_path / "run", NEW, overwrite=True)
    assert refused.value.exit_code == 5
    assert {k: v for k, v in contents(tmp_path).items() if ".lock" not in k} == {k: v for k, v in before.items() if ".lock" not in k}


def test_what_the_recipe_reads_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "run"
    before = begin(out)
    own = {"source": str(out / "model"), "data": {"domains": {"a": {"train": [str(out / "data" / "*.jsonl")]}}}}
    with pytest.raises(ConfigError, match="holds what the recipe reads") as refused:
        enter(out, load_recipe(WHOLE_VALUES | own), overwrite=True)
    assert [problem.field for problem in refused.value.problems] == ["source", "data.domains.a"]
    assert kept(out) == before


def test_nothing_is_deleted_for_a_recipe_that_cannot_run(values: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    before = begin(out)
    source = Path(shutil.copytree(values["source"], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "norm" not in name}, source / "model.safetensors")
    for wrong, kind in (({"source": str(source)}, ArtifactError), ({"target": {"hidden_size": 10**6}}, ShapeError)):
        with pytest.raises(kind):
            shearling.run(values | wrong, out, overwrite=True)
    assert kept(out) == before


@pytest.mark.parametrize("name", ["a\0b", "n" * 300, "file/run", "loop/run"])
def test_a_place_where_no_run_can_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for overwrite in (False, True):
        with pytest.raises(StorageError, match="cannot write here"):
            enter(tmp_path / name, OLD, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


# One process at a time


def held(out: Path) -> tuple[int, int]:
    """A child that holds the run until the returned end of a pipe is closed; (its pid, the end)."""
    ready, go = os.pipe(), os.pipe()
    if not (pid := os.fork()):
        os.close(go[1])
        with RunLock(out / ".lock"):
            os.write(ready[1], b"1")
            os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    for end in (*ready, go[0]):
        os.close(end)
    return pid, go[1]


def test_a_run_in_use_is_not_moved(tmp_path: Path) -> None:
    out = tmp_path / "run"
    before = begin(out)
    pid, end = held(out)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=f"in use by process {pid} on {socket.gethostname()}"):
            enter(out, OLD, overwrite=overwrite)
    assert kept(out) == before and [path.name for path in tmp_path.iterdir()] == ["run"]
    out.rename(tmp_path / ".aside-run")  # the child is just between its two renames
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=f"in use by process {pid}"):
            enter(out, OLD, overwrite=overwrite)
    assert not out.exists()
    os.close(end)
    os.waitpid(pid, 0)
    enter(out, NEW, overwrite=True)


def test_the_lock_of_a_run_that_was_moved_away_is_worth_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    begin(out)
    flock = shearling.io.files.fcntl.flock

    def moved(fd: int, operation: int) -> None:
        out.rename(tmp_path / "elsewhere")
        out.mkdir()
        flock(fd, operation)

    monkeypatch.setattr("shearling.io.files.fcntl.flock", moved)
    with pytest.raises(OutputError, match="another process put a new run here"):
        enter(out)


def test_another_run_that_takes_the_place_while_overwriting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "run", os.rename
    begin(out)

    def raced(one: Any, other: Any) -> None:
        if ".tmp-run-" in str(one):
            (out / "stages").mkdir(parents=True)
        rename(one, other)

    monkeypatch.setattr("os.rename", raced)
    with pytest.raises(OutputError, match="another process began a run here"):
        enter(out, NEW, overwrite=True)
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_place_that_cannot_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount point, say."""
    out, rename = tmp_path / "run", os.rename
    before = begin(out)

    def busy(one: Any, other: Any) -> None:
        if Path(one) == out:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(one, other)

    monkeypatch.setattr("os.rename", busy)
    with pytest.raises(StorageError, match=f"cannot be moved aside .{os.strerror(errno.EBUSY)}"):
        enter(out, NEW, overwrite=True)
    assert kept(out) == before and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_many_starters_exactly_one_wins(overwrite: bool, tmp_path: Path) -> None:
    starters = 20
    for attempt in range(2):
        out = tmp_path / str(attempt) / "run"
        if overwrite:
            begin(out)
        go, told, hold = os.pipe(), os.pipe(), os.pipe()
        pids = []
        for _ in range(starters):
            if not (pid := os.fork()):
                os.close(go[1])
                os.close(hold[1])
                os.read(go[0], 1)
                try:
                    with RunDirectory(out, NEW, overwrite=overwrite):
                        os.write(told[1], b"w")
                        os.read(hold[0], 1)
                except OutputError:
                    os.write(told[1], b"l")
                except BaseException:
                    os.write(told[1], b"?")
                os._exit(0)
            pids.append(pid)
        os.close(go[1])
        outcomes = b"".join(os.read(told[0], 1) for _ in range(starters))
        os.close(hold[1])
        for pid in pids:
            os.waitpid(pid, 0)
        for end in (go[0], *told, hold[0]):
            os.close(end)
        assert sorted(outcomes) == sorted(b"l" * (starters - 1) + b"w"), outcomes
        assert kept(out) == {"recipe.yaml": dump_recipe(NEW).encode()}


# A recipe that changed


def test_some_accepted_and_some_not(tmp_path: Path) -> None:
    enter(tmp_path)
    recipe = load_recipe(WHOLE_VALUES, ["train.steps=7", "prune.steps=9", "seed=1"])
    with pytest.raises(ConfigError) as refused:
        enter(tmp_path, recipe, accept_changed=["train", "seed"])
    assert [problem.field for problem in refused.value.problems] == ["prune.steps", "seed"]
    assert load_recipe(tmp_path / "recipe.yaml") == OLD


def test_a_change_that_comes_too_late_says_so(tmp_path: Path) -> None:
    enter(tmp_path)
    with RunDirectory(tmp_path, OLD) as directory:
        directory.do("prune", lambda: {}, Silent())
    recipe = load_recipe(WHOLE_VALUES, ["train.steps=7", "prune.steps=9"])
    prune, train = enter(tmp_path, recipe, accept_changed=["train.steps", "prune.steps"])
    assert prune == "accepted: prune.steps 3200 -> 9; too late: the stage prune is finished, and used 3200"
    assert train == "accepted: train.steps 48000 -> 7"


def test_a_kill_while_a_change_is_recorded(tmp_path: Path) -> None:
    k, killed, recipe = 0, True, load_recipe(WHOLE_VALUES, ["train.steps=7"])
    while killed:
        k += 1
        out = tmp_path / str(k)
        enter(out)
        killed = in_child_killed_at(k, lambda out=out: enter(out, recipe, accept_changed=["train"]))  # type: ignore[misc]
        assert load_recipe(out / "recipe.yaml") in (OLD, recipe)
        enter(out, recipe, accept_changed=["train"])
        assert load_recipe(out / "recipe.yaml") == recipe and not list(out.glob(".tmp-*"))
    assert k > 5


def test_what_a_stage_found_is_read_again_however_much_it_is(tmp_path: Path) -> None:
    """The losses of half a million held-out sequences are more than a file of anyone else may have."""
    found = {"sequence_losses": {"a": " ".join(["3.141593"] * 500_000)}}
    with RunDirectory(tmp_path, OLD) as directory:
        assert directory.do("source", lambda: dict(found), Silent())["sequence_losses"] == found["sequence_losses"]
    with RunDirectory(tmp_path, OLD) as directory:
        again = directory.do("source", lambda: pytest.fail("done again"), Silent())
    assert again["sequence_losses"] == found["sequence_losses"] and stage_result(tmp_path, "prune") is None
