"""Files: all or nothing, at the right place, one process at a time, and storage failures that say so."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from faults import in_child_killed_at
from shearling.errors import ArtifactError, OutputError, StorageError
from shearling.io.files import (
    RunLock,
    check_writable,
    publish_directory,
    read_json,
    refuse_existing,
    replace_directory,
    safe_join,
    sha256_file,
    stage_directory,
    storage_errors,
    sweep_temporary,
    write_atomic,
)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_write_atomic(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "schön")
    write_atomic(path, b"second")
    assert listing(tmp_path) == {"a.txt": b"second"}
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # not the 0600 of temporary files


def test_write_atomic_keeps_the_old_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        write_atomic(path, "new")
    assert listing(tmp_path) == {"a.txt": b"old"}


def staged_with(final: Path, text: str) -> Path:
    staged = stage_directory(final)
    (staged / "sub").mkdir()
    (staged / "sub" / "a").write_text(text)
    return staged


def test_publish_refuses_what_exists(tmp_path: Path) -> None:
    final = tmp_path / "new" / "out"
    publish_directory(staged_with(final, "1"), final)
    for blocked in (final, tmp_path / "file", tmp_path / "empty", tmp_path / "dangling"):
        if blocked.name == "file":
            blocked.write_text("x")
        elif blocked.name == "empty":
            blocked.mkdir()
        elif blocked.name == "dangling":
            blocked.symlink_to(tmp_path / "nowhere")
        with pytest.raises(OutputError, match="exists already"):
            publish_directory(staged_with(blocked, "2"), blocked)
        with pytest.raises(OutputError, match="exists already"):
            refuse_existing(blocked)
    refuse_existing(tmp_path / "free")
    assert listing(final) == {"sub/a": b"1"}


def test_replace(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for text in ("1", "2", "3"):
        replace_directory(staged_with(final, text), final)
        assert listing(tmp_path) == {"out/sub/a": text.encode()}


def test_replace_puts_the_old_back_when_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "out"
    publish_directory(staged_with(final, "1"), final)
    staged = staged_with(final, "2")
    original = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(source) == staged:
            raise OSError(errno.EIO, "broken")
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="the disk failed"):
        replace_directory(staged, final)
    assert listing(final) == {"sub/a": b"1"}


@pytest.mark.parametrize("replace", [False, True])
def test_killed_at_any_filesystem_call(tmp_path: Path, replace: bool) -> None:
    """Whatever call is the last, `final` is old, new, or (only in a swap, until the sweep) away; the sweep leaves no rubbish."""
    k, killed, seen = 0, True, set()
    while killed:
        k += 1
        final = tmp_path / str(k) / "out"
        final.parent.mkdir()
        if replace:
            publish_directory(staged_with(final, "old"), final)
        publish = replace_directory if replace else publish_directory
        killed = in_child_killed_at(k, lambda final=final, publish=publish: publish(staged_with(final, "new"), final))
        sweep_temporary(final.parent)
        left = listing(final.parent)
        assert left in ([{"out/sub/a": b"old"}] if replace else [{}]) + [{"out/sub/a": b"new"}]
        seen.add(left.get("out/sub/a"))
    assert seen == {b"old" if replace else None, b"new"} and k > 8


def test_sweep_for_one_name_leaves_others(tmp_path: Path) -> None:
    for name in (".tmp-a-0123456789ab", ".tmp-ab-0123456789ab", ".tmp-a-b-0123456789ab", "a", ".aside-b"):
        (tmp_path / name).mkdir()
    assert [path.name for path in sweep_temporary(tmp_path, "a")] == [".tmp-a-0123456789ab"]
    sweep_temporary(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert sweep_temporary(tmp_path / "nowhere") == []


EVIL = ["../x", "/etc/passwd", "//etc/passwd", "a/../../x", "..", ".", "", "a/", "a//b", "a/./b", "a\0b", "..\\x", "C:x", "c:\\x"]
LOOK_ALIKES = ["..／x", "․․/x", "‥/x", "．．/x", "／etc/passwd", "＼＼host＼x", "Ｃ：x", "C：x"]
"""Characters that some systems, or a later normalisation, take for '/', '.', a backslash or ':'."""
EVIL += [*LOOK_ALIKES, "\udcff", "\ud800", "n" * 256, "n" * 10**6, "a/" * 2000 + "a"]
EVIL_LINKS = ["out", "inner/out", "inner/up/secret", "loop", "dangling"]
NO_NAMES: list[Any] = [7, None, ["a"]]


@pytest.mark.parametrize("name", [*EVIL, *EVIL_LINKS, *NO_NAMES], ids=lambda name: ascii(name)[:30])
def test_safe_join_refuses(tmp_path: Path, name: Any) -> None:
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "inner" / "out").symlink_to("../../secret")
    (root / "inner" / "up").symlink_to("../..")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("../nowhere")
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(ArtifactError, match="refuses to open") as refused:
        safe_join(root, name)
    assert refused.value.exit_code == 3 and len(str(refused.value).encode()) < 1500


def test_safe_join_allows_files_inside_and_the_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "f00").write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00")
    (snapshot / "elsewhere").symlink_to("../../refs/main")
    assert safe_join(snapshot, "model.safetensors").read_text() == "weights"
    with pytest.raises(ArtifactError, match="leads out"):
        safe_join(snapshot, "elsewhere")
    (tmp_path / "link").symlink_to(snapshot)
    assert safe_join(tmp_path / "link", "model.safetensors").read_text() == "weights"
    for name in ("a/b.txt", "ü.safetensors", "重み-1.safetensors", "a..b", "...", "n" * 200):
        assert safe_join(tmp_path, name) == tmp_path / name


def test_read_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, "ü", "\\ud83d\\ude00"], "b": 2}', encoding="utf-8")
    assert read_json(path) == {"a": [1, "ü", "😀"], "b": 2}
    with pytest.raises(ArtifactError, match="5 brackets and commas, where at most 3"):
        read_json(path, parts=3)
    path.write_text('{"a": [1], "a": 2}')
    with pytest.raises(ArtifactError, match="'a' appears twice"):
        read_json(path)
    for broken in (b"", b"{", b"\xff{}", b"[" * 100_000, b"1" * 10_000, b'{"a": tru}', b'["\\ud800"]'):
        path.write_bytes(broken)
        with pytest.raises(ArtifactError, match=r"a\.json: not valid JSON"):
            read_json(path)
    for missing in (tmp_path / "none.json", path / "below"):
        with pytest.raises(ArtifactError, match="is missing"):
            read_json(missing)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_json(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_json(tmp_path / "a\0b")
    monkeypatch.setattr("shearling.io.files.JSON_LIMIT", 3)
    path.write_text("[ ]")
    assert read_json(path) == []
    path.write_text("[  ]")
    with pytest.raises(ArtifactError, match=r"4 bytes.*at most 3 bytes"):
        read_json(path)
    assert read_json(path, limit=4) == []


def test_check_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for fine in (tmp_path, tmp_path / "a" / "b", tmp_path / "file"):
        check_writable(fine)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for bad in (tmp_path / "file" / "b", Path("/proc/x/y"), tmp_path / "dangling" / "x", Path("a\0b"), tmp_path / ("n" * 300) / "x"):
        with pytest.raises(StorageError, match="cannot write here"):
            check_writable(bad)
    with pytest.raises(StorageError, match="bytes are needed"):
        check_writable(tmp_path / "a", needed=10**18)


def test_check_writable_on_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission bits do not stop root, so: the error of such a file system, and where namespaces allow it, a real one."""

    def read_only(*arguments: Any, **options: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", read_only)
        with pytest.raises(StorageError, match="the file system is read-only; choose another place") as refused:
            check_writable(tmp_path / "a" / "b")
    assert refused.value.exit_code == 6
    (tmp_path / "mount").mkdir()
    code = "import sys; from shearling.io.files import check_writable; check_writable(sys.argv[1])"
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 77; exec "$2" -c "$3" "$1/new/out"'
    arguments = [str(tmp_path / "mount"), sys.executable, code]
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare for a mount of its own")
    command = [unshare, "--map-root-user", "--mount", "sh", "-c", script, "sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("mounts are not allowed here")
    assert "StorageError" in done.stderr and "the file system is read-only" in done.stderr


def test_storage_errors(tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG):
        with pytest.raises(StorageError, match=r"out: cannot write \(7 bytes are needed\)"), storage_errors("out", 7):
            raise OSError(number, "x")
    with pytest.raises(StorageError, match="disk is full"), storage_errors("out"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(FileNotFoundError), storage_errors("out"):
        raise FileNotFoundError(errno.ENOENT, "x")
    with pytest.raises(KeyError), storage_errors("out"):
        raise KeyError("x")
    with pytest.raises(StorageError, match=r"^inner: [^:]*: the disk is full"), storage_errors("outer"), storage_errors("inner"):
        raise OSError(errno.ENOSPC, "x")


def test_disk_full_in_write_atomic(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_atomic(tmp_path / "a", b"x" * 2000)
        except StorageError as error:
            os._exit(error.exit_code if "2000 bytes are needed" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6 and listing(tmp_path) == {}


HOLD = """
import sys, time
from shearling.io.files import RunLock
from shearling.errors import OutputError
try:
    with RunLock(sys.argv[1]):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
except OutputError as error:
    sys.exit(error.exit_code)
"""


def holder(path: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_lock_is_held_against_another_process_and_free_after_kill(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock"
    with holder(path, 60) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        start = time.monotonic()
        with pytest.raises(OutputError, match=f"in use by process {other.pid} on {socket.gethostname()}"), RunLock(path):
            pass
        assert time.monotonic() - start < 1
        other.send_signal(signal.SIGKILL)
        other.wait()
    with RunLock(path):
        assert path.read_text().split() == [socket.gethostname(), str(os.getpid())]
        with pytest.raises(OutputError, match=f"process {os.getpid()}"), RunLock(path):
            pass
    with RunLock(path):  # free again after leaving
        pass


def test_of_many_starters_exactly_one_wins(tmp_path: Path) -> None:
    """Forked starters that all try at once; each winner holds until all have tried."""
    path, go, done = tmp_path / "lock", os.pipe(), os.pipe()
    children = []
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            os.close(go[1])
            os.read(go[0], 1)  # returns when the parent closes its end
            try:
                with RunLock(path):
                    os.write(done[1], b"w")
                    time.sleep(1)
                    os._exit(0)
            except OutputError:
                os._exit(5)
            finally:
                os._exit(1)
        children.append(pid)
    os.close(go[1])
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
    assert codes == [0] + [5] * 19
    for fd in (go[0], *done):
        os.close(fd)


def test_orphan_of_a_dead_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with RunLock(tmp_path / "lock"):
            worker = os.fork()
            if worker == 0:
                time.sleep(30)
                os._exit(0)
            os.write(write, json.dumps(worker).encode())
            time.sleep(30)
        os._exit(0)
    worker = json.loads(os.read(read, 100))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        with RunLock(tmp_path / "lock"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(read)
        os.close(write)
