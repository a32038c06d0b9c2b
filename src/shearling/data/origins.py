"""Where the text of each domain comes from, looked at whole before anything is tokenised.

What a domain is read through, whatever it is (local or remote files, a saved dataset, a hub dataset):

    reading = origin.texts("train", skip=k)   # a `Reading` (readings.py): an iterator of texts, used once
    for text in reading: ...
    reading.records       # raw records passed so far, those of `skip`, blank, filtered and broken ones among them
    reading.bytes_read    # bytes of the files, as they lie (compressed), that were read so far; 0 for a hub dataset
    reading.counts()      # {"filtered_documents": n, "skipped_documents": n} since `skip`: what `where` and `bad_documents` dropped
    reading.places        # the first three broken documents since `skip`, in words: "web.jsonl: line 5 is not JSON"
    origin.size("train")  # bytes of all files of a split, None where that is not known
    if origin.heldout: ...  # whether the domain has held-out text of its own: files, or a split of its dataset

Right after a text was received `records` counts it, so that `texts(split, skip=records)` goes on with the next one. Records that are
skipped over are neither parsed nor counted again: who goes on keeps `counts()` and `places` of before. But where reading ends with
`DamagedFile` (files.py) nothing that was made of the split's text may be gone on from: a checksum stands at the end of what it is of,
so text from before may be wrong. After any other error, and after a kill, it may: what is skipped over is decompressed and checked anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from shearling.data.config import DataConfig, DomainConfig
from shearling.data.documents import Fields
from shearling.data.files import TextFile, find_files
from shearling.data.readings import Reading, file_parts
from shearling.data.tables import ArrowPart, StreamPart, saved_dataset
from shearling.errors import DataError, Problem

FEW_DOCUMENTS = 200
"""A domain with fewer distinct documents is split inside them: of two in a hundred there would be too few to stand for it."""


@dataclass(frozen=True)
class Source:
    """What a split of a domain is read from: files, a saved dataset, or a dataset that is streamed."""

    files: tuple[TextFile, ...]
    """In the order in which they are read; of a folder that is streamed, whatever lies in it; of a hub dataset, none."""
    saved: bool = False
    """Whether they are those of a dataset that `save_to_disk` wrote."""
    stream: StreamPart | None = None
    """The dataset that is streamed."""

    def read(self, fields: Fields, skip: int, bad_documents: Literal["stop", "skip"]) -> Reading:
        """The documents, from raw record `skip` on."""
        parts = (self.stream,) if self.stream else map(ArrowPart, self.files) if self.saved else file_parts(self.files, fields)
        return Reading(parts, fields, skip, bad_documents)

    def size(self) -> int | None:
        """Bytes of the files as they lie; None for a stream, and where a server does not say."""
        sizes = [file.size for file in self.files]
        return None if self.stream or None in sizes else sum(size or 0 for size in sizes)

    def settings(self) -> dict[str, Any]:
        """Number and bytes of the files, and a digest of their names, sizes and marks; not of the folder, so that data may move."""
        facts = [(file.name, file.size, file.mark) if file.remote else (file.name, file.size) for file in self.files]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return {"count": len(facts), "bytes": sum(file.size or 0 for file in self.files), "names_and_sizes": digest}


@dataclass(frozen=True)
class Origin:
    """One domain with what exists of it."""

    name: str
    domain: DomainConfig
    train: Source
    heldout: Source | None
    """Held-out text of the domain's own; None where there is none, and a part of `train` is to be held out."""
    bad_documents: Literal["stop", "skip"] = "stop"

    def texts(self, split: str, skip: int = 0) -> Reading:
        """Every document of a split, as it stands, from raw record `skip` on. Nothing is opened before the first is asked for."""
        where = {name: frozenset(map(Fields.key, values)) for name, values in self.domain.where.items()}
        return self._source(split).read(Fields(self.domain.text_field, where), skip, self.bad_documents)

    def size(self, split: str = "train") -> int | None:
        """Bytes of a split as they lie; None where that is not known."""
        return self._source(split).size()

    def settings(self) -> dict[str, Any]:
        """What decides the text: of files the names and sizes, and the marks that servers give them.

        `bad_documents` is none of it: text that was made with `stop` has no broken documents, and that made with `skip` counts them.
        """
        names = {"dataset", "subset", "split", "revision", "heldout_split", "text_field", "where"}
        facts: dict[str, Any] = self.domain.model_dump(include=names)
        if self.train.files and self.domain.dataset is not None:
            facts["dataset"] = "a folder"  # known by its files
        return facts | {"train_files": self.train.settings(), "heldout_files": self._source("heldout").settings()}

    def _source(self, split: str) -> Source:
        return self.train if split == "train" else self.heldout or Source(())


@dataclass(frozen=True)
class Survey:
    """What must be known of all domains before one of them is split."""

    forbidden: frozenset[bytes]
    """Digests of the documents of all held-out files: no domain trains on them."""
    few: dict[str, int]
    """Number of distinct training documents of each domain that has fewer than `FEW_DOCUMENTS`."""
    claimed: dict[str, frozenset[bytes]] = field(default_factory=dict)
    """Digests of the documents of each of these domains that has no held-out text of its own. It holds out a part of each, so no other
    domain uses them; of several that share one the first by name has it."""
    held: frozenset[bytes] = frozenset()
    """Digests of what other domains hold out by hash; only domains with held-out text of their own need to know (held.py)."""

    def forbidden_to(self, origin: Origin) -> frozenset[bytes]:
        """Digests of the documents that a domain must not train on, as they are held out, whole or in part, in any domain."""
        claimed = [digests for name, digests in self.claimed.items() if name != origin.name]
        return self.forbidden.union(*claimed, self.held if origin.heldout else ())


def find_origins(config: DataConfig) -> list[Origin]:
    """Every domain with its files; raise one `DataError` for all paths of all domains that lead nowhere."""
    origins, problems = [], []
    for name, domain in config.domains.items():
        origin, more = _find_origin(name, domain, config.bad_documents)
        origins.append(origin)
        problems += more
    if problems:
        raise DataError(f"{len(problems)} problem{'s' * (len(problems) > 1)} with the text files", problems)
    return origins


def _find_origin(name: str, domain: DomainConfig, bad_documents: Literal["stop", "skip"]) -> tuple[Origin, list[Problem]]:
    field = f"domains.{name}"
    files, problems = find_files(domain.train or [], f"{field}.train")
    heldout_files, more = find_files(domain.heldout or [], f"{field}.heldout")
    problems += more
    train, heldout = Source(tuple(files)), Source(tuple(heldout_files)) if heldout_files else None
    if domain.dataset is not None:
        try:
            train = _dataset(domain, domain.split)
            heldout = heldout if domain.heldout_split is None else _dataset(domain, domain.heldout_split)
        except DataError as error:
            problems += [Problem(f"{field}.dataset", f"{error.headline}: {problem.found}", problem.remedy) for problem in error.problems]
    elif files:  # a folder may be given for training, and files in it as held out
        train = Source(tuple(file for file in files if file not in heldout_files))
        if not train.files:
            found = f"{len(files)} files, all of them held out"
            problems.append(Problem(f"{field}.train", found, "Give other files for training than for holding out."))
    return Origin(name, domain, train, heldout, bad_documents), problems


def _dataset(domain: DomainConfig, split: str) -> Source:
    dataset = domain.dataset or ""
    if os.path.isdir(dataset):
        files = saved_dataset(Path(dataset), split)
        if files is not None:
            return Source(tuple(files), saved=True)
        below = sorted(path for path in Path(dataset).rglob("*") if path.is_file() and not _hidden(path.relative_to(dataset)))
        return Source(
            tuple(TextFile(str(path), path.stat().st_size) for path in below), stream=StreamPart(dataset, domain.subset, split, None)
        )
    if dataset.startswith((".", "/", "~")):
        raise DataError(
            f"{dataset}: is no folder", [Problem("dataset", "nothing there", "Check the path, or give a dataset's name on the hub.")]
        )
    return Source((), stream=StreamPart(dataset, domain.subset, split, domain.revision))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def survey(origins: Sequence[Origin]) -> Survey:
    """Read all held-out files and the first training documents of every domain, without tokenising.

    Raises:
        DataError: domains without text of their own, all at once; or the first file that cannot be read.
    """
    forbidden: set[bytes] = set()
    few, problems = {}, []
    for origin in origins:
        reading = origin.texts("heldout")
        own = {digest for _, digest in distinct(reading, (), Counter())}
        forbidden |= own
        if origin.heldout and not own:
            remedy = "Give held-out text that is used, or leave it out."
            problems.append(Problem(f"domains.{origin.name}.heldout", _nothing_of(reading), remedy))
    inside: dict[str, set[bytes]] = {}
    for origin in origins:
        counts: Counter[str] = Counter()
        with closing(origin.texts("train")) as reading:
            digests = {digest for _, digest in islice(distinct(reading, forbidden, counts), FEW_DOCUMENTS)}
        if len(digests) < FEW_DOCUMENTS:
            few[origin.name] = len(digests)
            if not origin.heldout:
                inside[origin.name] = digests
        if not digests:
            overlap = counts["overlapping_documents"]
            found = f"{overlap} documents, all of them held out" if overlap else _nothing_of(reading)
            problems.append(Problem(f"domains.{origin.name}", found, "Give text to train on that is not held out."))
    claimed: dict[str, frozenset[bytes]] = {}
    for name, digests in sorted(inside.items()):
        claimed[name] = frozenset(digests.difference(*claimed.values()))
        few[name] = len(claimed[name])
        if digests and not claimed[name]:
            others = " and ".join(other for other, theirs in claimed.items() if theirs & digests)
            remedy = "Few documents are split inside them, which only one domain can do: give it text of its own, or leave it out."
            problems.append(Problem(f"domains.{name}", f"{len(digests)} documents, all of them in {others}, too", remedy))
    if problems:
        raise DataError(f"{len(problems)} domain{'s' * (len(problems) > 1)} without text", problems)
    return Survey(frozenset(forbidden), few, claimed)


def _nothing_of(reading: Reading) -> str:
    """Why a reading that was read to its end gave no text."""
    reasons = []
    if reading.filtered:
        seen = "; ".join(f"{name}: {', '.join(f'{value!r:.60}' for _, value in values)}" for name, values in reading.seen.items())
        reasons.append(f"{reading.filtered} documents that where keeps out, with values such as {seen}")
    if reading.skipped:
        reasons.append(f"{reading.skipped} broken documents, the first: {reading.places[0]}")
    return " and ".join(reasons) or "no text"


def distinct(
    texts: Iterable[str], forbidden: Collection[bytes], counts: Counter[str], seen: set[bytes] | None = None
) -> Iterator[tuple[str, bytes]]:
    """Texts, with their digests, that are not blank, not forbidden and not seen before; `counts` receives what is dropped.

    A digest is the first 16 bytes of the sha256 of the UTF-8 text; about 100 bytes of memory for each document. `seen` holds those of
    texts that came before, and receives the new ones.
    """
    seen = set() if seen is None else seen
    for text in texts:
        if not text.strip():
            continue
        digest = hashlib.sha256(text.encode()).digest()[:16]
        if digest in forbidden:
            counts["overlapping_documents"] += 1
        elif digest in seen:
            counts["duplicate_documents"] += 1
        else:
            seen.add(digest)
            yield text, digest
