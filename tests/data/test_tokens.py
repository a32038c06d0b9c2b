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

from shearling.config import parse
from shearling.data.config import DataConfig
from shearling.data.prepare import prepare
from shearling.data.tokens import fingerprint, open_tokens, split_digest
from shearling.errors import ArtifactError

SHARDS = ("web.train.00000.bin", "web.train.00001.bin", "web.train.00002.bin", "web.heldout.00000.bin", "code.heldout.00000.bin")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, texts: Any, jsonl: Any, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    domains = {name: str(jsonl(folder / f"{name}.jsonl", texts(50, seed=seed))) for seed, name in enumerate(("web", "code"))}
    prepare(parse(DataConfig, {"domains": domains, "sequence_length": 16}), tokenizer, 100, folder / "out", seed=1, shard_tokens=512)
    return folder / "out"


def test_rows_cannot_be_written_to(prepared: Path) -> None:
    tokens = open_tokens(prepared)
    assert tokens.domains == ("web", "code")
    rows = tokens.sequences("web", "train")
    with pytest.raises(TypeError, match="does not support item assignment"):
        rows[0, 0] = 5  # type: ignore[index]
    for part in (rows[0], rows[:3]):
        with pytest.raises(ValueError, match="read-only"):
            part[..., 0] = 5


def _flip(folder: Path) -> None:
    data = bytearray((folder / "code.train.00000.bin").read_bytes())
    data[7] ^= 1
    (folder / "code.train.00000.bin").write_bytes(data)


def _cut(folder: Path) -> None:
    data = (folder / "web.heldout.00000.bin").read_bytes()
    (folder / "web.heldout.00000.bin").write_bytes(data[:-2])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "web.train.00000.bin").unlink(), r"web\.train\.00000\.bin: found No such file"),
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
    assert [problem.field for problem in caught.value.problems] == ["web.heldout.00000.bin", "code.train.00000.bin"]


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
        for key, rows in tokens.arrays.items():
            assert np.array_equal(found.arrays[key][:], rows[:])
            assert found.arrays[key].dtype == rows.dtype
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


def listed(domain: str, rows: int) -> dict[str, Any]:
    """What a manifest says of a domain with one shard of so many rows on each side."""
    shards = {split: [{"file": f"{domain}.{split}.00000.bin", "sequences": rows, "sha256": "0" * 64}] for split in ("train", "heldout")}
    return {"train_sequences": rows, "heldout_sequences": rows, "shards": shards}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"format": 1}, "format"),
        ({"format": 3}, "format"),
        ({"dtype": "|O"}, "dtype"),
        ({"sequence_length": "16"}, "sequence_length"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"domains": {}}, "domains"),
        ({"domains": {"../../etc/x": listed("../../etc/x", 1)}}, "domains.../../etc/x"),
        ({"domains": {"web": listed("web", 1) | {"train_sequences": -1}}}, "domains.web"),
        ({"domains": {"web": 3}}, "domains.web"),
        ({"domains": {"web": listed("web", 1) | {"train_sequences": 10**4000}}}, "domains.web"),
        ({"domains": {"other": listed("other", 1)}}, "domains.other"),
        ({"vocab_size": 99}, "vocab_size"),
        ({"sequence_length": 8}, "sequence_length"),
        ({"tokenizer": "0" * 64}, "tokenizer"),
        ({"dtype": "<u4"}, "dtype"),
        ({"document_end": 1}, "document_end"),
        ({"document_end": -1}, "document_end"),
        ({"document_end": None}, "document_end"),
        ({"shard_sequences": 33, "domains": {"web": listed("web", 1)}}, "shard_sequences"),
        ({"shard_sequences": 0}, "shard_sequences"),
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


def _first(manifest: dict[str, Any]) -> dict[str, Any]:
    shard: dict[str, Any] = manifest["domains"]["web"]["shards"]["train"][0]
    return shard


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["domains"]["web"].pop("shards"),
        lambda manifest: manifest["domains"]["web"]["shards"].pop("heldout"),
        lambda manifest: manifest["domains"]["web"]["shards"].update(train=[]),
        lambda manifest: manifest["domains"]["web"]["shards"].update(train="web.train.00000.bin"),
        lambda manifest: manifest["domains"]["web"]["shards"]["train"].reverse(),
        lambda manifest: manifest["domains"]["web"]["shards"]["train"].pop(),
        lambda manifest: manifest["domains"]["web"].update(train_sequences=manifest["domains"]["web"]["train_sequences"] + 1),
        lambda manifest: _first(manifest).update(file="../../etc/passwd"),
        lambda manifest: _first(manifest).update(file="code.train.00000.bin"),
        lambda manifest: _first(manifest).update(file=None),
        lambda manifest: _first(manifest).update(sequences=True),
        lambda manifest: _first(manifest).update(sequences=33),
        lambda manifest: _first(manifest).update(sha256="0" * 63),
        lambda manifest: _first(manifest).update(sha256="../" * 21 + "x"),
        lambda manifest: _first(manifest).pop("sha256"),
    ],
)
def test_a_list_of_shards_that_makes_no_sense(prepared: Path, tmp_path: Path, change: Callable[[Any], Any]) -> None:
    shutil.copytree(prepared, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["domains"]["web"]["shards"]["train"]) == 3 and manifest["shard_sequences"] == 32
    change(manifest)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"no sound (train|heldout)_sequences and shards") as caught:
        open_tokens(tmp_path / "out")
    assert {problem.field for problem in caught.value.problems} == {"domains.web"}


def test_uneven_shards_before_the_last_are_refused(prepared: Path, tmp_path: Path) -> None:
    """A row would be looked for in the wrong shard."""
    shutil.copytree(prepared, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    first, second, _ = manifest["domains"]["web"]["shards"]["train"]
    first["sequences"], second["sequences"] = 31, 32
    manifest["domains"]["web"]["train_sequences"] -= 1
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="no sound train_sequences and shards"):
        open_tokens(tmp_path / "out")


def test_a_vocabulary_larger_than_the_ids_on_disk_can_say(prepared: Path, tmp_path: Path) -> None:
    """Even where all else in the manifest agrees."""
    shutil.copytree(prepared, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["vocab_size"] = manifest["settings"]["vocab_size"] = 2**16 + 1
    manifest["fingerprint"] = fingerprint(manifest["settings"])
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"dtype: found '<u2' where '<u4' is expected"):
        open_tokens(tmp_path / "out")


def test_what_the_bytes_of_a_split_are_known_by() -> None:
    """One shard by its own sha256, several by one over all; another order is another split."""
    digests = [hashlib.sha256(letter.encode()).hexdigest() for letter in "abc"]

    def known(*chosen: str) -> str:
        shards = [{"file": "", "sequences": 1, "sha256": digest} for digest in chosen]
        return split_digest({"shards": {"train": shards}}, "train")

    assert known(digests[0]) == digests[0]
    assert len({known(*digests), known(*digests[:2]), known(*reversed(digests)), *digests}) == 6
