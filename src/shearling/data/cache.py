"""Shards of prepared text that lies elsewhere, kept on this machine's disk: fetched once, checked at every open, within a limit.

Checked means: its bytes were hashed, by this process or another of the machine, since inode, time and size of the file last changed.

    FOLDER/shards/SHA256/rows.bin     a shard, whole; the name is that of its content, so no name of a manifest becomes a path
    FOLDER/shards/SHA256/.tmp-...     a shard on its way, as large as it will be
    FOLDER/shards/SHA256.lock         held by who fetches, checks or removes it
    FOLDER/shards/.room.lock          held by who makes room

Processes of one machine share a folder, whatever runs they belong to. A shard appears under its name by a rename, so none sees half of
it, and the kernel frees the locks of a process that ends. Least recently used shards are removed when the limit would be passed. On
POSIX a file that is removed stays readable to whoever has it open or mapped, and its room is free once they let go; who was given the
path and finds nothing there asks again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from shearling.data.remote import Remote, check_name
from shearling.data.verified import Verified
from shearling.errors import ArtifactError, ConfigError, OutputError, Problem
from shearling.io.files import TEMPORARY, RunLock, remove_tree, storage_errors, sweep_temporary

SHARD = "rows.bin"
LONG_AGO = 10 * 10**9
"""Nanoseconds by which a shard's time of change is set back when it is published, so that `Verified` may remember it at once: whoever
changes it later gives it another."""
_PAUSES = (0.01, 0.25)
"""Seconds between looks at a lock that another holds: the first, and the longest."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


class ShardCache:
    """The shards of one remote folder, as local files. Any number of threads and processes may use it at a time.

    Args:
        url: of the folder that holds the shards; see `Remote`.
        folder: of the cache; made if it is not there.
        limit_bytes: what all shards in the folder may take together, those on their way included.
        tidy: called before and after room is made for a shard, to `touch` what is in use and to let go of what was removed.

    Raises:
        ConfigError: the URL is of a kind that cannot be read here.
    """

    def __init__(self, url: str, folder: str | Path, limit_bytes: int, tidy: Callable[[], None] | None = None) -> None:
        self.remote = Remote(url)
        self.folder = Path(folder).expanduser().absolute() / "shards"
        self.limit_bytes = limit_bytes
        self._tidy = tidy or (lambda: None)
        self._known: dict[str, tuple[int, int, int]] = {}
        """Digest -> inode, time and size of the file as this process last checked it."""

    def path(self, file: str, size: int, sha256: str) -> Path:
        """The local file of a shard: checked by this process, and fetched where it is not there or damaged.

        Args:
            file: its name in the remote folder.
            size: bytes that it must have.
            sha256: 64 hex digits that it must have.

        Raises:
            ConfigError: it is larger than the whole limit.
            ArtifactError: there is no such file, or its content is another.
            StorageError: it cannot be read from the network, or not be written here.
        """
        check_name(file, str(self.remote))
        if not (isinstance(sha256, str) and _DIGEST.fullmatch(sha256)):
            raise ArtifactError(
                f"{self.remote}/{file}: cannot be used", [Problem("sha256", f"{sha256!r:.80}", "64 hex digits are needed.")]
            )
        self.check_size(file, size)
        home = self.folder / sha256
        found = home / SHARD
        if (stamp := _stamp(found)) is None or self._known.get(sha256) != stamp:
            with storage_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            with _waiting(RunLock(self.folder / f"{sha256}.lock")):
                if not _is_sound(found, size, sha256):
                    self._known.pop(sha256, None)
                    self._fetch(home, file, size, sha256)
                if (stamp := _stamp(found)) is not None:
                    self._known[sha256] = stamp
        self.touch(sha256)
        return found

    def touch(self, sha256: str) -> None:
        """Say that a shard is in use: others are removed before it."""
        with contextlib.suppress(OSError):  # removed by another just now, or the folder is not ours to write
            os.utime(self.folder / sha256)

    def check_size(self, file: str, size: int) -> None:
        """Raise `ConfigError` where a shard of `size` bytes is larger than the whole limit."""
        if size > self.limit_bytes:
            found = f"a limit of {self.limit_bytes} bytes where {file} alone has {size}"
            remedy = "Allow more, for the shards of all domains if the disk has room for them."
            raise ConfigError(f"{self.remote}: the cache is too small", [Problem("data.cache_gib", found, remedy)])

    def _fetch(self, home: Path, file: str, size: int, sha256: str) -> None:
        """Publish the shard; the caller holds its lock."""
        with storage_errors(home, size):
            remove_tree(home)  # a damaged one, and what killed fetches left
            home.mkdir()
            staged = home / f"{TEMPORARY}{SHARD}-{secrets.token_hex(6)}"
            try:
                self._reserve(staged, size)
                wrong = ""
                for _ in range(2):  # what was changed on the way comes right the second time
                    wrong = self.remote.patiently(file, lambda: self._download(staged, file, size, sha256))
                    if not wrong:
                        break
                else:
                    remedy = "The file there is damaged or another: prepare that text again, or upload its shards again, whole."
                    raise ArtifactError(f"{self.remote}/{file}: cannot be used", [Problem(file, wrong, remedy)])
                old = time.time_ns() - LONG_AGO
                os.utime(staged, ns=(old, old))
                os.rename(staged, home / SHARD)
            except BaseException:
                remove_tree(home)
                raise

    def _download(self, staged: Path, file: str, size: int, sha256: str) -> str:
        """Write the remote file into `staged`, flushed to disk; returns what is wrong with it, or nothing."""
        digest, length = hashlib.sha256(), 0
        with open(staged, "r+b") as out:
            for block in self.remote.blocks(file):
                length += len(block)
                if length > size:
                    return f"more than the {size} bytes that are expected"
                digest.update(block)
                out.write(block)
            if length < size:
                return f"{length} bytes where {size} are expected"
            if digest.hexdigest() != sha256:
                return f"sha256 {digest.hexdigest()} where {sha256} is expected"
            out.flush()
            os.fsync(out.fileno())
        return ""

    def _reserve(self, staged: Path, size: int) -> None:
        """Make room for `size` bytes and take it with an empty file of that size; waits for others that hold room while they fetch."""
        self._tidy()
        for pause in _pauses():
            with _waiting(RunLock(self.folder / ".room.lock")):
                enough = self._make_room(size)
                if enough:
                    with open(staged, "xb") as out:
                        out.truncate(size)
            self._tidy()
            if enough:
                return
            time.sleep(pause)

    def _make_room(self, size: int) -> bool:
        """Remove least recently used shards until `size` more bytes are within the limit, and say whether they are."""
        homes = [(home, _used(home), _bytes_in(home)) for home in self.folder.iterdir() if _DIGEST.fullmatch(home.name)]
        taken = sum(length for _, _, length in homes)
        for home, _, length in sorted(homes, key=lambda entry: entry[1]):
            if not length or (taken + size <= self.limit_bytes and (home / SHARD).exists()):
                continue  # with room enough, only what a killed fetch left is looked for
            lock = RunLock(self.folder / f"{home.name}.lock")
            try:
                lock.__enter__()
            except OutputError:  # someone fetches or checks it right now
                continue
            try:
                remove_tree(home)
                taken -= length
            finally:
                lock.__exit__(None, None, None)
        return taken + size <= self.limit_bytes


def _is_sound(found: Path, size: int, sha256: str) -> bool:
    try:
        if found.is_symlink() or found.stat().st_size != size:
            return False
        sweep_temporary(found.parent)
        with Verified(found.parent) as verified:
            return verified.sha256(found, sha256) == sha256
    except OSError:
        return False


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _used(home: Path) -> int:
    try:
        return home.stat().st_mtime_ns
    except OSError:
        return 0


def _bytes_in(home: Path) -> int:
    total = 0
    with contextlib.suppress(OSError), os.scandir(home) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def _pauses() -> Iterator[float]:
    pause, longest = _PAUSES
    while True:
        yield pause
        pause = min(pause * 1.5, longest)


@contextlib.contextmanager
def _waiting(lock: RunLock) -> Iterator[None]:
    """The lock, held; waits for as long as another thread or process has it."""
    for pause in _pauses():
        try:
            lock.__enter__()
            break
        except OutputError:
            time.sleep(pause)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)
