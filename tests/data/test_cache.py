"""The cache of remote shards: what it gives is what was asked for, fetched once, within its limit, whatever the network and others do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepared import Served, serving
from shearling.data import cache as cache_module
from shearling.data import remote as remote_module
from shearling.data.cache import SHARD, ShardCache
from shearling.data.remote import is_url
from shearling.errors import ArtifactError, ConfigError, StorageError

SIZE = 2**16


def add(folder: Path, name: str, size: int = SIZE) -> tuple[str, int, str]:
    """Arguments of `path` for a new shard of random bytes."""
    data = np.random.default_rng([*name.encode()]).bytes(size)
    (folder / name).write_bytes(data)
    return name, size, hashlib.sha256(data).hexdigest()


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "remote").mkdir()
    with serving(tmp_path / "remote") as served:
        yield served


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between tries, which are not waited for."""
    waits: list[float] = []
    monkeypatch.setattr(remote_module, "time", type("Clock", (), {"sleep": staticmethod(waits.append)}))
    return waits


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "shards").rglob(SHARD))


def flip(file: Path, position: int = 5) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["http", "file", "memory"])
def test_a_shard_is_fetched_once_and_is_what_it_should_be(shards: Served, tmp_path: Path, kind: str) -> None:
    shard = add(shards.folder, "web.train.00000.bin", 5 * 2**20)
    sound = (shards.folder / shard[0]).read_bytes()
    url = {"http": shards.url, "file": f"file://{shards.folder}", "memory": "memory://prepared/text"}[kind]
    if kind == "memory":
        fsspec.filesystem("memory").pipe(f"/prepared/text/{shard[0]}", sound)
    cache = ShardCache(url, tmp_path / "cache", 2**24)
    found = cache.path(*shard)
    assert found.read_bytes() == sound and found.name == SHARD and found.parent.name == shard[2]
    (shards.folder / shard[0]).unlink()
    if kind == "memory":
        fsspec.filesystem("memory").rm("/prepared", recursive=True)
    for again in (cache, ShardCache(url + "/", tmp_path / "cache", 2**24)):
        assert again.path(*shard) == found and found.read_bytes() == sound
    assert len(shards.asked) == (kind == "http")


def test_what_is_checked_once_is_remembered_and_what_changes_is_fetched_again(
    shards: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process reads a shard once; the next one not at all, while it is the same file."""
    read: list[Path] = []
    sha256_file = cache_module.Verified.sha256.__globals__["sha256_file"]
    monkeypatch.setitem(cache_module.Verified.sha256.__globals__, "sha256_file", lambda file: read.append(file) or sha256_file(file))
    shard = add(shards.folder, "a.bin")
    sound = (shards.folder / "a.bin").read_bytes()
    first, second, third = (ShardCache(shards.url, tmp_path / "cache", 2**20) for _ in range(3))
    found = first.path(*shard)
    assert not read  # it was hashed on its way
    for cache in (second, second, third, first):
        cache.path(*shard)
    assert len(read) == 1
    for number, damage in enumerate((lambda: flip(found), lambda: found.write_bytes(sound[:-1]), found.unlink), start=2):
        damage()
        for cache in (first, second):
            assert cache.path(*shard).read_bytes() == sound
        assert len(shards.asked) == number


def test_a_link_in_the_place_of_a_shard_is_not_followed(shards: Served, tmp_path: Path) -> None:
    shard = add(shards.folder, "a.bin")
    cache = ShardCache(shards.url, tmp_path / "cache", 2**20)
    found = cache.path(*shard)
    found.unlink()
    found.symlink_to(shards.folder / "a.bin")
    assert not ShardCache(shards.url, tmp_path / "cache", 2**20).path(*shard).is_symlink() and len(shards.asked) == 2


@pytest.mark.parametrize(
    ("faults", "waits"),
    [(["500"], 1), (["503", "429", "408"], 3), (["drop"], 1), (["cut", "500", "cut"], 3), (["flip"], 0), (["flip", "cut"], 1)],
)
def test_a_network_that_fails_for_a_while_changes_nothing(
    shards: Served, tmp_path: Path, waited: list[float], faults: list[str], waits: int
) -> None:
    shard = add(shards.folder, "a.bin")
    shards.faults += faults
    assert ShardCache(shards.url, tmp_path, 2**20).path(*shard).read_bytes() == (shards.folder / "a.bin").read_bytes()
    assert len(shards.asked) == len(faults) + 1
    assert len(waited) == waits and waited == sorted(waited)


@pytest.mark.parametrize(
    ("fault", "error", "said", "tries"),
    [
        ("500", StorageError, r"500.*tried 5 times", 5),
        ("cut", StorageError, r"ended 32768 bytes early, tried 5 times", 5),
        ("404", ArtifactError, "is missing", 1),
        ("403", StorageError, r"403.*rights", 1),
        ("flip", ArtifactError, r"a\.bin: found sha256 [0-9a-f]{64} where", 2),
    ],
)
def test_a_network_that_fails_for_good_is_told_with_the_url(
    shards: Served, tmp_path: Path, waited: list[float], fault: str, error: type[Exception], said: str, tries: int
) -> None:
    """Nothing is left behind, and what is no use is not tried again; neither a user nor a signature is told."""
    shard = add(shards.folder, "a.bin")
    shards.faults += [fault] * 9
    url = shards.url + "?signature=secret"
    with pytest.raises(error, match=said) as caught:
        ShardCache(url, tmp_path / "cache", 2**20).path(*shard)
    assert f"{shards.url}/a.bin" in str(caught.value) and "secret" not in str(caught.value)
    assert shards.asked == ["/data/a.bin?signature=secret"] * tries and waited == sorted(waited)
    assert not [path for path in (tmp_path / "cache").rglob("*") if not path.name.endswith(".lock") and path.name != "shards"]


def test_a_server_that_is_not_there(shards: Served, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9/data/a\.bin: cannot be read .*refused.*tried 5 times"):
        ShardCache("http://127.0.0.1:9/data", tmp_path, 2**20).path("a.bin", 10, "0" * 64)


@pytest.mark.parametrize("change", [1, -1])
def test_a_shard_of_another_length_is_refused(shards: Served, tmp_path: Path, change: int) -> None:
    name, size, digest = add(shards.folder, "a.bin")
    with pytest.raises(ArtifactError, match="bytes"):
        ShardCache(shards.url, tmp_path, 2**20).path(name, size + change, digest)
    assert not list(tmp_path.rglob(SHARD))


@pytest.mark.parametrize(
    "name", ["../a.bin", "/a.bin", "sub/a.bin", "a\\b", "..", ".", "", ".hidden", "a\0b", "a?b", "a#b", "a%2fb", "a" * 300, None]
)
def test_names_of_a_manifest_do_not_lead_elsewhere(shards: Served, tmp_path: Path, name: Any) -> None:
    (shards.folder.parent / "a.bin").write_bytes(b"secret")
    for digest in (hashlib.sha256(b"secret").hexdigest(), "../" * 10 + "x" * 34):
        with pytest.raises(ArtifactError, match="refuses to open"):
            ShardCache(f"file://{shards.folder}", tmp_path / "cache", 2**20).path(name, 6, digest)
    with pytest.raises(ArtifactError, match="64 hex digits"):
        ShardCache(f"file://{shards.folder}", tmp_path / "cache", 2**20).path("a.bin", 6, "../" * 10 + "x" * 34)
    assert not (tmp_path / "cache").exists() and not shards.asked


def test_the_least_recently_used_are_removed_and_no_more(shards: Served, tmp_path: Path) -> None:
    names = [add(shards.folder, f"{letter}.bin") for letter in "abcd"]
    cache = ShardCache(shards.url, tmp_path, 3 * SIZE + 2000)
    mapped = np.memmap(cache.path(*names[0]), np.uint8, "r")
    for shard in (names[1], names[2], names[0], names[3]):
        cache.path(*shard)
    there = {path.parent.name for path in tmp_path.rglob(SHARD)}
    assert there == {names[index][2] for index in (0, 2, 3)}
    for shard in names[1:]:
        cache.path(*shard)
        assert bytes_of(tmp_path) <= 3 * SIZE
    assert names[0][2] not in {path.parent.name for path in tmp_path.rglob(SHARD)}
    assert mapped.tobytes() == (shards.folder / "a.bin").read_bytes()  # it was removed, and reads on


def test_a_shard_larger_than_the_limit_is_refused_before_anything_is_fetched(shards: Served, tmp_path: Path) -> None:
    shard = add(shards.folder, "a.bin")
    with pytest.raises(ConfigError, match=r"data\.cache_gib: found a limit of 65535 bytes where a\.bin alone has 65536"):
        ShardCache(shards.url, tmp_path / "cache", SIZE - 1).path(*shard)
    assert not shards.asked and not (tmp_path / "cache").exists()


def test_what_a_killed_fetch_left_takes_no_room(shards: Served, tmp_path: Path) -> None:
    """Of the shard itself, and of others, whose locks died with it."""
    first, second = add(shards.folder, "a.bin"), add(shards.folder, "b.bin")
    for digest in (first[2], "7" * 64):
        left = tmp_path / "shards" / digest / f".tmp-{SHARD}-0123456789ab"
        left.parent.mkdir(parents=True)
        left.write_bytes(b"x" * SIZE)
    cache = ShardCache(shards.url, tmp_path, 2 * SIZE + 2000)
    cache.path(*first)
    cache.path(*second)
    assert bytes_of(tmp_path) == 2 * SIZE and not list(tmp_path.rglob(".tmp-*"))


def test_a_full_disk_is_told_and_leaves_nothing(shards: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = add(shards.folder, "a.bin")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "fsync", full)
        with pytest.raises(StorageError, match=f"the disk is full.*|{SIZE} bytes are needed"):
            ShardCache(shards.url, tmp_path, 2**20).path(*shard)
    assert not list(tmp_path.rglob("*rows*"))
    assert ShardCache(shards.url, tmp_path, 2**20).path(*shard).exists()


PROCESS = """
import hashlib, json, random, sys
from shearling.data.cache import ShardCache
url, folder, limit, shards, seed, count = json.loads(sys.argv[1])
cache, random = ShardCache(url, folder, limit), random.Random(seed)
for _ in range(count):
    name, size, digest = random.choice(shards)
    while True:
        try:
            with open(cache.path(name, size, digest), "rb") as file:
                data = file.read()
            break
        except FileNotFoundError:  # another made room with it
            continue
    assert hashlib.sha256(data).hexdigest() == digest, name
print("sound")
"""


def processes(number: int, *arguments: Any) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, json.dumps([*arguments[:4], seed, arguments[4]])], stdout=subprocess.PIPE, text=True
        )
        for seed in range(number)
    ]


def test_processes_that_begin_together_fetch_each_shard_once(shards: Served, tmp_path: Path) -> None:
    names = [add(shards.folder, f"{number}.bin", 2**20) for number in range(3)]
    shards.slow = 0.1
    for process in processes(3, shards.url, str(tmp_path / "cache"), 2**24, names, 20):
        assert process.communicate(timeout=50)[0] == "sound\n"
    assert sorted(shards.asked) == [f"/data/{number}.bin" for number in range(3)]


def test_processes_with_too_little_room_for_all_read_what_they_asked_for(shards: Served, tmp_path: Path) -> None:
    """Five shards where two have room, three processes, and one of them killed on the way."""
    names = [add(shards.folder, f"{number}.bin") for number in range(5)]
    limit = 2 * SIZE + 2000
    running = processes(3, shards.url, str(tmp_path / "cache"), limit, names, 60)
    victim = processes(1, shards.url, str(tmp_path / "cache"), limit, names, 10**6)[0]
    while len(shards.asked) < 5:
        time.sleep(0.01)
    victim.kill()
    victim.communicate()
    for process in running:
        assert process.communicate(timeout=50)[0] == "sound\n"
    assert len(shards.asked) > 5 and bytes_of(tmp_path / "cache") <= limit


def test_threads_of_one_process_fetch_a_shard_once(shards: Served, tmp_path: Path) -> None:
    shard, cache, found = add(shards.folder, "a.bin", 2**20), ShardCache(shards.url, tmp_path, 2**24), []
    shards.slow = 0.05
    threads = [threading.Thread(target=lambda: found.append(cache.path(*shard))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4 and len(shards.asked) == 1


ROOM = 3
ACTIONS = st.lists(st.tuples(st.sampled_from(("use", "use", "use", "flip", "unlink", "forget")), st.integers(0, 5)), max_size=30)


@given(ACTIONS)
@settings(max_examples=30, deadline=None)
def test_whatever_happens_to_the_files_what_is_given_is_sound(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int]]
) -> None:
    """And the limit holds, and the one used last is there."""
    folder = tmp_path_factory.mktemp("any")
    remote = folder / "remote"
    remote.mkdir()
    names = [add(remote, f"{number}.bin", 4096 + 512 * number) for number in range(6)]
    limit = sum(sorted(size for _, size, _ in names)[-ROOM:]) + 2000

    def fresh() -> ShardCache:
        return ShardCache(f"file://{remote}", folder / "cache", limit)

    cache = fresh()
    for action, number in actions:
        local = folder / "cache" / "shards" / names[number][2] / SHARD
        if action == "use":
            assert hashlib.sha256(cache.path(*names[number]).read_bytes()).hexdigest() == names[number][2]
            assert local.exists() and bytes_of(folder / "cache") <= limit
        elif action == "forget":
            cache = fresh()
        elif local.exists():
            damage: Callable[[Path], Any] = flip if action == "flip" else os.unlink
            damage(local)


def test_what_is_a_url() -> None:
    assert all(map(is_url, ("s3://bucket/data", "memory://x", "file:///x", "hf://datasets/a/b", "https://host/x")))
    assert not any(map(is_url, ("/data", "data", "C:\\data", "./s3", "~/data", "")))


def test_a_kind_of_url_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)nonsense://user/data.*Protocol not known") as caught:
        ShardCache("nonsense://me:secret@user/data", tmp_path, 10)
    assert "secret" not in caught.value.headline
