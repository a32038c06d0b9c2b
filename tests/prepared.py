"""Prepared text for tests, of random documents and many small shards, and a server for it that counts what it is asked for."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from shearling.data.encode import tokenizer_fingerprint
from shearling.data.tokens import FORMAT, MANIFEST, dtype_for, fingerprint, shard_name

END = 1
"""Id of the mark at a document's end; as that of `models.tiny_tokenizer`."""


def write_prepared(
    folder: Path, sizes: Mapping[str, tuple[int, int]], tokenizer: Any, *, length: int = 16, each: int = 8, vocab: int = 96, seed: int = 0
) -> dict[str, Any]:
    """Domains of (training, held-out) rows, in shards of `each` rows; documents of about 20 words. Returns the manifest."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    domains: dict[str, Any] = {}
    for name, counts in sizes.items():
        shards: dict[str, list[Any]] = {}
        for split, rows in zip(("train", "heldout"), counts, strict=True):
            shards[split] = []
            for number, start in enumerate(range(0, rows, each)):
                ids = rng.integers(3, vocab, (min(each, rows - start), length)).astype(dtype_for(vocab))
                ids[rng.random(ids.shape) < 0.05] = END
                file = shard_name(name, split, number)
                (folder / file).write_bytes(ids.tobytes())
                shards[split].append({"file": file, "sequences": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()})
        tokens = sum(counts) * length
        facts = {
            "documents": tokens // 22,
            "heldout_documents": 2,
            "duplicate_documents": 3,
            "overlapping_documents": 1,
            "bytes": 5 * tokens,
        }
        domains[name] = {
            **facts, "tokens": tokens, "train_sequences": counts[0], "heldout_sequences": counts[1], "shards": shards, "notes": [],
        }  # fmt: skip
    head = {
        "sequence_length": length, "vocab_size": vocab, "tokenizer": tokenizer_fingerprint(tokenizer), "document_end": END,
        "shard_sequences": each,
    }  # fmt: skip
    settings = {"format": FORMAT, **head, "seed": seed, "domains": {name: {} for name in sizes}}
    manifest = {
        "format": FORMAT, "fingerprint": fingerprint(settings), "dtype": dtype_for(vocab).str, **head, "settings": settings,
        "domains": domains,
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return manifest


def rows_of_files(folder: Path, manifest: Mapping[str, Any], domain: str, split: str) -> np.ndarray:
    """The rows of a split as they lie in its files, without our reader."""
    data = b"".join((folder / shard["file"]).read_bytes() for shard in manifest["domains"][domain]["shards"][split])
    return np.frombuffer(data, manifest["dtype"]).reshape(-1, manifest["sequence_length"])


class Served:
    """A folder behind a web server: its `url`, what was `asked` for, the `faults` of the next answers, and how `slow` each is, in s.

    A fault is a status ("500"), "drop" (the connection ends), "cut" (in the middle), "flip" (a bit differs), or "" (none).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.asked: list[str] = []
        self.faults: list[str] = []
        self.slow = 0.0


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: Any, served: Served) -> None:
        self.served = served
        super().__init__(*arguments, directory=str(served.folder))

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.served.asked.append(self.path)
        fault = self.served.faults.pop(0) if self.served.faults else ""
        if fault == "drop":
            self.close_connection = True
        elif fault.isdecimal() or not (self.served.folder / name).exists():
            self.send_error(int(fault or 404))
        else:
            data = (self.served.folder / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            data = bytes([data[0] ^ 1]) + data[1:] if fault == "flip" else data
            data = data[: len(data) // 2] if fault == "cut" else data
            half = len(data) // 2
            self.wfile.write(data[:half])
            time.sleep(self.served.slow)
            self.wfile.write(data[half:])


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """Serve a folder on this machine for the length of the block, below `/data`."""
    found = Served(folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, served=found)) as server:
        found.url = f"http://127.0.0.1:{server.server_address[1]}/data"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
