"""What will be held out of domains without held-out text of their own, known before any domain is packed.

Domains that are split by hash agree with one another without it. A domain with held-out text of its own trains on all of the rest, so it
must be told what others hold out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import closing

from shearling.data.config import DataConfig
from shearling.data.encode import Encoder
from shearling.data.origins import Origin, Survey, distinct
from shearling.data.pack import heldout_part, is_heldout


def held_out(origins: Iterable[Origin], survey: Survey, config: DataConfig, encoder: Encoder, seed: int) -> frozenset[bytes]:
    """Digests of the documents that domains hold out by hash, or of all documents of those that turn out to be split inside them.

    Of each such domain as much is read as it takes to fill its held-out side: some `heldout_sequences` times T tokens, divided by
    `heldout_part`, whatever the domain's size. What is held out is tokenised, and as much of the rest as makes one row. Domains of few
    documents are left out, since `Survey.claimed` has them. About 100 bytes of memory for each document read of one domain.

    Raises:
        DataError: the text cannot be read, or not be tokenised.
    """
    split = [origin for origin in origins if not origin.heldout and origin.name not in survey.few]
    return frozenset().union(*(_held_out_of(origin, survey.forbidden_to(origin), config, encoder, seed) for origin in split))


def _held_out_of(origin: Origin, forbidden: frozenset[bytes], config: DataConfig, encoder: Encoder, seed: int) -> set[bytes]:
    """Those of one domain. What is held out follows from the order of the documents alone, as in `pack.pack_domain`."""
    part, length = heldout_part(config), config.sequence_length
    rooms, tokens = {"heldout": config.heldout_sequences * length, "train": length}, {"heldout": 0, "train": 0}
    held: set[bytes] = set()
    seen: set[bytes] = set()
    with closing(origin.texts("train")) as reading:
        for text, digest in distinct(reading, forbidden, Counter(), seen):
            side = "heldout" if is_heldout(digest, seed, part) else "train"
            if tokens[side] >= rooms[side]:
                continue
            if side == "heldout":
                held.add(digest)
            (ids,) = encoder.encode([text])
            if len(ids):
                tokens[side] += len(encoder.mark(ids))
            if all(tokens[side] >= room for side, room in rooms.items()):
                return held
    # Without a row on each side it is split inside its documents, as it is too short; of each of them a part may be held out.
    return held if min(tokens.values()) >= length else seen
