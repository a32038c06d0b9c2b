"""What URLs are and how they are shown, and a folder of files at one, each read from its beginning to its end, and tried again.

`http` and `https` are read by `web`; every other kind of URL (`s3`, `gs`, `hf`, `memory`, `file`, ...) through fsspec.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

from shearling.data import web
from shearling.errors import ArtifactError, ConfigError, DataError, Problem, StorageError

WAITS = (0.5, 2.0, 6.0, 15.0)
"""Seconds between the tries to read a file."""
_BLOCK = 2**22
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
T = TypeVar("T")


def is_url(where: str) -> bool:
    """Whether a place is a URL (`s3://bucket/data`) and not a path; a file system's own path is read where it is."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", where) is not None


def shown_url(url: str) -> str:
    """A URL without user and password, and one of a web server without its query, which may hold a signature."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    shown = f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"
    return re.split("[?#]", shown, maxsplit=1)[0] if web.is_web(url) else shown


def shown_place(where: str) -> str:
    """A folder, as it is, or the URL of one without what may be secret: user, password, and what follows a `?`."""
    return shown_url(where.partition("?")[0].rstrip("/")) if is_url(where) else where


def told(error: BaseException, path: str = "") -> str:
    """An error of a library, in one line, about a file whose URL may hold secrets."""
    text = f"{type(error).__name__}: {error}"
    if is_url(path):
        for secret in (path, path.partition("?")[2]):
            text = text.replace(secret, shown_url(path)) if secret else text
    return " ".join(text.split())[:300]


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. (Plain files of web servers are read by `web`, without it.)

    Raises:
        DataError: no such kind of URL is known, or the package that reads it is not installed, which is named.
    """
    import fsspec  # type: ignore[import-untyped]

    shown, scheme = shown_url(url), url.partition("://")[0]
    if "::" in url:
        raise DataError(f"{shown}: cannot be read", [Problem("path", shown, "Chained URLs and archives are not read; unpack the files.")])
    try:
        system, path = fsspec.core.url_to_fs(url)
        return system, str(path)
    except ImportError as error:
        package = getattr(error.__cause__ or error, "name", None)
        remedy = f"{scheme}:// needs a package that is not installed: pip install {package}" if package else f"{error}."
        raise DataError(f"{shown}: {scheme}:// cannot be read", [Problem("path", shown, remedy)]) from None
    except Exception as error:  # what a file system raises on a URL that it cannot take
        remedy = f"This address cannot be read ({told(error, url)}); give a local path or a URL that fsspec knows."
        raise DataError(f"{shown}: {scheme}:// cannot be read", [Problem("path", shown, remedy)]) from None


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
        self._url = url
        self._file_system: Any = None
        try:
            urlsplit(url)  # raises for what only looks like one
            if not web.is_web(url):
                self._file_system, self._root = file_system(url.rstrip("/"))
        except ValueError as error:
            problems = error.problems if isinstance(error, DataError) else [Problem("url", told(error, url), "Check the address.")]
            raise ConfigError(f"{self}: cannot be read", problems) from None

    def __str__(self) -> str:
        """The URL as `shown_place` has it."""
        return shown_place(self._url)

    def blocks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file in order, 4 MiB or less at a time, in one try. Raises `Unreachable`."""
        check_name(name, str(self))
        try:
            yield from self._blocks(name)
        except MemoryError:
            raise
        except Exception as error:  # a client may raise anything when its network fails
            missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
            raise Unreachable(told(error, self._url), missing or isinstance(error, PermissionError), missing) from error

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
            folder, mark, query = self._url.partition("?")
            yield from web.stream(f"{folder.rstrip('/')}/{name}{mark}{query}", 0, _BLOCK)
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
