"""The rows of a split, over many shards: read as if they were one array."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.data import rows as rows_module
from shearling.data.rows import Maps, Rows, Shard
from shearling.data.tokens import shard_rows
from shearling.errors import ArtifactError, StorageError

T = 3


def written(folder: Path, total: int, each: int, dtype: str = "<u2") -> tuple[np.ndarray, list[Shard]]:
    """All rows [total, T], and the shards of `each` rows that hold them."""
    whole = np.arange(total * T, dtype=dtype).reshape(total, T)
    shards = []
    for number, start in enumerate(range(0, total, each)):
        part = whole[start : start + each]
        (folder / f"a.{number}").write_bytes(part.tobytes())
        shards.append(Shard(f"a.{number}", len(part), "0" * 64))
    return whole, shards


def rows_in(folder: Path, shards: list[Shard], dtype: str = "<u2", maps: Maps | None = None) -> Rows:
    return Rows(shards, T, np.dtype(dtype), lambda shard: folder / shard.file, maps)


@pytest.fixture(scope="module", params=[(1, 1), (5, 8), (8, 8), (9, 8), (37, 4)])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, Rows]:
    folder = tmp_path_factory.mktemp("rows")
    whole, shards = written(folder, *request.param)
    return whole, rows_in(folder, shards)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_index_gives_what_one_array_gives(both: tuple[np.ndarray, Rows], data: st.DataObject) -> None:
    whole, rows = both
    n = len(whole)
    number = st.integers(-n, n - 1)
    bound = st.none() | st.integers(-n - 3, n + 3)
    index = data.draw(
        number
        | st.builds(slice, bound, bound, st.none() | st.sampled_from([1, 2, 5, -1, -3]))
        | st.lists(number, max_size=12).map(lambda chosen: np.array(chosen, dtype=np.int64))
        | st.lists(number, min_size=6, max_size=6).map(lambda chosen: np.array(chosen, dtype=np.int32).reshape(2, 3))
        | st.lists(number, min_size=1, max_size=3)
        | number.map(np.int64)
    )
    column = data.draw(st.none() | st.integers(-T, T - 1) | st.builds(slice, st.none() | st.integers(0, T), st.none() | st.integers(0, T)))
    if column is None:
        found, expected = rows[index], whole[index]
    else:
        found, expected = rows[index, column], whole[index][..., column]
    assert found.dtype == whole.dtype
    assert np.array_equal(found, expected) and np.shape(found) == np.shape(expected)


def test_it_is_seen_as_an_array(both: tuple[np.ndarray, Rows]) -> None:
    whole, rows = both
    assert (len(rows), rows.shape, rows.ndim, rows.dtype) == (len(whole), whole.shape, 2, whole.dtype)
    assert np.array_equal(np.asarray(rows), whole)
    assert np.asarray(rows, dtype=np.int64).dtype == np.int64
    copy = np.array(rows)
    copy[0] = 7
    assert np.array_equal(rows, whole)
    assert [row.tolist() for row in rows] == whole.tolist()


@pytest.mark.parametrize("index", [-6, 5, [0, 5], np.array([-6]), np.array([True, False, True, False, False]), np.array([0.0])])
def test_what_is_no_row_is_refused(tmp_path: Path, index: Any) -> None:
    _, shards = written(tmp_path, 5, 2)
    with pytest.raises(IndexError):
        rows_in(tmp_path, shards)[index]


def test_a_shard_is_asked_for_when_a_row_of_it_is_read(tmp_path: Path) -> None:
    whole, shards = written(tmp_path, 12, 4)
    asked: list[str] = []

    def locate(shard: Shard) -> Path:
        asked.append(shard.file)
        return tmp_path / shard.file

    rows = Rows(shards, T, np.dtype("<u2"), locate)
    assert (len(rows), asked) == (12, [])
    assert np.array_equal(rows[[9, 1, 10]], whole[[9, 1, 10]])
    assert asked == ["a.2", "a.0"]
    rows[2:4], rows[11]
    assert asked == ["a.2", "a.0"]
    rows[:]
    assert asked == ["a.2", "a.0", "a.1"]


def test_what_locating_raises_is_passed_on_and_tried_again(tmp_path: Path) -> None:
    whole, shards = written(tmp_path, 4, 4)
    errors = [StorageError("the network is down")]

    def locate(shard: Shard) -> Path:
        if errors:
            raise errors.pop()
        return tmp_path / shard.file

    rows = Rows(shards, T, np.dtype("<u2"), locate)
    with pytest.raises(StorageError, match="network"):
        rows[0]
    assert np.array_equal(rows[:], whole)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, 5)])
def test_a_shard_that_went_away_is_named(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    _, shards = written(tmp_path, 8, 4)
    damage(tmp_path / "a.1")
    rows = rows_in(tmp_path, shards)
    assert rows[3][0] == 9
    with pytest.raises(ArtifactError, match=r"a\.1: cannot be mapped"):
        rows[4]


def test_no_more_files_are_open_than_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two splits share the bound; rows that were given out stay as they are."""
    monkeypatch.setattr(rows_module, "_MOST_OPEN", 5)
    whole, shards = written(tmp_path, 60, 2)
    maps = Maps()
    one, other = (rows_in(tmp_path, shards, maps=maps) for _ in range(2))
    before = len(os.listdir("/proc/self/fd"))
    first = one[0]
    for _ in range(2):
        for rows in (one, other):
            assert np.array_equal(rows[np.arange(60)], whole)
            assert len(os.listdir("/proc/self/fd")) <= before + 7
    assert np.array_equal(first, whole[0])


def test_many_threads_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_MOST_OPEN", 3)
    whole, shards = written(tmp_path, 200, 8)
    rows = rows_in(tmp_path, shards)
    start = threading.Barrier(4)

    def read(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        start.wait(30)
        return all(np.array_equal(rows[chosen], whole[chosen]) for chosen in (rng.integers(0, 200, 9) for _ in range(150)))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


def test_rows_of_a_full_shard() -> None:
    """A power of two, as many as fit, and at least one."""
    assert shard_rows(4096) == 2**14 and shard_rows(2048) == 2**15 and shard_rows(8) == 2**23
    assert shard_rows(3000) == 2**14 and shard_rows(2**27) == 1
    assert shard_rows(8, 64) == 8 and shard_rows(8, 127) == 8 and shard_rows(8, 7) == 1
