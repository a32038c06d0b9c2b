"""A run directory: its lock, its recipe, and the ledger of finished stages, from which the same command goes on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from shearling.data.mixture_config import PowerLawConfig
from shearling.errors import ConfigError, OutputError, Problem, ShearlingError, StorageError
from shearling.io.files import (
    ASIDE,
    TEMPORARY,
    RunLock,
    check_writable,
    read_json,
    remove_tree,
    replace_directory,
    stage_directory,
    storage_errors,
    sweep_temporary,
    write_atomic,
)
from shearling.recipe import FIXED, Recipe, RecipeLike, covers, differences, dump_recipe, load_recipe
from shearling.show import Show
from shearling.world import World

RECIPE_FILE = "recipe.yaml"
LOCK_FILE = ".lock"
LEDGER_LIMIT = 2**26
"""Bytes of what a stage found, at most: it holds the loss of every held-out sequence."""
RUNS = "runs"
"""Folder of the runs that were not told where to go."""
CONTENTS = frozenset(
    {
        *(RECIPE_FILE, LOCK_FILE, "metrics.jsonl", "plan.json", "report.json", "report.html"),
        *("data", ".data.lock", ".partial-data", "events", "stages", "checkpoints", "teacher", "pruned", "model", "padded"),
    }
)
"""What a run makes in its directory. `--overwrite` deletes a directory only if it holds nothing else."""
LAST_USE = {
    "teacher": "teacher",
    "prune": "prune",
    "mixture": "train",
    "train": "train",
    "export": "train",
    "evaluate": "evaluate",
    "runtime": "evaluate",
}
"""Section of the recipe -> the last stage that reads it."""


def run_path(recipe: RecipeLike, out: str | Path | None) -> Path:
    """The run directory: `out`, or `runs/NAME` below the current folder, NAME being the stem of the recipe's file.

    Raises `ConfigError` where `out` is left out and the recipe is not a file.
    """
    if out is not None:
        return Path(out)
    if isinstance(recipe, str | Path):
        return Path(RUNS) / Path(recipe).stem
    remedy = f"Give the directory of the run: {RUNS}/NAME stands in for it only where the recipe is a file."
    raise ConfigError("no run directory", [Problem("out", "nothing", remedy)])


class RunDirectory:
    """The directory of one run, held under its lock while entered.

    Args:
        path: made if it is not there.
        recipe: what the run is to do.
        overwrite: put a new run in the place of the one that is there.
        accept_changed: fields of the recipe, or sections of them, that may differ from what the run was begun with. Where they
            do, the recipe is recorded anew.

    Entering raises `OutputError` where the directory is in use or holds something else, `ConfigError` where it was begun with
    another recipe that is not accepted, `StorageError` where it cannot be written.
    """

    def __init__(self, path: str | Path, recipe: Recipe, *, overwrite: bool = False, accept_changed: Sequence[str] = ()) -> None:
        self.path = Path(path).absolute()
        self.recipe = recipe
        self.notes: list[str] = []
        """What the user should know of how the directory was entered."""
        self._overwrite, self._accept_changed = overwrite, tuple(accept_changed)
        self._lock: RunLock | None = None

    def __enter__(self) -> RunDirectory:
        real = _real(self.path)
        _bring_back(real)
        _refuse_something_else(real)
        if self._overwrite and (real / RECIPE_FILE).exists():
            self._lock = _begin_afresh(real, self.recipe)
            self.notes.append("begun afresh; to go on with this run after an interruption, leave --overwrite out")
        else:
            with storage_errors(real):
                real.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(real)
        try:
            check_writable(real / RECIPE_FILE)
            self._match_recipe()
            sweep_temporary(real)
            with contextlib.suppress(OSError):  # what is left over beside the run is no reason to end it
                sweep_temporary(real.parent, real.name)
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.__exit__(kind, error, trace)

    def result(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage found, or None while it is not finished."""
        return stage_result(self.path, stage)

    def remaining(self, stages: Sequence[str]) -> tuple[str, ...]:
        """Those of the stages that are not finished, in order."""
        return tuple(stage for stage in stages if not self._ledger(stage).exists())

    def half_done(self) -> dict[str, int]:
        """Stage -> bytes of what it goes on from: the checkpoints of `prune` and `train`, the shards of a `prepare` that was stopped."""
        checkpoints = self.path / "checkpoints"
        folders = {"prepare": self.path / ".partial-data", "prune": checkpoints / "prune", "train": checkpoints / "train"}
        return {stage: _bytes_below(folder) for stage, folder in folders.items()}

    def do(
        self, stage: str, work: Callable[[], dict[str, Any]], show: Show, *, again: bool = False, world: World | None = None
    ) -> dict[str, Any]:
        """The result of a stage: from the ledger where it is finished, else by doing the work and entering its result.

        `again`: do the work of a finished stage, too, which mends what was damaged since; the ledger stays as it is. On several
        processes all do the work, and process 0, which alone has entered the directory, keeps the ledger.
        """
        world = world or World()
        found = world.rank0_decides(lambda: self.result(stage))
        show.stage(stage, found is not None)
        if found is not None:
            if again:
                work()
            return found
        began = time.perf_counter()
        done = work()
        done.setdefault("seconds", round(time.perf_counter() - began, 3))
        world.rank0_decides(lambda: write_atomic(self._ledger(stage), json.dumps(done, indent=1) + "\n"))
        return done

    def _ledger(self, stage: str) -> Path:
        folder = self.path / "stages"
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder / f"{stage}.json"

    def _match_recipe(self) -> None:
        path = self.path / RECIPE_FILE
        if not path.exists():
            write_atomic(path, dump_recipe(self.recipe))
            return
        recorded = load_recipe(path)
        changed = accepted_changes(recorded, self.recipe, self._accept_changed, self.path)
        if not changed and recorded.data == self.recipe.data:  # else prepared text has moved
            return
        write_atomic(path, dump_recipe(self.recipe))
        for field, before, after in changed:
            last = LAST_USE.get(field.partition(".")[0], "")
            late = f"; too late: the stage {last} is finished, and used {before}" if last and not self.remaining([last]) else ""
            self.notes.append(f"accepted: {field} {before} -> {after}{late}")


def stage_result(path: Path, stage: str) -> dict[str, Any] | None:
    """What a stage of the run at `path` found, of its ledger; None where it is not finished. `ArtifactError` where that is damaged."""
    ledger = path / "stages" / f"{stage}.json"
    return dict(read_json(ledger, limit=LEDGER_LIMIT)) if ledger.exists() else None


def accepted_changes(before: Recipe, after: Recipe, accepted: Sequence[str], path: Path) -> list[tuple[str, str, str]]:
    """(field, before, after) of what differs and is `accepted` (fields, or sections of them); raise `ConfigError` for all else.

    What everything was made from (`shearling.recipe.FIXED`) is never accepted. `path`: the run directory, for the message.
    """
    changed = differences(before, after)
    problems = []
    for field, old, new in changed:
        if covers(FIXED, field):
            problems.append(Problem(field, f"{old} -> {new}", "What is made already was made from it, so this cannot be accepted."))
        elif not covers(accepted, field):
            problems.append(Problem(field, f"{old} -> {new}", f"To go on with the change: --accept-changed {field}."))
    if problems:
        raise ConfigError(
            f"{path}: begun with another recipe (before -> now). Go on with the recipe as it was, accept what differs with "
            "--accept-changed, begin afresh with --overwrite, or choose another --out",
            problems,
        )
    return changed


def check_artifacts(
    path: Path, *, tokens: bool = True, fingerprint: Callable[[], str] | None = None, manifest: Mapping[str, Any] | None = None
) -> None:
    """Raise `ConfigError` where text or source are not those that the finished stages of the run at `path` used.

    Reads the ledger, the manifest of `data/` and headers, nothing large. Raises `ArtifactError` where one of them is damaged.

    Args:
        path: the run directory.
        tokens: compare the token shards.
        fingerprint: gives the source's present fingerprint; left out where no stage that is to come uses the source.
        manifest: of the text that the run uses; left out, that of `data/`.
    """
    problems = []
    if tokens and (prepared := stage_result(path, "prepare")):
        from shearling.data.tokens import read_manifest

        before, now = _shards(prepared), _shards(manifest or read_manifest(path / "data"))
        remedy = "Put the prepared text back, or begin afresh with --overwrite."
        for field in sorted(before.keys() | now.keys()):
            if before.get(field) != now.get(field):
                problems.append(Problem(field, f"{before.get(field, 'nothing')} -> {now.get(field, 'nothing')}", remedy))
        if not problems and list(before) != list(now):  # by which shares and counts are saved
            problems.append(Problem("data.domains", f"{', '.join(before)} -> {', '.join(now)}", remedy))
    if fingerprint is not None and (measured := stage_result(path, "source")):
        old, new = measured.get("fingerprint"), fingerprint()
        if old != new:
            remedy = "Put the source back that the run was begun with, or begin afresh with --overwrite."
            problems.append(Problem("source", f"fingerprint {old} -> {new}", remedy))
    if problems:
        raise ConfigError(f"{path}: what the run was begun with has changed since (before -> now)", problems)


def _shards(facts: Mapping[str, Any]) -> dict[str, str]:
    """What prepared text is known by, of a ledger entry or a manifest: `data.DOMAIN.SPLIT` -> SHA-256 of the shards."""
    from shearling.data.tokens import split_digest

    found = {"data.sequence_length": str(facts.get("sequence_length"))}
    for domain, values in facts.get("domains", {}).items():
        found |= {f"data.{domain}.{split}": f"sha256 {split_digest(values, split)}" for split in values.get("shards", {})}
    return found


def _real(path: Path) -> Path:
    """Where a path leads, so that links are left as they are and what they lead to is replaced."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # a NUL; `check_writable` will say so
        return path


def _refuse_something_else(path: Path) -> None:
    """Raise where there is something at `path` that is no run of ours, or where nothing can be."""
    if os.path.isdir(path):
        foreign = not all(map(_is_ours, path.iterdir()))
        if foreign and not (path / RECIPE_FILE).exists():  # asked last: another process may be making the run just now
            raise OutputError(f"{path}: exists and is not a run of Shearling. Choose another --out, or an empty folder.")
        return
    try:
        check_writable(path / RECIPE_FILE)
    except StorageError:
        if not os.path.isdir(path):  # else another process has made it since, whose lock will tell
            raise


def _locked(path: Path) -> RunLock:
    """The lock of the run at `path`, held. Raises `OutputError` where another process has it."""
    lock = RunLock(path / LOCK_FILE)
    lock.__enter__()
    # Who overwrites this run may have moved it away after its lock was opened here and before it was taken: then this is the lock of
    # a directory that is gone, and the one that stands has another.
    with contextlib.suppress(OSError):
        if lock.path.read_text(encoding="utf-8") == f"{socket.gethostname()} {os.getpid()}\n":
            return lock
    lock.__exit__(None, None, None)
    raise OutputError(f"{path}: another process put a new run here at this moment; wait for it to end, or choose another --out")


def _bring_back(path: Path) -> None:
    """Where a kill left a run moved aside and no successor in its place, put it back."""
    aside = path.parent / f"{ASIDE}{path.name}"
    if os.path.isdir(aside) and not os.path.lexists(path):
        with RunLock(aside / LOCK_FILE):  # held by who overwrites it, until the new run stands
            sweep_temporary(path.parent, path.name)


def _begin_afresh(path: Path, recipe: Recipe) -> RunLock:
    """Put a new run in the place of the one at `path` and delete that; returns the new one's lock, held.

    The new directory is complete before it takes the name, and the old one stands aside until then, locked.
    """
    if not (path / LOCK_FILE).exists():  # before a lock is taken here, which would make one
        raise OutputError(f"{path}: {RECIPE_FILE} is there, but no run was. Delete it by hand, or choose another --out.")
    with contextlib.ExitStack() as held:
        held.push(_locked(path))
        _refuse_loss(path, recipe)
        sweep_temporary(path.parent, path.name)
        staged = stage_directory(path)
        lock = RunLock(staged / LOCK_FILE)
        try:
            lock.__enter__()
            write_atomic(staged / RECIPE_FILE, dump_recipe(recipe))
            replace_directory(staged, path)
        except BaseException as error:
            lock.__exit__(None, None, None)
            if staged.exists():
                remove_tree(staged)
            if isinstance(error, OSError) and not isinstance(error, ShearlingError):
                raise _swap_error(path, error) from error
            raise
    return lock


def _swap_error(path: Path, error: OSError) -> ShearlingError:
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
        return OutputError(f"{path}: another process began a run here at this moment; wait for it to end, or choose another --out")
    reason = error.strerror or str(error)  # a mount point, say, cannot be renamed
    return StorageError(f"{path}: cannot be moved aside ({reason}); delete what it holds by hand, or choose another --out")


def _refuse_loss(path: Path, recipe: Recipe) -> None:
    """Raise where deleting the directory would delete more than a run made, or what the new run reads."""
    foreign = sorted(p.name for p in path.iterdir() if p.name not in CONTENTS and not p.name.startswith((TEMPORARY, ASIDE)))
    if foreign:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise OutputError(f"{path}: holds {shown}, which is no part of a run and would be lost. Move it away, or choose another --out.")
    if not _written_by_us(path / RECIPE_FILE):
        raise OutputError(f"{path}: its {RECIPE_FILE} is not one that a run wrote. Delete it by hand, or choose another --out.")
    inputs = {"source": [recipe.source]}
    reference, start = recipe.mixture.reference, recipe.mixture.start
    inputs |= {"mixture.start": [start] if start else []}
    inputs |= {"mixture.reference": [reference.power_law] if isinstance(reference, PowerLawConfig) else []}
    inputs |= {"data.prepared": [recipe.data.prepared] if recipe.data.prepared else []}
    for name, domain in recipe.data.domains.items():
        inputs[f"data.domains.{name}"] = [*(domain.train or ()), *(domain.heldout or ()), *([domain.dataset] if domain.dataset else ())]
    remedy = "--overwrite would delete it: move it away, or choose another --out."
    problems = [
        Problem(field, name, remedy)
        for field, names in inputs.items()
        for name in names
        if os.path.isabs(name) and Path(os.path.realpath(name)).is_relative_to(path)
    ]
    if problems:
        raise ConfigError(f"{path}: holds what the recipe reads", problems)


def _written_by_us(path: Path) -> bool:
    """Whether a recipe is as a program writes it; one of the user's own, with its comments and layout, is not to be deleted."""
    try:
        text = path.read_text(encoding="utf-8")
        return text == yaml.safe_dump(yaml.safe_load(text), sort_keys=False, allow_unicode=True)
    except (OSError, ValueError, yaml.YAMLError):
        return False


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _is_ours(path: Path) -> bool:
    """Whether a name may stand in a run directory that has no recipe yet: its lock, and what a killed writer of the recipe left."""
    return path.name == LOCK_FILE or path.name.startswith(f"{TEMPORARY}{RECIPE_FILE}-")
