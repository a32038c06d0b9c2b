"""A folder of files at a URL, each read from its beginning to its end: tried again where the network fails, and told clearly where not.

`http` and `https` are read by `web`; every other kind of URL (`s3`, `gs`, `hf`, `memory`, `file`, ...) through fsspec.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from shearling.data import web
from shearling.errors import ArtifactError, ConfigError, Problem, StorageError

WAITS = (0.5, 2.0, 6.0, 15.0)
"""Seconds between the tries to read a file."""
_BLOCK = 2**22
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
T = TypeVar("T")


def is_url(where: str) -> bool:
    """Whether a place is a URL (`s3://bucket/data`) and not a path; a file system's own path is read where it is."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", where) is not None


class Unreachable(Exception):
    """One try to read failed on the way; `final` where another cannot help."""

    def __init__(self, reason: str, final: bool, missing: bool) -> None:
        super().__init__(reason)
        self.final, self.missing = final, missing


class Remote:
    """The files that lie in one folder of a remote place.

    Args:
        url: of the folder. What follows a `?` is kept for every file, as a signature is.

    Raises:
        ConfigError: the URL is of a kind that cannot be read here.
    """

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._file_system: Any = None
        if web.is_web(url):
            return
        if "::" in url:
            raise ConfigError(f"{self}: cannot be read", [Problem("url", "a chain of URLs", "Give the URL of a folder; unpack archives.")])
        import fsspec  # type: ignore[import-untyped]

        try:
            self._file_system, self._root = fsspec.url_to_fs(url.rstrip("/"))
        except (ImportError, ValueError, OSError) as error:
            remedy = "Give a URL that fsspec knows, and install what it needs for it, or a folder."
            raise ConfigError(f"{self}: cannot be read", [Problem("url", _text(error), remedy)]) from None

    def __str__(self) -> str:
        """The URL without what may be secret: user, password, and what follows a `?`."""
        return urlunsplit((self._parts.scheme, self._parts.netloc.rpartition("@")[2], self._parts.path.rstrip("/"), "", ""))

    def blocks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file in order, 4 MiB or less at a time, in one try. Raises `Unreachable`."""
        check_name(name, str(self))
        try:
            yield from self._blocks(name)
        except MemoryError:
            raise
        except Exception as error:  # a client may raise anything when its network fails
            missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
            raise Unreachable(_text(error), missing or isinstance(error, PermissionError), missing) from error

    def read(self, name: str, limit: int) -> bytes:
        """A small file whole; raise `ArtifactError` where it is missing or has more than `limit` bytes, `StorageError` as `patiently`."""

        def once() -> bytes:
            data = bytearray()
            for block in self.blocks(name):
                data += block
                if len(data) > limit:
                    raise ArtifactError(f"{self}/{name}: cannot be read", [Problem(name, f"more than {limit} bytes", _GET_AGAIN)])
            return bytes(data)

        return self.patiently(name, once)

    def patiently(self, name: str, work: Callable[[], T]) -> T:
        """What `work`, which reads the file `name`, gives; tried again after growing waits where it raises `Unreachable`.

        Raises:
            ArtifactError: there is no such file.
            StorageError: it could not be read.
        """
        for number in range(len(WAITS) + 1):
            try:
                return work()
            except Unreachable as error:
                if error.missing:
                    raise ArtifactError(f"{self}/{name}: is missing", [Problem(name, str(error), _GET_AGAIN)]) from error
                if error.final or number == len(WAITS):
                    tries = f", tried {number + 1} times" if number else ""
                    remedy = "check the network, the address and the rights to read there"
                    raise StorageError(f"{self}/{name}: cannot be read ({error}{tries}); {remedy}") from error
                time.sleep(WAITS[number])
        raise AssertionError("the last try returns or raises")

    def _blocks(self, name: str) -> Iterator[bytes]:
        if self._file_system is None:
            url = urlunsplit(self._parts._replace(path=f"{self._parts.path.rstrip('/')}/{name}"))
            yield from web.stream(url, 0, _BLOCK)
            return
        self._file_system.invalidate_cache(f"{self._root}/{name}")  # what is there now counts, not what was seen before
        with self._file_system.open(f"{self._root}/{name}", "rb") as stream:
            while block := stream.read(_BLOCK):
                yield block


_GET_AGAIN = "Check the address, or upload the prepared text again, whole."


def check_name(name: str, where: str) -> None:
    """Raise `ArtifactError` unless a name read from a file is that of a file beside it: letters, digits, `_`, `-`, `.` alone."""
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        remedy = "The name of a file in this folder is needed: letters, digits, '_', '-' and '.'."
        raise ArtifactError(f"{where}: refuses to open {name!r:.200}", [Problem("file name", f"{name!r:.200}", remedy)])


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
