"""A token set in the making, beside the place where it will stand: `.partial-NAME`, which the next try goes on with.

Its manifest names the domains that are finished and is written anew after each. A domain that was begun has a ledger, and the shards
that this speaks of. Whatever else is in the folder is worth nothing. The last manifest is that of the whole set, so a finished folder
needs only its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from shearling.data.ledger import Ledger
from shearling.data.tokens import MANIFEST, SPLITS, read_manifest, shard_name, shard_problems, shards_of
from shearling.errors import ArtifactError
from shearling.io.files import remove_tree, sha256_file, write_atomic


class Partial:
    """The folder while it is worked on, under the lock of the place that it is for.

    Entered, it keeps the domains that were finished or begun with the same settings and are undamaged, and drops all else. Left by an
    error, it keeps them, and is gone where there are none. It is published by renaming `path`.

    Args:
        out: where the token set will stand.
        head: the manifest that is to be; `domains` in it is of no account.
    """

    def __init__(self, out: Path, head: Mapping[str, Any]) -> None:
        self.path = out.parent / f".partial-{out.name}"
        self.domains: dict[str, Any] = {}
        """Finished domain -> what the manifest says of it."""
        self._head = head

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest with the domains that are finished, in the order of the settings."""
        return {**self._head, "domains": {name: self.domains[name] for name in self._head["settings"]["domains"] if name in self.domains}}

    def __enter__(self) -> Partial:
        if self.path.is_symlink() or not self.path.is_dir():
            remove_tree(self.path)
            self.path.mkdir(parents=True)
        kept = self._finished_before()
        if kept:
            self.finish(kept)
        self.drop_unfinished()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.path.is_dir():  # it was not published
            self.drop_unfinished()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def finish(self, domains: Mapping[str, Any]) -> None:
        """Enter domains whose shards lie complete in the folder: {name: facts}. They are kept from now on."""
        before = self.domains
        self.domains = {**before, **domains}
        try:
            write_atomic(self.path / MANIFEST, json.dumps(self.manifest, indent=1))
        except BaseException:
            self.domains = before
            raise

    def ledger(self, domain: str) -> Ledger:
        """The ledger of a domain that is begun or to begin."""
        return Ledger(self.path, domain, self._head["fingerprint"])

    def take_over(self, folder: Path, domains: Mapping[str, Any]) -> None:
        """Enter domains whose shards lie undamaged in `folder`; their bytes are shared with it where the file system can do that."""
        for facts in domains.values():
            for shard in (shard for split in SPLITS for shard in shards_of(facts, split)):
                source, target = (folder / shard.file).resolve(), self.path / shard.file
                try:
                    os.link(source, target)
                except OSError:
                    shutil.copyfile(source, target)
        self.finish(domains)

    def discard(self) -> None:
        """Keep nothing: the folder is gone once it is left."""
        self.domains = {}

    def _finished_before(self) -> dict[str, Any]:
        try:
            manifest = read_manifest(self.path)
        except ArtifactError:
            return {}
        if manifest["fingerprint"] != self._head["fingerprint"]:
            return {}
        # Never from the memory of `Verified`: these files were not flushed yet, and a power cut can empty one and leave its size and time.
        damaged = {domain for domain, _ in shard_problems(self.path, manifest, lambda file, _: sha256_file(file))}
        return {name: facts for name, facts in manifest["domains"].items() if name not in damaged}

    def drop_unfinished(self) -> None:
        """Drop what is part of no domain that is finished or begun; once all are finished, what is none of the token set."""
        kept = {MANIFEST} if self.domains else set()
        for facts in self.domains.values():
            kept |= {shard.file for split in SPLITS for shard in shards_of(facts, split)}
        for name in self._head["settings"]["domains"]:
            ledger = self.ledger(name)
            if name not in self.domains and (state := ledger.read()) is not None:
                kept |= ledger.files
                kept |= {shard_name(name, split, n) for split, writer in state["writers"].items() for n in range(len(writer["shards"]) + 1)}
        for path in self.path.iterdir():
            if path.name not in kept:
                remove_tree(path)
