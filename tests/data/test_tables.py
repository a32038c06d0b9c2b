"""Datasets: saved folders, folders and hub names that are streamed, Parquet; rows are found again, and damage is seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shearling.config import parse
from shearling.data.config import DataConfig
from shearling.data.origins import Origin, find_origins
from shearling.errors import DataError

ROWS = [{"text": f"document {number}", "meta": {"lang": "en" if number % 3 else "de"}, "n": number} for number in range(700)]
TEXTS = [row["text"] for row in ROWS]


def origin(dataset: Path | str, **changes: Any) -> Origin:
    bad = changes.pop("bad_documents", "stop")
    (found,) = find_origins(parse(DataConfig, {"domains": {"web": {"dataset": str(dataset), **changes}}, "bad_documents": bad}))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `Dataset` in three files, and a `DatasetDict` of two splits beside it."""
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    datasets.disable_progress_bars()
    try:
        rows = datasets.Dataset.from_list(ROWS)
        rows.save_to_disk(str(folder / "one"), num_shards=3)
        datasets.DatasetDict({"train": rows, "validation": rows.select([5, 3])}).save_to_disk(str(folder / "two"))
    finally:
        datasets.enable_progress_bars()
    return folder


@pytest.mark.parametrize("skip", [0, 1, 233, 234, 300, 699, 700, 900])
def test_a_saved_dataset_is_read_from_any_row_on(saved: Path, skip: int) -> None:
    domain = origin(saved / "one")
    reading = domain.texts("train", skip=skip)
    assert list(reading) == TEXTS[skip:]
    assert reading.records == 700
    assert reading.bytes_read == domain.size() == sum(path.stat().st_size for path in (saved / "one").glob("*.arrow"))


def test_a_split_of_a_saved_dataset_is_trained_on_and_another_held_out(saved: Path) -> None:
    domain = origin(saved / "two", heldout_split="validation", where={"meta.lang": "en"})
    assert domain.heldout and list(domain.texts("heldout")) == [TEXTS[5]]
    reading = domain.texts("train")
    assert list(reading) == [row["text"] for row in ROWS if row["n"] % 3]
    assert reading.filtered == sum(not row["n"] % 3 for row in ROWS)
    assert not origin(saved / "two").heldout and list(origin(saved / "two").texts("heldout")) == []


def test_an_inner_field_of_a_saved_dataset_is_its_text(saved: Path) -> None:
    assert set(origin(saved / "one", text_field="meta.lang").texts("train")) == {"en", "de"}
    with pytest.raises(DataError, match=r"arrow: row 1 has no field 'body'") as caught:
        list(origin(saved / "one", text_field="body").texts("train"))
    assert "found the fields 'text', 'meta', 'n'" in str(caught.value)
    with pytest.raises(DataError, match=r"arrow: row 1: the field 'n' is no text"):
        list(origin(saved / "one", text_field="n").texts("train"))


def test_a_split_that_is_not_there_is_named_with_those_that_are(saved: Path, tmp_path: Path) -> None:
    for folder, split, there in ((saved / "two", "test", "'train', 'validation'"), (saved / "one", "test", "one split")):
        with pytest.raises(DataError, match="has no such split") as caught:
            origin(folder, split=split)
        (problem,) = caught.value.problems
        assert problem.field == "domains.web.dataset" and there in problem.found
    with pytest.raises(DataError, match="is no folder"):
        origin(tmp_path / "nothing")


def copied(saved: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved / "one", tmp_path / "copy"))


def test_a_saved_dataset_that_is_cut_off_anywhere_is_seen(saved: Path, tmp_path: Path) -> None:
    """Also between two batches, where Arrow's own reader sees a sound end."""
    folder = copied(saved, tmp_path)
    file = sorted(folder.glob("*.arrow"))[1]
    whole = file.read_bytes()
    for size in (0, 3, 4, 8, 1000, len(whole) // 2, len(whole) - 8, len(whole) - 4, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError) as caught:
            assert len(list(origin(folder).texts("train"))) == 700
        assert f"{file}: cannot be read" in str(caught.value), size
    file.unlink()
    with pytest.raises(DataError, match="not whole"):
        origin(folder)


def test_a_damaged_list_of_files_opens_nothing_outside(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    state = json.loads((folder / "state.json").read_text())
    for files in ([{"filename": "../one/data-00000-of-00003.arrow"}], [{"name": "x"}], None, [3]):
        (folder / "state.json").write_text(json.dumps(state | {"_data_files": files}))
        with pytest.raises(DataError) as caught:
            origin(folder)
        assert caught.value.problems[0].field == "domains.web.dataset"
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json"):
        origin(folder)


def test_a_folder_that_load_dataset_reads_is_streamed(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS), ("test", ROWS[:4])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    domain = origin(tmp_path, heldout_split="test", where={"meta.lang": "en"})
    assert list(domain.texts("heldout")) == [TEXTS[1], TEXTS[2]]
    assert list(domain.texts("train", skip=4)) == [row["text"] for row in ROWS[4:] if row["n"] % 3]
    assert domain.size() is None
    before = domain.settings()
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    again = origin(moved, heldout_split="test", where={"meta.lang": "en"}).settings()
    assert again == before and before["train_files"]["count"] == 2
    (moved / "test.jsonl").write_text("{}\n")
    assert origin(moved, heldout_split="test", where={"meta.lang": "en"}).settings() != before


class FakeStream:
    """What `load_dataset(streaming=True)` gives, with a note of what was passed over by `skip`."""

    def __init__(self, rows: list[Any], log: list[Any], break_at: int | None = None) -> None:
        self.rows, self.log, self.break_at = rows, log, break_at

    def skip(self, number: int) -> FakeStream:
        self.log.append(("skip", number))
        return FakeStream(self.rows[number:], self.log, self.break_at)

    def __iter__(self) -> Iterator[Any]:
        for number, row in enumerate(self.rows):
            if number == self.break_at:
                raise ConnectionResetError("the network is gone")
            yield row


def test_a_hub_dataset_is_streamed_from_any_row_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    log: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> FakeStream:
        log.append((arguments, options))
        return FakeStream(ROWS, log)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    domain = origin("owner/text", subset="en", revision="abc")
    reading = domain.texts("train", skip=690)
    assert log == []
    assert list(reading) == TEXTS[690:] and reading.records == 700 and reading.bytes_read == 0
    assert log == [(("owner/text", "en"), {"split": "train", "revision": "abc", "streaming": True}), ("skip", 690)]
    assert domain.size() is None and domain.settings()["dataset"] == "owner/text"


def test_a_hub_dataset_that_breaks_off_is_an_error_with_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: FakeStream(ROWS, [], break_at=7))
    reading = origin("owner/text", bad_documents="skip").texts("train", skip=10)
    with pytest.raises(DataError, match=r"owner/text, split train: cannot be read after row 17") as caught:
        list(reading)
    assert "ConnectionResetError: the network is gone" in str(caught.value)


def test_broken_rows_of_a_stream_are_counted_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: FakeStream([{"text": "a"}, {"text": None}, {}, {"text": "b"}], []))
    reading = origin("owner/text", bad_documents="skip").texts("train")
    assert list(reading) == ["a", "b"]
    assert reading.places == [
        "owner/text, split train: row 2: the field 'text' is no text",
        "owner/text, split train: row 3 has no field 'text'",
    ]


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=300)
    return path


def test_of_parquet_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [row | {"big": "x" * 20} for row in ROWS])
    config = parse(DataConfig, {"domains": {"web": {"train": str(tmp_path), "where": {"meta.lang": "de"}}}})
    (domain,) = find_origins(config)
    assert list(domain.texts("train", skip=301)) == [row["text"] for row in ROWS[301:] if not row["n"] % 3]
    (lost,) = find_origins(parse(DataConfig, {"domains": {"web": {"train": str(tmp_path), "text_field": "body"}}}))
    for skip in (0, 400, 650):
        with pytest.raises(DataError, match=rf"a\.parquet: row {skip + 1} has no field 'body'") as caught:
            list(lost.texts("train", skip))
    assert "found the fields 'text', 'meta', 'n', 'big'" in str(caught.value)


def test_a_parquet_file_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    whole = parquet(tmp_path / "a.parquet", ROWS).read_bytes()
    for size in (0, 3, 50, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.parquet").write_bytes(whole[:size])
        (domain,) = find_origins(parse(DataConfig, {"domains": {"web": {"train": str(tmp_path)}}, "bad_documents": "skip"}))
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
            list(domain.texts("train"))


def test_text_of_a_table_that_is_not_utf8_is_a_broken_document(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array([b"fine", b"\xff\xfe", b"too"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (domain,) = find_origins(parse(DataConfig, {"domains": {"web": str(tmp_path)}, "bad_documents": "skip"}))
    reading = domain.texts("train")
    assert list(reading) == ["fine", "too"] and reading.places == [f"{tmp_path / 'a.parquet'}: row 2 is not UTF-8"]
