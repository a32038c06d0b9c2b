"""How far a domain is packed, so that a try that was killed inside a domain goes on there.

Two files beside the domain's shards: `DOMAIN.ledger.json`, which is replaced whole, and `DOMAIN.seen`, to which the digests of the
documents that came by are added, 16 bytes each. What the ledger does not know of yet is cut off or written anew by the next try, which
gives the same bytes. Everything that a ledger speaks of is compared with it, by sha256, before it is gone on with: after a power cut a
file may have any content. All is put on the disk before the ledger speaks of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from shearling.errors import ArtifactError
from shearling.io.files import parse_json, write_atomic

FORMAT = 1
"""Version of what is recorded; a ledger of another is begun anew, not gone on with."""
DIGEST_BYTES = 16
_SECONDS = 10.0
_PART = 0.01
"""Part of the time that may go into recording: after a slow record the next one waits longer."""
_LARGEST = 2**26
"""Bytes: a larger ledger is none of ours."""


class Ledger:
    """The ledger of one domain; `with ledger:` around the packing of it closes its files.

    Args:
        folder: where the domain's shards are made.
        domain: its name.
        fingerprint: of the settings; a ledger of others is worth nothing.
    """

    def __init__(self, folder: Path, domain: str, fingerprint: str) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self._file, self._seen_file = folder / f"{domain}.ledger.json", folder / f"{domain}.seen"
        self._seen: Any = None
        self._new: list[bytes] = []
        self._count = 0
        self._digest = hashlib.sha256()
        self._next = time.monotonic() + _SECONDS

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    @property
    def files(self) -> set[str]:
        """Names of its two files."""
        return {self._file.name, self._seen_file.name}

    def read(self) -> dict[str, Any] | None:
        """The state that was recorded last; None where there is none, or one of other settings, or a damaged one."""
        try:
            with open(self._file, "rb") as file:
                values = parse_json(file.read(_LARGEST), str(self._file), parts=_LARGEST)
        except (OSError, ArtifactError):
            return None
        sound = isinstance(values, dict) and values.keys() == {"sha256", "state"} and values["sha256"] == self._sign(values["state"])
        return dict(values["state"]) if sound else None

    def resume(self, state: dict[str, Any]) -> set[bytes]:
        """Go on from `state`, which `read` returned: the digests that were recorded.

        Raises:
            ValueError: the file of digests is not what the ledger says of it.
        """
        size = state["seen"]["count"] * DIGEST_BYTES
        self._seen = open(self._seen_file, "r+b")  # noqa: SIM115  (closed by __exit__)
        data = self._seen.read(size)
        self._digest = hashlib.sha256(data)
        if self._digest.hexdigest() != state["seen"]["sha256"]:
            raise ValueError(f"{self._seen_file}: not what was recorded of it")
        self._seen.truncate(size)
        self._count = state["seen"]["count"]
        return {data[start : start + DIGEST_BYTES] for start in range(0, size, DIGEST_BYTES)}

    def add(self, digests: Iterable[bytes]) -> None:
        """Documents came by; their digests go with the next record."""
        self._new += digests

    def record(self, state: Callable[[], dict[str, Any]]) -> None:
        """Record what `state` gives, which must be on the disk by then, if it is time to."""
        began = time.monotonic()
        if began < self._next:
            return
        if self._seen is None:
            self._seen = open(self._seen_file, "xb")  # noqa: SIM115  (closed by __exit__)
        data = b"".join(self._new)
        self._seen.write(data)
        self._seen.flush()
        os.fsync(self._seen.fileno())
        self._digest.update(data)
        self._count += len(self._new)
        self._new = []
        values = {**state(), "seen": {"count": self._count, "sha256": self._digest.hexdigest()}}
        write_atomic(self._file, json.dumps({"sha256": self._sign(values), "state": values}))
        ended = time.monotonic()
        self._next = ended + max(_SECONDS, (ended - began) / _PART)

    def discard(self) -> None:
        """Nothing is recorded any more, and nothing of before is gone on with."""
        self._close()
        self._file.unlink(missing_ok=True)  # first, for it speaks of the other
        self._seen_file.unlink(missing_ok=True)
        self._new, self._count, self._digest = [], 0, hashlib.sha256()

    def _sign(self, state: Any) -> str:
        return hashlib.sha256(json.dumps([FORMAT, self._fingerprint, state], sort_keys=True).encode()).hexdigest()

    def _close(self) -> None:
        if self._seen is not None:
            self._seen.close()
            self._seen = None
