"""The memory of verified shards: it saves reading them again, and neither hides damage nor gets in the way."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shearling.data import verified
from shearling.data.tokens import open_tokens
from shearling.errors import ArtifactError, StorageError
from shearling.io.files import sha256_file

SHARDS = ("code.heldout.00000.bin", "code.train.00000.bin", "web.heldout.00000.bin", "web.train.00000.bin")
MEMORY = ".verified.json"


def settle(out: Path, seconds: int = 100) -> None:
    """Make the shards older than the tick of any clock."""
    for name in SHARDS:
        when = (out / name).stat().st_mtime_ns - seconds * 10**9
        os.utime(out / name, ns=(when, when))


@pytest.fixture
def out(preparation: Any, tmp_path: Path) -> Path:
    preparation(tmp_path / "out")
    settle(tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read whole, in order."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(verified, "sha256_file", counted)
    return names


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)


def test_every_shard_is_read_once(out: Path, read: list[str], preparation: Any) -> None:
    open_tokens(out)
    assert sorted(read) == sorted(SHARDS)
    for _ in range(2):
        open_tokens(out)
        preparation(out)
    assert len(read) == 4
    assert preparation.packed == ["code", "web"]


def _touch(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def _move(file: Path) -> None:
    """The same bytes and time in another file."""
    found = file.stat()
    data = file.read_bytes()
    (file.parent / "other").write_bytes(data)
    os.utime(file.parent / "other", ns=(found.st_mtime_ns, found.st_mtime_ns))
    (file.parent / "other").rename(file)


@pytest.mark.parametrize("change", [_touch, _move])
def test_only_what_changed_is_read_again(out: Path, read: list[str], change: Callable[[Path], None]) -> None:
    open_tokens(out)
    read.clear()
    change(out / "web.train.00000.bin")
    open_tokens(out)
    open_tokens(out)
    assert read == ["web.train.00000.bin"]


def test_damage_after_verification_is_found(out: Path, read: list[str]) -> None:
    open_tokens(out)
    read.clear()
    flip(out / "web.train.00000.bin")
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"web\.train\.00000\.bin: found sha256"):
            open_tokens(out)
        settle(out, 0)
    assert read == ["web.train.00000.bin"] * 2


def test_what_was_just_written_is_not_trusted(out: Path, read: list[str]) -> None:
    """Within one tick of a file system's clock a change leaves no trace, so such a file is read each time."""
    now = (out / "web.train.00000.bin").stat().st_mtime_ns + 100 * 10**9
    os.utime(out / "web.train.00000.bin", ns=(now, now))
    open_tokens(out)
    data = (out / "web.train.00000.bin").read_bytes()
    (out / "web.train.00000.bin").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(out / "web.train.00000.bin", ns=(now, now))
    with pytest.raises(ArtifactError, match=r"web\.train\.00000\.bin: found sha256"):
        open_tokens(out)


def test_another_manifest_is_compared_anew(out: Path, read: list[str]) -> None:
    """What is remembered is a content, not that something was right."""
    open_tokens(out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["domains"]["web"]["shards"]["train"][0]["sha256"] = "0" * 64
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"web\.train\.00000\.bin: found sha256 [0-9a-f]{64} where 0{64} is expected"):
        open_tokens(out)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"web.train.00000.bin": 3, "code.train.00000.bin": [1], "web.heldout.00000.bin": {"a": []}}',
        b'{"web.train.00000.bin": ' + b"[" * 900 + b"]" * 900 + b"}",
        b"[" * 200_000,
        b'{"web.train.00000.bin": [' + b"9" * 5000 + b"]}",
    ],
)
def test_a_broken_memory_is_none(out: Path, read: list[str], data: bytes) -> None:
    (out / MEMORY).write_bytes(data)
    open_tokens(out)
    assert sorted(read) == sorted(SHARDS)
    open_tokens(out)
    assert len(read) == 4  # it was replaced


def test_a_memory_that_lies_makes_no_error(out: Path, read: list[str]) -> None:
    open_tokens(out)
    lies = {name: [*facts[:3], "0" * 64] for name, facts in json.loads((out / MEMORY).read_text()).items()}
    (out / MEMORY).write_text(json.dumps(lies))
    read.clear()
    open_tokens(out)
    assert sorted(read) == sorted(SHARDS)


def _link(out: Path) -> None:
    (out.parent / "thesis.txt").write_text("mine")
    (out / MEMORY).symlink_to(out.parent / "thesis.txt")


def _huge(out: Path) -> None:
    with (out / MEMORY).open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("make", [_link, _huge, lambda out: os.mkfifo(out / MEMORY), lambda out: (out / MEMORY).mkdir()])
def test_something_else_in_its_place(out: Path, read: list[str], make: Callable[[Path], Any]) -> None:
    make(out)
    open_tokens(out)
    open_tokens(out)
    assert len(read) in (4, 8)
    assert not (out.parent / "thesis.txt").exists() or (out.parent / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["write_atomic", "sweep_temporary"])
@pytest.mark.parametrize("error", [StorageError("full"), OSError(errno.EROFS, "read-only")])
def test_where_nothing_can_be_written(out: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, name: str, error: OSError) -> None:
    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(verified, name, refuse)
    for _ in range(2):
        assert open_tokens(out).domains == ("web", "code")
    assert len(read) == 8
    assert not (out / MEMORY).exists()


def test_leavings_of_a_kill_are_swept(out: Path) -> None:
    (out / f".tmp-{MEMORY}-0123456789ab").write_text("{")
    open_tokens(out)
    assert sorted(path.name for path in out.iterdir()) == [MEMORY, *SHARDS[:2], "manifest.json", *SHARDS[2:]]
