"""Tensors in files: exact, checked from headers before any is read, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults import Bomb
from models import FAMILIES, tiny_config, tiny_model
from shearling.arch.families import anatomy_of
from shearling.errors import ArtifactError, ShearlingError, StorageError
from shearling.io.files import sha256_file
from shearling.io.tensors import CHUNK, MemoryReader, ShardWriter, TensorReader, _chunks, check_tensors, write_tensors

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


@pytest.mark.parametrize("chunk", [7, CHUNK])
def test_what_was_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Digest and size of the file, without reading it; of tensors of any layout, and none."""
    monkeypatch.setattr("shearling.io.tensors.CHUNK", chunk)
    whole = torch.arange(60.0).reshape(6, 10)
    tensors = {"whole": whole, "transposed": whole.t(), "rows": whole[1::2], "shared": whole[2:4], "none": whole[:0], "one": whole[0, 0]}
    tensors |= {"half": whole.bfloat16(), "gradient": torch.ones(3, requires_grad=True), "flags": whole > 7}
    for content in (tensors, {}):
        path = tmp_path / "model.safetensors"
        digest, size = written = write_tensors(path, content, {"format": "pt"})
        assert digest == written.sha256 == sha256_file(path) and size == written.size == path.stat().st_size
        assert all(torch.equal(load_file(path)[name], tensor) for name, tensor in content.items())


def test_writing_is_chunked_and_copies_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a contiguous tensor on the CPU every piece is a view of its own memory, and none is larger than 64 MiB."""
    tensor, seen = torch.zeros(3 * CHUNK // 4 + 1), []

    def chunks(tensor: torch.Tensor) -> Any:
        for piece in _chunks(tensor):
            seen.append((len(piece), torch.frombuffer(piece, dtype=torch.uint8).data_ptr()))
            yield piece

    monkeypatch.setattr("shearling.io.tensors._chunks", chunks)
    write_tensors(tmp_path / "a", {"a": tensor})
    starts = range(0, tensor.numel() * 4, CHUNK)
    assert seen == [(min(CHUNK, tensor.numel() * 4 - start), tensor.data_ptr() + start) for start in starts] and len(seen) == 4
    assert CHUNK <= 64 * 2**20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_tensors_of_another_device(tmp_path: Path) -> None:
    tensor = torch.arange(12.0, device="cuda").reshape(3, 4)
    written = write_tensors(tmp_path / "a.safetensors", {"a": tensor, "b": tensor.t()})
    assert written.sha256 == sha256_file(tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["b"], tensor.t().cpu())


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


def test_every_problem_at_once(tmp_path: Path) -> None:
    """Of files and of tensors: torn shards, one outside, an index that disagrees, tensors that are not the config's."""
    tensors = {name: tensor.clone() for name, tensor in tiny_model("llama").state_dict().items()}
    anatomy = anatomy_of(tiny_config("llama").to_dict())
    norm, query = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    parts = {
        "torn.safetensors": {query: tensors.pop(query)},
        "half.safetensors": {head: tensors.pop(head)},
        "good.safetensors": {norm: tensors[norm], "model.stranger": torch.zeros(3), embedding: tensors[embedding].char()},
        "rest.safetensors": {**{name: t for name, t in tensors.items() if name != embedding}, norm: torch.zeros(47)},
    }
    weight_map = {name: file for file, part in parts.items() for name in part}
    weight_map |= {"model.ghost": "good.safetensors", "model.far": "../x.safetensors"}
    del parts["rest.safetensors"]["model.layers.0.mlp.up_proj.weight"]
    for file, part in parts.items():
        save_file(part, tmp_path / file)
    for file in ("torn.safetensors", "half.safetensors"):
        data = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(data[: 40 if file == "torn.safetensors" else -1])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ArtifactError, match="problems with its weights") as refused:
        TensorReader(tmp_path, anatomy=anatomy)
    assert refused.value.exit_code == 3
    in_two, absent = "in good.safetensors and in rest.safetensors", "model.layers.0.mlp.up_proj.weight"
    assert {(problem.field, problem.found) for problem in refused.value.problems} == {
        ("../x.safetensors: file name", "'../x.safetensors'"),
        ("torn.safetensors: header", "a header of 104 bytes in a file of 40"),
        ("half.safetensors: data", "18431 bytes of data where 18432 are due"),
        (norm, in_two),
        (norm, "shape (47,)"),
        ("model.ghost", "in no shard, by the index in good.safetensors"),
        (absent, "in no shard, by the index in rest.safetensors"),
        (absent, "no such tensor"),
        ("model.stranger", "an unknown tensor"),
        (embedding, "dtype I8"),
    }


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
