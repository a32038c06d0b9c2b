"""Checkpoints without pickle: tensors in safetensors, the rest in JSON, and a manifest that vouches for every byte.

    FOLDER/step-00000050/
      manifest.json            line 1: SHA-256 of the rest; the rest: format, step, {file: size and SHA-256}
      state.json
      tensors.safetensors      or shards of at most 2 GB with an index

A directory is staged as `.tmp-*`, flushed and renamed, so one that has its name is whole, unless the disk damaged it later; the
manifest tells. Steps are found by their directories' names alone: there is no pointer that could go stale.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearling.errors import ArtifactError, Problem
from shearling.io.files import (
    parse_json,
    read_json,
    remove_tree,
    replace_directory,
    safe_join,
    sha256_file,
    stage_directory,
    sweep_temporary,
    write_atomic,
)
from shearling.io.tensors import ShardWriter, TensorReader, shortened

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT = 1
SHARD_BYTES = 2 * 10**9
_NAME = re.compile(r"step-(\d{8,})")
_REMEDY = "Delete this checkpoint, or go on from another."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    step: int
    """Steps that were done when it was saved."""
    tensors: dict[str, Tensor]
    """On the CPU, mapped from the files; writing to one does not reach the file."""
    state: dict[str, Any]
    """Plain JSON values."""
    path: Path


class _NewerFormatError(ArtifactError):
    """Written by a newer version: no reason to fall back to an older checkpoint unasked."""


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2) -> Path:
    """Save a checkpoint of `step` and delete those before the newest `keep` (at least 2) up to this step.

    Call it from one process, under the run's lock. `tensors` keep their dtype and are not copied; tensors that share memory
    are written twice. A checkpoint of this step that exists is replaced. `state`: JSON values, keys being text.
    Raises `StorageError` where the disk is full; the earlier checkpoints are then as they were.
    """
    sweep_temporary(folder)
    final = folder / f"step-{step:08d}"
    staged = stage_directory(final)
    try:
        text = json.dumps(dict(state), sort_keys=True)
        write_atomic(staged / "state.json", text)
        with ShardWriter(staged, SHARD_BYTES, stem="tensors") as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(staged.iterdir())}
        body = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1, sort_keys=True)
        write_atomic(staged / "manifest.json", hashlib.sha256(body.encode()).hexdigest() + "\n" + body)
        replace_directory(staged, final)
    except BaseException:
        if staged.exists():
            remove_tree(staged)
        raise
    _delete_old(folder, step, max(keep, 2))
    return final


def load(folder: Path, step: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint, or that of `step`; None where there is none at all.

    A damaged newest one is passed over with a warning that names the file. Raises `ArtifactError` where `step` is named and
    missing or damaged, where no checkpoint is whole, and where one was written by a newer version.
    """
    found = steps(folder)
    if step is not None:
        if step not in found:
            remedy = f"There are {', '.join(map(str, found)) or 'none'}."
            raise ArtifactError(f"{folder}: no checkpoint of step {step}", [Problem("step", str(step), remedy)])
        return _read(found[step], step)
    problems: list[Problem] = []
    for candidate in sorted(found, reverse=True):
        try:
            return _read(found[candidate], candidate)
        except _NewerFormatError:
            raise
        except ArtifactError as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
            problems += error.problems
    if problems:
        raise ArtifactError(f"{folder}: no checkpoint is whole; to start afresh, delete them", problems)
    return None


def steps(folder: Path) -> dict[int, Path]:
    """Step -> directory of every checkpoint in `folder`, ascending, whole or not."""
    if not folder.is_dir():
        return {}
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match and match[0] == f"step-{int(match[1]):08d}"))


def _read(path: Path, step: int) -> Checkpoint:
    files = _files(path, step)
    for name, entry in files.items():
        file = safe_join(path, name)
        try:
            size = file.stat().st_size
            found = f"{size} bytes where {entry['bytes']} are due"
            if size == entry["bytes"]:
                digest = sha256_file(file)
                found = "" if digest == entry["sha256"] else f"SHA-256 {digest} where {entry['sha256']} is due"
        except OSError as error:
            found = error.strerror or str(error)
        if found:
            raise ArtifactError(f"{path}: damaged checkpoint", [Problem(str(file), found, _REMEDY)])
    state = read_json(path / "state.json")
    reader = TensorReader(path, stem="tensors")
    return Checkpoint(step, {name: reader.get(name) for name in reader.names()}, state, path)


def _files(path: Path, step: int) -> dict[str, dict[str, Any]]:
    """The manifest's table of files; every way in which it can be broken is an `ArtifactError`."""
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
        raise _NewerFormatError(f"{path}: a checkpoint of a newer version", [Problem(str(manifest), found, remedy)])
    files = values.get("files") if version == FORMAT and values.get("step") == step else None
    sound = isinstance(files, dict) and all(isinstance(e, dict) and e.keys() == {"bytes", "sha256"} for e in files.values())
    if not isinstance(files, dict) or not sound or "state.json" not in files:
        found = f"format {version!r} and no table of files of step {step}"
        raise ArtifactError(f"{path}: damaged checkpoint", [Problem(str(manifest), found, _REMEDY)])
    return files


def _delete_old(folder: Path, step: int, keep: int) -> None:
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
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in _files(path, step).items())
    except (ArtifactError, OSError):
        return False


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state by parameter name, so that it outlives any reordering of parameters and groups.

    `names`: `id(parameter)` -> name, for every parameter of the optimizer. Returns tensors named `KEY/PARAMETER`
    (`exp_avg/model.norm.weight`), each of its parameter's shape and not copied, and scalars `{KEY: {PARAMETER: number}}` (the
    step counts). Hyperparameters are not part of it: they come from the recipe and its schedules.
    A sharded moment (DTensor) is gathered, so every rank must call this.
    """
    from torch import Tensor

    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step":
                tensors[f"{key}/{name}"] = value.full_tensor() if hasattr(value, "full_tensor") else value
            else:
                scalars.setdefault(key, {})[name] = value.item() if isinstance(value, Tensor) else value
    return tensors, scalars


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Put what `pack_optimizer` returned back; the state of a parameter that is not in it is empty, as before its first step.

    Copies the tensors to their parameters' device and dtype, and shards those of sharded parameters (every rank must call this).
    Raises `ArtifactError` for state of parameters that this optimizer does not have, and for shapes that differ.
    """
    import torch

    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {names[id(parameter)]: i for i, parameter in enumerate(ordered)}
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32  # as torch makes step counts itself
    state: dict[int, dict[str, Any]] = {}
    problems = []
    entries: list[tuple[str, str, Tensor]] = []
    for path, value in tensors.items():
        key, _, name = path.partition("/")
        entries.append((key, name, value))
    entries += [(key, name, torch.tensor(value, dtype=dtype)) for key, values in scalars.items() for name, value in values.items()]
    for key, name, value in entries:
        if name not in index:
            problems.append(Problem(f"{key}/{name}", "state of an unknown parameter", "The checkpoint is of another model or stage."))
            continue
        parameter = ordered[index[name]]
        if value.shape != parameter.shape and key not in scalars:
            found = f"shape {tuple(value.shape)}"
            problems.append(Problem(f"{key}/{name}", found, f"The parameter has {tuple(parameter.shape)}; it is of another shape."))
            continue
        state.setdefault(index[name], {})[key] = value if key in scalars else _like(value, parameter)
    if problems:
        raise ArtifactError("this optimizer state does not fit the model", shortened(problems))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of a whole tensor, placed as its parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device, copy=True)
