"""Where the text of each domain comes from, looked at whole before anything is tokenised."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shearling.data.config import DataConfig, DomainConfig
from shearling.data.documents import find_files, read_files, read_hub
from shearling.errors import DataError, Problem

FEW_DOCUMENTS = 200
"""A domain with fewer distinct documents is split inside them: of two in a hundred there would be too few to stand for it."""


@dataclass(frozen=True)
class Origin:
    """One domain with the files that exist for it."""

    name: str
    domain: DomainConfig
    train: list[Path]
    heldout: list[Path]

    def texts(self, split: str) -> Iterator[str]:
        """Every document, as it stands, of the files of a split or of the hub dataset."""
        if split == "train" and self.domain.dataset is not None:
            d = self.domain
            return read_hub(self.domain.dataset, d.subset, d.split, d.revision, d.text_field)
        return read_files(getattr(self, split), self.domain.text_field)

    def size(self) -> float:
        """Bytes of the training files as they lie on disk; infinite for a hub dataset."""
        return float("inf") if self.domain.dataset else sum(file.stat().st_size for file in self.train)

    def settings(self) -> dict[str, Any]:
        """What decides the text: of files the names and sizes, not the folder, so that data may move."""
        facts: dict[str, Any] = self.domain.model_dump(include={"dataset", "subset", "split", "revision", "text_field"})
        for split, files in (("train", self.train), ("heldout", self.heldout)):
            sizes = [(file.name, file.stat().st_size) for file in files]
            digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
            facts[f"{split}_files"] = {"count": len(sizes), "bytes": sum(size for _, size in sizes), "names_and_sizes": digest}
        return facts


@dataclass(frozen=True)
class Survey:
    """What must be known of all domains before one of them is split."""

    forbidden: frozenset[bytes]
    """Digests of the documents of all held-out files: no domain trains on them."""
    few: dict[str, int]
    """Number of distinct training documents of each domain that has fewer than `FEW_DOCUMENTS`."""


def find_origins(config: DataConfig) -> list[Origin]:
    """Every domain with its files; raise one `DataError` for all paths of all domains that lead nowhere."""
    origins, problems = [], []
    for name, domain in config.domains.items():
        train, train_problems = find_files(domain.train or [], f"domains.{name}.train")
        heldout, heldout_problems = find_files(domain.heldout or [], f"domains.{name}.heldout")
        problems += train_problems + heldout_problems
        rest = sorted(set(train) - set(heldout))  # a folder may be given for training, and files in it as held out
        if train and not rest:
            found = f"{len(train)} files, all of them held out"
            problems.append(Problem(f"domains.{name}.train", found, "Give other files for training than for holding out."))
        origins.append(Origin(name, domain, rest, heldout))
    if problems:
        raise DataError(f"{len(problems)} problem{'s' * (len(problems) > 1)} with the text files", problems)
    return origins


def survey(origins: Sequence[Origin]) -> Survey:
    """Read all held-out files and the first training documents of every domain, without tokenising.

    Raises:
        DataError: domains without text, all at once; or the first file that cannot be read.
    """
    forbidden: set[bytes] = set()
    few, problems = {}, []
    for origin in origins:
        own = {digest for _, digest in distinct(origin.texts("heldout"), (), Counter())}
        forbidden |= own
        if origin.heldout and not own:
            problems.append(Problem(f"domains.{origin.name}.heldout", "no text", "Give files with text, or leave heldout out."))
    for origin in origins:
        counts: Counter[str] = Counter()
        number = sum(1 for _ in islice(distinct(origin.texts("train"), forbidden, counts), FEW_DOCUMENTS))
        if number < FEW_DOCUMENTS:
            few[origin.name] = number
        if not number:
            overlap = counts["overlapping_documents"]
            found = f"{overlap} documents, all of them held out" if overlap else "no text"
            problems.append(Problem(f"domains.{origin.name}", found, "Give text to train on that is not held out."))
    if problems:
        raise DataError(f"{len(problems)} domain{'s' * (len(problems) > 1)} without text", problems)
    return Survey(frozenset(forbidden), few)


def distinct(texts: Iterable[str], forbidden: Collection[bytes], counts: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """Texts, with their digests, that are not blank, not forbidden and not seen before; `counts` receives what is dropped.

    A digest is the first 16 bytes of the sha256 of the UTF-8 text; about 100 bytes of memory for each document.
    """
    seen: set[bytes] = set()
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
