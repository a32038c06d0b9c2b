"""Files: what is published is complete, what is read is where it says it is, and storage failures say so.

A name that begins with `.tmp-` is work in progress and worth nothing; a name without it is complete. `.aside-NAME` is what
`replace_directory` moved out of the way; if a kill left it without a successor, `sweep_temporary` brings it back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import reprlib
import secrets
import shutil
import socket
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from shearling.errors import ArtifactError, OutputError, Problem, StorageError

TEMPORARY = ".tmp-"
ASIDE = ".aside-"
JSON_LIMIT = 3 * 2**20
"""Largest JSON text that is read, in bytes, unless a caller allows more."""
JSON_PARTS = 120_000
"""Most brackets and commas in a JSON text. Both limits together keep what any text of it costs to parse below 50 MB of memory."""

NAME_LIMIT = 300
"""Longest name read from a file that is followed, in characters; file systems take 255 bytes between two slashes."""

_STORAGE = {
    errno.ENOSPC: "the disk is full; free space there or choose another place",
    errno.EDQUOT: "the disk quota is used up; free space there or choose another place",
    errno.EFBIG: "the file would be larger than is allowed here; raise the limit (ulimit -f) or choose another place",
    errno.EIO: "the disk failed to write; choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "permission denied; choose a place that you may write to",
    errno.EPERM: "permission denied; choose a place that you may write to",
}


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits; reads 1 MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: str | Path, *, limit: int | None = None, parts: int | None = None) -> Any:
    """Read a JSON file in UTF-8; raise `ArtifactError` where it is missing, too large, or broken, or names a key twice.

    `limit`: bytes that the file may have, `JSON_LIMIT` if left out; `parts`: brackets and commas, `JSON_PARTS` if left out.
    """
    path = Path(path)
    limit = JSON_LIMIT if limit is None else limit
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        problem = Problem(path.name, found, "Check the path, or get the file again.")
        raise ArtifactError(f"{path}: {'is missing' if missing else 'cannot be read'}", [problem]) from None
    if len(data) > limit:
        remedy = f"A JSON file here has at most {limit} bytes; get the file again."
        raise ArtifactError(f"{path}: cannot be read", [Problem(path.name, f"{max(size, len(data))} bytes", remedy)])
    return parse_json(data, str(path), parts=parts)


def parse_json(data: bytes, where: str, *, parts: int | None = None) -> Any:
    """Parse JSON bytes; raise `ArtifactError` that names `where` for anything that is not sound JSON in UTF-8.

    Refused beside what is no JSON: a key named twice in an object, where the last would silently win; half a surrogate pair,
    which no file or message can hold; and more than `parts` (left out: `JSON_PARTS`) brackets and commas.
    """
    most = JSON_PARTS if parts is None else parts
    try:
        if (found := sum(map(data.count, (b"[", b"{", b",")))) > most:
            raise ValueError(f"{found} brackets and commas, where at most {most} are read")
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        return values
    except (ValueError, RecursionError, MemoryError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArtifactError(f"{where}: not valid JSON", [Problem("JSON", text, "The file is damaged; get it again.")]) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key[:80]!r} appears twice")
        values[key] = value
    return values


def safe_join(root: str | Path, name: str) -> Path:
    """`root / name`, for a name read from a file; raise `ArtifactError` if it could lead out of `root`.

    Refuses absolute names, `..`, backslashes, drive letters, characters that some systems take for one of these, and symbolic
    links that leave `root`. Links into the blob store of a Hugging Face cache are followed, since every file of a downloaded
    snapshot is one.
    """
    root = Path(root)
    reason = None
    if not isinstance(name, str) or len(name) > NAME_LIMIT or _is_evil(name) or _is_evil(unicodedata.normalize("NFKC", name)):
        reason = "the name of a file inside this directory is needed, without '..' or a leading '/'"
    else:
        try:
            name.encode()
            target, inside = (root / name).resolve(), root.resolve()
            allowed = [inside] + ([inside.parents[1] / "blobs"] if inside.parent.name == "snapshots" else [])
            if not any(target.is_relative_to(folder) for folder in allowed):
                reason = f"it is a link that leads out of the directory, to {target}"
            elif target.is_symlink():
                reason = "it is a link that leads to itself"
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, half a surrogate pair
            reason = f"it cannot be followed ({str(error)[:200]})"
    if reason:
        shown = reprlib.repr(name) if not isinstance(name, str) or len(name) > NAME_LIMIT else repr(name)
        raise ArtifactError(f"{root}: refuses to open {shown}", [Problem("file name", shown, f"{reason[0].upper()}{reason[1:]}.")])
    return root / name


def _is_evil(name: str) -> bool:
    parts = name.split("/")
    return any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name or re.match("[A-Za-z]:", name) is not None


@contextlib.contextmanager
def storage_errors(path: str | Path, needed: int | None = None) -> Iterator[None]:
    """Turn "disk full", "read-only", "permission denied" and the like into a `StorageError` that names `path`.

    `needed`: bytes that the work inside writes in all, where known; the message gives it.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _errno_in_text(error)
        if number not in _STORAGE:
            raise
        size = f" ({needed} bytes are needed)" if needed else ""
        raise StorageError(f"{path}: cannot write{size}: {_STORAGE[number]}") from error


def _errno_in_text(error: Exception) -> int | None:
    """The Rust writer of safetensors reports an OS error as text only: "... (os error 28)"."""
    match = re.search(r"\(os error (\d+)\)", str(error)) or re.search(r"code: (\d+), kind:", str(error))
    return int(match[1]) if match else None


def check_writable(path: str | Path, needed: int = 0) -> None:
    """Raise `StorageError` unless something can be written at `path` (a file or directory to come).

    Tries it out with an empty file in the nearest directory that exists: permission bits alone do not tell (root, read-only
    mounts, /proc). `needed`: bytes that must be free there.
    """
    folder = Path(path)
    try:
        while folder != folder.parent:
            try:
                folder.lstat()
                break
            except (FileNotFoundError, NotADirectoryError):  # a name too long or with a NUL is an error of its own
                folder = folder.parent
        if folder == Path(path) and not folder.is_dir():
            folder = folder.parent
        if not folder.is_dir():
            raise StorageError(f"{path}: cannot write here: {folder} is not a directory; choose another place")
        probe = folder / f"{TEMPORARY}{Path(path).name}-{secrets.token_hex(6)}"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.unlink(probe)
        free = shutil.disk_usage(folder).free
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = _STORAGE.get(number or 0, f"{(error.strerror if isinstance(error, OSError) else None) or error}; choose another place")
        raise StorageError(f"{path}: cannot write here: {reason}") from None
    if needed > free:
        raise StorageError(f"{path}: {needed} bytes are needed and {free} are free; free space there or choose another place")


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a whole file so that any reader, and any kill, sees the old content or the new, never a part."""
    path = Path(path)
    staged = path.parent / f"{TEMPORARY}{path.name}-{secrets.token_hex(6)}"
    with storage_errors(path, len(data)):
        try:
            with open(staged, "xb") as file:
                file.write(data.encode("utf-8") if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


def refuse_existing(final: Path) -> None:
    """Raise `OutputError` where there is anything at `final`, be it a link that leads nowhere."""
    if os.path.lexists(final):
        raise OutputError(f"{final}: exists already; choose another output, or ask to overwrite it")


def stage_directory(final: str | Path) -> Path:
    """Make an empty `.tmp-` directory beside `final`, to be filled and handed to `publish_directory`; makes missing parents."""
    final = Path(final)
    staged = final.parent / f"{TEMPORARY}{final.name}-{secrets.token_hex(6)}"
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
    return staged


def publish_directory(staged: Path, final: Path) -> None:
    """Give a finished directory its name: every file to disk, then one rename. Raises `OutputError` where `final` exists."""
    with storage_errors(final):
        refuse_existing(final)
        _fsync_tree(staged)
        refuse_existing(final)  # the flush may have taken long; a rename would go over an empty directory
        try:
            os.rename(staged, final)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                refuse_existing(final)
            raise
        _fsync(final.parent)


def replace_directory(staged: Path, final: Path) -> None:
    """Like `publish_directory`, but a directory already at `final` gives way: moved aside, then deleted once the new one stands."""
    if not os.path.lexists(final):
        publish_directory(staged, final)
        return
    aside = final.parent / f"{ASIDE}{final.name}"
    with storage_errors(final):
        _fsync_tree(staged)
        if os.path.lexists(aside):  # `final` stands, so this is an old leftover
            remove_tree(aside)
        os.rename(final, aside)
        try:
            os.rename(staged, final)
        except BaseException:
            os.rename(aside, final)
            raise
        _fsync(final.parent)
        remove_tree(aside)


def remove_tree(path: Path) -> None:
    """Delete a file, link or directory; a link is never followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep_temporary(folder: str | Path, name: str = "") -> list[Path]:
    """Remove what killed writers left in `folder`: every `.tmp-*` (only those staged for `name`, if given), and `.aside-*`.

    What was set aside and has no successor is renamed back. Call it only where no one else writes: under a `RunLock`, or for a
    `name` of one's own. Returns the paths that were removed or restored.
    """
    folder, swept = Path(folder), []
    if not folder.is_dir():
        return []
    with storage_errors(folder):
        for path in sorted(folder.iterdir()):
            if path.name.startswith(ASIDE) and (not name or path.name == ASIDE + name):
                final = folder / path.name.removeprefix(ASIDE)
                if os.path.lexists(final):
                    remove_tree(path)
                else:
                    os.rename(path, final)
            elif path.name.startswith(TEMPORARY) and (not name or re.fullmatch(re.escape(TEMPORARY + name) + "-[0-9a-f]{12}", path.name)):
                remove_tree(path)
            else:
                continue
            swept.append(path)
    return swept


class RunLock:
    """One process at a time: `with RunLock(path): ...`. Another gets `OutputError` at once, naming host and process.

    The kernel holds the lock (flock), so it is free the moment its holder ends, however that happens; the file stays.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd: int | None = None

    def __enter__(self) -> RunLock:
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with storage_errors(self.path):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            holder = self._holder(fd)
            os.close(fd)
            raise OutputError(f"{self.path.parent}: in use by {holder}; wait for it to end, or choose another output") from None
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        _held.add(fd)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        fd, self._fd = self._fd, None
        if fd is not None and fd in _held:  # a forked child has let go of it already
            _held.discard(fd)
            os.close(fd)

    @staticmethod
    def _holder(fd: int) -> str:
        for _ in range(20):  # the holder writes its name just after taking the lock
            words = os.pread(fd, 300, 0).decode("utf-8", "replace").split()
            if len(words) == 2:
                return f"process {words[1]} on {words[0]}"
            time.sleep(0.01)
        return "another process"


_held: set[int] = set()


def _let_go() -> None:
    """In a forked child (a loader's worker, say): close the locks, lest an orphan keep a dead run's directory locked."""
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def _fsync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _fsync(Path(parent) / name)
        _fsync(Path(parent))


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush a directory
            raise
    finally:
        os.close(fd)
