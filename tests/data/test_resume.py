"""Preparing that was cut short goes on, and a damaged directory is mended: in the end the same bytes as of one clean try."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import faults
from faults import in_child_killed_at
from shearling.config import parse
from shearling.data.config import DataConfig
from shearling.data.pack import Progress
from shearling.data.prepare import prepare
from shearling.data.tokens import open_tokens
from shearling.data.verified import VERIFIED
from shearling.errors import ArtifactError, DataError, OutputError, StorageError

SHARDS = ("web.train.00000.bin", "web.heldout.00000.bin", "code.train.00000.bin", "code.heldout.00000.bin")
ONE_DOMAIN = ["code.heldout.00000.bin", "code.train.00000.bin", "manifest.json"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the memory of verified shards, which on a slow machine is written sooner."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != VERIFIED}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_in(domain: str, error: BaseException) -> Callable[..., None]:
    """A progress function that raises `error` once `domain` is being tokenised."""

    def progress(now: Progress) -> None:
        if now.domain == domain:
            raise error

    return progress


@pytest.fixture
def clean(preparation: Any, tmp_path: Path) -> dict[str, bytes]:
    """The files of a try that nothing disturbed."""
    preparation(tmp_path / "clean" / "out")
    assert preparation.packed == ["code", "web"]  # the small one first
    preparation.packed.clear()
    return contents(tmp_path / "clean" / "out")


@pytest.fixture
def begun(preparation: Any, tmp_path: Path, clean: dict[str, bytes]) -> Path:
    """The folder of a try that ended in its second domain."""
    with pytest.raises(KeyboardInterrupt):
        preparation(tmp_path / "out", progress=stop_in("web", KeyboardInterrupt()))
    preparation.packed.clear()
    return tmp_path / ".partial-out"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("x"), StorageError("x"), RuntimeError("x")], ids=repr)
def test_a_finished_domain_is_not_tokenised_again(preparation: Any, tmp_path: Path, clean: dict[str, bytes], error: BaseException) -> None:
    for _ in range(2):
        with pytest.raises(type(error)):
            preparation(tmp_path / "out", progress=stop_in("web", error))
        assert names(tmp_path / ".partial-out") == ONE_DOMAIN
        assert not (tmp_path / "out").exists()
    preparation(tmp_path / "out")
    assert preparation.packed == ["code", "web", "web", "web"]
    assert contents(tmp_path / "out") == clean
    assert names(tmp_path) == [".out.lock", "clean", "out", "text"]


def test_nothing_stays_where_no_domain_was_finished(preparation: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        preparation(tmp_path / "out", progress=stop_in("code", KeyboardInterrupt()))
    assert names(tmp_path) == [".out.lock", "text"]


def test_other_settings_begin_anew(preparation: Any, begun: Path, tmp_path: Path) -> None:
    seeds = [preparation(tmp_path / name, seed=2) for name in ("out", "other")]
    assert preparation.packed == ["code", "web"] * 2
    assert seeds[0] == seeds[1]
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    assert not begun.exists()


def _cut(folder: Path) -> None:
    with (folder / "code.train.00000.bin").open("r+b") as file:
        file.truncate(8)


def _flip(folder: Path, name: str = "code.heldout.00000.bin", position: int = 0) -> None:
    data = bytearray((folder / name).read_bytes())
    data[position] ^= 1
    (folder / name).write_bytes(data)


def _replace_by_file(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("x")


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda folder: (folder / "web.train.00000.bin").write_bytes(b"half a shard"), True),
        (lambda folder: (folder / "nested").mkdir(), True),
        (lambda folder: (folder / "code.train.00000.bin").unlink(), False),
        (_cut, False),
        (_flip, False),
        (lambda folder: (folder / "manifest.json").unlink(), False),
        (lambda folder: (folder / "manifest.json").write_text("{"), False),
        (lambda folder: _flip(folder, "manifest.json", 20), False),
        (_replace_by_file, False),
    ],
)
def test_what_is_half_made_or_damaged_does_not_count(
    preparation: Any, begun: Path, tmp_path: Path, clean: dict[str, bytes], damage: Callable[[Path], Any], kept: bool
) -> None:
    damage(begun)
    preparation(tmp_path / "out")
    assert preparation.packed == (["web"] if kept else ["code", "web"])
    assert contents(tmp_path / "out") == clean


def test_killed_anywhere_then_killed_again(preparation: Any, tmp_path: Path, clean: dict[str, bytes]) -> None:
    """Whatever two kills leave behind, the third try ends with the same bytes; under the final name nothing is ever incomplete."""
    k, killed, left_to_do = 0, True, set()
    while killed:
        k += 1
        out = tmp_path / str(k) / "out"
        killed = in_child_killed_at(k, lambda out=out: preparation(out))
        assert not out.exists() or contents(out) == clean
        in_child_killed_at(1 + k * 7 % 45, lambda out=out: preparation(out))
        assert not out.exists() or contents(out) == clean
        preparation.packed.clear()
        preparation(out)
        left_to_do.add(tuple(preparation.packed))
        assert contents(out) == clean, k
        assert names(out.parent) == [".out.lock", "out"]
    assert k > 40
    assert left_to_do == {("code", "web"), ("web",), ()}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_only_finished_domains(
    preparation: Any, tmp_path: Path, clean: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    from shearling.data.shards import ShardWriter

    write = ShardWriter._write

    def full(self: Any) -> None:
        write(self)
        if "web" in self._file.name:
            raise OSError(number, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "_write", full)
        with pytest.raises(StorageError, match=r"out: cannot write: the disk .*; free space there") as caught:
            preparation(tmp_path / "out")
    assert caught.value.exit_code == 6
    assert names(tmp_path / ".partial-out") == ONE_DOMAIN
    preparation.packed.clear()
    preparation(tmp_path / "out")
    assert preparation.packed == ["web"]
    assert contents(tmp_path / "out") == clean


def test_a_file_that_cannot_grow(preparation: Any, tmp_path: Path, clean: dict[str, bytes]) -> None:
    """The system's own refusal, at any byte of the larger shard."""
    largest = len(clean["web.train.00000.bin"])
    assert largest > 4000 > max(len(data) for name, data in clean.items() if name != "web.train.00000.bin")
    for limit in (4000, largest - 1):
        pid = os.fork()
        if pid == 0:
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                preparation(tmp_path / "out")
            except StorageError as error:
                (tmp_path / "message").write_text(str(error))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert "out: cannot write" in (tmp_path / "message").read_text()
        (tmp_path / "message").unlink()
        assert names(tmp_path / ".partial-out") == ONE_DOMAIN
    preparation(tmp_path / "out")
    assert preparation.packed == ["web"]
    assert contents(tmp_path / "out") == clean


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "a directory"])
def test_only_the_damaged_domain_is_made_anew(preparation: Any, tmp_path: Path, clean: dict[str, bytes], shard: str, damage: str) -> None:
    out = tmp_path / "clean" / "out"
    other = "code.train.00000.bin" if shard.startswith("web") else "web.train.00000.bin"
    inode = (out / other).stat().st_ino
    (out / shard).unlink()
    if damage == "a directory":
        (out / shard).mkdir()
    elif damage != "missing":
        data = clean[shard]
        (out / shard).write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 128]))
    with pytest.raises(ArtifactError, match=f"{shard}.*Run `shearling prepare` with the same recipe and --out"):
        open_tokens(out)
    manifest = preparation(out)
    assert preparation.packed == [shard.partition(".")[0]]
    assert contents(out) == clean
    assert (out / other).stat().st_ino == inode  # taken over, not copied
    assert names(out.parent) == [".out.lock", "out"]
    assert open_tokens(out).manifest == manifest


def test_mending_where_files_cannot_be_linked(
    preparation: Any, tmp_path: Path, clean: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    (tmp_path / "clean" / "out" / "web.train.00000.bin").unlink()
    preparation(tmp_path / "clean" / "out")
    assert contents(tmp_path / "clean" / "out") == clean


def test_mending_killed_anywhere(preparation: Any, tmp_path: Path, clean: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Never does a shard that was sound get lost or changed, and the next try ends with the same bytes."""
    monkeypatch.setattr(faults, "CALLS", (*faults.CALLS, (os, "link")))
    k, killed = 0, True
    while killed:
        k += 1
        out = tmp_path / str(k) / "out"
        out.mkdir(parents=True)
        for name, data in clean.items():
            (out / name).write_bytes(data)
        _flip(out, "code.train.00000.bin")
        damaged = contents(out)
        killed = in_child_killed_at(k, lambda out=out: preparation(out))
        aside = out.parent / ".aside-out"
        assert not aside.exists() or {**damaged, **contents(aside)} == damaged
        if out.exists():
            assert contents(out) in (clean, damaged), k
        else:
            assert contents(aside) == damaged
            assert contents(out.parent / ".partial-out") == clean
        preparation.packed.clear()
        preparation(out)
        assert preparation.packed in ([], ["code"])
        assert contents(out) == clean, k
        if not aside.exists():
            assert names(out.parent) == [".out.lock", "out"]
    assert k > 40


def test_a_text_that_changed_is_not_mixed_in(preparation: Any, tmp_path: Path, clean: dict[str, bytes], texts: Any, jsonl: Any) -> None:
    """Other words of the same length: names and sizes of the files are as they were, the shards would not be."""
    out, source = tmp_path / "clean" / "out", preparation.folder / "code.jsonl"
    text = source.read_text()
    source.write_text("".join({"1": "2", "2": "1"}.get(letter, letter) for letter in text))
    _flip(out, "code.train.00000.bin")
    damaged = contents(out)
    for _ in range(2):
        with pytest.raises(ArtifactError) as caught:
            preparation(out)
        assert caught.value.exit_code == 3
        assert "code.train.00000.bin" in [problem.field for problem in caught.value.problems]
        for problem in caught.value.problems:
            assert "is expected" in problem.found
            assert f"delete {out}" in problem.remedy
        assert contents(out) == damaged
        assert names(out.parent) == [".out.lock", "out"]
    source.write_text(text)
    preparation(out)
    assert contents(out) == clean


def test_a_broken_manifest_is_not_guessed_at(preparation: Any, tmp_path: Path, clean: dict[str, bytes]) -> None:
    out = tmp_path / "clean" / "out"
    (out / "manifest.json").write_bytes(clean["manifest.json"].replace(b'"vocab_size": 100', b'"vocab_size": 101', 1))
    with pytest.raises(ArtifactError, match="vocab_size: found 101 where 100 is expected"):
        preparation(out)
    (out / "manifest.json").unlink()
    with pytest.raises(OutputError, match="holds no prepared data"):
        preparation(out)


def test_a_half_made_folder_under_the_final_name(preparation: Any, begun: Path, tmp_path: Path, clean: dict[str, bytes]) -> None:
    """Renamed by hand it is refused, and completed by the same command."""
    begun.rename(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"domains\.web: found no such domain.*complete it"):
        open_tokens(tmp_path / "out")
    preparation(tmp_path / "out")
    assert preparation.packed == ["web"]
    assert contents(tmp_path / "out") == clean


def test_a_link_is_followed(preparation: Any, tmp_path: Path, clean: dict[str, bytes]) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "clean" / "out")
    (tmp_path / "out" / "web.train.00000.bin").unlink()
    preparation(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "clean" / "out") == clean


def test_mending_keeps_the_order_of_the_domains(preparation: Any, tmp_path: Path, clean: dict[str, bytes]) -> None:
    """Weights and cursors of a run are saved in this order."""
    out = tmp_path / "clean" / "out"
    (out / "web.train.00000.bin").unlink()
    values = preparation.config.model_dump()
    values["domains"] = dict(reversed(values["domains"].items()))
    prepare(parse(DataConfig, values), preparation.tokenizer, 100, out, seed=1)
    assert contents(out) == clean


def test_leavings_of_other_versions_are_swept(preparation: Any, tmp_path: Path) -> None:
    (tmp_path / ".tmp-out-0123456789ab").mkdir()
    preparation(tmp_path / "out")
    assert names(tmp_path) == [".out.lock", "out", "text"]
