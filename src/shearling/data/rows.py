"""The rows of a split over all of its shards, mapped when they are first asked for.

A shard is a raw little-endian array of ids [rows, T], row after row, without a header. All shards of a split but the last have the same
number of rows, so that a row is found by a division.
"""

from __future__ import annotations

import operator
import resource
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from shearling.errors import ArtifactError, Problem

_MOST_OPEN = 2**14
"""Shards that a token set keeps mapped at once, at most; the system allows about four times as many maps."""
REBUILD = "Run `shearling prepare` with the same recipe and --out to rebuild this shard."
"""What to do about a shard of a folder that is damaged."""
Ids = NDArray[Any]


@dataclass(frozen=True)
class Shard:
    """One file of a split, as the manifest names it."""

    file: str
    """Its name in the directory; made by `shard_name`, never by who wrote the manifest."""
    sequences: int
    """Rows in it, at least 1."""
    sha256: str
    """Of its bytes, 64 hex digits."""


Locate = Callable[[Shard], Path]
"""Where the local file of a shard lies; it may have to be fetched first."""


class Rows:
    """The rows [n, T] of a split, over all of its shards; they can be read and not written.

    A shard is located and mapped when a row of it is first asked for. Many threads may read at once.

    Args:
        shards: at least one; all but the last with equally many rows, the last with no more.
        sequence_length: T.
        dtype: of the ids on disk.
        locate: gives the file of a shard; what it raises is passed on.
        maps: counts the shards that are mapped, together with other splits of the set; left out, these alone.
    """

    def __init__(
        self, shards: Sequence[Shard], sequence_length: int, dtype: np.dtype[Any], locate: Locate, maps: Maps | None = None
    ) -> None:
        self.shards = tuple(shards)
        self.shape = (sum(shard.sequences for shard in shards), sequence_length)
        self.dtype = dtype
        self._each = self.shards[0].sequences
        self._locate, self._maps = locate, maps or Maps()
        self._open: dict[int, Ids] = {}

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    def __getitem__(self, index: Any) -> Ids:
        """Rows by an int, a slice or an array of ints, [T] or [.., T]; after a comma, ints and slices choose among the T tokens.

        A new array, or a view of the file that cannot be written to. Raises `IndexError` as numpy does, and `ArtifactError` where a
        shard cannot be mapped.
        """
        if isinstance(index, tuple):
            rows, *rest = index
            found = self[rows]
            return found[(*[slice(None)] * (found.ndim - 1), *rest)]
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            return self._span(chosen.start, chosen.stop) if chosen.step == 1 else self._gather(np.array(chosen, dtype=np.int64))
        if isinstance(index, np.ndarray | list):
            return self._gather(np.asarray(index))
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        shard, row = divmod(number % len(self), self._each)
        return np.asarray(self._map(shard)[row])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Ids:
        """All rows, in memory where they do not lie in one shard."""
        rows = self[:]
        return np.array(rows, dtype=dtype) if copy else np.asarray(rows, dtype=dtype)

    def _span(self, start: int, stop: int) -> Ids:
        parts = []
        while start < stop:
            shard, row = divmod(start, self._each)
            parts.append(self._map(shard)[row : row + stop - start])
            start += len(parts[-1])
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, self.shape[1]), self.dtype)

    def _gather(self, rows: Ids) -> Ids:
        if rows.size and rows.dtype.kind not in "iu":
            raise IndexError(f"rows are chosen by whole numbers, not by {rows.dtype}")
        if rows.size and not (-len(self) <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        rows = rows.astype(np.int64, copy=False)
        if len(self.shards) == 1:
            return self._map(0)[rows]
        found = np.empty((*rows.shape, self.shape[1]), self.dtype)
        flat = found.reshape(-1, self.shape[1])
        shards, places = np.divmod(rows.reshape(-1) % len(self), self._each)
        for number, (shard, place) in enumerate(zip(shards.tolist(), places.tolist(), strict=True)):
            flat[number] = self._map(shard)[place]
        return found

    def _map(self, number: int) -> Ids:
        """The ids [rows, T] of a shard."""
        found = self._open.get(number)
        if found is None:
            found = self._load(number)
            self._maps.opened(self._open, number)
        return found

    def _load(self, number: int) -> Ids:
        """Map a shard and enter it in `_open`."""
        file = self._locate(self.shards[number])
        try:
            self._open[number] = found = self._mapped(number, file)
        except (OSError, ValueError) as error:  # ValueError: the file is too short
            raise self._unmappable(number, file, error, REBUILD) from None
        return found

    def _mapped(self, number: int, file: Path | BinaryIO) -> Ids:
        return np.memmap(file, self.dtype, "r", shape=(self.shards[number].sequences, self.shape[1])).view(np.ndarray)

    def _unmappable(self, number: int, file: Path, error: Exception, remedy: str) -> ArtifactError:
        return ArtifactError(f"{file}: cannot be mapped", [Problem(self.shards[number].file, str(error), remedy)])


class Maps:
    """Keeps the number of mapped shards below what the system allows: each holds a file open. The oldest are let go first."""

    def __init__(self) -> None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = _MOST_OPEN if files == resource.RLIM_INFINITY else max(1, min(files // 2, _MOST_OPEN))
        self._order: deque[tuple[dict[int, Ids], int]] = deque()
        self._lock = threading.Lock()

    def opened(self, maps: dict[int, Ids], number: int) -> None:
        """`maps[number]` was just mapped."""
        with self._lock:
            self._order.append((maps, number))
            if len(self._order) > self._most:
                oldest, key = self._order.popleft()
                oldest.pop(key, None)  # who reads it at this moment holds it
