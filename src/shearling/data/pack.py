"""One domain on its way to its two shards: which side each document is on, tokenised in batches, packed into rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from shearling.data.config import DataConfig
from shearling.data.encode import Encoder
from shearling.data.origins import Origin, Survey, distinct
from shearling.data.tokens import SPLITS, Ids, ShardWriter, dtype_for, shard_name
from shearling.errors import DataError, Problem

LEAST_PART, LARGEST_PART = 0.02, 0.1
"""Part of the documents that is set aside to be held out, and the largest part of a document where it is split inside."""
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 2**20

Progress = Callable[[str, int, int], None]
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
    origin: Origin, survey: Survey, config: DataConfig, encoder: Encoder, folder: Path, seed: int, progress: Progress | None
) -> dict[str, Any]:
    """Write both shards of a domain into `folder` and return what the manifest says of it.

    Raises:
        DataError: the text cannot be read on, or is too short for one sequence on each side.
    """

    def run(sides: Callable[[bytes], Side], quota: int = 0) -> dict[str, Any]:
        with ExitStack() as stack:
            packing = _Packing(origin.name, config, encoder, folder, quota, progress, stack)
            if origin.heldout:
                texts = distinct(origin.texts("heldout"), (), Counter())
                packing.take(((text, "heldout") for text, _ in texts), ("heldout",))
            texts = distinct(origin.texts("train"), survey.forbidden, packing.counts)
            packing.take(((text, sides(digest)) for text, digest in texts), ("train",) if origin.heldout else SPLITS)
            return packing.finish()

    def run_inside(documents: int, why: str) -> dict[str, Any]:
        # An equal share of each, so that the held-out text is spread over all of the domain.
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


class _Packing:
    """Both shards of a domain while they are written. The result does not depend on how documents fall into batches."""

    def __init__(
        self, name: str, config: DataConfig, encoder: Encoder, folder: Path, quota: int, progress: Progress | None, stack: ExitStack
    ) -> None:
        limits = {"train": config.max_train_sequences, "heldout": config.heldout_sequences}
        dtype = dtype_for(encoder.vocab_size)
        self.writers = {
            split: stack.enter_context(ShardWriter(folder / shard_name(name, split), config.sequence_length, dtype, limits[split]))
            for split in SPLITS
        }
        self.counts: Counter[str] = Counter()
        self._name, self._encoder, self._quota, self._progress = name, encoder, quota, progress

    def take(self, documents: Iterable[tuple[str, Side]], splits: Sequence[str]) -> None:
        """Add documents until both they and the room in `splits` are at an end."""
        for batch in _batches(self._wanted(documents, splits)):
            for (text, side), ids in zip(batch, self._encoder.encode([text for text, _ in batch]), strict=True):
                self._add(ids, side, len(text.encode()))
            if self._progress:
                used = self.counts["documents"] + self.counts["heldout_documents"]
                self._progress(self._name, used, sum(writer.tokens for writer in self.writers.values()))

    def _wanted(self, documents: Iterable[tuple[str, Side]], splits: Sequence[str]) -> Iterator[tuple[str, Side]]:
        for text, side in documents:
            if all(self.writers[split].full for split in splits):
                return
            if side == "both" or not self.writers[side].full:  # what has no room need not be tokenised
                yield text, side

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

    def finish(self) -> dict[str, Any]:
        """Complete both files and return the facts."""
        names = ("documents", "heldout_documents", "duplicate_documents", "overlapping_documents", "bytes")
        return {
            **{name: self.counts[name] for name in names},
            "tokens": sum(writer.tokens for writer in self.writers.values()),
            **{f"{split}_sequences": writer.sequences for split, writer in self.writers.items()},
            "sha256": {split: writer.finish() for split, writer in self.writers.items()},
            "notes": [],
        }


def _batches(documents: Iterable[tuple[str, Side]]) -> Iterator[list[tuple[str, Side]]]:
    batch: list[tuple[str, Side]] = []
    characters = 0
    for text, side in documents:
        batch.append((text, side))
        characters += len(text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
