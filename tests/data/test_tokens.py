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
from shearling.data.tokens import ShardWriter, open_tokens
from shearling.errors import ArtifactError


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
        (_flip, r"code\.train\.bin: found sha256 [0-9a-f]{64} where [0-9a-f]{64} is expected"),
        (_cut, r"web\.heldout\.bin: found \d+ bytes where \d+ are expected"),
        (lambda folder: (folder / "web.train.bin").unlink(), r"web\.train\.bin: found No such file"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "format: found list"),
        (shutil.rmtree, "no prepared data"),
    ],
)
def test_damage_is_named(prepared: Path, tmp_path: Path, damage: Callable[[Path], Any], expected: str) -> None:
    shutil.copytree(prepared, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ArtifactError, match=expected):
        open_tokens(tmp_path / "out")


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
