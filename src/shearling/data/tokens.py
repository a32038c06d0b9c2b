"""Prepared text on disk: per domain two shards of token rows, and a manifest that says what they are.

A shard is a raw little-endian array of ids [n, T], row after row, without a header: `DOMAIN.train.bin`, `DOMAIN.heldout.bin`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shearling.data.config import domain_name_problem
from shearling.errors import ArtifactError, Problem
from shearling.io.files import read_json, sha256_file

FORMAT = 1
"""Version of the layout; raised when older readers would misread it."""
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
_AGAIN = "The directory is damaged: delete it and prepare the data again."
Ids = NDArray[Any]


def shard_name(domain: str, split: str) -> str:
    """File name of a shard."""
    return f"{domain}.{split}.bin"


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The type of the ids on disk: uint16 while every id fits, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class TokenSet:
    """Token rows of every domain, mapped from disk and never written to."""

    path: Path
    manifest: Mapping[str, Any]
    """What `prepare` returned: counts, fingerprints, notes, by domain."""
    arrays: Mapping[tuple[str, str], Ids]
    """(domain, split) -> ids [n, T], uint16 or uint32."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, in the order in which weights, losses and cursors are indexed."""
        return tuple(self.manifest["domains"])

    @property
    def sequence_length(self) -> int:
        """T, tokens in a row."""
        return int(self.manifest["sequence_length"])

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""
        return int(self.manifest["vocab_size"])

    def sequences(self, domain: str, split: str) -> Ids:
        """The rows [n, T] of a domain, `split` being train or heldout; read-only, uint16 or uint32, n >= 1."""
        return self.arrays[domain, split]


def open_tokens(path: str | Path, *, verify: bool = True) -> TokenSet:
    """Open a directory that `prepare` made.

    Sizes are checked always. `verify` reads every shard once and compares its sha256; leave it out where another process of the
    same job has just done so.

    Raises:
        ArtifactError: the directory or a shard is missing, of another size or content, or made by another version.
    """
    path = Path(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise ArtifactError(f"{path}: no prepared data", [Problem("data", found, "Prepare the data first.")])
    manifest = read_json(path / MANIFEST)
    problems = _manifest_problems(manifest)
    if problems:
        raise ArtifactError(f"{path / MANIFEST}: cannot be used", problems)
    arrays: dict[tuple[str, str], Ids] = {}
    dtype, length = np.dtype(manifest["dtype"]), manifest["sequence_length"]
    for domain, facts in manifest["domains"].items():
        for split in SPLITS:
            file, rows = path / shard_name(domain, split), facts[f"{split}_sequences"]
            problem = _shard_problem(file, rows * length * dtype.itemsize, facts["sha256"][split] if verify else None)
            if problem:
                problems.append(problem)
            else:
                arrays[domain, split] = np.memmap(file, dtype=dtype, mode="r", shape=(rows, length))
    if problems:
        raise ArtifactError(f"{path}: {len(problems)} shard{'s' * (len(problems) > 1)} cannot be used", problems)
    return TokenSet(path, manifest, arrays)


def _shard_problem(file: Path, size: int, sha256: str | None) -> Problem | None:
    try:
        found = file.stat().st_size
        if found != size:
            return Problem(file.name, f"{found} bytes where {size} are expected", _AGAIN)
        if sha256 and (digest := sha256_file(file)) != sha256:
            return Problem(file.name, f"sha256 {digest} where {sha256} is expected", _AGAIN)
    except OSError as error:
        return Problem(file.name, f"{error.strerror} where {size} bytes are expected", _AGAIN)
    return None


def _manifest_problems(manifest: Any) -> list[Problem]:
    """What makes a manifest unusable; it may come from elsewhere, so names are checked before they become paths."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = repr(manifest.get("format")) if isinstance(manifest, dict) else type(manifest).__name__
        return [Problem("format", found, f"This version reads format {FORMAT}: prepare the data again.")]
    problems = [
        Problem(field, repr(manifest.get(field)), _AGAIN)
        for field in ("sequence_length", "vocab_size")
        if not (type(manifest.get(field)) is int and manifest[field] > 0)
    ]
    if manifest.get("dtype") not in ("<u2", "<u4"):
        problems.append(Problem("dtype", repr(manifest.get("dtype")), _AGAIN))
    domains = manifest.get("domains")
    if not (isinstance(domains, dict) and domains):
        return [*problems, Problem("domains", repr(domains)[:80], _AGAIN)]
    for name, facts in domains.items():
        if name_problem := domain_name_problem(name):
            problems.append(Problem(f"domains.{name}", "an unsafe name", name_problem))
        if not isinstance(facts, dict):
            problems.append(Problem(f"domains.{name}", repr(facts)[:80], _AGAIN))
            continue
        digests = facts.get("sha256")
        for split in SPLITS:
            rows = facts.get(f"{split}_sequences")
            if not (type(rows) is int and rows > 0 and isinstance(digests, dict) and isinstance(digests.get(split), str)):
                problems.append(Problem(f"domains.{name}", f"no sound {split}_sequences and sha256", _AGAIN))
    return problems


class ShardWriter:
    """Packs runs of ids into rows of T and writes them; a last row that is not full is dropped.

    Args:
        file: path of the shard; replaced if there is one.
        sequence_length: T.
        dtype: type of the ids on disk.
        limit: rows at most; None for no limit.
    """

    _BLOCK = 2**20

    def __init__(self, file: Path, sequence_length: int, dtype: np.dtype[Any], limit: int | None) -> None:
        self.sequence_length = sequence_length
        self.tokens = 0
        """Tokens taken, with those of a row that is not full."""
        self._limit = None if limit is None else limit * sequence_length
        self._dtype = dtype
        self._pending: list[Ids] = []
        self._pending_size = 0
        self._digest = hashlib.sha256()
        self._file = open(file, "wb")  # noqa: SIM115  (closed by __exit__)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self._limit is not None and self.tokens >= self._limit

    @property
    def sequences(self) -> int:
        """Full rows so far."""
        return self.tokens // self.sequence_length

    def add(self, ids: Ids) -> None:
        """Append ids [n], each below the vocabulary size; what goes over the limit is dropped."""
        if self._limit is not None:
            ids = ids[: self._limit - self.tokens]
        self.tokens += len(ids)
        self._pending.append(ids.astype(self._dtype))
        self._pending_size += len(ids)
        if self._pending_size >= self._BLOCK:
            self._write()

    def finish(self) -> str:
        """Write what is pending, drop the last row if it is not full, and return the sha256 of the file."""
        self._write()
        self._file.flush()
        return self._digest.hexdigest()

    def _write(self) -> None:
        ids = np.concatenate(self._pending) if self._pending else np.empty(0, self._dtype)
        whole = len(ids) // self.sequence_length * self.sequence_length
        data = ids[:whole].tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._pending, self._pending_size = [ids[whole:]], len(ids) - whole
