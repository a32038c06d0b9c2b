"""Text behind URLs: found, read on where the network fails, refused where it is no longer what it was; a missing package is named."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem

from shearling.config import parse
from shearling.data import files as files_module
from shearling.data.config import DataConfig
from shearling.data.files import DamagedFile, find_files
from shearling.data.origins import Origin, find_origins
from shearling.errors import DataError

TEXTS = [f"document {number} " + "ä" * (number % 400) for number in range(4000)]
DATA = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
_folders = itertools.count()


def origin(train: Any, **changes: Any) -> Origin:
    (found,) = find_origins(parse(DataConfig, {"domains": {"web": {"train": train, **changes}}}))
    return found


@pytest.fixture
def bucket() -> Iterator[tuple[MemoryFileSystem, str]]:
    """A folder of fsspec's file system in memory: (system, its URL)."""
    system, folder = MemoryFileSystem(), f"/bucket{next(_folders)}"
    system.mkdir(folder)
    yield system, f"memory://{folder}"
    system.rm(folder, recursive=True)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "RETRY_WAITS", (0.0, 0.0))


def parquet(texts: list[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "more": texts}), sink, row_group_size=1000)
    return sink.getvalue()


def test_files_folders_and_globs_of_urls(bucket: tuple[MemoryFileSystem, str]) -> None:
    system, url = bucket
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "10.txt", ".hidden.txt", ".git/x.txt", "a/note.bin", "v[1]/a.txt"):
        system.pipe(f"{url}/{name}", name.encode())
    system.mkdir(f"{url}/empty")

    def names(*paths: str) -> list[str]:
        files, problems = find_files([f"{url}/{path}" if path else url for path in paths], "train")
        assert problems == []
        return [file.path.removeprefix(f"{url}/") for file in files]

    assert names("") == ["10.txt", "a/b/c.txt", "a/z.txt", "b.txt", "v[1]/a.txt"]
    assert names("*.txt", "b.txt", "**/c.txt") == ["10.txt", "a/b/c.txt", "b.txt"]
    assert names("v[1]/a.txt") == ["v[1]/a.txt"] and names("a*") == ["a/b/c.txt", "a/z.txt"]
    assert list(origin(f"{url}/a").texts("train")) == ["a/b/c.txt", "a/z.txt"]
    _, problems = find_files([f"{url}/{path}" for path in ("none.txt", "no*.txt", "a/note.bin", "empty")], "domains.web.train")
    assert [problem.field for problem in problems] == ["domains.web.train"] * 4
    for name, problem in zip(("none.txt", "no*.txt", "a/note.bin", "empty"), problems, strict=True):
        assert f"{url}/{name}" in problem.found


@pytest.mark.parametrize("skip", [0, 1, 1999, 4000])
@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress),
        ("a.parquet", lambda _: parquet(TEXTS)),
    ],
)
def test_every_kind_of_file_is_read_behind_a_url(
    bucket: tuple[MemoryFileSystem, str], name: str, pack: Callable[[bytes], bytes], skip: int
) -> None:
    system, url = bucket
    system.pipe(f"{url}/{name}", pack(DATA))
    domain = origin(f"{url}/{name}")
    reading = domain.texts("train", skip)
    assert list(reading) == TEXTS[skip:]
    assert reading.records == 4000 and reading.bytes_read == domain.size() == len(pack(DATA))


def test_local_and_remote_files_are_read_together_in_a_settled_order(bucket: tuple[MemoryFileSystem, str], tmp_path: Path) -> None:
    system, url = bucket
    system.pipe(f"{url}/a.txt", b"remote")
    (tmp_path / "a.txt").write_text("local")
    orders = [list(origin(list(paths)).texts("train")) for paths in itertools.permutations([url, str(tmp_path)])]
    assert orders[0] == orders[1] and sorted(orders[0]) == ["local", "remote"]


def test_a_remote_file_that_vanished_or_changed_is_named(bucket: tuple[MemoryFileSystem, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: it does not come back by waiting."""
    system, url = bucket
    monkeypatch.setattr(files_module, "RETRY_WAITS", (3600.0,))
    monkeypatch.setattr(files_module.time, "sleep", lambda seconds: pytest.fail(f"slept {seconds} s"))
    for name, data in (("a.jsonl", DATA), ("a.parquet", parquet(TEXTS))):
        system.pipe(f"{url}/{name}", data)
        domain = origin(f"{url}/{name}")
        system.pipe(f"{url}/{name}", data + b"\n")
        with pytest.raises(DamagedFile, match=rf"{name}: has changed"):
            list(domain.texts("train"))
        system.rm(f"{url}/{name}")
        with pytest.raises(DataError, match=rf"{name}: cannot be read") as caught:
            list(domain.texts("train"))
        assert not isinstance(caught.value, DamagedFile) and "FileNotFoundError" in str(caught.value)


class MarkedFileSystem(MemoryFileSystem):
    """A file system in memory that tells ETags, and breaks off: every `every` reads, `times` times in all."""

    protocol = "marked"
    tag, every, times, reads, opened = "1", 0, 0, 0, 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.removeprefix("marked://")))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return super().info(path, **options) | {"ETag": type(self).tag}

    def find(self, path: str, **options: Any) -> Any:
        found = super().find(path, **options)
        return {name: facts | {"ETag": type(self).tag} for name, facts in found.items()} if options.get("detail") else found

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        type(self).opened += 1
        return Breaking(super()._open(path, *arguments, **options), type(self))


class Breaking(io.BytesIO):
    """A file whose reads fail as its file system says."""

    def __init__(self, file: Any, rules: type[MarkedFileSystem]) -> None:
        super().__init__(file.getvalue())
        self.rules = rules

    def read(self, size: int | None = -1) -> bytes:
        self.rules.reads += 1
        if self.rules.every and self.rules.times and not self.rules.reads % self.rules.every:
            self.rules.times -= 1
            raise TimeoutError("the network is slow")
        return super().read(size)


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    fsspec.register_implementation("marked", MarkedFileSystem, clobber=True)
    for name, value in (("tag", "1"), ("every", 0), ("times", 0), ("reads", 0), ("opened", 0)):
        monkeypatch.setattr(MarkedFileSystem, name, value)
    folder = f"/marked{next(_folders)}"
    MarkedFileSystem().pipe(f"{folder}/a.jsonl", DATA)
    MarkedFileSystem.opened = 0
    yield f"marked://{folder}/a.jsonl"
    MarkedFileSystem().rm(folder, recursive=True)


def test_reading_goes_on_where_the_network_broke_off(marked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MarkedFileSystem, "every", 3)
    monkeypatch.setattr(MarkedFileSystem, "times", 5)
    domain = origin(marked)
    reading = domain.texts("train")
    assert list(reading) == TEXTS and reading.bytes_read == len(DATA)
    assert MarkedFileSystem.times == 0 and MarkedFileSystem.opened == 6


def test_a_network_that_stays_away_is_an_error_with_the_reason(marked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = origin(marked)
    monkeypatch.setattr(MarkedFileSystem, "every", 1)
    monkeypatch.setattr(MarkedFileSystem, "times", 99)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read") as caught:
        list(domain.texts("train"))
    assert "TimeoutError: the network is slow" in str(caught.value) and "Check the address" in str(caught.value)
    assert not isinstance(caught.value, DamagedFile) and MarkedFileSystem.times == 99 - 3


def test_a_file_with_another_mark_is_another_file(marked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    domain, before = origin(marked), origin(marked).settings()
    assert origin(marked.rpartition("/")[0]).settings() == before
    monkeypatch.setattr(MarkedFileSystem, "tag", "2")
    with pytest.raises(DamagedFile, match="has changed") as caught:
        list(domain.texts("train"))
    assert "the mark 2, where it was 1" in str(caught.value)
    assert origin(marked).settings() != before


def test_files_are_known_by_names_and_sizes_and_not_by_where_they_lie(tmp_path: Path, bucket: tuple[MemoryFileSystem, str]) -> None:
    system, url = bucket
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jsonl").write_bytes(DATA)
    before = origin(str(tmp_path / "one")).settings()
    (tmp_path / "one").rename(tmp_path / "two")
    assert origin(str(tmp_path / "two")).settings() == before
    assert before["train_files"]["bytes"] == len(DATA) and before["heldout_files"]["count"] == 0
    system.pipe(f"{url}/a.jsonl", DATA)
    there = origin(url).settings()
    system.mv(f"{url}/a.jsonl", f"{url}/elsewhere/a.jsonl")
    assert origin(f"{url}/elsewhere").settings() == there


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("s3://bucket/a.jsonl", "pip install s3fs"),
        ("gs://bucket/*.jsonl", "pip install gcsfs"),
        ("abfs://bucket/a.jsonl", "pip install adlfs"),
        ("quux://bucket/a.jsonl", "Protocol not known: quux"),
        ("zip://a.jsonl::memory://a.zip", "archives are not read"),
    ],
)
def test_an_address_that_cannot_be_read_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, url: str, remedy: str) -> None:
    import sys

    from fsspec.registry import _registry

    for package in ("s3fs", "gcsfs", "adlfs"):  # as if they were not installed
        monkeypatch.setitem(sys.modules, package, None)
    for scheme in ("s3", "gs", "abfs"):
        _registry.pop(scheme, None)
    with pytest.raises(DataError) as caught:
        find_origins(parse(DataConfig, {"domains": {"web": url, "none": "/nowhere/x.txt"}}))
    problem, other = caught.value.problems
    assert problem.field == "domains.web.train" and remedy in problem.remedy
    assert other.field == "domains.none.train"


def test_urls_are_left_as_they_are(tmp_path: Path) -> None:
    values = {"domains": {"a": {"train": ["x", "s3://bucket/x//*.jsonl"], "heldout": "https://host/y.txt"}}}
    domain = parse(DataConfig, values).resolved(tmp_path).domains["a"]
    assert domain.train == [str(tmp_path / "x"), "s3://bucket/x//*.jsonl"] and domain.heldout == ["https://host/y.txt"]
