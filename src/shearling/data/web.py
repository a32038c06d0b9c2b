"""Files of plain web servers, `http://` and `https://`, by Python's own client: from any byte on, and read at any place."""

from __future__ import annotations

import io
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

TIMEOUT = 60.0
"""Seconds without a byte after which a try is given up."""
_GONE, _REFUSED, _BEYOND = (404, 410), (401, 403), 416


class NoSuchPart(OSError):
    """The file ends before the first byte that was asked for."""


def is_web(url: str) -> bool:
    """Whether a URL is one of these."""
    return url.lower().startswith(("http://", "https://"))


class _Redirects(HTTPRedirectHandler):
    """Follows them, and takes the login to no other host."""

    def redirect_request(self, req: Request, *arguments: Any) -> Request | None:
        """The next request, if there is to be one."""
        found = super().redirect_request(req, *arguments)
        if found is not None and found.host != req.host:
            found.remove_header("Authorization")
        return found


@cache
def _opener() -> OpenerDirector:
    return build_opener(_Redirects)


@contextmanager
def _answer(url: str, start: int = 0, end: int | None = None) -> Iterator[HTTPResponse]:
    """The answer of a server to a request for the bytes from `start` to `end` (exclusive); `OSError` of the kind that fits."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "shearling"}
    parts = urlsplit(url)
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {b64encode(login.encode()).decode()}"
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    if start or end is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    try:
        answer: HTTPResponse = _opener().open(Request(url, headers=headers), timeout=TIMEOUT)
        with answer:
            yield answer
    except HTTPError as error:
        with error:  # it is the open answer, too
            kinds = dict.fromkeys(_GONE, FileNotFoundError) | dict.fromkeys(_REFUSED, PermissionError) | {_BEYOND: NoSuchPart}
            raise kinds.get(error.code, OSError)(f"HTTP status {error.code} {error.reason}") from None
    except HTTPException as error:  # what is no HTTP, or ends before it said that it would
        raise ConnectionError(f"{type(error).__name__}: {error}") from None


def info(url: str) -> dict[str, Any]:
    """Size in bytes (None where the server does not say) and ETag of a file, as file systems of fsspec give them.

    Headers are taken of a GET that is broken off: addresses that are signed for GET refuse a HEAD.
    """
    with _answer(url) as answer:
        return _facts(answer)


def _facts(answer: HTTPResponse) -> dict[str, Any]:
    """What the headers of an answer say of the whole file, be it of all of it or of a part."""
    size = answer.length
    if answer.status == 206:  # "bytes 5-9/10", with * where the server does not know the last number
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(total) if total.isascii() and total.isdigit() else None
    return {"type": "file", "size": size, "ETag": answer.headers.get("ETag")}


def stream(url: str, start: int, block: int, check: Callable[[dict[str, Any]], None] | None = None) -> Iterator[bytes]:
    """The bytes of a file from `start` on, `block` at a time, by one request.

    `check` is given what `info` tells before the first bytes are read, and ends the reading by raising.

    Raises:
        NoSuchPart: the file has less than `start` bytes, or just so many.
        OSError: another failure, also where the connection ends early.
    """
    with _answer(url, start) as answer:
        if check is not None:
            check(_facts(answer))
        passed = 0 if answer.status == 206 else start  # a server that knows no ranges sends all of it
        while passed:
            passed -= len(answer.read(min(block, passed))) or passed
        while data := answer.read(block):
            yield data
        if answer.length:
            raise ConnectionError(f"the connection ended {answer.length} bytes early")


class _NoParts(OSError):
    """The server sends files whole or not at all."""


class WebFile(io.RawIOBase):
    """A file of `size` bytes for reading at any place, on a server that knows ranges.

    Each read is a request, made anew after each of `waits`, in seconds, where it fails.
    """

    def __init__(self, url: str, size: int, waits: Sequence[float] = ()) -> None:
        super().__init__()
        self._url, self._size, self._at, self._waits = url, size, 0, waits

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, in bytes."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, or as much of it as is left of the file. Raises `OSError`."""
        end = min(self._at + len(buffer), self._size)
        if self._at >= end:
            return 0
        for wait in (*self._waits, None):
            try:
                data = self._part(end)
                break
            except (FileNotFoundError, PermissionError, _NoParts):
                raise
            except OSError:
                if wait is None:
                    raise
                time.sleep(wait)
        buffer[: len(data)] = data
        self._at = end
        return len(data)

    def _part(self, end: int) -> bytes:
        with _answer(self._url, self._at, end) as answer:
            if answer.status != 206:
                raise _NoParts("the server sends no parts of files; download the file")
            data = answer.read(end - self._at)
        if len(data) < end - self._at:
            raise ConnectionError(f"the connection ended {end - self._at - len(data)} bytes early")
        return data
