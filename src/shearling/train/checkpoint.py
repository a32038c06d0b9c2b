"""Checkpoints without pickle: tensors in safetensors, the rest in JSON, and a manifest that vouches for every byte.

    FOLDER/step-00000050/
      manifest.json            line 1: SHA-256 of the rest; the rest: format, step, {file: size and SHA-256}
      state.json
      rank-00000.safetensors   what process 0 holds: its rows of sharded tensors, and all that is not sharded
      rank-00001.safetensors   ... of process 1

Rows lie in order of the processes, as FSDP2 deals them, so any number of processes reads what any other number wrote. A directory
is staged as `.tmp-*`, flushed and renamed, so one that has its name is whole, unless the disk damaged it later; the manifest tells.
Steps are found by their directories' names alone: there is no pointer that could go stale.

Format 1 held every tensor whole, in `tensors*.safetensors`; it is read still.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearling.board import told
from shearling.errors import ArtifactError, NewerFormatError, Problem
from shearling.io.files import (
    parse_json,
    read_json,
    remove_tree,
    replace_directory,
    safe_join,
    sha256_file,
    stage_directory,
    storage_errors,
    write_atomic,
)
from shearling.io.tensors import TensorReader, write_tensors
from shearling.world import World

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
_NAME = re.compile(r"step-(\d{8,})")
_REMEDY = "Delete this checkpoint, or go on from another."


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor in one file."""

    reader: TensorReader
    start: int
    rows: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole. Tensors are mapped from its files when asked for; writing to one does not reach a file."""

    step: int
    """Steps that were done when it was saved."""
    state: dict[str, Any]
    """Plain JSON values."""
    path: Path
    shapes: dict[str, tuple[int, ...]]
    """Name -> whole shape of every tensor."""
    pieces: dict[str, list[Piece]]
    """Name -> where its rows lie, in order."""

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows `start` to `end` of a tensor, on the CPU."""
        import torch

        found = []
        for piece in self.pieces[name]:
            first, last = max(start, piece.start), min(end, piece.start + piece.rows)
            if first < last:
                found.append(piece.reader.get(name)[first - piece.start : last - piece.start])
        if not found:  # no rows are asked for
            return self.pieces[name][0].reader.get(name)[:0]
        return found[0] if len(found) == 1 else torch.cat(found)

    def whole(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        return self.rows(name, 0, self.shapes[name][0]) if self.shapes[name] else self.pieces[name][0].reader.get(name)


def directory_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def write_part(staged: Path, rank: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write and flush the file of one process, its rows by name. Returns {"name", "bytes", "sha256"}."""
    path = staged / f"{_part(rank)}.safetensors"
    digest, size = write_tensors(path, tensors)
    with storage_errors(path, size), open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": size, "sha256": digest}


def publish(staged: Path, step: int, parts: list[dict[str, Any]], state: Mapping[str, Any], keep: int) -> Path:
    """Give a staged directory with every process' part its state, its manifest and its name; delete all but the newest `keep`.

    From process 0, under the run's lock. A checkpoint of this step that exists is replaced. `state`: JSON values, keys being text.
    """
    text = json.dumps(dict(state), sort_keys=True).encode()
    write_atomic(staged / "state.json", text)
    files = {part["name"]: {"bytes": part["bytes"], "sha256": part["sha256"]} for part in parts}
    files["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    body = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1, sort_keys=True)
    write_atomic(staged / "manifest.json", hashlib.sha256(body.encode()).hexdigest() + "\n" + body)
    final = directory_of(staged.parent, step)
    replace_directory(staged, final)
    delete_old(staged.parent, step, max(keep, 2))
    return final


def rewrite(found: Checkpoint, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Put another checkpoint of the same step in the place of one that was found, at once and whole; then as `publish`.

    From process 0 alone, under the run's lock; `tensors` are whole. Raises `StorageError` where there is no room for both for a moment.
    """
    staged = stage_directory(found.path)
    try:
        return publish(staged, found.step, [write_part(staged, 0, tensors)], state, keep)
    except BaseException:
        with contextlib.suppress(OSError):  # the next one who saves sweeps
            remove_tree(staged)
        raise


def load(folder: Path, step: int | None = None, world: World | None = None) -> Checkpoint | None:
    """The newest whole checkpoint, or that of `step`; None where there is none at all. All processes find the same one.

    A damaged newest one is passed over with a warning that names the file. Raises `ArtifactError` where `step` is named and
    missing or damaged, where no checkpoint is whole, and where one was written by a newer version.
    """
    world = world or World()
    found = world.rank0_decides(lambda: list(steps(folder)))
    if step is not None:
        if step not in found:
            remedy = f"There are {', '.join(map(str, found)) or 'none'}."
            raise told(ArtifactError(f"{folder}: no checkpoint of step {step}", [Problem("step", str(step), remedy)]))
        return world.everywhere(lambda: _read(directory_of(folder, step), step, world))
    problems: list[Problem] = []
    for candidate in sorted(found, reverse=True):
        try:
            return world.everywhere(lambda: _read(directory_of(folder, candidate), candidate, world))  # noqa: B023 (called at once)
        except NewerFormatError:
            raise
        except ArtifactError as error:
            if world.first:
                warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
            problems += error.problems
    if problems:
        raise told(ArtifactError(f"{folder}: no checkpoint is whole; to start afresh, delete them", problems))
    return None


def steps(folder: Path) -> dict[int, Path]:
    """Step -> directory of every checkpoint in `folder`, ascending, whole or not."""
    if not folder.is_dir():
        return {}
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match and match[0] == f"step-{int(match[1]):08d}"))


def _read(path: Path, step: int, world: World) -> Checkpoint:
    """Open a checkpoint. The hashes of its files are shared out over the processes."""
    version, files = _files(path, step)
    for number, (name, entry) in enumerate(files.items()):
        file = safe_join(path, name)
        try:
            size = file.stat().st_size
            found = f"{size} bytes where {entry['bytes']} are due"
            if size == entry["bytes"]:
                digest = sha256_file(file) if number % world.size == world.rank else entry["sha256"]
                found = "" if digest == entry["sha256"] else f"SHA-256 {digest} where {entry['sha256']} is due"
        except OSError as error:
            found = error.strerror or str(error)
        if found:
            raise ArtifactError(f"{path}: damaged checkpoint", [Problem(str(file), found, _REMEDY)])
    state = read_json(path / "state.json")
    readers = [TensorReader(path, "tensors")] if version == 1 else [TensorReader(path, _part(rank)) for rank in range(_parts(files))]
    shapes, pieces = _table(path, readers)
    return Checkpoint(step, state, path, shapes, pieces)


def _part(rank: int) -> str:
    return f"rank-{rank:05d}"


def _parts(files: Mapping[str, Any]) -> int:
    return sum(name.startswith("rank-") for name in files)


def _table(path: Path, readers: list[TensorReader]) -> tuple[dict[str, tuple[int, ...]], dict[str, list[Piece]]]:
    """Whole shape of every tensor, and where its rows lie; `ArtifactError` where the files' shapes do not go together."""
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[Piece]] = {}
    for reader in readers:
        for name, shape in reader.shapes().items():
            before = shapes.get(name)
            if before is None:
                shapes[name], pieces[name] = shape, [Piece(reader, 0, shape[0] if shape else 1)]
            elif not shape or before[1:] != shape[1:]:
                found = f"rows of shape {shape} after rows of shape {before}"
                raise ArtifactError(f"{path}: damaged checkpoint", [Problem(name, found, _REMEDY)])
            else:
                pieces[name].append(Piece(reader, before[0], shape[0]))
                shapes[name] = (before[0] + shape[0], *shape[1:])
    return shapes, pieces


def _files(path: Path, step: int) -> tuple[int, dict[str, dict[str, Any]]]:
    """The manifest's format and table of files; every way in which it can be broken is an `ArtifactError`."""
    manifest = path / "manifest.json"
    try:
        head, _, body = manifest.read_bytes().partition(b"\n")
    except OSError as error:
        raise ArtifactError(f"{path}: damaged checkpoint", [Problem(str(manifest), error.strerror or str(error), _REMEDY)]) from None
    if hashlib.sha256(body).hexdigest().encode() != head:
        found = "content that does not match its own SHA-256"
        raise ArtifactError(f"{path}: damaged checkpoint", [Problem(str(manifest), found, _REMEDY)])
    values = parse_json(body, str(manifest))
    version = values.get("format") if isinstance(values, dict) else None
    if isinstance(version, int) and version > FORMAT:
        found, remedy = f"format {version}; this version reads up to {FORMAT}", "Use the version of Shearling that wrote it."
        raise NewerFormatError(f"{path}: a checkpoint of a newer version", [Problem(str(manifest), found, remedy)])
    files = values.get("files") if version in (1, FORMAT) and values.get("step") == step else None
    sound = isinstance(files, dict) and all(isinstance(e, dict) and e.keys() == {"bytes", "sha256"} for e in files.values())
    if not isinstance(version, int) or not isinstance(files, dict) or not sound or "state.json" not in files:
        found = f"format {version!r} and no table of files of step {step}"
        raise ArtifactError(f"{path}: damaged checkpoint", [Problem(str(manifest), found, _REMEDY)])
    return version, files


def delete_old(folder: Path, step: int, keep: int) -> None:
    """Delete what is older than the newest `keep` complete checkpoints up to `step`; a failure is a warning, not the run's end."""
    older = [(number, path) for number, path in steps(folder).items() if number <= step]
    complete = [number for number, path in older if _complete(path, number)]
    if len(complete) <= keep:
        return
    for number, path in older:
        if number < complete[-keep]:
            try:
                (path / "manifest.json").unlink(missing_ok=True)  # first, so that a half-deleted one never looks complete
                remove_tree(path)
            except OSError as error:
                warnings.warn(f"{path}: an old checkpoint could not be deleted ({error})", stacklevel=3)


def _complete(path: Path, step: int) -> bool:
    """Whether a checkpoint is whole by its manifest and its files' sizes; reads no tensors."""
    try:
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in _files(path, step)[1].items())
    except (ArtifactError, OSError):
        return False
