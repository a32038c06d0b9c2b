"""Text files, local or behind any fsspec URL: which ones a path names, and their bytes, decompressed, a block at a time.

A file behind a URL is opened anew where the connection breaks (one that is read at any place, as Parquet is, asks for the part again on
web servers; other file systems of fsspec do so themselves). A file that is not what it was when it was found is an error.
"""

from __future__ import annotations

import glob
import io
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import zstandard

from shearling.data import web
from shearling.data.remote import file_system, is_url, shown_url, told
from shearling.errors import DataError, Problem

LINES = (".jsonl", ".json")
"""Kinds of file that hold one JSON object a line."""
WHOLE = (".txt", ".md", ".rst", ".py")
"""Kinds of file that are one document."""
PARQUET = ".parquet"
COMPRESSED = (".gz", ".zst")
RETRY_WAITS = (1.0, 5.0, 20.0)
"""Seconds before each new try to read on in a file behind a URL."""
_KINDS = f"Known are {', '.join(LINES + WHOLE)}, these with {' or '.join(COMPRESSED)}, and {PARQUET}."
_BLOCK, _ZSTD_BLOCK, _REMOTE_BLOCK = 2**16, 2**14, 2**22
_MARKS = ("ETag", "etag", "blob_id", "checksum", "md5Hash", "crc32c", "content_md5", "Content-MD5", "sha256", "md5")
"""What file systems call the mark that tells one content of a file from another."""

Count = Callable[[int], None]


class DamagedFile(DataError):
    """A file is damaged, cut off, or not the one that was found. What was read of it before that showed may be wrong, too: a checksum
    stands at the end of what it is of. So nothing that was made of its text may be kept."""


@dataclass(frozen=True)
class TextFile:
    """A file as it was found."""

    path: str
    """Local path, or URL."""
    size: int | None
    """Bytes; None where the server does not say."""
    mark: str | None = None
    """ETag or checksum of a file behind a URL, where its file system gives one; None for a local file."""

    @property
    def remote(self) -> bool:
        """Whether it is behind a URL."""
        return is_url(self.path)

    @property
    def shown(self) -> str:
        """The path for people to read: of a URL without what may be secret."""
        return shown_url(self.path) if self.remote else self.path

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.shown.rpartition("/")[2]

    @property
    def kind(self) -> str | None:
        """The ending that tells how to read the file, without the compression; None if it is not known."""
        return _kind(self.name)

    def __lt__(self, other: TextFile) -> bool:
        """By folders and name, whatever the folders' separators are among other characters."""
        return self.path.split("/") < other.path.split("/")


def find_files(paths: Sequence[str], field: str) -> tuple[list[TextFile], list[Problem]]:
    """The text files that `paths` name, sorted, and what is wrong with the paths; `field` names them in a recipe.

    A path is a file, a folder (every file of a known kind below it, hidden ones left out) or a glob (`**` for any depth), local or
    as a URL of a file system that can list. An existing path is taken as it is, whatever characters it has.
    """
    found: dict[str, TextFile] = {}
    problems = []
    for path in paths:
        files, more = _find_remote(path, field) if is_url(path) else _find_local(path, field)
        problems += more
        for file in files:
            if file.kind is None:
                problems.append(Problem(field, file.shown, f"This is no kind of text file that can be read. {_KINDS}"))
            found[file.path] = file
    return sorted(found.values()), problems


def _find_local(path: str, field: str) -> tuple[list[TextFile], list[Problem]]:
    matches = [Path(path)] if os.path.lexists(path) else _glob(Path(path))
    if not matches:
        return [], [Problem(field, path, "No file matches; check the path, or the folder that relative paths start from.")]
    files, problems = [], []
    for match in matches:
        inside = sorted(_walk(match)) if match.is_dir() else [match]
        if not inside:
            problems.append(Problem(field, f"{match}, a folder without text files", _KINDS))
        for file in inside:
            if file.is_file() and os.access(file, os.R_OK):
                files.append(TextFile(str(file), file.stat().st_size))
            elif _kind(file.name) is None:
                files.append(TextFile(str(file), None))
            else:
                problems.append(Problem(field, str(file), "The file cannot be read; check the link or its permissions."))
    return files, problems


def _glob(path: Path) -> list[Path]:
    """Matches of a pattern, sorted; leading parts that exist are taken as they are, so '[' in a folder's name does no harm."""
    folder, rest = Path(path.anchor), list(path.relative_to(path.anchor).parts)
    while rest and os.path.lexists(folder / rest[0]):
        folder /= rest.pop(0)
    return [folder / name for name in sorted(glob.glob(os.path.join(*rest), root_dir=folder, recursive=True))] if rest else []


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent) / name for name in files if not name.startswith(".") and _kind(name))


def _kind(name: str) -> str | None:
    base, suffix = os.path.splitext(name.lower())
    if suffix in COMPRESSED:
        suffix = os.path.splitext(base)[1]
        return suffix if suffix in LINES + WHOLE else None
    return suffix if suffix in (*LINES, *WHOLE, PARQUET) else None


def _find_remote(url: str, field: str) -> tuple[list[TextFile], list[Problem]]:
    shown = shown_url(url)
    try:
        return _list_remote(url, field)
    except FileNotFoundError:
        return [], [Problem(field, shown, "No file matches; check the address, and that you may read there.")]
    except DataError as error:
        return [], [Problem(field, shown, problem.remedy) for problem in error.problems]
    except Exception as error:  # each file system raises what its library raises; all of it means the same here
        remedy = "It cannot be reached; check the address, the network, and that you are logged in where that is needed."
        return [], [Problem(field, f"{shown} ({told(error, url)})", remedy)]


def _list_remote(url: str, field: str) -> tuple[list[TextFile], list[Problem]]:
    """As `_find_remote`; raises what the file system raises, `FileNotFoundError` where nothing matches."""
    if web.is_web(url):
        info = web.info(url)
        return [TextFile(url, info["size"], _mark(info))], []
    system, path = file_system(url)
    try:
        listed = {path: system.info(path)}
    except FileNotFoundError:
        listed = system.glob(path, detail=True) if re.search(r"[*?\[]", path) else {}
        listed = {name: info for name, info in listed.items() if not _hidden(name, path)}
    if not listed:
        raise FileNotFoundError
    files, problems = [], []
    for name, info in sorted(listed.items()):
        inside = {name: info}
        if info.get("type") == "directory":
            below = system.find(name, detail=True)
            inside = {n: i for n, i in below.items() if _kind(n.rpartition("/")[2]) and not _hidden(n, name)}
            if not inside:
                problems.append(Problem(field, f"{shown_url(system.unstrip_protocol(name))}, a folder without text files", _KINDS))
        files += [TextFile(system.unstrip_protocol(n), i.get("size"), _mark(i)) for n, i in inside.items()]
    return files, problems


def _hidden(name: str, start: str) -> bool:
    """Whether a part of `name` that `start`, a folder or a pattern, does not spell begins with a dot."""
    spelled = set(start.split("/"))
    return any(part.startswith(".") and part not in spelled for part in name.split("/"))


def _mark(info: dict[str, Any]) -> str | None:
    return next((str(info[key]) for key in _MARKS if info.get(key)), None)


def blocks(file: TextFile, count: Count) -> Iterator[bytes]:
    """The bytes of a file, decompressed, a block at a time; `count` is told of the bytes as they lie, compressed, when they are read.

    Raises:
        DamagedFile: the file is cut off or damaged, or has changed since it was found.
        DataError: it cannot be read.
    """
    suffix = os.path.splitext(file.name)[1].lower()
    raw = _counted(file, _remote_blocks(file) if file.remote else _local_blocks(file), count)
    try:
        if suffix == ".zst":
            yield from _zstd(raw)
        elif suffix == ".gz":
            yield from _gzip(raw)
        else:
            yield from raw
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        remedy = "The file is cut off or damaged; get it again."
        raise DamagedFile(f"{file.shown}: cannot be decompressed", [Problem("file", str(error), remedy)]) from None


def _counted(file: TextFile, raw: Iterator[bytes], count: Count) -> Iterator[bytes]:
    read = 0
    for block in raw:
        read += len(block)
        count(len(block))
        yield block
    check_size(file, read)


def check_size(file: TextFile, size: int) -> None:
    """Raise `DamagedFile` where a file has another number of bytes than when it was found."""
    if file.size is not None and size != file.size:
        found = f"{size} bytes, where there were {file.size} when it was found"
        raise DamagedFile(f"{file.shown}: has changed", [Problem("file", found, "Leave the text alone while it is read, and begin anew.")])


def _local_blocks(file: TextFile) -> Iterator[bytes]:
    try:
        with open(file.path, "rb", buffering=0) as opened:
            while block := opened.read(_BLOCK):
                yield block
    except OSError as error:
        raise unreadable(file, error) from None


def unreadable(file: TextFile, error: BaseException) -> DataError:
    """What to raise for a file that cannot be opened or read on, for a reason that is no fault of its content."""
    remedy = "Check the address, the network and your login." if file.remote else "Check the file and its disk."
    return DataError(f"{file.shown}: cannot be read", [Problem("file", told(error, file.path) if file.remote else str(error), remedy)])


def open_seekable(file: TextFile) -> Any:
    """Open a file for reading at any place, closed by the caller. Raises `DamagedFile` where it is not what was found, or `unreadable`."""
    try:
        if not file.remote:
            check_size(file, os.stat(file.path).st_size)
            return open(file.path, "rb")
        if not web.is_web(file.path):
            system, path = _unchanged(file)
            return system.open(path, "rb", block_size=_REMOTE_BLOCK)
        _check(file, web.info(file.path))
        if file.size is None:
            raise OSError("the server does not tell its size; download the file")
        return io.BufferedReader(web.WebFile(file.path, file.size, RETRY_WAITS), _REMOTE_BLOCK)
    except DataError:
        raise
    except Exception as error:  # whatever the library of the file system raises
        raise unreadable(file, error) from error


def _unchanged(file: TextFile) -> tuple[Any, str]:
    system, path = file_system(file.path)
    system.invalidate_cache(path)
    _check(file, system.info(path))
    return system, path


def _check(file: TextFile, info: dict[str, Any]) -> None:
    """Raise `DamagedFile` where a file behind a URL is no longer what was found."""
    if (mark := _mark(info)) != file.mark:
        found = f"the mark {mark}, where it was {file.mark} when it was found"
        raise DamagedFile(f"{file.shown}: has changed", [Problem("file", found, "Leave the text alone while it is read, and begin anew.")])
    if info.get("size") is not None:
        check_size(file, info["size"])


def _check_answer(file: TextFile, info: dict[str, Any]) -> None:
    """As `_check`, of what stands in an answer; where a server leaves the mark out of answers of parts, it is asked for the whole."""
    _check(file, web.info(file.path) if file.mark is not None and _mark(info) is None else info)


def _remote_blocks(file: TextFile) -> Iterator[bytes]:
    """The bytes of a file behind a URL. Where reading fails it is tried again from the same place, after each of `RETRY_WAITS`."""
    at, waits = 0, iter(RETRY_WAITS)
    while True:
        try:
            for block in _remote_blocks_once(file, at):
                at += len(block)
                yield block
                waits = iter(RETRY_WAITS)
            return
        except DataError:
            raise
        except Exception as error:  # whatever the library of the file system raises
            wait = None if isinstance(error, FileNotFoundError | PermissionError) else next(waits, None)
            if wait is None:
                raise unreadable(file, error) from error
            time.sleep(wait)


def _remote_blocks_once(file: TextFile, start: int) -> Iterator[bytes]:
    if web.is_web(file.path):
        try:
            yield from web.stream(file.path, start, _BLOCK, partial(_check_answer, file))
        except web.NoSuchPart:
            _check(file, web.info(file.path))  # most likely it is shorter now
            raise
        return
    system, path = _unchanged(file)
    with system.open(path, "rb", block_size=_REMOTE_BLOCK) as opened:
        if start:
            opened.seek(start)
        while block := opened.read(_BLOCK):
            yield block


def _zstd(raw: Iterator[bytes]) -> Iterator[bytes]:
    # Frame by frame by hand: the library's stream reader takes a file that is cut off for one that has ended.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, whole = decompressor.decompressobj(), False
    for block in raw:
        for start in range(0, len(block), _ZSTD_BLOCK):
            data = block[start : start + _ZSTD_BLOCK]
            while data:
                yield frame.decompress(data)
                whole, data = frame.eof, frame.unused_data
                if whole:
                    frame = decompressor.decompressobj()
    if not whole:
        raise EOFError("the file ends inside a compressed frame")


def _gzip(raw: Iterator[bytes]) -> Iterator[bytes]:
    member, begun, whole = zlib.decompressobj(31), False, False
    for data in raw:
        while data:
            if not begun and whole:
                data = data.lstrip(b"\0")  # what tapes pad a file with
                if not data:
                    break
            yield member.decompress(data, 2**20)
            begun, data = not member.eof, member.unconsumed_tail or member.unused_data
            if member.eof:
                member, whole = zlib.decompressobj(31), True
    if begun or not whole:
        raise EOFError("the file ends inside a compressed part")
