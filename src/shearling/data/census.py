"""What a token set has of each domain, as a table, and how often a run would go through it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shearling.data.tokens import SPLITS

COUNTS = (
    *("documents", "heldout_documents", "tokens", "bytes", "duplicate_documents", "overlapping_documents", "filtered_documents"),
    *("skipped_documents", "train_sequences", "heldout_sequences"),
)
"""Counts of a domain in a manifest that the table takes over; one that was not counted is 0."""


def census(domains: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Domain -> `COUNTS`, `bytes_per_token` (of the text that was used, marks counted as tokens) and `shards` (of both splits).

    `domains`: what a manifest, or the ledger entry of the stage prepare, says of each.
    """
    table: dict[str, dict[str, Any]] = {}
    for name, facts in domains.items():
        row: dict[str, Any] = {count: int(facts.get(count, 0)) for count in COUNTS}
        row["bytes_per_token"] = round(row["bytes"] / row["tokens"], 3) if row["tokens"] else None
        row["shards"] = sum(len(facts.get("shards", {}).get(split, ())) for split in SPLITS)
        table[name] = row
    return table


def passes(domains: Mapping[str, Any], shares: Mapping[str, float], sequences: int) -> dict[str, dict[str, float | None]]:
    """Domain -> how often a run goes through its training text.

    Args:
        domains: as for `census`.
        shares: of the mixture, by domain; they sum to 1.
        sequences: that the run trains on in all.

    Returns:
        By domain: `share`; `epochs`, the times that its text is gone through if the share stays; `repeated_above`, the share above which
        the run would use some of it twice, None where even all of the run would not.
    """
    found: dict[str, dict[str, float | None]] = {}
    for name, facts in domains.items():
        have = facts["train_sequences"]
        above = have / sequences if sequences else None
        found[name] = {
            "share": shares[name],
            "epochs": shares[name] * sequences / have,
            "repeated_above": above if above is not None and above < 1 else None,
        }
    return found


def repetition_notes(passed: Mapping[str, Mapping[str, float | None]], moving: bool) -> list[str]:
    """Sentences for the user: one for every domain that would be repeated, and one on those that would be if their shares grew.

    `passed`: what `passes` gives. `moving`: whether the mixture changes the shares: the paper's C4 went from 15 % to 49 %.
    """
    notes, later = [], []
    for name, row in passed.items():
        share, epochs, above = row["share"], row["epochs"], row["repeated_above"]
        if share is None or epochs is None or above is None:
            continue
        if epochs > 1:
            may = " (which the mixture may move)" if moving else ""
            notes.append(
                f"{name}: at its starting share of {share:.1%}{may} the run goes through its text {epochs:.2f} times: above {above:.1%} it "
                "is repeated. More text, a smaller weight or fewer steps avoid that."
            )
        else:
            later.append(f"{name} would be repeated above a share of {above:.1%}")
    return notes + ([f"{', '.join(later)}, where the mixture may move."] if later and moving else [])
