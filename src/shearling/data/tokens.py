"""Prepared text on disk: per domain and split a list of shards of token rows, and a manifest that says what they are.

A shard, `DOMAIN.train.00000.bin`, is as `shearling.data.rows` has it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np

from shearling.data.config import domain_name_problem
from shearling.data.rows import REBUILD, Locate, Maps, Rows, Shard
from shearling.data.verified import Verified
from shearling.errors import ArtifactError, Problem
from shearling.io.files import read_json

FORMAT = 2
"""Version of the layout; raised when older readers would misread it."""
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
R = TypeVar("R", bound=Rows)
SHARD_TOKENS = 2**26
"""Tokens in a full shard, at most."""
_AGAIN = "The directory is damaged: delete it and prepare the data again."
_COMPLETE = "Run `shearling prepare` with the same recipe and --out to complete it."


def shard_name(domain: str, split: str, number: int) -> str:
    """File name of a shard; `number` counts from 0."""
    return f"{domain}.{split}.{number:05d}.bin"


def shard_rows(sequence_length: int, shard_tokens: int = SHARD_TOKENS) -> int:
    """Rows of a full shard: the largest power of two with which it holds at most `shard_tokens` tokens, and at least 1."""
    return 1 << max((shard_tokens // sequence_length).bit_length() - 1, 0)


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The type of the ids on disk: uint16 while every id fits, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class TokenSet:
    """Token rows of every domain, mapped from disk and never written to."""

    path: Path
    manifest: Mapping[str, Any]
    """What `prepare` returned: counts, shards, fingerprints, notes, by domain."""
    arrays: Mapping[tuple[str, str], Rows]
    """(domain, split) -> rows [n, T], uint16 or uint32; `rows_of` makes them."""

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

    @property
    def document_end(self) -> int:
        """The id of the mark that ends each document; nothing else in the rows has it."""
        return int(self.manifest["document_end"])

    def sequences(self, domain: str, split: str) -> Rows:
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
    return TokenSet(path, manifest, rows_of(manifest, lambda shard: path / shard.file, Rows))


def rows_of(manifest: Mapping[str, Any], locate: Locate, kind: type[R]) -> dict[tuple[str, str], R]:
    """(domain, split) -> its rows, of a manifest that is known to be sound; no shard is located yet. `kind`: `Rows`, or a kind of it."""
    dtype, length, maps = np.dtype(manifest["dtype"]), manifest["sequence_length"], Maps()
    return {
        (domain, split): kind(shards_of(facts, split), length, dtype, locate, maps)
        for domain, facts in manifest["domains"].items()
        for split in SPLITS
    }


def row_bytes(manifest: Mapping[str, Any]) -> int:
    """Bytes of a row on disk."""
    return int(manifest["sequence_length"] * np.dtype(manifest["dtype"]).itemsize)


def shards_of(facts: Mapping[str, Any], split: str) -> list[Shard]:
    """The shards of a split, in order; `facts` is what a sound manifest says of a domain."""
    return [Shard(shard["file"], shard["sequences"], shard["sha256"]) for shard in facts["shards"][split]]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a directory that `prepare` made; raise `ArtifactError` where there is none or it is not sound."""
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise ArtifactError(f"{path}: no prepared data", [Problem("data", found, "Prepare the data first.")])
    return check_manifest(read_json(path / MANIFEST), str(path / MANIFEST))


def check_manifest(manifest: Any, where: str) -> dict[str, Any]:
    """A manifest, which may come from elsewhere, once it is known to be sound; raise `ArtifactError` that names `where`."""
    try:
        problems = _manifest_problems(manifest) or _contradictions(manifest)
    except RecursionError:
        problems = [Problem("manifest", "lists in lists without end", _AGAIN)]
    if problems:
        raise ArtifactError(f"{where}: cannot be used", problems)
    return dict(manifest)


def damaged_shards(path: Path, manifest: Mapping[str, Any]) -> dict[tuple[str, str], Problem]:
    """(domain, file) -> what is wrong with the shard, by size and sha256; reads only what has changed since it was last verified."""
    with Verified(path) as verified:
        return shard_problems(path, manifest, verified.sha256)


def shard_problems(path: Path, manifest: Mapping[str, Any], sha256: Callable[[Path, str], str] | None) -> dict[tuple[str, str], Problem]:
    """(domain, file) -> what is wrong with the shard; for a domain that is missing whole, (domain, "").

    Args:
        path: the directory.
        manifest: as `read_manifest` gives it.
        sha256: (file, expected digest) -> its digest; None to compare sizes only.
    """
    problems: dict[tuple[str, str], Problem] = {}
    row = row_bytes(manifest)
    for domain in manifest["settings"]["domains"]:
        facts = manifest["domains"].get(domain)
        if facts is None:
            found = "no such domain in the manifest, so preparing did not come to its end"
            problems[domain, ""] = Problem(f"domains.{domain}", found, _COMPLETE)
            continue
        for shard in (shard for split in SPLITS for shard in shards_of(facts, split)):
            if difference := difference_of(path / shard.file, shard.sequences * row, shard.sha256, sha256):
                problems[domain, shard.file] = Problem(shard.file, difference, REBUILD)
    return problems


def difference_of(file: Path, size: int, digest: str, sha256: Callable[[Path, str], str] | None) -> str | None:
    """What is wrong with the file of a shard, if anything; `sha256` as for `shard_problems`."""
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


def split_digest(facts: Mapping[str, Any], split: str) -> str:
    """What the bytes of a split are known by, 64 hex digits: the sha256 of its shard, or one over those of all its shards in order."""
    digests = [shard.sha256 for shard in shards_of(facts, split)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _manifest_problems(manifest: Any) -> list[Problem]:
    """What makes a manifest unusable; it may come from elsewhere, so names are checked before they become paths."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = repr(manifest.get("format"))[:80] if isinstance(manifest, dict) else type(manifest).__name__
        remedy = "prepare the data again, into another directory, or delete this one first."
        return [Problem("format", found, f"This version reads format {FORMAT}: {remedy}")]
    problems = [
        Problem(field, repr(manifest.get(field))[:80], _AGAIN)
        for field in ("sequence_length", "vocab_size", "shard_sequences")
        if not _is_count(manifest.get(field))
    ]
    if manifest.get("dtype") not in ("<u2", "<u4"):
        problems.append(Problem("dtype", repr(manifest.get("dtype"))[:80], _AGAIN))
    end = manifest.get("document_end")
    if not (type(end) is int and end >= 0):
        problems.append(Problem("document_end", repr(end)[:80], _AGAIN))
    domains = manifest.get("domains")
    if not (isinstance(domains, dict) and domains):
        return [*problems, Problem("domains", repr(domains)[:80], _AGAIN)]
    for name, facts in domains.items():
        if name_problem := domain_name_problem(name):
            problems.append(Problem(f"domains.{name}", "an unsafe name", name_problem))
        if not isinstance(facts, dict):
            problems.append(Problem(f"domains.{name}", repr(facts)[:80], _AGAIN))
        elif name_problem is None and _is_count(full := manifest.get("shard_sequences")):
            unsound = [split for split in SPLITS if not _sound_split(name, facts, split, full)]
            problems += [Problem(f"domains.{name}", f"no sound {split}_sequences and shards", _AGAIN) for split in unsound]
    return problems


def _sound_split(domain: str, facts: Mapping[str, Any], split: str, full: int) -> bool:
    """Whether what a manifest says of the shards of a split makes sense; `full`: rows of every shard but the last."""
    shards = facts.get("shards")
    listed = shards.get(split) if isinstance(shards, dict) else None
    if not (isinstance(listed, list) and listed and _is_count(facts.get(f"{split}_sequences"))):
        return False
    for number, shard in enumerate(listed):
        if not (isinstance(shard, dict) and _is_count(shard.get("sequences")) and shard["sequences"] <= full):
            return False
        digest = shard.get("sha256")
        if shard.get("file") != shard_name(domain, split, number) or not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
            return False
    even = all(before["sequences"] == full for before, _ in pairwise(listed))
    return even and sum(shard["sequences"] for shard in listed) == facts[f"{split}_sequences"]


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**48


def _contradictions(manifest: Mapping[str, Any]) -> list[Problem]:
    """Where a manifest is at odds with the settings it was made with, which a fingerprint guards."""
    settings, found = manifest.get("settings"), manifest.get("fingerprint")
    if not isinstance(settings, dict) or not isinstance(settings.get("domains"), dict) or fingerprint(settings) != found:
        return [Problem("fingerprint", f"{found!r:.80}, which is not that of the settings", _AGAIN)]
    fields = ("sequence_length", "vocab_size", "tokenizer", "shard_sequences", "document_end")
    wanted = {field: settings.get(field) for field in fields}
    wanted["dtype"] = dtype_for(manifest["vocab_size"]).str
    problems = [
        Problem(field, f"{manifest.get(field)!r:.80} where {value!r:.80} is expected", _AGAIN)
        for field, value in wanted.items()
        if manifest.get(field) != value
    ]
    strangers = [name for name in manifest["domains"] if name not in settings["domains"]]
    return problems + [Problem(f"domains.{name}", "a domain that is not in the settings", _AGAIN) for name in strangers]
