"""Reading from any record on, with counts of what was dropped: the same documents, whatever the kinds of files and wherever it began."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shearling.config import parse
from shearling.data.config import DataConfig
from shearling.data.origins import Origin, find_origins, survey
from shearling.data.readings import Reading
from shearling.errors import DataError

RECORDS = st.lists(
    st.one_of(
        st.builds(lambda text, lang: {"text": text, "meta": {"lang": lang}}, st.text(max_size=20), st.sampled_from(["en", "de", None])),
        st.sampled_from([None, "blank", "broken", "latin"]),
        st.just({"text": 5, "meta": {"lang": "en"}}),
        st.just({"text": "no language", "meta": {}}),
    ),
    max_size=12,
)


def line(record: Any) -> bytes:
    odd: dict[Any, bytes] = {None: b"null", "blank": b" \t", "broken": b'{"text": "cut', "latin": b'{"text": "\xe4"}'}
    return odd[record] if record is None or isinstance(record, str) else json.dumps(record, ensure_ascii=True).encode()


def write(path: Path, records: list[Any]) -> None:
    """A file of the kind that its name says: JSON lines or Parquet."""
    data = b"".join(line(record) + b"\n" for record in records)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            record if isinstance(record, dict) and isinstance(record["text"], str) else {"text": None, "meta": {}} for record in records
        ]
        kind = pa.schema([("text", pa.string()), ("meta", pa.struct([("lang", pa.string())]))])
        pq.write_table(pa.Table.from_pylist(rows, kind), path, row_group_size=3)
        return
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))


def origin(train: Any, **changes: Any) -> Origin:
    bad = changes.pop("bad_documents", "stop")
    (found,) = find_origins(parse(DataConfig, {"domains": {"web": {"train": train, **changes}}, "bad_documents": bad}))
    return found


def follow(reading: Reading) -> list[tuple[str, int]]:
    """Each text with `records` right after it."""
    return [(text, reading.records) for text in reading]


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.sampled_from(["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"]), RECORDS), min_size=1, max_size=4), st.data()
)
def test_reading_goes_on_at_any_record_as_if_it_had_never_stopped(files: list[tuple[str, list[Any]]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, records) in enumerate(files):
            path = Path(folder) / f"{number}.{kind}"
            if kind == "txt":
                path.write_text("one whole file")
            else:
                write(path, records)
        domain = origin(folder, where={"meta.lang": ["en"]}, bad_documents="skip")
        whole = domain.texts("train")
        every = follow(whole)
        total = sum(1 if kind == "txt" else len(records) for kind, records in files)
        assert whole.records == total and whole.bytes_read == domain.size()
        stops = [0, *(records for _, records in every), total, total + 3]
        stop = data.draw(st.sampled_from(stops) | st.integers(0, total))
        rest = domain.texts("train", skip=stop)
        assert follow(rest) == [(text, records) for text, records in every if records > stop]
        assert rest.records == total and rest.bytes_read == domain.size()
        first = domain.texts("train")
        while first.records < stop and next(first, None) is not None:
            pass
        if first.records == stop:  # a text was received there
            for name, count in whole.counts().items():
                assert first.counts()[name] + rest.counts()[name] == count


def test_every_record_is_given_filtered_blank_or_broken(tmp_path: Path) -> None:
    records = [
        {"text": "a", "meta": {"lang": "en"}},
        "blank",
        {"text": "b", "meta": {"lang": "de"}},
        "broken",
        {"text": 1, "meta": {"lang": "en"}},
    ]
    write(
        tmp_path / "a.jsonl",
        [*records, {"meta": {"lang": "en"}}, {"text": "c", "meta": "en"}, "latin", {"text": "d", "meta": {"lang": "en"}}],
    )
    reading = origin(str(tmp_path), where={"meta.lang": "en"}, bad_documents="skip").texts("train")
    assert follow(reading) == [("a", 1), ("d", 9)]
    assert reading.counts() == {"filtered_documents": 1, "skipped_documents": 5}
    file = tmp_path / "a.jsonl"
    assert reading.places == [
        f"{file}: line 4 is not JSON",
        f"{file}: line 5: the field 'text' is no text",
        f"{file}: line 6 has no field 'text'",
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("broken", "line 2 is not JSON"),
        ("latin", "line 2 is not UTF-8"),
        (None, "line 2 is not a JSON object"),
        ({"body": "x"}, "line 2 has no field 'text'"),
        ({"text": 5}, "line 2: the field 'text' is no text"),
    ],
)
def test_a_broken_record_stops_reading_unless_it_is_to_be_skipped(tmp_path: Path, record: Any, message: str) -> None:
    write(tmp_path / "a.jsonl", [{"text": "a"}, record, {"text": "b"}])
    stopping = origin(str(tmp_path)).texts("train")
    assert next(stopping) == "a"
    with pytest.raises(DataError) as caught:
        next(stopping)
    assert f"{tmp_path / 'a.jsonl'}: {message}" in str(caught.value)
    skipping = origin(str(tmp_path), bad_documents="skip").texts("train")
    assert list(skipping) == ["a", "b"]
    assert skipping.counts() == {"filtered_documents": 0, "skipped_documents": 1}
    assert skipping.places == [f"{tmp_path / 'a.jsonl'}: {message}"]


def test_a_whole_file_that_is_not_utf8_is_skipped_as_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine")
    (tmp_path / "b.txt").write_bytes(b"not\n\xff")
    reading = origin(str(tmp_path), bad_documents="skip").texts("train")
    assert list(reading) == ["fine"]
    assert reading.places == [f"{tmp_path / 'b.txt'}: line 2 is not UTF-8"]


@pytest.mark.parametrize("cut", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_a_file_that_cannot_be_read_on_is_an_error_even_where_documents_may_be_skipped(tmp_path: Path, cut: Any) -> None:
    name = "a.jsonl.gz" if cut is gzip.compress else "a.jsonl.zst"
    (tmp_path / name).write_bytes(cut(b'{"text": "a"}\n{"text": "b"}\n')[:-2])
    with pytest.raises(DataError, match="cannot be decompressed"):
        list(origin(str(tmp_path), bad_documents="skip").texts("train"))


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"set": "C4"}, [0]),
        ({"set": ["C4", "Wiki"]}, [0, 1]),
        ({"set": ["C4", "Wiki"], "meta.year": 2020}, [1]),
        ({"meta.year": 2019.0}, [0]),
        ({"meta.flag": True}, [0]),
        ({"meta.flag": 1}, [1]),
        ({"a.b": "dotted name"}, [2]),
        ({"set": "1"}, []),
    ],
)
def test_where_keeps_documents_of_equal_fields(tmp_path: Path, where: dict[str, Any], kept: list[int]) -> None:
    rows = [
        {"text": "0", "set": "C4", "meta": {"year": 2019, "flag": True}, "a": {"b": "x"}},
        {"text": "1", "set": "Wiki", "meta": {"year": 2020, "flag": 1}, "a": {"b": "y"}},
        {"text": "2", "set": 1, "meta": {"year": [2019], "flag": {"x": 1}}, "a": {"b": "z"}, "a.b": "dotted name"},
    ]
    write(tmp_path / "a.jsonl", rows)
    reading = origin(str(tmp_path), where=where).texts("train")
    assert list(reading) == [str(number) for number in kept]
    assert reading.filtered == 3 - len(kept)


def test_a_field_that_where_asks_for_must_be_there(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "a", "lang": "en"}, {"text": "b"}])
    with pytest.raises(DataError, match=r"line 2 has no field 'lang'") as caught:
        list(origin(str(tmp_path), where={"lang": "en"}).texts("train"))
    assert "where: found the fields 'text'. Name the field that documents are chosen by." in str(caught.value)


def test_a_where_that_keeps_nothing_shows_the_values_that_there_are(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "a", "meta": {"set": "RedPajamaC4"}}, {"text": "b", "meta": {"set": "RedPajamaBook"}}] * 300)
    with pytest.raises(DataError) as caught:
        survey([origin(str(tmp_path), where={"meta.set": "C4"})])
    (problem,) = caught.value.problems
    assert problem.field == "domains.web"
    assert problem.found == "600 documents that where keeps out, with values such as meta.set: 'RedPajamaC4', 'RedPajamaBook'"


def test_a_domain_of_broken_documents_alone_is_empty_and_says_why(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["broken", {"body": "x"}])
    (tmp_path / "none.jsonl").write_bytes(b"\n\n")
    domains = {"web": str(tmp_path / "a.jsonl"), "none": str(tmp_path / "none.jsonl")}
    origins = find_origins(parse(DataConfig, {"domains": domains, "bad_documents": "skip"}))
    with pytest.raises(DataError, match="2 domains without text") as caught:
        survey(origins)
    assert [problem.found for problem in caught.value.problems] == [
        f"2 broken documents, the first: {tmp_path / 'a.jsonl'}: line 1 is not JSON",
        "no text",
    ]


def test_the_text_may_lie_in_an_inner_field(tmp_path: Path) -> None:
    rows = [{"meta": {"text": "inner"}, "text": "outer"}, {"meta.text": "dotted", "meta": {"text": "inner"}}]
    write(tmp_path / "a.jsonl", rows)
    assert list(origin(str(tmp_path), text_field="meta.text").texts("train")) == ["inner", "dotted"]
    write(tmp_path / "a.jsonl", [*rows, {"meta": None}])
    with pytest.raises(DataError, match=r"line 3 has no field 'meta\.text'"):
        list(origin(str(tmp_path), text_field="meta.text").texts("train"))


def test_bytes_read_grow_with_reading_up_to_the_size(tmp_path: Path) -> None:
    import random

    rng = random.Random(0)
    rows = [{"text": "".join(rng.choices("abcdefghij ", k=3000))} for _ in range(300)]
    for name in ("a.jsonl.zst", "b.jsonl", "c.parquet"):
        write(tmp_path / name, [row | {"meta": {}} for row in rows])
    domain = origin(str(tmp_path))
    reading = domain.texts("train")
    assert (reading.records, reading.bytes_read) == (0, 0)
    places = [reading.bytes_read for _ in reading]
    assert places == sorted(places) and len(set(places)) > 20 and places[0] < 10**5
    assert reading.bytes_read == domain.size() == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_file_that_grew_or_shrank_since_it_was_found_is_not_used(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt", "a.parquet"):
        write(tmp_path / name, [{"text": "a", "meta": {}}] * 3)
        domain = origin(str(tmp_path / name))
        write(tmp_path / name, [{"text": "a", "meta": {}}] * 50)
        with pytest.raises(DataError, match=rf"{name}: has changed"):
            list(domain.texts("train"))


def test_files_in_a_folder_that_are_held_out_are_not_trained_on(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    domain = origin(str(tmp_path), heldout=str(tmp_path / "b.txt"))
    assert list(domain.texts("train")) == ["a", "c"] and list(domain.texts("heldout")) == ["b"]
    assert (domain.size(), domain.size("heldout")) == (2, 1) and domain.heldout
    with pytest.raises(DataError, match="all of them held out"):
        origin(str(tmp_path), heldout=[str(tmp_path)])


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt", "a.parquet"):
        write(tmp_path / name, [{"text": "a", "meta": {}}])
        domain = origin(str(tmp_path / name))
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=rf"{name}: cannot be read"):
            list(domain.texts("train"))


def test_memory_stays_that_of_a_document_and_a_block(tmp_path: Path) -> None:
    import tracemalloc

    row = line({"text": "x" * 1000}) + b"\n"
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(row * 30_000))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(row * 30_000))
    reading = origin(str(tmp_path)).texts("train")
    next(reading)
    tracemalloc.start()
    try:
        assert sum(1 for _ in reading) == 59_999
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
