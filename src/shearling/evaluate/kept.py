"""The file that finished tasks are kept in, so that the same command goes on: JSON, written whole after each task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shearling.errors import ConfigError, OutputError, Problem
from shearling.io.files import check_writable, read_json, sha256_file, write_atomic
from shearling.sources import TOKENIZER_FILES, Source

FORMAT = 1
ROOM = 2**20
"""Bytes that must be free where the file is to lie."""


def model_mark(source: Source) -> str:
    """SHA-256 (hex) of what a model answers by: its config's sizes, and every byte of its weights and tokenizer.

    `Source.fingerprint` goes by headers alone, and two checkpoints of one training have the same.
    """
    if source.gguf_file is not None:
        paths = [source.directory / source.gguf_file]
    else:
        named = (source.directory / name for name in ("config.json", *TOKENIZER_FILES))
        paths = sorted(source.directory.glob("*.safetensors")) + [path for path in named if path.is_file()]
    what = [source.fingerprint(), *([path.name, sha256_file(path)] for path in paths)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


class Kept:
    """Finished tasks in a file. Opening it reads what is there.

    Args:
        path: the file; it need not be there.
        asked: what the results hang on besides the task's documents, by name: model, limit, precision, version of the harness.

    Raises:
        ConfigError: what is there was found under something else. OutputError: it is another file. StorageError: no room there.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path = path
        self.asked: dict[str, Any] = dict(asked)
        self.tasks: dict[str, dict[str, Any]] = {}
        check_writable(path, ROOM)
        if not path.exists():
            return
        found: Any = read_json(path) if path.is_file() else None
        if not _is_ours(found):
            raise OutputError(f"{path}: exists already and holds no results of tasks; choose another --out")
        before = found["asked"]
        remedy = "Give another --out, or delete this file to begin afresh."
        problems = [Problem(key, f"{before.get(key)!r} in the file, {value!r} now", remedy) for key, value in asked.items()]
        if changed := [problem for problem, key in zip(problems, asked, strict=True) if before.get(key) != asked[key]]:
            raise ConfigError(f"{path}: holds results found otherwise", changed)
        self.tasks = found["tasks"]

    def result(self, task: str, mark: str) -> dict[str, Any] | None:
        """What was found for a task; None if nothing was. Raises `ConfigError` where its documents had another mark."""
        entry = self.tasks.get(task)
        if entry is None:
            return None
        if entry["documents"] != mark:
            remedy = "Its documents have changed. Give another --out, or delete this file to begin afresh."
            found = f"documents {entry['documents'][:12]} in the file, {mark[:12]} now"
            raise ConfigError(f"{self.path}: holds results found otherwise", [Problem(task, found, remedy)])
        return dict(entry["result"])

    def keep(self, task: str, mark: str, result: Mapping[str, Any]) -> None:
        """Enter a finished task, and write the file. Raises `StorageError` where it cannot be written."""
        self.tasks[task] = {"documents": mark, "result": dict(result)}
        write_atomic(self.path, json.dumps({"format": FORMAT, "asked": self.asked, "tasks": self.tasks}, indent=1) + "\n")


def _is_ours(found: Any) -> bool:
    """Whether JSON values are what `Kept` writes."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return False
    asked, tasks = found.get("asked"), found.get("tasks")
    if not isinstance(asked, dict) or not isinstance(tasks, dict):
        return False
    entries = tasks.values()
    return all(
        isinstance(entry, dict) and isinstance(entry.get("documents"), str) and isinstance(entry.get("result"), dict) for entry in entries
    )
