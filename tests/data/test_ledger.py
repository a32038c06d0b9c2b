"""A domain that was begun is gone on with: after kills anywhere the same bytes, and most of the text is not tokenised again."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from faults import die, in_child, in_child_killed_at
from shearling.config import parse
from shearling.data import ledger, pack
from shearling.data.config import DataConfig
from shearling.data.encode import Encoder
from shearling.data.pack import Progress
from shearling.data.prepare import prepare
from shearling.data.tokens import open_tokens
from shearling.errors import DataError, StorageError

T = 8
SHARD = 256
"""Tokens in a shard: 32 rows."""


@dataclass
class Preparation:
    """One domain of many shards that records after every batch of a few documents."""

    config: DataConfig
    tokenizer: Any
    texts: list[str]
    encoded: list[str]
    """What was tokenised since the fixture was made, in this process."""

    def __call__(self, out: Path, config: DataConfig | None = None, **arguments: Any) -> dict[str, Any]:
        return prepare(config or self.config, self.tokenizer, 100, out, **{"seed": 1, "shard_tokens": SHARD, **arguments})


@pytest.fixture(params=["split off", "files of its own"])
def preparation(
    request: pytest.FixtureRequest, tmp_path: Path, texts: Any, jsonl: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Preparation:
    """300 documents, some of them again, some blank, and between them lines that are broken."""

    def broken(path: Path) -> str:
        lines = path.read_text().splitlines()
        for number in range(len(lines) - 3, 0, -25):
            lines.insert(number, "{")
        path.write_text("\n".join(lines))
        return str(path)

    lines = texts(300, seed=1, length=10)
    lines = [*lines[:150], *lines[20:40], " ", *lines[150:], *lines[:9]]
    domain: dict[str, Any] = {"train": broken(jsonl(tmp_path / "text" / "web.jsonl", lines))}
    if request.param == "files of its own":
        domain["heldout"] = broken(jsonl(tmp_path / "text" / "own.jsonl", texts(30, seed=2, length=10)))
    values = {"sequence_length": T, "heldout_sequences": 6, "domains": {"web": domain}, "bad_documents": "skip"}
    config = parse(DataConfig, values)
    monkeypatch.setattr(pack, "_BATCH_DOCUMENTS", 24)
    monkeypatch.setattr(ledger, "_SECONDS", 0.0)
    monkeypatch.setattr(ledger, "_PART", float("inf"))
    encoded: list[str] = []
    original = Encoder.encode

    def encode(self: Encoder, batch: Any) -> Any:
        encoded.extend(batch)
        return original(self, batch)

    monkeypatch.setattr(Encoder, "encode", encode)
    return Preparation(config, tokenizer, lines, encoded)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, bytes]]:
    """What `clean` has made, by kind of preparation, with FOLDER for the folder of the text, by which broken lines are named."""
    return {}


@pytest.fixture
def clean(preparation: Preparation, made: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files of a try that nothing disturbed, in one batch, without a record."""
    kind = "files of its own" if preparation.config.domains["web"].heldout else "split off"
    folder = str(tmp_path).encode()
    if kind in made:
        return {name: data.replace(b"FOLDER", folder) for name, data in made[kind].items()}
    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_SECONDS", 1e9)
        patched.setattr(pack, "_BATCH_DOCUMENTS", 10**6)
        facts = preparation(tmp_path / "clean")["domains"]["web"]
    assert len(facts["shards"]["train"]) > 10
    assert facts["duplicate_documents"] == 29 and facts["skipped_documents"] > 10 and "broken" in facts["notes"][0]
    preparation.encoded.clear()
    found = contents(tmp_path / "clean")
    made[kind] = {name: data.replace(folder, b"FOLDER") for name, data in found.items()}
    return found


def stop_after(batches: int, stop: Callable[[], Any]) -> Callable[[Progress], None]:
    """A progress function that calls `stop` after so many batches."""
    seen = [0]

    def progress(_: Progress) -> None:
        seen[0] += 1
        if seen[0] == batches:
            stop()

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt


def test_what_was_recorded_is_not_tokenised_again(preparation: Preparation, tmp_path: Path, clean: dict[str, bytes]) -> None:
    with pytest.raises(KeyboardInterrupt):
        preparation(tmp_path / "out", progress=stop_after(8, interrupt))
    kept = contents(tmp_path / ".partial-out")
    assert {"web.ledger.json", "web.seen", "web.train.00000.bin", "web.heldout.00000.bin"} <= kept.keys()
    whole = [name for name in kept if clean.get(name) == kept[name]]
    assert len(whole) > 5
    preparation.encoded.clear()
    inodes = {name: (tmp_path / ".partial-out" / name).stat().st_ino for name in whole}
    told: list[Progress] = []
    preparation(tmp_path / "out", progress=told.append)
    assert contents(tmp_path / "out") == clean
    assert 100 < len(preparation.encoded) < 200
    assert preparation.encoded[-1] == preparation.texts[-10]  # the last that is no repetition
    assert all((tmp_path / "out" / name).stat().st_ino == inode for name, inode in inodes.items())
    assert told[0].documents > 100 and told[0].documents_per_second < told[0].documents / told[0].seconds
    assert told[-1].share == 1 and told[-1].seconds_left == 0
    assert not (tmp_path / ".partial-out").exists()


def test_killed_anywhere_then_killed_again(preparation: Preparation, tmp_path: Path, clean: dict[str, bytes]) -> None:
    """At random calls of the file system, several times over, and at last not: the same bytes, and nothing else is left."""
    rng = random.Random(3)
    for number in range(8):
        out = tmp_path / str(number) / "out"
        kills = 0
        while in_child_killed_at(rng.randint(1, 130), lambda out=out: preparation(out)):
            kills += 1
            assert not out.exists()
        assert contents(out) == clean, number
        assert sorted(path.name for path in out.parent.iterdir()) == [".out.lock", "out"]
    assert in_child_killed_at(90, lambda: preparation(tmp_path / "again" / "out"))


def test_killed_after_any_batch(preparation: Preparation, tmp_path: Path, clean: dict[str, bytes]) -> None:
    """Between the calls of the file system, too, and each try comes further than the one before."""
    out, documents = tmp_path / "out", [-1]
    for _ in range(40):
        if in_child(lambda: preparation(out, progress=stop_after(2, die))) == 0:
            break
        state = json.loads((tmp_path / ".partial-out" / "web.ledger.json").read_text())["state"]
        documents.append(state["point"]["records"])
    assert documents == sorted(set(documents)) and len(documents) > 5
    assert contents(out) == clean


@pytest.fixture
def begun(preparation: Preparation, tmp_path: Path, clean: dict[str, bytes]) -> Path:
    """The folder of a try that was killed in the middle."""
    assert in_child(lambda: preparation(tmp_path / "out", progress=stop_after(9, die))) < 0
    return tmp_path / ".partial-out"


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_length": T + 1},
        {"heldout_sequences": 5},
        {"max_train_sequences": 500},
    ],
)
def test_other_settings_begin_anew(
    preparation: Preparation, begun: Path, tmp_path: Path, change: dict[str, Any], clean: dict[str, bytes]
) -> None:
    config = preparation.config.model_copy(update=change)
    preparation.encoded.clear()
    preparation(tmp_path / "out", config)
    assert len(preparation.encoded) > 280
    preparation(tmp_path / "fresh", config)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh") != clean


def test_another_seed_or_size_of_shards_begins_anew(preparation: Preparation, begun: Path, tmp_path: Path) -> None:
    for number, change in enumerate(({"seed": 2}, {"shard_tokens": 2 * SHARD})):
        preparation.encoded.clear()
        preparation(tmp_path / f"out{number}", **change)
        begun.rename(tmp_path / f".partial-again{number}")
        preparation(tmp_path / f"again{number}", **change)
        assert contents(tmp_path / f"out{number}") == contents(tmp_path / f"again{number}")
        assert len(preparation.encoded) > 560
        assert in_child(lambda: preparation(tmp_path / "out", progress=stop_after(8, die))) < 0


def _edit(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def _flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize(
    ("damage", "goes_on"),
    [
        (_edit("web.ledger.json", lambda data: data[:-9]), False),
        (_edit("web.ledger.json", lambda data: data.replace(b'"documents": ', b'"documents": 1')), False),
        (_edit("web.ledger.json", lambda data: b"[]"), False),
        (_edit("web.seen", _flip), False),
        (_edit("web.seen", lambda data: data[:-1]), False),
        (_edit("web.seen", lambda data: data + b"half a record"), True),
        (lambda folder: (folder / "web.seen").unlink(), False),
        (_edit("web.train.00000.bin", _flip), False),
        (_edit("web.train.00003.bin", lambda data: data + b"xx"), False),
        (lambda folder: (folder / "web.train.00004.bin").unlink(), False),
        (lambda folder: last_shard(folder).write_bytes(last_shard(folder).read_bytes() + b"half a row"), True),
        (lambda folder: last_shard(folder).write_bytes(_flip(last_shard(folder).read_bytes())), False),
        (lambda folder: last_shard(folder).write_bytes(b""), False),
        (lambda folder: (folder.parent / "linked").hardlink_to(last_shard(folder)), False),
        (lambda folder: (folder / "web.train.00777.bin").write_bytes(b"from elsewhere"), True),
    ],
)
def test_only_what_is_whole_is_gone_on_with(
    preparation: Preparation, begun: Path, tmp_path: Path, clean: dict[str, bytes], damage: Callable[[Path], Any], goes_on: bool
) -> None:
    damage(begun)
    preparation(tmp_path / "out")
    assert contents(tmp_path / "out") == clean
    assert (len(preparation.encoded) < 200) == goes_on
    assert open_tokens(tmp_path / "out").domains == ("web",)


def last_shard(folder: Path) -> Path:
    """The shard of the training text that was begun and not ended."""
    state = json.loads((folder / "web.ledger.json").read_text())["state"]["writers"]["train"]
    assert state["rows"]
    return folder / f"web.train.{len(state['shards']):05d}.bin"


def test_a_full_disk_while_recording(
    preparation: Preparation, tmp_path: Path, clean: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = ledger.write_atomic, [0]

    def write_atomic(path: Path, data: str) -> None:
        calls[0] += 1
        if calls[0] == 7:
            raise StorageError("no room")
        original(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "write_atomic", write_atomic)
        with pytest.raises(StorageError, match="no room"):
            preparation(tmp_path / "out")
    preparation.encoded.clear()
    preparation(tmp_path / "out")
    assert contents(tmp_path / "out") == clean
    assert len(preparation.encoded) < 250


def test_recording_takes_a_hundredth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first after ten seconds; after one that took a second, the next a hundred seconds later."""
    now, recorded = [0.0], []
    monkeypatch.setattr(ledger.time, "monotonic", lambda: now[0])

    def state() -> dict[str, Any]:
        recorded.append(now[0])
        now[0] += 1.0
        return {}

    with ledger.Ledger(tmp_path, "web", "f") as slow:
        while now[0] < 320:
            slow.add([b"0123456789abcdef"])
            slow.record(state)
            now[0] += 0.5
    assert recorded == [10.0, 111.0, 212.0, 313.0]
    with ledger.Ledger(tmp_path, "web", "f") as found:
        read = found.read()
        assert read is not None and read["seen"]["count"] > 600
        assert found.resume(read) == {b"0123456789abcdef"}
    assert ledger.Ledger(tmp_path, "web", "g").read() is None


def test_nothing_is_kept_that_was_read_of_a_file_before_its_damage_showed(
    tokenizer: Any, texts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checksum stands at the end of what it is of, so a flipped bit is packed and recorded before it is found."""
    monkeypatch.setattr(ledger, "_SECONDS", 0.0)
    monkeypatch.setattr(ledger, "_PART", 1e9)
    monkeypatch.setattr(pack, "_BATCH_DOCUMENTS", 8)
    path = tmp_path / "web.jsonl.gz"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(4000, seed=1, length=30)).encode()
    whole = gzip.compress(lines, compresslevel=0)  # stored as it is
    damaged = whole.replace(b"w1", b"w2", 1)
    config = parse(DataConfig, {"domains": {"web": str(path)}, "sequence_length": T, "heldout_sequences": 500}, "recipe")
    assert len(whole) > 2**18 and damaged != whole
    path.write_bytes(whole)
    clean = prepare(config, tokenizer, 100, tmp_path / "clean", seed=1, shard_tokens=SHARD)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="decompressed"):
        prepare(config, tokenizer, 100, tmp_path / "out", seed=1, shard_tokens=SHARD)
    assert not list(tmp_path.glob(".partial-out/*.ledger.json"))
    path.write_bytes(whole)
    found = prepare(config, tokenizer, 100, tmp_path / "out", seed=1, shard_tokens=SHARD)
    assert found["domains"]["web"]["shards"] == clean["domains"]["web"]["shards"]
