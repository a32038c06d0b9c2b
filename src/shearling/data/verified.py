"""Files whose content was verified before: a shard of hundreds of gigabytes is not read again while its file is the same.

A small file beside the shards keeps inode, time of change, size and sha256 of each. It can only confirm what is expected: where it is
missing, broken or wrong the shard is read, and where it cannot be written nothing is kept.
"""

from __future__ import annotations

import contextlib
import json
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from shearling.errors import ArtifactError
from shearling.io.files import read_json, sha256_file, sweep_temporary, write_atomic

VERIFIED = ".verified.json"
_LARGEST = 2**24
"""Bytes: a larger file is none of ours."""
_SETTLED = 2 * 10**9
"""Nanoseconds. Clocks of file systems tick as slowly as this, so a file changed more recently may change again without a trace."""


class Verified:
    """The memory of one folder: `with Verified(folder) as verified`, then `verified.sha256(file, expected)`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = _read(folder / VERIFIED)
        self._now: dict[str, Any] = {}

    def __enter__(self) -> Verified:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if any(self._before.get(name) != facts for name, facts in self._now.items()):
            with contextlib.suppress(OSError):
                sweep_temporary(self._folder, VERIFIED)
                write_atomic(self._folder / VERIFIED, json.dumps(self._now))

    def sha256(self, file: Path, expected: str) -> str:
        """The sha256 of a file in the folder, 64 hex digits: read from the file unless it is known to be `expected`."""
        began, found = time.time_ns(), file.stat()
        facts = [found.st_ino, found.st_mtime_ns, found.st_size, expected]
        known = self._before.get(file.name) == facts
        digest = expected if known else sha256_file(file)
        if known or (digest == expected and found.st_mtime_ns < began - _SETTLED):
            self._now[file.name] = facts
        return digest


def _read(file: Path) -> dict[str, Any]:
    try:
        found = file.lstat()
        values = read_json(file) if stat.S_ISREG(found.st_mode) and found.st_size <= _LARGEST else None
    except (OSError, ArtifactError):
        values = None
    return values if isinstance(values, dict) else {}
