"""The writer of shards: whole rows in files of equal length, and going on gives the bytes of not having stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.data.shards import ShardWriter

T = 8
RUNS = st.lists(st.lists(st.integers(0, 65535), max_size=40), max_size=12)


def writer(folder: Path, limit: int | None = None, each: int = 4, state: dict[str, Any] | None = None) -> ShardWriter:
    return ShardWriter(folder, "web", "train", T, np.dtype("<u2"), limit, each, state)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=40, deadline=None)
@given(runs=RUNS, limit=st.none() | st.integers(0, 9), block=st.integers(1, 50), each=st.sampled_from([1, 2, 4, 64]))
def test_rows_are_packed_into_shards(
    tmp_path_factory: pytest.TempPathFactory, runs: list[list[int]], limit: int | None, block: int, each: int
) -> None:
    folder = tmp_path_factory.mktemp("writer")
    with writer(folder, limit, each) as out:
        out._BLOCK = block  # type: ignore[misc]
        for run in runs:
            out.add(np.array(run, dtype=np.uint32))
        rows, full, shards = out.sequences, out.full, out.finish()
    flat = list(itertools.chain(*runs))
    assert rows == min(len(flat) // T, len(flat) if limit is None else limit)
    assert full == (limit is not None and len(flat) >= limit * T)
    assert [shard["sequences"] for shard in shards] == [min(each, rows - start) for start in range(0, rows, each)]
    assert [shard["file"] for shard in shards] == [f"web.train.{number:05d}.bin" for number in range(len(shards))]
    found = contents(folder)
    assert found.keys() == {shard["file"] for shard in shards}
    assert np.frombuffer(b"".join(found[shard["file"]] for shard in shards), "<u2").tolist() == flat[: rows * T]
    assert all(shard["sha256"] == hashlib.sha256(found[shard["file"]]).hexdigest() for shard in shards)


@settings(max_examples=40, deadline=None)
@given(runs=RUNS, stops=st.lists(st.integers(0, 11), max_size=4), limit=st.none() | st.integers(0, 12), lost=st.booleans())
def test_going_on_gives_the_bytes_of_not_having_stopped(
    tmp_path_factory: pytest.TempPathFactory, runs: list[list[int]], stops: list[int], limit: int | None, lost: bool
) -> None:
    """Stopped after any runs; what was written behind the record (`lost`) leaves no trace."""
    clean, folder = tmp_path_factory.mktemp("clean"), tmp_path_factory.mktemp("stopped")
    with writer(clean, limit) as out:
        for run in runs:
            out.add(np.array(run, dtype=np.uint32))
        expected = out.finish()
    state, done = None, 0
    for stop in [*sorted(stop for stop in stops if stop < len(runs)), len(runs)]:
        with writer(folder, limit, state=state) as out:
            for run in runs[done:stop]:
                out.add(np.array(run, dtype=np.uint32))
            state, done = json.loads(json.dumps(out.record())), stop
            if lost:
                out.add(np.arange(100, dtype=np.uint32))
                out._write()
    with writer(folder, limit, state=state) as out:
        assert out.finish() == expected
    found = contents(folder)
    assert {name: found[name] for name in contents(clean)} == contents(clean)


def test_a_writer_never_writes_into_a_file_that_is_there(tmp_path: Path) -> None:
    """It may be linked from a token set in use."""
    (tmp_path / "in-use.bin").write_bytes(b"sound")
    (tmp_path / "web.train.00000.bin").hardlink_to(tmp_path / "in-use.bin")
    with writer(tmp_path) as out:
        out.add(np.arange(8, dtype=np.uint32))
        out.finish()
    assert (tmp_path / "in-use.bin").read_bytes() == b"sound"
    assert (tmp_path / "web.train.00000.bin").stat().st_size == 16


@pytest.mark.parametrize("name", ["web.train.00000.bin", "web.train.00001.bin"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "linked"])
def test_a_state_that_is_not_what_lies_there_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    with writer(tmp_path) as out:
        out.add(np.arange(6 * T + 3, dtype=np.uint32))
        state = out.record()
    assert len(state["shards"]) == 1 and state["rows"] == 2
    file = tmp_path / name
    data = file.read_bytes()
    if damage == "linked":
        if name == "web.train.00001.bin":
            (tmp_path / "elsewhere").hardlink_to(file)
        else:
            file.unlink()
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "cut" else data[:5] + bytes([data[5] ^ 4]) + data[6:])
    with pytest.raises((ValueError, FileNotFoundError)):
        writer(tmp_path, state=state)
