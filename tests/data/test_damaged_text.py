"""Compressed text that is cut off or has a flipped bit: never trained on, whatever bit or byte it is."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from shearling.data.documents import Fields
from shearling.data.files import DamagedFile, find_files
from shearling.data.readings import Reading, file_parts
from shearling.errors import DataError

TEXTS = ["the quick brown fox " * 3, "jumps over", "der faule Hund – ça va"]
DATA = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
PACKED = {"a.jsonl.gz": gzip.compress(DATA, mtime=0), "a.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(DATA)}


def read(path: Path) -> list[str]:
    files, _ = find_files([str(path)], "train")
    return list(Reading(file_parts(files, Fields("text")), Fields("text")))


@pytest.mark.parametrize("name", PACKED)
def test_a_file_that_is_cut_off_at_any_byte_is_an_error(tmp_path: Path, name: str) -> None:
    path, whole = tmp_path / name, PACKED[name]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError) as caught:
            read(path)
        # What was decompressed before the end is not enough to tell a broken line from a file that is cut off.
        assert isinstance(caught.value, DamagedFile) and caught.value.headline == f"{path}: cannot be decompressed"
    path.write_bytes(whole)
    assert read(path) == TEXTS


@pytest.mark.parametrize("name", PACKED)
def test_no_flipped_bit_ever_changes_a_text(tmp_path: Path, name: str) -> None:
    """Nearly every one is an error; the others (a flag, a time in the header) change nothing that is read."""
    path, whole = tmp_path / name, PACKED[name]
    harmless = 0
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert read(path) == TEXTS, bit
            harmless += 1
        except DataError as error:
            assert str(path) in str(error)
    assert harmless <= 8 * 8


@pytest.mark.parametrize(
    "pack", [lambda data: gzip.compress(data), lambda data: zstandard.ZstdCompressor().compress(data)], ids=["a.jsonl.gz", "a.jsonl.zst"]
)
def test_parts_one_after_another_are_one_file(tmp_path: Path, pack: Callable[[bytes], bytes], request: pytest.FixtureRequest) -> None:
    path = tmp_path / request.node.callspec.id
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh äß", k=rng.randint(1, 60_000))) for _ in range(20)]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    pieces, at = [], 0
    while at < len(data):
        size = rng.randint(1, 50_000)
        pieces.append(pack(data[at : at + size]))
        at += size
    path.write_bytes(b"".join(pieces))
    assert read(path) == texts
    path.write_bytes(b"".join(pieces)[:-3])
    with pytest.raises(DataError, match="cannot be decompressed"):
        read(path)
    path.write_bytes(b"".join(pieces) + b"rubbish")
    with pytest.raises(DataError, match="cannot be decompressed"):
        read(path)


def test_gzip_may_be_padded_with_zeros(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(PACKED["a.jsonl.gz"] + bytes(70_000) + PACKED["a.jsonl.gz"] + bytes(3))
    assert read(tmp_path / "a.jsonl.gz") == TEXTS * 2


def test_a_line_that_ends_where_the_file_is_cut_off_is_not_taken_for_a_broken_one(tmp_path: Path) -> None:
    """A compressed file that breaks off inside a line is a damaged file, which no `skip` passes over."""
    rng = random.Random(0)
    data = "".join(json.dumps({"text": "".join(rng.choices("abcdefghijklmnop", k=30_000))}) + "\n" for _ in range(20)).encode()
    for name, packed in (("a.jsonl.gz", gzip.compress(data)), ("a.jsonl.zst", zstandard.ZstdCompressor().compress(data))):
        (tmp_path / name).write_bytes(packed[: len(packed) // 2])
        files, _ = find_files([str(tmp_path / name)], "train")
        reading = Reading(file_parts(files, Fields("text")), Fields("text"), bad_documents="skip")
        with pytest.raises(DataError, match="cannot be decompressed"):
            list(reading)
        assert reading.skipped == 0 and 0 < reading.records < 20
