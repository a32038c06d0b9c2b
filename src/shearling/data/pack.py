"""One domain on its way to its shards: which side each document is on, tokenised in batches, packed into rows."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from shearling.data.ahead import map_ahead, read_ahead
from shearling.data.config import DataConfig
from shearling.data.encode import Encoder
from shearling.data.files import DamagedFile
from shearling.data.ledger import Ledger
from shearling.data.origins import Origin, Survey, distinct
from shearling.data.readings import PLACES, Reading
from shearling.data.rows import Ids
from shearling.data.shards import ShardWriter
from shearling.data.tokens import SPLITS, dtype_for
from shearling.errors import DataError, Problem

LEAST_PART, LARGEST_PART = 0.02, 0.1
"""Part of the documents that is set aside to be held out, and the largest part of a document where it is split inside."""
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 2**13, 2**20
_AHEAD = 2
"""Batches that are read ahead, and batches that are tokenised at once: while one ends on one core the next begins on the others."""
_DROPPED = ("duplicate_documents", "overlapping_documents", "filtered_documents", "skipped_documents")


@dataclass(frozen=True)
class Progress:
    """How far preparing a domain is."""

    domain: str
    documents: int
    """Used so far, on both sides, those of an earlier try among them."""
    tokens: int
    """Packed so far."""
    seconds: float
    """Spent on this domain by this try."""
    documents_per_second: float
    """Of this try; 0 before the first."""
    share: float | None
    """How much of the domain is done, from 0 to 1: by the bytes of its files, or by the tokens where those are limited. None: unknown."""
    seconds_left: float | None
    """At the speed of this try; None where it cannot be told."""


Tell = Callable[[Progress], None]
Side = Literal["train", "heldout", "both"]


def heldout_part(config: DataConfig) -> float:
    """The part of the documents that is set aside: as much as fills both sides at once, but in [0.02, 0.1].

    One for all domains, so that a document that several domains share falls on the same side in each.
    """
    if config.max_train_sequences is None:
        return LEAST_PART
    return min(max(config.heldout_sequences / (config.heldout_sequences + config.max_train_sequences), LEAST_PART), LARGEST_PART)


def is_heldout(digest: bytes, seed: int, part: float) -> bool:
    """Whether a document is set aside: a function of its text and the seed, so it stays so when files are added."""
    hashed = hashlib.sha256(f"{seed}/".encode() + digest).digest()
    return int.from_bytes(hashed[:8], "big") < part * 2**64


def pack_domain(
    origin: Origin, survey: Survey, config: DataConfig, encoder: Encoder, ledger: Ledger, seed: int, shard_sequences: int, tell: Tell | None
) -> dict[str, Any]:
    """Write the shards of a domain into the ledger's folder and return what the manifest says of it.

    Where the ledger knows of an earlier try that was cut short, that is gone on with. Only a domain that is split inside its documents,
    since it has few or short ones, always begins anew.

    Raises:
        DataError: the text cannot be read on, or is too short for one sequence on each side.
    """

    def run(sides: Callable[[bytes], Side], quota: int = 0) -> dict[str, Any]:
        with ledger, ExitStack() as stack:
            packing = _begun(partial(_Packing, origin, config, encoder, ledger, quota, shard_sequences, tell), ledger, quota, stack)
            try:
                if origin.heldout and not packing.resumed:
                    packing.take("heldout", (), lambda _: "heldout", ("heldout",))
                packing.take("train", survey.forbidden_to(origin), sides, ("train",) if origin.heldout else SPLITS)
            except DamagedFile:
                ledger.discard()  # what was read of the file before the damage showed may be wrong, too
                raise
            return packing.finish()

    def run_inside(documents: int, why: str) -> dict[str, Any]:
        # An equal share of each, so that the held-out text is spread over all of the domain.
        ledger.discard()
        facts = run(lambda _: "both", -(-config.heldout_sequences * config.sequence_length // documents))
        facts["notes"].append(f"{origin.name}: {why} to hold out whole ones, so the last part of each, at most a tenth, is held out.")
        return facts

    few = survey.few.get(origin.name)
    if origin.heldout:
        facts = run(lambda _: "train")
    elif few is not None:
        facts = run_inside(few, f"{few} document{'s are' if few > 1 else ' is'} too few")
    else:
        part = heldout_part(config)
        facts = run(lambda digest: "heldout" if is_heldout(digest, seed, part) else "train")
        if not (facts["train_sequences"] and facts["heldout_sequences"]):
            documents = facts["documents"] + facts["heldout_documents"]
            facts = run_inside(documents, f"the {documents} documents are too short")
    _check_length(origin, facts, config)
    if facts["heldout_sequences"] < config.heldout_sequences:
        notes = f"{facts['heldout_sequences']} of {config.heldout_sequences} held-out sequences could be filled"
        facts["notes"].append(f"{origin.name}: {notes}.")
    return facts


def _check_length(origin: Origin, facts: dict[str, Any], config: DataConfig) -> None:
    short = [split for split in SPLITS if not facts[f"{split}_sequences"]]
    if not short:
        return
    length, tokens = config.sequence_length, facts["tokens"]
    if origin.heldout:
        sides = " and ".join("held-out text" if split == "heldout" else "training text" for split in short)
        remedy = f"The {sides} does not fill one sequence: give more of it, or a shorter sequence_length."
    else:
        remedy = f"At most a tenth is held out and must fill a sequence, which takes about {11 * length} tokens: give more text, "
        remedy += "held-out files of the domain's own, or a shorter sequence_length."
    found = f"{tokens} tokens, with sequence_length {length}"
    raise DataError(f"domain {origin.name} is too short", [Problem(f"domains.{origin.name}", found, remedy)])


@dataclass(frozen=True)
class _Point:
    """Where reading stands, right after a document."""

    records: int = 0
    bytes_read: int = 0
    counts: dict[str, int] | None = None
    """What was dropped up to here."""
    places: tuple[str, ...] = ()


class _Document(NamedTuple):
    text: str | None
    """None where its side has no room, and at the end."""
    digest: bytes | None
    """None at the end, where only the point counts."""
    side: Side
    point: _Point


def _begun(begin: Callable[[ExitStack, dict[str, Any] | None], _Packing], ledger: Ledger, quota: int, stack: ExitStack) -> _Packing:
    """A packing that goes on from the ledger, where that is sound, or else begins; `begin`: makes one from what a ledger holds."""
    state = None if quota else ledger.read()
    if state is not None:
        with ExitStack() as attempt:
            try:
                packing = begin(attempt, state)
            except (OSError, ValueError):
                pass  # what is recorded is not what lies there
            else:
                stack.push(attempt.pop_all())
                return packing
    ledger.discard()
    return begin(stack, None)


class _Packing:
    """The shards of a domain while they are written. The result does not depend on how documents fall into batches, nor on threads."""

    def __init__(
        self,
        origin: Origin,
        config: DataConfig,
        encoder: Encoder,
        ledger: Ledger,
        quota: int,
        shard_sequences: int,
        tell: Tell | None,
        stack: ExitStack,
        state: dict[str, Any] | None,
    ) -> None:
        self.resumed = state is not None
        limits = {"train": config.max_train_sequences, "heldout": config.heldout_sequences}
        self._limits = {split: None if limit is None else limit * config.sequence_length for split, limit in limits.items()}
        dtype = dtype_for(encoder.vocab_size)
        self.writers = {
            split: stack.enter_context(
                ShardWriter(
                    ledger.folder, origin.name, split, config.sequence_length, dtype, limits[split], shard_sequences,
                    state and state["writers"][split],
                )
            )
            for split in SPLITS
        }  # fmt: skip
        self.counts: Counter[str] = Counter(state["counts"] if state else {})
        self._point = _Point(**{**state["point"], "places": tuple(state["point"]["places"])}) if state else _Point()
        self._seen: set[bytes] = ledger.resume(state) if state else set()
        self._origin, self._encoder, self._ledger, self._quota, self._tell = origin, encoder, ledger, quota, tell
        self._size: int | None = None
        self._began = time.monotonic()
        self._used_before, self._share_before = self._used, 0.0

    @property
    def _used(self) -> int:
        return self.counts["documents"] + self.counts["heldout_documents"]

    def take(self, source: str, forbidden: frozenset[bytes] | tuple[()], sides: Callable[[bytes], Side], splits: Sequence[str]) -> None:
        """Add the documents of the files of a split until both they and the room in `splits` are at an end."""
        if self._filled(splits):
            return
        reading = self._origin.texts(source, skip=self._point.records)
        if source == "train":
            self._size = self._origin.size("train")
            self._share_before = self._share() or 0.0
        documents = _documents(reading, forbidden, sides, self._wanted, self._point, self._seen)
        with (
            closing(read_ahead(_batches(documents), _AHEAD)) as batches,
            closing(map_ahead(self._encode, batches, _AHEAD)) as encoded,
        ):
            for batch, ids in encoded:
                full = self._pack(batch, iter(ids), splits)
                if source == "train" and not self._quota:
                    self._ledger.add(document.digest for document in batch if document.digest is not None)
                    self._ledger.record(self._state)
                if self._tell:
                    self._tell(self._progress())
                if full:
                    break
        if source != "train":  # the next files are read from their beginning; a document may be in both, which is counted there
            self._point, self._seen = _Point(counts=_kept(self._point.counts), places=self._point.places), set()

    def _wanted(self, side: Side) -> bool:
        """Whether there is room; what has none need not be tokenised. Asked from another thread, it may be told late that there is none."""
        return side == "both" or not self.writers[side].full

    def _encode(self, batch: list[_Document]) -> list[Ids]:
        return self._encoder.encode([document.text for document in batch if document.text is not None])

    def _pack(self, batch: list[_Document], ids: Iterator[Ids], splits: Sequence[str]) -> bool:
        """Add a batch; returns whether `splits` are full. Documents that come after leave no trace, be they in this batch or not."""
        for text, _, side, point in batch:
            if self._filled(splits):
                return True
            self._point = point
            if text is not None:
                self._add(next(ids), side, len(text.encode()))
        return self._filled(splits)

    def _filled(self, splits: Sequence[str]) -> bool:
        return all(self.writers[split].full for split in splits)

    def _add(self, ids: Ids, side: Side, size: int) -> None:
        cut = {"train": len(ids), "heldout": 0}.get(side)
        if cut is None:
            tail = 0 if self.writers["heldout"].full else min(int(len(ids) * LARGEST_PART), self._quota)
            cut = len(ids) - tail
        used = False
        for split, part, count in (("train", ids[:cut], "documents"), ("heldout", ids[cut:], "heldout_documents")):
            if len(part) and not self.writers[split].full:
                self.writers[split].add(self._encoder.mark(part))
                self.counts[count] += 1
                used = True
        self.counts["bytes"] += size * used

    def _state(self) -> dict[str, Any]:
        writers = {split: writer.record() for split, writer in self.writers.items()}
        return {"counts": dict(self.counts), "point": asdict(self._point), "writers": writers}

    def _share(self) -> float | None:
        read = self._point.bytes_read / self._size if self._size else None
        limits = [(self.writers[split].tokens, limit) for split, limit in self._limits.items() if limit is not None]
        if len(limits) < len(SPLITS):
            return None if read is None else min(read, 1.0)
        filled = min(tokens / limit for tokens, limit in limits)
        return min(max(filled, read or 0.0), 1.0)

    def _progress(self) -> Progress:
        seconds, share = time.monotonic() - self._began, self._share()
        speed = (self._used - self._used_before) / seconds if seconds else 0.0
        done = 0.0 if share is None else share - self._share_before
        left = 0.0 if share == 1 else seconds / done * (1 - share) if share is not None and done > 0 else None
        tokens = sum(writer.tokens for writer in self.writers.values())
        return Progress(self._origin.name, self._used, tokens, seconds, speed, share, left)

    def finish(self) -> dict[str, Any]:
        """Complete all files and return the facts."""
        dropped = self._point.counts or {}
        counts = {name: self.counts[name] for name in ("documents", "heldout_documents", "bytes")}
        notes = []
        if skipped := dropped.get("skipped_documents", 0):
            were = "document was" if skipped == 1 else "documents were"
            notes.append(f"{self._origin.name}: {skipped} broken {were} left out, the first at {'; '.join(self._point.places)}.")
        return {
            **counts,
            **{name: dropped.get(name, 0) for name in _DROPPED},
            "tokens": sum(writer.tokens for writer in self.writers.values()),
            **{f"{split}_sequences": writer.sequences for split, writer in self.writers.items()},
            "shards": {split: writer.finish() for split, writer in self.writers.items()},
            "notes": notes,
        }


def _kept(counts: dict[str, int] | None) -> dict[str, int]:
    """Of what was dropped from held-out files, what is counted: broken documents, and those that `where` leaves out."""
    return {name: (counts or {}).get(name, 0) for name in ("filtered_documents", "skipped_documents")}


def _documents(
    reading: Reading,
    forbidden: frozenset[bytes] | tuple[()],
    sides: Callable[[bytes], Side],
    wanted: Callable[[Side], bool],
    before: _Point,
    seen: set[bytes],
) -> Iterator[_Document]:
    """The distinct documents of a reading that goes on from `before`, and a last entry for what was dropped behind them."""
    dropped = Counter(before.counts or {})

    def point() -> _Point:
        now = reading.counts()
        counts = {name: dropped[name] + now.get(name, 0) for name in _DROPPED}
        return _Point(reading.records, reading.bytes_read, counts, (*before.places, *reading.places)[:PLACES])

    with closing(reading):
        for text, digest in distinct(reading, forbidden, dropped, seen):
            side = sides(digest)
            yield _Document(text if wanted(side) else None, digest, side, point())
        yield _Document(None, None, "both", point())


def _batches(documents: Iterator[_Document]) -> Iterator[list[_Document]]:
    """Batches of documents; an error comes after the documents before it."""
    batch: list[_Document] = []
    characters = 0
    try:
        for document in documents:
            batch.append(document)
            characters += len(document.text or "")
            if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    except Exception:
        yield batch
        raise
    yield batch
