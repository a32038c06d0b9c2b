"""A source's likeliest predictions on disk, by the token ids that they are of: a sequence goes through the source once.

A cache is a folder, and in it one for each teacher and way to ask it (`key`), so that different runs may share it, also at the same time:
every process appends to a file of its own and reads those that it finds when it begins. A record is as long as any other: the SHA-256 of
the sequence's ids, the k likeliest tokens at each position (int32), the k + 1 log-probabilities (fp16, whose error is at most 0.1 % of a
probability of 1 % or more), and a checksum. What a kill left torn at the end of a file is not read. What is computed anew goes through
fp16, too, so a step is the same whether its predictions were there or not.

Legend: B sequences of T tokens, k likeliest tokens.
"""

from __future__ import annotations

import hashlib
import os
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shearling.errors import ArtifactError, Problem
from shearling.io.files import storage_errors
from shearling.objectives.distill import Prediction, Predictions
from shearling.objectives.teacher import Teacher

_KEY, _SUM = 32, 4
_SUFFIX = ".predictions"


def key(*parts: object) -> str:
    """Name of the folder of what was asked for in this way: of a teacher's fingerprint and all else that predictions hang on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


class CachedTeacher:
    """A `Teacher` with `top_k`, of sequences of `length` tokens, that computes only what is not in `folder` yet; one of one process.

    Raises `StorageError` where the folder cannot be written, `ArtifactError` where a record in it is damaged.
    """

    def __init__(self, teacher: Teacher, folder: Path, length: int, top_k: int, anyone: Callable[[bool], bool] = lambda here: here) -> None:
        """`anyone`: whether what is true of this process is true of any that the teacher is sharded over, who compute together."""
        self._anyone = anyone
        self.teacher, self._folder, self._length, self._k = teacher, folder, length, top_k
        self._size = _KEY + length * top_k * 4 + length * (top_k + 1) * 2 + _SUM
        self._found: dict[bytes, tuple[Path, int]] = {}
        self._own = folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}{_SUFFIX}"
        self.computed = 0
        """Sequences that went through the teacher."""
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob(f"*{_SUFFIX}")):
                self._read_keys(path)

    def __call__(self, ids_BT: Tensor) -> tuple[Predictions, Mapping[str, Tensor]]:
        """See `shearling.objectives.distill.Source`."""
        keys = [hashlib.sha256(row.astype("<i8").tobytes()).digest() for row in ids_BT.cpu().numpy()]
        missing = [place for place, found in enumerate(keys) if found not in self._found]
        if self._anyone(bool(missing)):
            predictions, _ = self.teacher(ids_BT[missing or [0]])
            for number, place in enumerate(missing):
                found = predictions(slice(number * self._length, (number + 1) * self._length))
                assert found.ids_nk is not None, "a cached teacher tells the likeliest tokens"
                self._append(keys[place], found.ids_nk.cpu().numpy(), found.log_p_nC.cpu().numpy())
            self.computed += len(missing)
        records = [self._read(found) for found in keys]
        ids_Nk = torch.from_numpy(np.concatenate([ids for ids, _ in records])).to(ids_BT.device)
        log_p_NC = torch.from_numpy(np.concatenate([log_p for _, log_p in records])).to(ids_BT.device)
        return lambda rows: Prediction(log_p_NC[rows].float(), ids_Nk[rows].long()), {}

    def _read_keys(self, path: Path) -> None:
        with path.open("rb") as file:
            for start in range(0, path.stat().st_size // self._size * self._size, self._size):
                file.seek(start)
                self._found.setdefault(file.read(_KEY), (path, start))

    def _append(self, name: bytes, ids_Tk: np.ndarray, log_p_TC: np.ndarray) -> None:
        if name in self._found:  # twice in one batch
            return
        body = name + ids_Tk.astype("<i4").tobytes() + log_p_TC.astype("<f2").tobytes()
        with storage_errors(self._folder, self._size), self._own.open("ab") as file:
            start = file.tell() // self._size * self._size
            file.truncate(start)  # what a full disk took of one before
            file.write(body + zlib.crc32(body).to_bytes(_SUM, "little"))
        self._found[name] = (self._own, start)

    def _read(self, name: bytes) -> tuple[np.ndarray, np.ndarray]:
        path, start = self._found[name]
        with storage_errors(path), path.open("rb") as file:
            file.seek(start)
            record = file.read(self._size)
        body, at = record[:-_SUM], _KEY + self._length * self._k * 4
        if len(record) != self._size or zlib.crc32(body).to_bytes(_SUM, "little") != record[-_SUM:]:
            remedy = "Delete this file: what it holds is computed again."
            raise ArtifactError(f"{path}: damaged", [Problem(f"record at byte {start}", "a wrong checksum", remedy)])
        ids_Tk = np.frombuffer(body[_KEY:at], "<i4").reshape(self._length, self._k)
        return ids_Tk, np.frombuffer(body[at:], "<f2").reshape(self._length, self._k + 1)
