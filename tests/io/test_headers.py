"""Hostile headers and JSON: refused by name, in little time and memory, whatever the file claims. Imports no torch.

Run as a program, this file is the child process that reads the corpus; see `test_hostile_files_cost_little`.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shearling.errors import ArtifactError
from shearling.io.files import JSON_LIMIT, JSON_PARTS, parse_json, read_json
from shearling.io.headers import HEADER_LIMIT, read_header
from shearling.io.tensors import TensorReader

GROWTH = 50 * 2**20
"""Memory, in bytes, that reading one file may take."""
SECONDS = 1.0


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    shape, offsets = (list(x) if isinstance(x, tuple) else x for x in (shape, offsets))
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


Content = bytes | Callable[[], bytes]
"""What is in a file; large ones are made when they are needed, lest the child's memory be full of what they left."""


def make(content: Content) -> bytes:
    return content() if callable(content) else content


TEXTS: dict[str, Content] = {
    "empty": b"",
    "open": b"{",
    "nonsense": b"{nonsense}",
    "two values": b"{} {}",
    "not utf-8": b'{"\xff": 1}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "overlong utf-8": b'{"\xc0\xaf": 1}',
    "half a pair in utf-8": b'{"\xed\xa0\x80": 1}',
    "half a pair, escaped": b'{"\\ud800": 1}',
    "half a pair in a value": b'{"a": ["\\uDC00x"]}',
    "a control character": b'{"a\n": 1}',
    "deep": lambda: b'{"a":' * 50_000,
    "deep lists": lambda: b'{"a":' + b"[" * 100_000,
    "deep and closed": lambda: b"[" * 5_000 + b"]" * 5_000,
    "many lists": lambda: b'{"a":[' + b"[]," * 1_000_000 + b"1]}",
    "many commas": lambda: b"[" + b"1," * 1_000_000 + b"1]",
    "long number": lambda: b'{"a":' + b"9" * 100_000 + b"}",
    "larger than the limit": lambda: b" " * JSON_LIMIT + b"{}",
    "a key twice": b'{"a": 1, "b": 2, "a": 1}',
    "a key twice inside": b'{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}',
    "a key twice in two spellings": b'{"a": 1, "\\u0061": 2}',
}
"""No sound JSON: refused by every reader of JSON, as a file, as an index, and as a header."""

COSTLY: dict[str, Content] = {
    "widest characters": lambda: ('["\N{GRINNING FACE}' + "a" * (JSON_LIMIT - 9) + '"]').encode(),
    "widest characters, escaped": lambda: ('["\N{GRINNING FACE}' + "a" * (JSON_LIMIT - 11) + '\\n"]').encode(),
    "widest characters and a pair": lambda: ('["\N{GRINNING FACE}' + "a" * (JSON_LIMIT - 21) + '\\ud83d\\ude00"]').encode(),
    "escapes": lambda: b'["' + b"\\n" * (JSON_LIMIT // 2 - 2) + b'"]',
    "digits": lambda: b"[1." + b"3" * (JSON_LIMIT - 4) + b"]",
    "keys": lambda: b"{" + b",".join(b'"k%06d": %d.5' % (i, i) for i in range(JSON_PARTS - 1)) + b"}",
    "lists": lambda: b"[" + b",".join([b"[70000]"] * (JSON_PARTS // 2 - 1)) + b"]",
    "chains": lambda: b"[" + b",".join([b'{"":' * 900 + b"7000" + b"}" * 900] * (JSON_PARTS // 901 - 1)) + b"]",
    "infinite": b"[1e999999999, -Infinity, NaN]",
}
"""Sound JSON at the limits of what is read: let in or not, it must cost little."""

HEADERS: dict[str, Content] = {
    "empty": b"",
    "short": b"\x02\0\0\0\0\0\0",
    "huge length": raw({}, length=2**63),
    "all ones": raw({}, length=2**64 - 1),
    "length beyond file": raw({}, length=100),
    "zero length": raw(b"") + b"  ",
    "list": raw([1, 2]),
    "leading space": raw(b" {}"),
    "number": raw(b"123"),
    "duplicate key": raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"1234"),
    "duplicate inside": raw(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "entry is text": raw({"a": "b"}),
    "missing field": raw({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "extra field": raw({"a": {**entry(), "code": "x"}}, b"1234"),
    "unknown dtype": raw({"a": entry("F31")}, b"1234"),
    "dtype a list": raw({"a": entry(["F32"])}, b"1234"),
    **{f"dtype {depth} deep": raw({"a": entry(json.loads("[" * depth + "]" * depth))}, b"1234") for depth in (50, 200, 400)},
    "negative": raw({"a": entry(shape=(-1,))}, b"1234"),
    "fraction": raw({"a": entry(shape=(1.0,))}, b"1234"),
    "boolean": raw({"a": entry(shape=(True,))}, b"1234"),
    "overflow": raw({"a": entry(shape=(2**62, 2**62, 4), offsets=(0, 4))}, b"1234"),
    "overflow offsets": raw({"a": entry(offsets=(2**64 - 4, 2**64))}, b"1234"),
    "many dimensions": raw({"a": entry(shape=(1,) * 100)}, b"1234"),
    "reversed": raw({"a": entry(shape=(0,), offsets=(4, 0))}, b"1234"),
    "three offsets": raw({"a": entry(offsets=(0, 4, 8))}, b"1234"),
    "outside": raw({"a": entry(shape=(2,), offsets=(0, 8))}, b"1234"),
    "overlap": raw({"a": entry(shape=(2,), offsets=(0, 8)), "b": entry(shape=(2,), offsets=(4, 12))}, b"x" * 12),
    "same place": raw({"a": entry(), "b": entry()}, b"1234"),
    "gap": raw({"a": entry(), "b": entry(offsets=(8, 12))}, b"x" * 12),
    "trailing": raw({"a": entry()}, b"12345"),
    "wrong size": raw({"a": entry(shape=(3,), offsets=(0, 8))}, b"x" * 8),
    "metadata": raw({"__metadata__": {"a": 1}}),
    "metadata list": raw({"__metadata__": []}),
    **{f"text: {name}": lambda text=text: raw(make(text)) for name, text in (TEXTS | COSTLY).items()},  # type: ignore[misc]
}

WIDEST = '{"weight_map": {"a": "\N{GRINNING FACE}' + "a" * 10**6 + '.safetensors"}}'
INDEXES: dict[str, Content] = {
    **{f"text: {name}": text for name, text in (TEXTS | COSTLY).items()},
    "a list": b"[]",
    "no table": b'{"metadata": {}}',
    "an empty table": b'{"weight_map": {}}',
    "a number": b'{"weight_map": {"a": 1}}',
    "a deep table": b'{"weight_map": ' + b"[" * 400 + b"]" * 400 + b"}",
    "a shard of the widest characters": lambda: WIDEST.encode(),
    "many tensors": lambda: b'{"weight_map": {' + b",".join(b'"k%06d":"x.safetensors"' % i for i in range(JSON_PARTS - 9)) + b"}}",
    "many shards": lambda: b'{"weight_map": {' + b",".join(b'"%d":"%d.safetensors"' % (i, i) for i in range(20_000)) + b"}}",
}

WHOLE = {
    "header": raw({"a": entry("BF16", (2, 3), (0, 12)), "b": entry("F32", (2,), (12, 20)), "__metadata__": {"format": "pt"}}, b"x" * 20),
    "index": b'{"metadata": {"total_size": 8}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers_are_refused_by_name(tmp_path: Path, case: str) -> None:
    path = tmp_path / "evil.safetensors"
    path.write_bytes(make(HEADERS[case]))
    with pytest.raises(ArtifactError, match=r"evil\.safetensors") as refused:
        read_header(path)
    assert refused.value.exit_code == 3 and len(str(refused.value)) < 1000


@pytest.mark.parametrize("case", TEXTS)
def test_hostile_json_is_refused_by_name(tmp_path: Path, case: str) -> None:
    path = tmp_path / "evil.json"
    path.write_bytes(make(TEXTS[case]))
    with pytest.raises(ArtifactError, match=r"evil\.json") as refused:
        read_json(path)
    assert refused.value.exit_code == 3 and len(str(refused.value)) < 1000


@pytest.mark.parametrize("case", INDEXES)
def test_hostile_indexes_are_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(make(INDEXES[case]))
    with pytest.raises(ArtifactError) as refused:
        TensorReader(tmp_path)
    assert refused.value.exit_code == 3 and len(str(refused.value)) < 50_000


def test_what_is_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    """Sparse files of 10 GB: the sizes that they claim are theirs."""
    for name, read in (("big.safetensors", read_header), ("big.json", read_json)):
        with open(tmp_path / name, "wb") as file:
            file.write((10**10).to_bytes(8, "little"))
            file.truncate(10**10 + 8)
        with pytest.raises(ArtifactError, match=rf"{10**10}.*at most" if name == "big.safetensors" else rf"{10**10 + 8} bytes.*at most"):
            read(tmp_path / name)


def test_the_limits_leave_room_for_large_models(tmp_path: Path) -> None:
    """13 000 tensors in a header; the largest dense models have 1 200."""
    names = [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(13_000)]
    header = {name: entry("BF16", (16384, 16384), (i * 2**29, (i + 1) * 2**29)) for i, name in enumerate(names)}
    text = json.dumps(header).encode()
    assert len(text) < HEADER_LIMIT and parse_json(text, "header") == header


def test_read_header_agrees_with_safetensors(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros((), dtype=torch.int64)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (h.dtype, h.shape) for name, h in header.items()} == {"a": ("F32", (2, 3)), "b": ("BF16", (4,)), "c": ("I64", ())}
    assert sorted(h.offsets for h in header.values()) == [(0, 8), (8, 32), (32, 40)]


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtifactError, match="not a sound safetensors file"):
            read_header(path)


def test_hostile_files_cost_little() -> None:
    """The corpus, then 2 000 mutations of a sound header and 2 000 of a sound index, in a small process of its own.

    A fresh interpreter without torch: in this one, memory that was freed before would hide what is taken. Every file may take
    `SECONDS` and `GROWTH`, in resident and in address space.
    """
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "4000"


def _status(field: str) -> int:
    """A size of this process from /proc, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _in_child(work: Callable[[], Any], name: str, growth: float = GROWTH) -> None:
    """Do `work` in a forked child with `growth` of address space to spare; resident memory beyond it is an error, too."""
    pid = os.fork()
    if pid == 0:
        if growth < math.inf:
            limit = _status("VmSize") + int(growth)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before = _status("VmRSS")
        try:
            work()
            grown = _status("VmHWM") - before
            assert grown < growth, f"{grown} bytes"
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{name}: {type(error).__name__}: {error}\n".encode(errors="replace"))
        os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        sys.exit(1)


def _refused(read: Callable[[Path], Any], path: Path, sound: bool = False) -> None:
    start = time.monotonic()
    try:
        read(path)
        assert sound, "was let in"
    except ArtifactError as error:
        assert error.exit_code == 3 and "MemoryError" not in str(error), str(error)[:500]
    assert time.monotonic() - start < SECONDS


def _read_index(path: Path) -> None:
    reader = TensorReader(path.parent)
    assert reader.names() and all(file.resolve().is_relative_to(path.parent.resolve()) for file in reader.files)


def _read_bounded(path: Path) -> None:
    for header in read_header(path).values():
        assert 0 <= header.offsets[0] <= header.offsets[1] <= path.stat().st_size


def _parse(path: Path) -> None:
    parse_json(path.read_bytes(), str(path))


def _mutate(whole: bytes, rng: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(5), rng.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randint(1, 9)]
        elif kind == 2:
            data[at:at] = rng.choice([b"[", b"{", b'"', b"9" * 20, b",", b"-", b"null", b"../", b"\\ud800", bytes([rng.randrange(256)])])
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 40)]
        else:
            data[rng.randrange(min(8, len(data)))] = rng.randrange(256)
        data = data or bytearray(b"x")
    return bytes(data)


def _read_everything(folder: Path) -> None:
    header, text, index = folder / "m.safetensors", folder / "m.json", folder / "model.safetensors.index.json"
    for number, name in enumerate(("one", "two")):
        (folder / f"{name}.safetensors").write_bytes(raw({"ab"[number]: entry()}, b"1234"))
    corpus = [(header, _read_bounded, HEADERS, ()), (text, read_json, TEXTS | COSTLY, COSTLY), (text, _parse, TEXTS | COSTLY, (*COSTLY,))]
    for path, read, cases, sound in [*corpus, (index, _read_index, INDEXES, ())]:
        for name, content in cases.items():
            case = f"{path.name}: {name}"
            _in_child(lambda path=path, content=content: path.write_bytes(make(content)), case, math.inf)  # type: ignore[misc]
            if read is not _parse or path.stat().st_size <= JSON_LIMIT:
                _in_child(lambda read=read, path=path, name=name, sound=sound: _refused(read, path, name in sound), case)  # type: ignore[misc]
    mutations = 0
    for path, reads, whole in ((header, (_read_bounded,), WHOLE["header"]), (index, (_read_index, read_json, _parse), WHOLE["index"])):

        def work(path: Path = path, reads: Any = reads, whole: bytes = whole) -> None:
            for seed in range(2000):
                path.write_bytes(_mutate(whole, random.Random(seed)))
                for read in reads:
                    _refused(read, path, sound=True)

        for read in reads:  # before it is changed it is sound
            path.write_bytes(whole)
            read(path)
        _in_child(work, f"mutations of {path.name}")
        mutations += 2000
    print(mutations)


if __name__ == "__main__":
    _memory = Path("/dev/shm")  # where there is one: the files are written thousands of times, and a busy disk takes a while
    with tempfile.TemporaryDirectory(dir=_memory if os.access(_memory, os.W_OK) else None) as _folder:
        _read_everything(Path(_folder))
