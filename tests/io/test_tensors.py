"""Tensors in files: exact, checked from headers, hostile headers refused at small cost, and nothing half-written."""

from __future__ import annotations

import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import FAMILIES, tiny_config, tiny_model
from shearling.arch.families import anatomy_of
from shearling.errors import ArtifactError, ShearlingError, StorageError
from shearling.io.tensors import MemoryReader, ShardWriter, TensorReader, check_tensors, read_header, write_tensors


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    shape, offsets = (list(x) if isinstance(x, tuple) else x for x in (shape, offsets))
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EVERY_DTYPE = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]


def test_write_reads_back_by_safetensors_and_by_us(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in EVERY_DTYPE}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "ü": torch.arange(24.0).reshape(4, 6).t()[1:, ::2]}
    write_tensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    reader = TensorReader(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        for found in (reader.get(name), theirs[name]):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert found.reshape(-1).view(torch.uint8).equal(tensor.contiguous().reshape(-1).view(torch.uint8))
    assert reader.shapes() == MemoryReader(tensors).shapes() == {name: tuple(t.shape) for name, t in tensors.items()}
    assert reader.dtypes() == MemoryReader(tensors).dtypes()


def test_read_header_agrees_with_safetensors(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros((), dtype=torch.int64)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (h.dtype, h.shape) for name, h in header.items()} == {"a": ("F32", (2, 3)), "b": ("BF16", (4,)), "c": ("I64", ())}
    assert sorted(h.offsets for h in header.values()) == [(0, 8), (8, 32), (32, 40)]


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x02\0\0\0\0\0\0",
    "huge length": raw({}, length=2**63),
    "all ones": raw({}, length=2**64 - 1),
    "length beyond file": raw({}, length=100),
    "zero length": raw(b"") + b"  ",
    "not json": raw(b"{nonsense}"),
    "not utf-8": raw(b'{"\xff": 1}'),
    "list": raw([1, 2]),
    "leading space": raw(b" {}"),
    "number": raw(b"123"),
    "deep": raw(b'{"a":' * 50_000),
    "deep lists": raw(b'{"a":' + b"[" * 100_000),
    "many lists": raw(b'{"a":[' + b"[]," * 1_000_000 + b"1]}"),
    "long number": raw(b'{"a":' + b"9" * 100_000 + b"}"),
    "duplicate key": raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"1234"),
    "duplicate inside": raw(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "entry is text": raw({"a": "b"}),
    "missing field": raw({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "extra field": raw({"a": {**entry(), "code": "x"}}, b"1234"),
    "unknown dtype": raw({"a": entry("F31")}, b"1234"),
    "dtype a list": raw({"a": entry(["F32"])}, b"1234"),
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
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_by_name(tmp_path: Path, case: str) -> None:
    path = tmp_path / "evil.safetensors"
    path.write_bytes(HOSTILE[case])
    start = time.monotonic()
    with pytest.raises(ArtifactError, match=r"evil\.safetensors"):
        read_header(path)
    assert time.monotonic() - start < 1


def test_header_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(10**9 + 8)  # sparse
    with pytest.raises(ArtifactError, match="at most"):
        read_header(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtifactError, match="not a sound safetensors file"):
            read_header(path)


def test_mutated_headers_never_crash_nor_grow(tmp_path: Path) -> None:
    """Whatever is read: headers in bounds, or `ArtifactError`; in a child with little address space to spare."""
    whole = raw({"a": entry("BF16", (2, 3), (0, 12)), "b": entry("F32", (2,), (12, 20)), "__metadata__": {"format": "pt"}}, b"x" * 20)
    path = tmp_path / "m.safetensors"

    def mutate(rng: random.Random) -> bytes:
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            kind, at = rng.randrange(4), rng.randrange(len(data))
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[at : at + rng.randint(1, 9)]
            elif kind == 2:
                data[at:at] = rng.choice([b"[", b"{", b'"', b"9" * 20, b",", b"-", b"null", bytes([rng.randrange(256)])])
            else:
                data[rng.randrange(8)] = rng.randrange(256)
            data = data or bytearray(b"x")
        return bytes(data)

    def work() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 50 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for seed in range(2000):
            path.write_bytes(mutate(random.Random(seed)))
            try:
                for header in read_header(path).values():
                    assert 0 <= header.offsets[0] <= header.offsets[1] <= path.stat().st_size
            except ArtifactError:
                pass
        for data in HOSTILE.values():
            path.write_bytes(data)
            try:
                read_header(path)
            except ArtifactError:
                continue
            raise AssertionError

    assert exit_code_of(work) == 0


def exit_code_of(work: Callable[[], None]) -> int:
    """Exit code of a forked child that does `work`: that of a `ShearlingError`, or 99 for anything else raised."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            work()
            code = 0
        except ShearlingError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write_shards(folder: Path, count: int = 7, limit: float = 100) -> dict[str, torch.Tensor]:
    tensors = {f"t{i}": torch.full((i + 1, 4), float(i)) for i in range(count)}
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, limit) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return tensors


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = write_shards(tmp_path)
    reader = TensorReader(tmp_path)
    assert len(reader.files) == 5 and reader.files[0].name == "model-00001-of-00005.safetensors"
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in tensors.items()) and set(reader.names()) == set(tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in tensors.values())
    assert max(path.stat().st_size for path in reader.files[:3]) < 400
    assert not list(tmp_path.glob(".tmp-*"))


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write_shards(tmp_path, limit=5e9)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_writer_refuses_a_name_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="written already"), ShardWriter(tmp_path, 8) as writer:
        for name in ("a", "b", "a"):
            writer.add(name, torch.zeros(2))


def test_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 8) as writer:
        for name in "abc":
            writer.add(name, torch.zeros(2))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_disk_full_while_writing(tmp_path: Path) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with ShardWriter(tmp_path, 600) as writer:
            writer.add("small", torch.zeros(100))
            writer.add("large", torch.zeros(1000))

    assert exit_code_of(work) == StorageError.exit_code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "link.safetensors"])
def test_index_that_leads_outside(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    (model / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ArtifactError, match="refuses to open"):
        TensorReader(model)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, {"a": "pytorch_model.bin"}, "x"])
def test_index_that_is_none(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ArtifactError, match=r"index\.json"):
        TensorReader(tmp_path)


def test_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["t6"]
    index["weight_map"]["t5"] = index["weight_map"]["t4"]
    del index["weight_map"]["t6"]
    path.write_text(json.dumps(index))
    with pytest.raises(ArtifactError) as caught:
        TensorReader(tmp_path)
    assert {problem.field for problem in caught.value.problems} == {"ghost", "t5", "t6"}


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    for i in (1, 2):
        save_file({"a": torch.zeros(1), f"b{i}": torch.zeros(1)}, tmp_path / f"s{i}.safetensors")
    weight_map = {"a": "s1.safetensors", "b1": "s1.safetensors", "b2": "s2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ArtifactError, match=r"a: found in s1\.safetensors and in s2\.safetensors"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 8, 100, -1])
def test_truncated_shard(tmp_path: Path, cut: int) -> None:
    write_shards(tmp_path, limit=5e9)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: not a sound"):
        TensorReader(tmp_path)


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sentinel),)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    for name in ("pytorch_model.bin", "model.pt"):
        torch.save({"a": Bomb(sentinel)}, tmp_path / name)
    with pytest.raises(ArtifactError, match="Convert the model to safetensors"):
        TensorReader(tmp_path)
    with pytest.raises(ArtifactError, match="no such directory"):
        TensorReader(tmp_path / "none")
    assert not sentinel.exists()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_check_tensors(family: str, tied: bool) -> None:
    state = dict(tiny_model(family, tied=tied).state_dict())  # a tied model's holds lm_head too, which is tolerated
    anatomy = anatomy_of(tiny_config(family, tied=tied).to_dict())
    check_tensors(MemoryReader({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}), anatomy)
    del state["model.layers.1.self_attn.k_proj.weight"]
    state["model.layers.3.mlp.up_proj.weight"] = torch.zeros(40, 48)
    state["model.norm.weight"] = torch.zeros(47)
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 48, dtype=torch.int8)
    with pytest.raises(ArtifactError) as caught:
        check_tensors(MemoryReader(state), anatomy)
    assert {problem.field: problem.found for problem in caught.value.problems} == {
        "model.layers.1.self_attn.k_proj.weight": "no such tensor",
        "model.layers.3.mlp.up_proj.weight": "an unknown tensor",
        "model.norm.weight": "shape (47,)",
        "model.layers.0.mlp.up_proj.weight": "dtype I8",
    }


def test_many_problems_are_counted(tmp_path: Path) -> None:
    anatomy = anatomy_of(tiny_config("llama", layers=20).to_dict())
    with pytest.raises(ArtifactError, match="and: found 83 more"):
        check_tensors(MemoryReader({}), anatomy)
