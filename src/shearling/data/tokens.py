"""Prepared text on disk: per domain two shards of token rows, and a manifest that says what they are.

A shard is a raw little-endian array of ids [n, T], row after row, without a header: `DOMAIN.train.bin`, `DOMAIN.heldout.bin`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shearling.data.config import domain_name_problem
from shearling.data.verified import Verified
from shearling.errors import ArtifactError, Problem
from shearling.io.files import read_json

FORMAT = 1
"""Version of the layout; raised when older readers would misread it."""
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
_AGAIN = "The directory is damaged: delete it and prepare the data again."
_REBUILD = "Run `shearling prepare` with the same recipe and --out to rebuild this shard."
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

    Sizes are checked always. `verify` compares the sha256 of every shard, and reads those that have changed on disk since they were
    last verified; leave it out where another process of the same job has just done so.

    Raises:
        ArtifactError: the directory or a shard is missing, of another size or content, or made by another version.
    """
    path = Path(path)
    manifest = read_manifest(path)
    problems = damaged_shards(path, manifest) if verify else shard_problems(path, manifest, None)
    if problems:
        headline = f"{path}: {len(problems)} shard{'s' * (len(problems) > 1)} cannot be used"
        raise ArtifactError(headline, list(problems.values()))
    dtype, length = np.dtype(manifest["dtype"]), manifest["sequence_length"]
    arrays: dict[tuple[str, str], Ids] = {
        (domain, split): np.memmap(path / shard_name(domain, split), dtype, "r", shape=(facts[f"{split}_sequences"], length))
        for domain, facts in manifest["domains"].items()
        for split in SPLITS
    }
    return TokenSet(path, manifest, arrays)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a directory that `prepare` made; raise `ArtifactError` where there is none or it is not sound."""
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise ArtifactError(f"{path}: no prepared data", [Problem("data", found, "Prepare the data first.")])
    manifest = read_json(path / MANIFEST)
    try:
        problems = _manifest_problems(manifest) or _contradictions(manifest)
    except RecursionError:
        problems = [Problem("manifest", "lists in lists without end", _AGAIN)]
    if problems:
        raise ArtifactError(f"{path / MANIFEST}: cannot be used", problems)
    return dict(manifest)


def damaged_shards(path: Path, manifest: Mapping[str, Any]) -> dict[tuple[str, str], Problem]:
    """(domain, split) -> what is wrong with the shard, by size and sha256; reads only what has changed since it was last verified."""
    with Verified(path) as verified:
        return shard_problems(path, manifest, verified.sha256)


def shard_problems(path: Path, manifest: Mapping[str, Any], sha256: Callable[[Path, str], str] | None) -> dict[tuple[str, str], Problem]:
    """(domain, split) -> what is wrong with the shard.

    Args:
        path: the directory.
        manifest: as `read_manifest` gives it.
        sha256: (file, expected digest) -> its digest; None to compare sizes only.
    """
    problems: dict[tuple[str, str], Problem] = {}
    row = manifest["sequence_length"] * np.dtype(manifest["dtype"]).itemsize
    for domain in manifest["settings"]["domains"]:
        facts = manifest["domains"].get(domain)
        for split in SPLITS:
            if facts is None:
                found: str | None = "no such domain in the manifest, so preparing did not come to its end"
            else:
                size, digest = facts[f"{split}_sequences"] * row, facts["sha256"][split]
                found = _difference(path / shard_name(domain, split), size, digest, sha256)
            if found:
                problems[domain, split] = Problem(shard_name(domain, split), found, _REBUILD)
    return problems


def _difference(file: Path, size: int, digest: str, sha256: Callable[[Path, str], str] | None) -> str | None:
    try:
        if (found := file.stat().st_size) != size:
            return f"{found} bytes where {size} are expected"
        if sha256 and (actual := sha256(file, digest)) != digest:
            return f"sha256 {actual} where {digest} is expected"
    except OSError as error:
        return f"{error.strerror} where {size} bytes are expected"
    return None


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Sha256 over the settings of a preparation: equal ones give equal shards."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _manifest_problems(manifest: Any) -> list[Problem]:
    """What makes a manifest unusable; it may come from elsewhere, so names are checked before they become paths."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = repr(manifest.get("format")) if isinstance(manifest, dict) else type(manifest).__name__
        return [Problem("format", found, f"This version reads format {FORMAT}: prepare the data again.")]
    problems = [
        Problem(field, repr(manifest.get(field))[:80], _AGAIN)
        for field in ("sequence_length", "vocab_size")
        if not _is_count(manifest.get(field))
    ]
    if manifest.get("dtype") not in ("<u2", "<u4"):
        problems.append(Problem("dtype", repr(manifest.get("dtype"))[:80], _AGAIN))
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
            sound = isinstance(digests, dict) and isinstance(digests.get(split), str)
            if not (sound and _is_count(facts.get(f"{split}_sequences"))):
                problems.append(Problem(f"domains.{name}", f"no sound {split}_sequences and sha256", _AGAIN))
    return problems


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**48


def _contradictions(manifest: Mapping[str, Any]) -> list[Problem]:
    """Where a manifest is at odds with the settings it was made with, which a fingerprint guards."""
    settings, found = manifest.get("settings"), manifest.get("fingerprint")
    if not isinstance(settings, dict) or not isinstance(settings.get("domains"), dict) or fingerprint(settings) != found:
        return [Problem("fingerprint", f"{found!r:.80}, which is not that of the settings", _AGAIN)]
    wanted = {field: settings.get(field) for field in ("sequence_length", "vocab_size", "tokenizer")}
    wanted["dtype"] = dtype_for(manifest["vocab_size"]).str
    problems = [
        Problem(field, f"{manifest.get(field)!r:.80} where {value!r:.80} is expected", _AGAIN)
        for field, value in wanted.items()
        if manifest.get(field) != value
    ]
    strangers = [name for name in manifest["domains"] if name not in settings["domains"]]
    return problems + [Problem(f"domains.{name}", "a domain that is not in the settings", _AGAIN) for name in strangers]


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
        file.unlink(missing_ok=True)  # never into a file that is there: it may be linked from a token set in use
        self._file = open(file, "xb")  # noqa: SIM115  (closed by __exit__)

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
