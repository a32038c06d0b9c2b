"""A run directory: its lock, its recipe, and the ledger of finished stages, from which the same command goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from shearling.errors import ConfigError, OutputError, Problem
from shearling.io.files import TEMPORARY, RunLock, check_writable, read_json, storage_errors, sweep_temporary, write_atomic
from shearling.recipe import Recipe, differences, dump_recipe, load_recipe

RECIPE_FILE = "recipe.yaml"


class Show(Protocol):
    """Where a run tells how it goes; the command line shows it, and a Python caller may pass a class of their own."""

    def stage(self, name: str, done: bool) -> None:
        """A stage begins, or (`done`) was found finished."""
        ...

    def note(self, text: str) -> None:
        """Something the user should read."""
        ...

    def step(self, stage: str, step: int, steps: int, line: Mapping[str, Any]) -> None:
        """A training step is done; `line` is what was logged."""
        ...

    def count(self, what: str, done: int, unit: str) -> None:
        """Work of unknown length goes on."""
        ...


class Silent:
    """Shows nothing; the default in Python."""

    def stage(self, name: str, done: bool) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def step(self, stage: str, step: int, steps: int, line: Mapping[str, Any]) -> None:
        """Nothing."""

    def count(self, what: str, done: int, unit: str) -> None:
        """Nothing."""


class RunDirectory:
    """The directory of one run, held under its lock while entered.

    Raises `OutputError` where it is in use or holds something else, `ConfigError` where it was begun with another recipe.
    """

    def __init__(self, path: str | Path, recipe: Recipe) -> None:
        self.path = Path(path).absolute()
        self.recipe = recipe
        self._lock = RunLock(self.path / ".lock")

    def __enter__(self) -> RunDirectory:
        check_writable(self.path / RECIPE_FILE)
        if self.path.is_dir() and not (self.path / RECIPE_FILE).exists() and not all(map(_is_ours, self.path.iterdir())):
            raise OutputError(f"{self.path}: exists and is not a run of Shearling. Choose another --out, or an empty folder.")
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock.__enter__()
        try:
            self._match_recipe()
            sweep_temporary(self.path)
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.__exit__(kind, error, trace)

    def result(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage found, or None while it is not finished."""
        path = self._ledger(stage)
        return dict(read_json(path)) if path.exists() else None

    def do(self, stage: str, work: Callable[[], dict[str, Any]], show: Show) -> dict[str, Any]:
        """The result of a stage: from the ledger where it is finished, else by doing the work and entering its result."""
        found = self.result(stage)
        show.stage(stage, found is not None)
        if found is not None:
            return found
        began = time.perf_counter()
        found = work()
        found.setdefault("seconds", round(time.perf_counter() - began, 3))
        write_atomic(self._ledger(stage), json.dumps(found, indent=1) + "\n")
        return found

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
        changed = differences(load_recipe(path), self.recipe)
        if changed:
            remedy = "Go on with the recipe as it was, or choose another --out."
            problems = [Problem(field, after, f"The run was begun with {before}. {remedy}") for field, before, after in changed]
            raise ConfigError(f"{self.path}: begun with another recipe", problems)


def _is_ours(path: Path) -> bool:
    """Whether a name may stand in a run directory that has no recipe yet: its lock, and what a killed writer of the recipe left."""
    return path.name == ".lock" or path.name.startswith(f"{TEMPORARY}{RECIPE_FILE}-")
