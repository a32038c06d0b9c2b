"""Writing the shards of a split: runs of ids in, files of whole rows out; it can be gone on with where it stopped."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from shearling.data.rows import Ids
from shearling.data.tokens import shard_name

_CHUNK = 2**20


class ShardWriter:
    """Packs runs of ids into rows of T and writes them, a new file after every `shard_sequences` rows.

    A last row that is not full is dropped.

    Args:
        folder: where the files `DOMAIN.SPLIT.00000.bin` and so on are made; those that are there are replaced.
        domain: name of the domain.
        split: train or heldout.
        sequence_length: T.
        dtype: type of the ids on disk.
        limit: rows at most; None for no limit.
        shard_sequences: rows of a full shard.
        state: what `record` returned of an earlier writer; its files lie in the folder. None to begin.

    Raises:
        ValueError: the files are not what the state says.
    """

    _BLOCK = 2**20

    def __init__(
        self,
        folder: Path,
        domain: str,
        split: str,
        sequence_length: int,
        dtype: np.dtype[Any],
        limit: int | None,
        shard_sequences: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.sequence_length = sequence_length
        self.tokens = 0
        """Tokens taken, with those of a row that is not full."""
        self.shards: list[dict[str, Any]] = []
        """Finished shards, as the manifest names them: file, sequences, sha256."""
        self._folder, self._domain, self._split = folder, domain, split
        self._limit = None if limit is None else limit * sequence_length
        self._shard_sequences = shard_sequences
        self._dtype = dtype
        self._pending: list[Ids] = []
        self._pending_size = 0
        self._file: Any = None
        self._rows = 0
        self._digest = hashlib.sha256()
        if state is not None:
            try:
                self._restore(state)
            except BaseException:
                self._close()
                raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

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
        self._pending.append(ids.astype(self._dtype, copy=False))
        self._pending_size += len(ids)
        if self._pending_size >= self._BLOCK:
            self._write()

    def record(self) -> dict[str, Any]:
        """Put all whole rows on the disk, and return what another writer needs to go on from here, as JSON can hold it."""
        self._write()
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        pending = b"".join(ids.tobytes() for ids in self._pending).hex()
        return {
            "tokens": self.tokens, "shards": list(self.shards), "rows": self._rows, "sha256": self._digest.hexdigest(), "pending": pending,
        }  # fmt: skip

    def finish(self) -> list[dict[str, Any]]:
        """Write what is pending, drop the last row if it is not full, and return all shards."""
        self._write()
        if self._rows:
            self._complete()
        return self.shards

    def _write(self) -> None:
        ids = np.concatenate(self._pending) if self._pending else np.empty(0, self._dtype)
        whole = len(ids) // self.sequence_length
        done = 0
        while done < whole:
            if self._file is None:
                file = self._name(len(self.shards))
                file.unlink(missing_ok=True)  # never into a file that is there: it may be linked from a token set in use
                self._file = open(file, "xb")  # noqa: SIM115  (closed by __exit__)
            rows = min(whole - done, self._shard_sequences - self._rows)
            data = ids[done * self.sequence_length : (done + rows) * self.sequence_length].tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._rows += rows
            done += rows
            if self._rows == self._shard_sequences:
                self._complete()
        rest = ids[whole * self.sequence_length :].copy()  # a view would keep the whole block
        self._pending, self._pending_size = [rest], len(rest)

    def _complete(self) -> None:
        """The current file is whole: on to the next one."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._close()
        name = shard_name(self._domain, self._split, len(self.shards))
        self.shards.append({"file": name, "sequences": self._rows, "sha256": self._digest.hexdigest()})
        self._rows, self._digest = 0, hashlib.sha256()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _name(self, number: int) -> Path:
        return self._folder / shard_name(self._domain, self._split, number)

    def _restore(self, state: dict[str, Any]) -> None:
        row = self.sequence_length * self._dtype.itemsize
        for number, shard in enumerate(state["shards"]):
            with open(self._name(number), "rb") as file:
                digest = _read(file, shard["sequences"] * row)
                if digest.hexdigest() != shard["sha256"] or file.read(1):
                    raise ValueError(f"{shard['file']}: not what was recorded of it")
        self.tokens, self.shards, self._rows = state["tokens"], list(state["shards"]), state["rows"]
        if self._rows:
            self._file = open(self._name(len(self.shards)), "r+b")  # noqa: SIM115  (closed by __exit__)
            if os.fstat(self._file.fileno()).st_nlink != 1:
                raise ValueError(f"{self._file.name}: linked from elsewhere")
            self._digest = _read(self._file, self._rows * row)
            self._file.truncate(self._rows * row)
        if self._digest.hexdigest() != state["sha256"]:
            raise ValueError("the shard that was begun is not what was recorded of it")
        pending = np.frombuffer(bytes.fromhex(state["pending"]), self._dtype)
        self._pending, self._pending_size = [pending], len(pending)


def _read(file: Any, size: int) -> Any:
    """The digest of the next `size` bytes of an open file, which then stands behind them; of fewer where it ends before."""
    digest = hashlib.sha256()
    while size and (block := file.read(min(_CHUNK, size))):
        digest.update(block)
        size -= len(block)
    return digest
