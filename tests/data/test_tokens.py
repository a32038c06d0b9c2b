"""Token sets: what is opened is what was written, or it is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.config import parse
from shearling.data.config import DataConfig
from shearling.data.prepare import prepare
from shearling.data.tokens import ShardWriter, fingerprint, open_tokens
from shearling.errors import ArtifactError

SHARDS = ("web.train.bin", "web.heldout.bin", "code.train.bin", "code.heldout.bin")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, texts: Any, jsonl: Any, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    domains = {name: str(jsonl(folder / f"{name}.jsonl", texts(50, seed=seed))) for seed, name in enumerate(("web", "code"))}
    prepare(parse(DataConfig, {"domains": domains, "sequence_length": 16}), tokenizer, 100, folder / "out", seed=1)
    return folder / "out"


def test_rows_cannot_be_written_to(prepared: Path) -> None:
    tokens = open_tokens(prepared)
    assert tokens.domains == ("web", "code")
    with pytest.raises(ValueError, match="read-only"):
        tokens.sequences("web", "train")[0, 0] = 5


def _flip(folder: Path) -> None:
    data = bytearray((folder / "code.train.bin").read_bytes())
    data[7] ^= 1
    (folder / "code.train.bin").write_bytes(data)


def _cut(folder: Path) -> None:
    data = (folder / "web.heldout.bin").read_bytes()
    (folder / "web.heldout.bin").write_bytes(data[:-2])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "web.train.bin").unlink(), r"web\.train\.bin: found No such file"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "format: found list"),
        (shutil.rmtree, "no prepared data"),
    ],
)
def test_what_is_missing_is_named(prepared: Path, tmp_path: Path, damage: Callable[[Path], Any], expected: str) -> None:
    shutil.copytree(prepared, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ArtifactError, match=expected):
        open_tokens(tmp_path / "out")


@pytest.mark.parametrize("shard", SHARDS)
def test_a_cut_or_flipped_shard_is_never_opened(prepared: Path, tmp_path: Path, shard: str) -> None:
    """Every shard, cut to several lengths and with a byte changed in many places: which it is, what was found, what was expected."""
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    sound = (out / shard).read_bytes()
    size, digest = len(sound), hashlib.sha256(sound).hexdigest()
    for length in (0, 1, 8, size // 2, size - 1, size + 1):
        (out / shard).write_bytes((sound + b"x")[:length])
        with pytest.raises(ArtifactError) as caught:
            open_tokens(out)
        assert [(p.field, p.found) for p in caught.value.problems] == [(shard, f"{length} bytes where {size} are expected")]
    for position in np.linspace(0, size - 1, 20).astype(int).tolist():
        flipped = bytearray(sound)
        flipped[position] ^= 1 << position % 8
        (out / shard).write_bytes(flipped)
        with pytest.raises(ArtifactError) as caught:
            open_tokens(out)
        actual = hashlib.sha256(flipped).hexdigest()
        assert [(p.field, p.found) for p in caught.value.problems] == [(shard, f"sha256 {actual} where {digest} is expected")]
        assert "Run `shearling prepare` with the same recipe and --out" in caught.value.problems[0].remedy
    assert caught.value.exit_code == 3
    (out / shard).write_bytes(sound)
    assert len(open_tokens(out).arrays) == 4


def test_all_damaged_shards_are_named_at_once(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "out")
    _flip(tmp_path / "out")
    _cut(tmp_path / "out")
    with pytest.raises(ArtifactError, match="2 shards cannot be used") as caught:
        open_tokens(tmp_path / "out")
    assert [problem.field for problem in caught.value.problems] == ["web.heldout.bin", "code.train.bin"]


def test_a_cut_or_flipped_manifest_changes_nothing_unnoticed(prepared: Path, tmp_path: Path) -> None:
    """It is refused, or the tokens are the same: only counts that are shown to the reader are not guarded."""
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    tokens, sound = open_tokens(out), (out / "manifest.json").read_bytes()
    refused = 0
    for position in np.random.default_rng(0).choice(len(sound), 150, replace=False).tolist():
        flipped = bytearray(sound)
        flipped[position] ^= 1 << position % 7
        (out / "manifest.json").write_bytes(flipped)
        try:
            found = open_tokens(out)
        except ArtifactError:
            refused += 1
            continue
        for name in ("domains", "sequence_length", "vocab_size"):
            assert getattr(found, name) == getattr(tokens, name), position
        for key, ids in tokens.arrays.items():
            assert np.array_equal(found.arrays[key], ids)
            assert found.arrays[key].dtype == ids.dtype
    assert refused > 75
    for length in (0, 1, 8, len(sound) // 2, len(sound) - 1):
        (out / "manifest.json").write_bytes(sound[:length])
        with pytest.raises(ArtifactError, match="not valid JSON"):
            open_tokens(out)


def test_without_verification_only_sizes_are_checked(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "out")
    _flip(tmp_path / "out")
    assert open_tokens(tmp_path / "out", verify=False).domains == ("web", "code")
    _cut(tmp_path / "out")
    with pytest.raises(ArtifactError, match="bytes where"):
        open_tokens(tmp_path / "out", verify=False)


DIGESTS = {"train": "", "heldout": ""}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"format": 2}, "format"),
        ({"dtype": "|O"}, "dtype"),
        ({"sequence_length": "16"}, "sequence_length"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"domains": {}}, "domains"),
        ({"domains": {"../../etc/x": {"train_sequences": 1, "heldout_sequences": 1, "sha256": DIGESTS}}}, "domains.../../etc/x"),
        ({"domains": {"web": {"train_sequences": -1, "heldout_sequences": 1, "sha256": DIGESTS}}}, "domains.web"),
        ({"domains": {"web": 3}}, "domains.web"),
        ({"domains": {"web": {"train_sequences": 10**4000, "heldout_sequences": 1, "sha256": DIGESTS}}}, "domains.web"),
        ({"domains": {"other": {"train_sequences": 1, "heldout_sequences": 1, "sha256": DIGESTS}}}, "domains.other"),
        ({"vocab_size": 99}, "vocab_size"),
        ({"sequence_length": 8}, "sequence_length"),
        ({"tokenizer": "0" * 64}, "tokenizer"),
        ({"dtype": "<u4"}, "dtype"),
        ({"settings": {}}, "fingerprint"),
        ({"settings": {"domains": 3}, "fingerprint": fingerprint({"domains": 3})}, "fingerprint"),
        ({"fingerprint": None}, "fingerprint"),
    ],
)
def test_manifests_are_not_trusted(prepared: Path, tmp_path: Path, change: dict[str, Any], field: str) -> None:
    shutil.copytree(prepared, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ArtifactError) as caught:
        open_tokens(tmp_path / "out")
    assert [problem.field for problem in caught.value.problems] == [field]


@settings(max_examples=40, deadline=None)
@given(
    runs=st.lists(st.lists(st.integers(0, 65535), max_size=30), max_size=12), limit=st.none() | st.integers(0, 9), block=st.integers(1, 50)
)
def test_writer_packs_rows(tmp_path_factory: pytest.TempPathFactory, runs: list[list[int]], limit: int | None, block: int) -> None:
    file = tmp_path_factory.mktemp("writer") / "a.bin"
    with ShardWriter(file, 8, np.dtype("<u2"), limit) as writer:
        writer._BLOCK = block  # type: ignore[misc]
        for run in runs:
            writer.add(np.array(run, dtype=np.int64))
        digest = writer.finish()
        rows = writer.sequences
    flat = [id_ for run in runs for id_ in run]
    assert rows == min(len(flat) // 8, len(flat) if limit is None else limit)
    assert np.fromfile(file, dtype="<u2").tolist() == flat[: rows * 8]
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_writer_never_writes_into_a_file_that_is_there(tmp_path: Path) -> None:
    """It may be linked from a token set in use."""
    (tmp_path / "in-use.bin").write_bytes(b"sound")
    (tmp_path / "a.bin").hardlink_to(tmp_path / "in-use.bin")
    with ShardWriter(tmp_path / "a.bin", 8, np.dtype("<u2"), None) as writer:
        writer.add(np.arange(8))
        writer.finish()
    assert (tmp_path / "in-use.bin").read_bytes() == b"sound"
    assert (tmp_path / "a.bin").stat().st_size == 16
