"""Documents: every kind of file, in a settled order, and errors that name file and line."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from shearling.data.documents import BadDocument, Fields
from shearling.data.files import find_files
from shearling.data.readings import Reading, file_parts
from shearling.data.tables import StreamPart
from shearling.errors import DataError

TEXTS = ["one", "zwei\nZeilen", "трое", ""]
LINES = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS).encode()


def read(path: Path, text_field: str = "text") -> list[str]:
    files, problems = find_files([str(path)], "domains.web.train")
    assert problems == []
    fields = Fields(text_field)
    return list(Reading(file_parts(files, fields), fields))


def names(paths: list[str]) -> list[str]:
    files, problems = find_files(paths, "train")
    assert problems == []
    return [file.path for file in files]


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.json", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zst),
        ("a.JSONL.ZST", lambda data: zst(data[:20]) + zst(data[20:])),
        ("a.jsonl", lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl", lambda data: data[:-1]),
    ],
)
def test_lines(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(pack(LINES))
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.py"])
def test_whole_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("\ufeffein\nText\n".encode())
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"zwei"))
    assert read(tmp_path / name) == ["ein\nText\n"]
    assert read(tmp_path) == ["ein\nText\n", "zwei"]


def test_long_lines_over_many_blocks(tmp_path: Path) -> None:
    texts = ["x" * 300_000, "y", "ä" * 200_000]
    (tmp_path / "a.jsonl.zst").write_bytes(zst("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode()))
    assert read(tmp_path / "a.jsonl.zst") == texts


def test_parquet(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "odd [name]*"
    folder.mkdir()
    datasets.Dataset.from_dict({"body": TEXTS}).to_parquet(str(folder / "a.parquet"))
    assert read(folder / "a.parquet", "body") == TEXTS
    with pytest.raises(DataError, match=r"a\.parquet: row 1 has no field 'text'"):
        read(folder / "a.parquet")
    (folder / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        read(folder / "a.parquet", "body")


def test_hub_streams_a_split(tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_bytes(LINES)
    assert list(Reading([StreamPart(str(tmp_path), None, "validation", None)], Fields("text"))) == TEXTS
    with pytest.raises(DataError, match=r"split train: cannot be read") as caught:
        list(Reading([StreamPart(str(tmp_path), None, "train", None)], Fields("text")))
    assert "Check the dataset's name" in str(caught.value)


def test_order_is_by_name_and_each_file_comes_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "10.txt", ".hidden.txt", ".git/x.txt", "a/note.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = names([str(tmp_path), f"{tmp_path}/*.txt", f"{tmp_path}/b.txt", f"{tmp_path}/**/c.txt"])
    assert found == [f"{tmp_path}/{name}" for name in ("10.txt", "a/b/c.txt", "a/z.txt", "b.txt")]


def test_brackets_in_a_folder_are_no_glob(tmp_path: Path) -> None:
    (tmp_path / "v[1]").mkdir()
    (tmp_path / "v[1]" / "a.txt").write_text("x")
    for path in ("v[1]", "v[1]/a.txt", "v[1]/*.txt"):
        assert names([str(tmp_path / path)]) == [f"{tmp_path}/v[1]/a.txt"]


def test_all_problems_with_paths_at_once(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    os.symlink(tmp_path / "gone", tmp_path / "dangling.txt")
    paths = ["none.jsonl", "no*.jsonl", "image.png", "empty", "dangling.txt"]
    _, problems = find_files([str(tmp_path / path) for path in paths], "domains.web.train")
    assert [problem.field for problem in problems] == ["domains.web.train"] * 5
    for path, problem in zip(paths, problems, strict=True):
        assert path in problem.found


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", LINES + b'{"text": "cut', "line 5 is not JSON"),
        ("a.jsonl", b'\n{"text": NULL}\n', "line 2 is not JSON"),
        ("a.json", b'[{"text": "x"}]', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", LINES + b'{"body": "x"}', "line 5 has no field 'text'"),
        ("a.jsonl", b'{"text": null}', "line 1: the field 'text' is no text"),
        ("a.jsonl", LINES + b'{"text": "\xff"}', "line 5 is not UTF-8"),
        ("a.txt", b"one\ntwo\n\xe4", "line 3 is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-12], "cannot be decompressed"),
        ("a.jsonl.gz", LINES, "cannot be decompressed"),
        ("a.jsonl.zst", zst(LINES)[:-5], "cannot be decompressed"),
        ("a.jsonl.zst", zst(LINES) + zst(LINES)[:6], "cannot be decompressed"),
        ("a.jsonl.zst", LINES, "cannot be decompressed"),
        ("a.txt.zst", zst(LINES)[:-5], "cannot be decompressed"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert f"{tmp_path / name}: {expected}" in str(caught.value)
    assert len(str(caught.value)) < 600
    assert isinstance(caught.value, BadDocument) is ("decompressed" not in expected)


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00 \\ud83d x"}')
    assert read(tmp_path / "a.jsonl") == ["\U0001f600 \ufffd x"]
