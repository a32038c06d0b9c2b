"""Text that was prepared before: in a folder of this machine, read where it is, or at a URL, read through a cache of its shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shearling.data.cache import ShardCache
from shearling.data.config import DataConfig
from shearling.data.encode import tokenizer_fingerprint
from shearling.data.remote import Remote, is_url, shown_place
from shearling.data.rows import Ids, Locate, Maps, Rows, Shard
from shearling.data.tokens import MANIFEST, SPLITS, TokenSet, check_manifest, open_tokens, read_manifest, row_bytes, rows_of
from shearling.errors import ArtifactError, ConfigError, Problem, StorageError
from shearling.io.files import JSON_LIMIT, parse_json

_TRIES = 20
"""How often a shard is asked for that others remove from the cache before it is mapped."""


def read_prepared(where: str) -> dict[str, Any]:
    """The manifest of prepared text in a folder or at a URL.

    Raises:
        ArtifactError: there is none, it is not sound, or preparing did not come to its end.
        ConfigError: a kind of URL that cannot be read here. StorageError: the network fails.
    """
    if not is_url(where):
        shown, manifest = where, read_manifest(Path(where))
    else:
        remote = Remote(where)
        shown = str(remote)
        name = f"{remote}/{MANIFEST}"
        manifest = check_manifest(parse_json(remote.read(MANIFEST, JSON_LIMIT), name), name)
    missing = [domain for domain in manifest["settings"]["domains"] if domain not in manifest["domains"]]
    if missing:
        remedy = "Prepare it to its end where it was begun, or give other text."
        raise ArtifactError(
            f"{shown}: preparing did not come to its end", [Problem(f"domains.{name}", "nothing", remedy) for name in missing]
        )
    return manifest


def check_prepared(manifest: Mapping[str, Any], config: DataConfig, tokenizer: Any, vocab_size: int) -> None:
    """Raise one `ConfigError` for all in which prepared text is not what a recipe asks for.

    Text that was prepared for a smaller vocabulary will do if the tokenizer is the same: models of one family differ in the rows of their
    embeddings that no token uses.

    Args:
        manifest: as `read_prepared` gives it.
        config: the recipe's; its domains are those of the text, all of them, or left out.
        tokenizer: the source's.
        vocab_size: rows of the source's embedding.
    """
    problems = []
    length = manifest["sequence_length"]
    if config.sequence_length != length:
        remedy = f"Set it to {length}, or give text that was prepared with {config.sequence_length}."
        problems.append(Problem("data.sequence_length", f"{config.sequence_length} where the prepared text has {length}", remedy))
    problems += model_problems(manifest, tokenizer, vocab_size)
    if config.domains:
        known = ", ".join(manifest["domains"])
        for name in config.domains:
            if name not in manifest["domains"]:
                remedy = f"Its domains are {known}. Name all of them, or leave domains out."
                problems.append(Problem(f"data.domains.{name}", "a domain that the prepared text has not", remedy))
        for name in manifest["domains"]:
            if name not in config.domains:
                remedy = "Give its weight, too, or leave domains out: then all have equal ones."
                problems.append(Problem(f"data.domains.{name}", "nothing, though the prepared text has this domain", remedy))
    if problems:
        raise ConfigError(f"{shown_place(str(config.prepared))}: this prepared text and the recipe do not go together", problems)


def model_problems(manifest: Mapping[str, Any], tokenizer: Any, vocab_size: int) -> list[Problem]:
    """Why a model with this tokenizer and so many rows in its embedding cannot be given prepared text."""
    problems, vocab = [], manifest["vocab_size"]
    if (found := tokenizer_fingerprint(tokenizer)) != manifest["tokenizer"]:
        shown = f"a tokenizer with the fingerprint {found[:16]} where the text was prepared with {manifest['tokenizer'][:16]}"
        problems.append(Problem("source", shown, "Give text that was prepared with the tokenizer of this source."))
    if vocab > vocab_size:
        shown = f"a vocabulary of {vocab_size} where the text was prepared for {vocab}"
        problems.append(Problem("source", shown, "Give text that was prepared for this source."))
    return problems


def open_prepared(where: str, manifest: Mapping[str, Any], cache: str | Path, limit_bytes: int, *, verify: bool = True) -> TokenSet:
    """The rows of prepared text. Of what lies at a URL nothing is fetched yet.

    Args:
        where: folder or URL.
        manifest: as `read_prepared` gives it, for what lies at a URL; a folder's is read again.
        cache: folder of the cache, for what lies at a URL.
        limit_bytes: what the cache may hold.
        verify: compare the sha256 of every shard of a folder; those that are fetched are always compared.

    Raises:
        ArtifactError: shards of a folder are missing or damaged.
        ConfigError: a shard is larger than the whole cache may be.
    """
    if not is_url(where):
        return open_tokens(where, verify=verify)
    row = row_bytes(manifest)

    def tidy() -> None:
        for rows in arrays.values():
            rows.tidy(store.touch)

    store = ShardCache(where, cache, limit_bytes, tidy)
    arrays = rows_of(manifest, lambda shard: store.path(shard.file, shard.sequences * row, shard.sha256), CachedRows)
    for rows in arrays.values():
        store.check_size(rows.shards[0].file, rows.shards[0].sequences * row)
    return TokenSet(store.folder, manifest, arrays)


def fetch_heldout(tokens: TokenSet, progress: Callable[[int, int], None] | None = None) -> None:
    """Have the held-out shards of all domains here, if they come from elsewhere; `progress` is called with shards so far, and in all.

    Raises what `ShardCache.path` raises.
    """
    splits = [rows for domain in tokens.domains if isinstance(rows := tokens.sequences(domain, "heldout"), CachedRows)]
    total = sum(len(rows.shards) for rows in splits)
    done = 0
    for rows in splits:
        for first in range(0, len(rows), rows.shards[0].sequences):
            _ = rows[first]
            done += 1
            if progress:
                progress(done, total)


def too_small_for(manifest: Mapping[str, Any], limit_bytes: int) -> str | None:
    """A sentence for the user where a cache of `limit_bytes` cannot hold all shards of a remote set; None where it can."""
    size = row_bytes(manifest) * sum(facts[f"{split}_sequences"] for facts in manifest["domains"].values() for split in SPLITS)
    if size <= limit_bytes:
        return None
    return (
        f"the prepared text has {size / 2**30:.1f} GiB and data.cache_gib allows for {limit_bytes / 2**30:.1f}: sequences are drawn from "
        "all over it, so shards will be fetched again and again. Allow for all of it if the disk has room."
    )


class CachedRows(Rows):
    """Rows whose shards are fetched when a row of them is first asked for, and may be removed from the cache at any time.

    A shard that is mapped stays readable when it is removed; it is let go when this process next has one fetched, so that its room
    on the disk is free, and fetched again if a row of it is asked for. Arguments as of `Rows`.
    """

    def __init__(self, shards: Sequence[Shard], sequence_length: int, dtype: np.dtype[Any], locate: Locate, maps: Maps) -> None:
        super().__init__(shards, sequence_length, dtype, locate, maps)
        self._inodes: dict[int, tuple[Path, int]] = {}

    def _load(self, number: int) -> Ids:
        shard = self.shards[number]
        for _ in range(_TRIES):
            file = self._locate(shard)
            try:
                with open(file, "rb") as opened:
                    mapped, inode = self._mapped(number, opened), os.fstat(opened.fileno()).st_ino
            except FileNotFoundError:  # another process made room with it just now
                continue
            except (OSError, ValueError) as error:
                raise self._unmappable(number, file, error, "Delete it; it is fetched again.") from None
            self._open[number], self._inodes[number] = mapped, (file, inode)
            return mapped
        remedy = "raise data.cache_gib, or give the runs caches of their own"
        raise StorageError(f"{shard.file}: other processes remove it from the cache as soon as it is fetched; {remedy}")

    def tidy(self, touch: Callable[[str], None]) -> None:
        """Let go of the shards that were removed from the cache, and `touch` the others, which are in use."""
        for number, (file, inode) in list(self._inodes.items()):
            try:
                there = number in self._open and file.stat().st_ino == inode
            except OSError:
                there = False
            if there:
                touch(self.shards[number].sha256)
            else:
                self._open.pop(number, None)  # who reads it at this moment holds it
                self._inodes.pop(number, None)
