"""The table of a token set, and how often a run goes through it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shearling.data.census import COUNTS, census, passes, repetition_notes

FACTS: dict[str, Any] = {
    "documents": 90, "heldout_documents": 10, "tokens": 2000, "bytes": 9000, "duplicate_documents": 4, "overlapping_documents": 2,
    "filtered_documents": 7, "skipped_documents": 1, "train_sequences": 100, "heldout_sequences": 20,
    "shards": {"train": [{}, {}, {}], "heldout": [{}]}, "notes": [],
}  # fmt: skip


def test_the_table_has_what_was_counted() -> None:
    older = {key: value for key, value in FACTS.items() if key not in ("filtered_documents", "skipped_documents")} | {"tokens": 0}
    table = census({"web": FACTS, "old": older})
    assert list(table) == ["web", "old"]
    assert table["web"] == {**{name: FACTS[name] for name in COUNTS}, "bytes_per_token": 4.5, "shards": 4}
    assert table["old"]["filtered_documents"] == 0 and table["old"]["bytes_per_token"] is None


def test_passes_and_the_share_above_which_text_is_repeated() -> None:
    domains = {"web": FACTS, "code": {"train_sequences": 60}, "large": {"train_sequences": 201}}
    found = passes(domains, {"web": 0.6, "code": 0.2, "large": 0.2}, 200)
    assert found["web"] == {"share": 0.6, "epochs": pytest.approx(1.2), "repeated_above": 0.5}
    assert found["code"] == {"share": 0.2, "epochs": pytest.approx(2 / 3), "repeated_above": 0.3}
    assert found["large"]["repeated_above"] is None
    assert [note.partition(":")[0] for note in repetition_notes(found, False)] == ["web"]
    assert "60.0% the run goes through its text 1.20 times: above 50.0%" in repetition_notes(found, False)[0]
    moving = repetition_notes(found, True)
    assert "60.0% (which the mixture may move)" in moving[0]
    assert moving[1:] == ["code would be repeated above a share of 30.0%, where the mixture may move."]


def test_a_run_that_trains_on_nothing_repeats_nothing() -> None:
    found = passes({"web": FACTS}, {"web": 1.0}, 0)
    assert found["web"] == {"share": 1.0, "epochs": 0.0, "repeated_above": None} and not repetition_notes(found, True)


@given(st.integers(1, 10**6), st.floats(0.001, 1), st.integers(1, 10**7))
def test_text_is_repeated_exactly_above_that_share(have: int, share: float, sequences: int) -> None:
    row = passes({"web": {"train_sequences": have}}, {"web": share}, sequences)["web"]
    above = row["repeated_above"]
    assert row["epochs"] is not None
    if above is None:
        assert row["epochs"] <= 1
    elif abs(share - above) > 1e-9:
        assert (row["epochs"] > 1) == (share > above)
