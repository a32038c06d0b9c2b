"""A token set in the making, beside the place where it will stand: `.partial-NAME`, which the next try goes on with.

Its manifest names the domains that are finished and is written anew after each. Whatever else is in the folder is half made and
worth nothing. The last such manifest is that of the whole set, so a finished folder needs only its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from shearling.data.tokens import MANIFEST, SPLITS, read_manifest, shard_name, shard_problems
from shearling.errors import ArtifactError
from shearling.io.files import remove_tree, sha256_file, write_atomic


class Partial:
    """The folder while it is worked on, under the lock of the place that it is for.

    Entered, it keeps the domains that were finished with the same settings and are undamaged, and drops all else. Left by an error, it
    keeps the finished domains, and is gone where there are none. It is published by renaming `path`.

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
        self._drop_unfinished()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.path.is_dir():  # it was not published
            self._drop_unfinished()
            if not self.domains:
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

    def take_over(self, folder: Path, domains: Mapping[str, Any]) -> None:
        """Enter domains whose shards lie undamaged in `folder`; their bytes are shared with it where the file system can do that."""
        for name in domains:
            for split in SPLITS:
                source, target = (folder / shard_name(name, split)).resolve(), self.path / shard_name(name, split)
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

    def _drop_unfinished(self) -> None:
        kept = {shard_name(name, split) for name in self.domains for split in SPLITS} | ({MANIFEST} if self.domains else set())
        for path in self.path.iterdir():
            if path.name not in kept:
                remove_tree(path)
