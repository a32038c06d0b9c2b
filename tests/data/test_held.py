"""No document is on both sides, whichever domains it is in: what one domain holds out is trained on in none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shearling.config import parse
from shearling.data import pack
from shearling.data.config import DataConfig
from shearling.data.encode import Encoder
from shearling.data.held import held_out
from shearling.data.origins import find_origins, survey
from shearling.data.pack import Progress
from shearling.data.prepare import prepare
from shearling.data.tokens import TokenSet, open_tokens
from shearling.data.verified import VERIFIED
from shearling.errors import DataError

Texts = Callable[..., list[str]]
Jsonl = Callable[[Path, Iterable[str]], Path]
Make = Callable[..., tuple[dict[str, Any], TokenSet]]


def config(domains: dict[str, Any], **fields: Any) -> DataConfig:
    return parse(DataConfig, {"sequence_length": 16, "heldout_sequences": 8, "domains": domains, **fields})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != VERIFIED}


def documents_of(rows: Any) -> set[tuple[int, ...]]:
    """The documents in the rows of a split that end there; the first may be the end of one alone, where it is split inside."""
    flat = rows[:].reshape(-1)
    return {tuple(part[part != 0].tolist()) for part in np.split(flat, np.flatnonzero(flat == 0) + 1)[:-1]}


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any) -> Make:
    """(Facts by domain, tokens) of prepared domains, each in a call of its own folder."""
    count = iter(range(100))

    def made(domains: dict[str, Any], **fields: Any) -> tuple[dict[str, Any], TokenSet]:
        out = tmp_path / f"out{next(count)}"
        return prepare(config(domains, **fields), tokenizer, 100, out, seed=1)["domains"], open_tokens(out)

    return made


@pytest.fixture
def shared(tmp_path: Path, texts: Texts, jsonl: Jsonl) -> dict[str, Any]:
    """A domain that is split by hash, and one with a held-out file of its own that trains on the same text, and on more."""
    common = texts(600, seed=1)
    own = {"train": str(jsonl(tmp_path / "own.jsonl", [*texts(50, seed=2), *common, *texts(50, seed=3)]))}
    own["heldout"] = str(jsonl(tmp_path / "heldout.jsonl", texts(20, seed=4)))
    return {"own": own, "web": str(jsonl(tmp_path / "web.jsonl", common))}


@pytest.mark.parametrize("fields", [{}, {"heldout_sequences": 2}, {"heldout_sequences": 500}, {"max_train_sequences": 50}], ids=str)
def test_what_a_domain_holds_out_by_hash_is_trained_on_in_none(make: Make, shared: dict[str, Any], fields: dict[str, int]) -> None:
    """Whether its held-out side is filled by the first documents, by later ones, or not at all; and nothing else is dropped."""
    facts, tokens = make(shared, **fields)
    heldout = documents_of(tokens.sequences("web", "heldout"))
    assert heldout and not heldout & documents_of(tokens.sequences("own", "train"))
    if "max_train_sequences" not in fields:
        assert facts["own"]["overlapping_documents"] == facts["web"]["heldout_documents"] >= len(heldout)
        assert facts["own"]["documents"] == 700 - facts["web"]["heldout_documents"]
    alone, _ = make({"web": shared["web"]}, **fields)
    assert facts["web"] == alone["web"]


def test_the_documents_named_are_those_that_are_held_out(make: Make, shared: dict[str, Any], tokenizer: Any, texts: Texts) -> None:
    facts, tokens = make({"web": shared["web"]})
    domains = config({"web": shared["web"]})
    origins = find_origins(domains)
    found = held_out(origins, survey(origins), domains, Encoder(tokenizer, 100), seed=1)
    by_digest = {hashlib.sha256(text.encode()).digest()[:16]: text for text in texts(600, seed=1)}
    named = {tuple(tokenizer(by_digest[digest])["input_ids"]) for digest in found}
    assert len(found) == facts["web"]["heldout_documents"]
    assert documents_of(tokens.sequences("web", "heldout")) <= named
    assert not named & documents_of(tokens.sequences("web", "train"))


def test_no_more_is_read_than_fills_the_held_out_side(tmp_path: Path, texts: Texts, jsonl: Jsonl, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", texts(1000, seed=1))
    with path.open("a") as file:
        file.write("this line is never reached")
    domains = config({"web": str(path)}, heldout_sequences=2)
    origins = find_origins(domains)
    held = held_out(origins, survey(origins), domains, Encoder(tokenizer, 100), seed=1)
    assert 0 < len(held) < 10
    with pytest.raises(DataError, match="line 1001 is not JSON"):
        held_out(origins, survey(origins), config({"web": str(path)}, heldout_sequences=500), Encoder(tokenizer, 100), seed=1)


def test_where_nothing_is_shared_nothing_changes(tmp_path: Path, make: Make, shared: dict[str, Any], texts: Texts, jsonl: Jsonl) -> None:
    """Every domain has the shards that it has alone; few documents, short ones, and held-out files are among them."""
    shared["own"]["train"] = str(jsonl(tmp_path / "other.jsonl", texts(300, seed=5)))
    domains = {
        **shared,
        "few": str(jsonl(tmp_path / "few.jsonl", texts(60, seed=6))),
        "short": str(jsonl(tmp_path / "short.jsonl", (f"{n} w1 w2 w3 w4 w5 w6 w7 w8 w9 w10" for n in range(300)))),
    }
    facts, _ = make(domains, sequence_length=128, heldout_sequences=1)
    assert "too few" in facts["few"]["notes"][0] and "too short" in facts["short"]["notes"][0]
    for name, domain in domains.items():
        assert facts[name] == make({name: domain}, sequence_length=128, heldout_sequences=1)[0][name]
        assert facts[name]["overlapping_documents"] == 0


def test_documents_that_are_split_inside_as_they_are_few_are_used_in_one_domain_alone(
    tmp_path: Path, make: Make, texts: Texts, jsonl: Jsonl, tokenizer: Any
) -> None:
    few, web, own = texts(60, seed=1), texts(300, seed=2), texts(50, seed=3)
    heldout = str(jsonl(tmp_path / "heldout.jsonl", texts(9, seed=4)))
    domains = {
        "own": {"train": str(jsonl(tmp_path / "own.jsonl", [*own, *few[:7]])), "heldout": heldout},
        "web": str(jsonl(tmp_path / "web.jsonl", [*web, *few[5:25]])),
        "few": str(jsonl(tmp_path / "few.jsonl", few)),
        "last": str(jsonl(tmp_path / "last.jsonl", [*texts(40, seed=5), *few[50:]])),
    }
    facts, tokens = make(domains)
    assert {name: facts[name]["overlapping_documents"] for name in domains} == {"own": 7, "web": 20, "few": 0, "last": 10}
    assert [len(facts[name]["notes"]) for name in ("few", "last")] == [1, 1] and "40 documents are too few" in facts["last"]["notes"][0]
    assert facts["few"] == make({"few": domains["few"]})[0]["few"]
    ids = {tuple(tokenizer(text)["input_ids"]) for text in few}
    for name in ("own", "web", "last"):
        assert not ids & (documents_of(tokens.sequences(name, "train")) | documents_of(tokens.sequences(name, "heldout")))


def test_a_domain_of_few_documents_that_are_all_in_another_is_refused(tmp_path: Path, make: Make, texts: Texts, jsonl: Jsonl) -> None:
    path = str(jsonl(tmp_path / "a.jsonl", texts(50, seed=1)))
    with pytest.raises(DataError, match="1 domain without text") as caught:
        make({"b": path, "a": path})
    (problem,) = caught.value.problems
    assert (problem.field, problem.found) == ("domains.b", "50 documents, all of them in a, too")


def test_documents_that_turn_out_too_short_are_not_trained_on_beside_held_out_files(
    tmp_path: Path, make: Make, texts: Texts, jsonl: Jsonl
) -> None:
    short = [f"{n} w1 w2 w3 w4 w5 w6 w7 w8 w9 w10" for n in range(300)]
    heldout = str(jsonl(tmp_path / "h.jsonl", texts(20, seed=2)))
    domains = {
        "own": {"train": str(jsonl(tmp_path / "own.jsonl", [*short, *texts(80, seed=1)])), "heldout": heldout},
        "short": str(jsonl(tmp_path / "short.jsonl", short)),
    }
    facts, _ = make(domains, sequence_length=128, heldout_sequences=1)
    assert "too short" in facts["short"]["notes"][0]
    assert (facts["own"]["documents"], facts["own"]["overlapping_documents"]) == (80, 300)


def test_the_same_bytes_whatever_order_and_wherever_it_is_stopped(
    tmp_path: Path, shared: dict[str, Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each batch of each domain, with a ledger that is written after each; and a shard that is damaged is made anew."""
    monkeypatch.setattr(pack, "_BATCH_DOCUMENTS", 250)
    monkeypatch.setattr("shearling.data.ledger._SECONDS", -1.0)

    def run(name: str, domains: dict[str, Any], progress: Callable[[Progress], None] | None = None) -> dict[str, bytes]:
        prepare(config(domains), tokenizer, 100, tmp_path / name, seed=1, progress=progress)
        return contents(tmp_path / name)

    calls: list[str] = []
    clean = run("clean", shared, lambda now: calls.append(now.domain))
    assert calls.count("own") >= 3 and calls.count("web") >= 3
    turned = run("turned", dict(reversed(shared.items())))
    assert {name: data for name, data in turned.items() if name.endswith(".bin")} == {
        name: data for name, data in clean.items() if name.endswith(".bin")
    }
    for stop in range(len(calls)):
        left = iter(range(stop))

        def progress(now: Progress, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(f"stopped{stop}", shared, progress)
        assert run(f"stopped{stop}", shared) == clean
    shard = tmp_path / "clean" / "own.train.00000.bin"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    assert run("clean", shared) == clean
