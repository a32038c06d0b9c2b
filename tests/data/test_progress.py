"""How far preparing is: what is told of it, and what a terminal shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shearling.config import parse
from shearling.data import pack
from shearling.data.config import DataConfig
from shearling.data.pack import Progress
from shearling.data.prepare import prepare
from shearling.show import duration
from shearling.stages import how_far


@pytest.fixture
def tell(tmp_path: Path, texts: Any, jsonl: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Progress]]:
    """Prepares a domain of 3000 documents and returns all that was told; the clock moves on by a second whenever it is looked at."""
    path = jsonl(tmp_path / "web.jsonl", texts(3000, seed=1))
    monkeypatch.setattr(pack, "_BATCH_CHARACTERS", 20_000)

    def prepared(**fields: Any) -> list[Progress]:
        clock, told = [0.0], []

        def monotonic() -> float:
            clock[0] += 1.0
            return clock[0]

        config = parse(DataConfig, {"sequence_length": 16, "domains": {"web": str(path)}, **fields})
        with monkeypatch.context() as patched:
            patched.setattr(pack, "time", type("Clock", (), {"monotonic": staticmethod(monotonic)}))
            prepare(config, tokenizer, 100, tmp_path / f"out{len(fields)}", seed=1, progress=told.append)
        return told

    return prepared


def test_documents_a_second_and_the_time_left(tell: Callable[..., list[Progress]]) -> None:
    told = tell()
    assert len(told) > 10
    assert [now.seconds for now in told] == [float(n) for n in range(1, len(told) + 1)]
    for now in told:
        assert now.documents_per_second == now.documents / now.seconds
        assert now.share is not None and now.seconds_left is not None
        assert now.seconds_left == pytest.approx(now.seconds / now.share * (1 - now.share))
    shares = [now.share for now in told]
    assert shares == sorted(shares) and 0 < shares[0] < 0.5 and shares[-1] == 1
    assert (told[-1].domain, told[-1].documents, told[-1].seconds_left) == ("web", 3000, 0)


def test_where_tokens_are_limited_they_tell_the_share(tell: Callable[..., list[Progress]]) -> None:
    """Of text that is far longer than what is asked for, little is read."""
    told = tell(heldout_sequences=20, max_train_sequences=1000)
    assert told[-1].share == 1 and told[-1].documents < 1500
    assert told[0].share is not None and told[0].share < 0.5


@pytest.mark.parametrize(
    ("seconds_left", "text"),
    [
        (None, "web: 1,234 documents, 57 documents/s"),
        (3725.4, "web: 1,234 documents, 57 documents/s, 1h02m left"),
        (59.6, "web: 1,234 documents, 57 documents/s, 1m00s left"),
    ],
)
def test_what_is_shown(seconds_left: float | None, text: str) -> None:
    assert how_far(Progress("web", 1234, 10**6, 21.7, 56.9, None, seconds_left)) == text
    assert duration(200) == "3m20s"
