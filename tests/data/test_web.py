"""Text on plain web servers: read on where the connection breaks, refused where it has changed, with no secret in what is told."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from shearling.config import parse
from shearling.data import files as files_module
from shearling.data.config import DataConfig
from shearling.data.files import DamagedFile
from shearling.data.origins import find_origins
from shearling.data.web import stream
from shearling.errors import DataError
from test_remote_text import DATA, TEXTS, origin, parquet


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "RETRY_WAITS", (0.0, 0.0))


class Server(ThreadingHTTPServer):
    """A web server of a few files in memory that can be told to misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges, self.sizes, self.marks, self.marked_parts, self.status = True, True, True, True, 200
        self.requests: list[str] = []
        """Of each request the range that was asked for, or nothing."""
        self.moved: dict[str, str] = {}
        """Path -> where its file is now."""
        self.login = ""
        """What the header Authorization must be."""
        self.short: set[int] = set()
        """Numbers of requests that are answered with no more than 100,000 bytes."""

    def handle_error(self, request: Any, address: Any) -> None:
        """A client that hangs up is nothing to tell."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        server, data = self.server, self.server.files.get(self.path.partition("?")[0])
        asked = self.headers.get("Range", "")
        number = len(server.requests)
        server.requests.append(asked)
        if self.path in server.moved:
            self.send_response(302)
            self.send_header("Location", server.moved[self.path])
            self.end_headers()
            return
        if server.login and self.headers.get("Authorization") != server.login:
            self.send_error(401)
            return
        if data is None or server.status != 200:
            self.send_error(404 if data is None else server.status)
            return
        start, end = 0, len(data)
        if asked and server.ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), int(last or len(data) - 1) + 1
        if start and start >= len(data):
            self.send_error(416)
            return
        part = bool(asked and server.ranges)
        self.send_response(206 if part else 200)
        if server.marks and (server.marked_parts or not part):
            self.send_header("ETag", f'"{hash(data)}"')
        if part:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data) if server.sizes else '*'}")
        if server.sizes:
            self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self.wfile.write(data[start : start + 10**5 if number in server.short else end])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def address(server: Server, path: str) -> str:
    return f"http://127.0.0.1:{server.server_port}{path}"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server_that_breaks_off_is_asked_for_the_rest(server: Server, ranges: bool) -> None:
    server.files["/a.jsonl"] = DATA
    domain = origin(address(server, "/a.jsonl?key=secret"))
    server.requests.clear()
    server.short, server.ranges = {0, 1}, ranges
    reading = domain.texts("train")
    assert list(reading) == TEXTS and reading.bytes_read == domain.size() == len(DATA)
    assert server.requests == ["", "bytes=100000-", f"bytes={200_000 if ranges else 100_000}-"]  # and none for the headers alone
    assert "secret" not in json.dumps(domain.settings())


def test_a_server_that_leaves_the_mark_out_of_parts_is_asked_for_the_whole_one(server: Server) -> None:
    server.files["/a.jsonl"] = DATA
    domain = origin(address(server, "/a.jsonl"))
    server.requests.clear()
    server.short, server.marked_parts = {0}, False
    assert list(domain.texts("train")) == TEXTS
    assert server.requests == ["", "bytes=100000-", ""]


@pytest.mark.parametrize(
    ("change", "marks"), [("shorter", True), ("shorter", False), ("longer", True), ("longer", False), ("other", True)]
)  # without a mark a file of the same size is taken for the same
def test_a_file_that_changes_where_the_connection_broke_is_not_read_on(server: Server, change: str, marks: bool) -> None:
    """Told by the answer to the request for the rest, which shows the mark, if there are marks, and the size of the whole."""
    server.files["/a.jsonl"], server.marks = DATA, marks
    domain = origin(address(server, "/a.jsonl"))
    server.requests.clear()
    server.short = {0}
    texts = iter(domain.texts("train"))
    assert next(texts) == TEXTS[0]
    other = DATA.replace(b"document 7 ", b"document X ")
    server.files["/a.jsonl"] = {"shorter": DATA[:1000], "longer": DATA + DATA, "other": other}[change]
    with pytest.raises(DamagedFile, match=r"a\.jsonl: has changed"):
        list(texts)
    assert server.requests == ["", "bytes=100000-", *[""] * (change == "shorter")]  # and not tried again


def test_parquet_of_a_web_server_is_read_in_parts(server: Server) -> None:
    server.files["/a.parquet"] = parquet(TEXTS)
    url = address(server, "/a.parquet")
    assert list(origin(url).texts("train", skip=3500)) == TEXTS[3500:]
    domain = origin(url)
    server.ranges = False
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read") as caught:
        list(domain.texts("train"))
    assert "the server sends no parts of files; download the file" in str(caught.value)


def test_a_part_that_breaks_off_is_asked_for_again(server: Server) -> None:
    server.files["/a.parquet"] = parquet(TEXTS)
    domain = origin(address(server, "/a.parquet"))
    server.requests.clear()
    assert list(domain.texts("train")) == TEXTS
    parts = len(server.requests)
    server.requests.clear()
    server.short = {2}  # after requests for the headers alone, and for what is at the end
    assert list(domain.texts("train")) == TEXTS and len(server.requests) == parts + 1


def test_a_web_server_that_tells_no_size_is_read(server: Server) -> None:
    server.files["/a.jsonl.gz"] = gzip.compress(DATA)
    server.sizes = False
    domain = origin(address(server, "/a.jsonl.gz"))
    assert domain.size() is None and list(domain.texts("train")) == TEXTS


def test_user_and_password_of_a_url_are_sent(server: Server) -> None:
    server.files["/a.txt"] = b"text"
    server.login = "Basic dXNlcjpwQHNz"
    url = address(server, "/a.txt").replace("http://", "http://user:p%40ss@")
    assert list(origin(url).texts("train")) == ["text"]
    with pytest.raises(DataError, match="HTTP status 401"):
        origin(address(server, "/a.txt"))


def test_user_and_password_are_not_sent_on_to_another_host(server: Server) -> None:
    server.files["/a.txt"] = b"text"
    server.moved = {"/here": "/a.txt", "/there": address(server, "/a.txt").replace("127.0.0.1", "localhost")}
    server.login = "Basic dXNlcjp3b3Jk"
    base = address(server, "").replace("http://", "http://user:word@")
    assert b"".join(stream(f"{base}/here", 0, 10)) == b"text"
    with pytest.raises(PermissionError, match="401"):
        list(stream(f"{base}/there", 0, 10))


def test_what_a_web_server_refuses_is_named_without_secrets(server: Server) -> None:
    server.files["/a.jsonl"] = DATA
    url = address(server, "/a.jsonl?key=secret").replace("http://", "http://user:word@")
    plain = address(server, "/a.jsonl")
    domain = origin(plain + "?key=secret")
    server.status = 403
    with pytest.raises(DataError, match="HTTP status 403") as caught:
        list(domain.texts("train"))
    assert plain in str(caught.value) and "secret" not in str(caught.value)
    with pytest.raises(DataError) as caught:
        find_origins(parse(DataConfig, {"domains": {"web": [url, address(server, "/none.jsonl")]}}))
    assert "HTTP status 403" in str(caught.value) and "No file matches" in str(caught.value)
    assert "secret" not in str(caught.value) and "word" not in str(caught.value)
    server.status, server.files["/a.jsonl"] = 200, DATA.replace(b"document 7 ", b"document X ")
    with pytest.raises(DamagedFile, match=r"a\.jsonl: has changed"):
        list(domain.texts("train"))
