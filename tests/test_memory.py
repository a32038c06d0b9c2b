"""A model is cut from disk to disk in the memory of one shard read and one shard written, however large it is.

Run as a program, this file is the child process that cuts under a limit; see `test_the_transform_streams`.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import torch

from shearling.arch.families import Anatomy, anatomy_of
from shearling.io.tensors import ShardWriter, TensorReader
from shearling.prune.plan import PrunePlan, plan_from_masks
from shearling.prune.transform import transform

SHARD = 40 * 10**6
"""Bytes of a shard, read or written."""
SLACK = 64 * 2**20
"""For a tensor and its slice, the mapping of a shard that the next tensor's replaces, and what the allocator keeps."""


def shapes() -> tuple[Anatomy, Anatomy]:
    """A source of 285 MB in fp32, and a target of 155 MB."""
    sizes = {"num_hidden_layers": 10, "hidden_size": 768, "intermediate_size": 2048, "vocab_size": 4096, "head_dim": 64}
    source = anatomy_of({"model_type": "llama", "num_attention_heads": 12, "num_key_value_heads": 6, **sizes})
    return source, source.with_sizes(layer=8, hidden=640, group=5, neuron=1536)


def make_plan() -> PrunePlan:
    source, target = shapes()
    generator = torch.Generator().manual_seed(0)

    def mask(axis: str) -> torch.Tensor:
        open_ = torch.zeros(source.sizes[axis])
        open_[torch.randperm(len(open_), generator=generator)[: target.sizes[axis]]] = 1
        return open_

    masks = {axis: mask(axis) for axis in ("layer", "hidden")}
    masks |= {axis: torch.stack([mask(axis) for _ in range(source.sizes["layer"])]) for axis in ("group", "neuron")}
    return plan_from_masks(source, target, masks)


def cut(folder: Path) -> None:
    """Cut `folder`/source to `folder`/cut under the limit; under the same limit the whole source cannot be held."""
    torch.set_num_threads(1)
    (source, target), plan = shapes(), make_plan()
    reader = TensorReader(folder / "source", anatomy=source)
    reader.get("model.norm.weight").clone()  # loads safetensors
    status = Path("/proc/self/status").read_text()
    now = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
    limit = now + max(path.stat().st_size for path in reader.files) + SHARD + SLACK
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with ShardWriter(folder / "cut", SHARD) as writer:
        for name, tensor in transform(plan, source, target, reader):
            writer.add(name, tensor)
    for what in (reader, TensorReader(folder / "cut", anatomy=target)):
        try:
            _whole = [what.get(name).clone() for name in what.names()]
        except (MemoryError, RuntimeError):
            continue
        raise AssertionError("the whole model fits within the limit, which therefore shows nothing")


def test_the_transform_streams(tmp_path: Path) -> None:
    """285 MB in 8 shards, cut under a limit of a shard read, a shard written and some slack, which no whole model fits.

    The limit is on data (RLIMIT_DATA: heap, and private mappings that can be written to, among which are the shards that
    `TensorReader` maps), not on address space: of that, the C library reserves 64 MiB for every thread, never to be used, and
    safetensors maps each file once more to read its header. Linux only, as is the rest of the storage layer.
    """
    (source, target), plan = shapes(), make_plan()
    (tmp_path / "source").mkdir()
    (tmp_path / "cut").mkdir()
    generator = torch.Generator().manual_seed(1)
    with ShardWriter(tmp_path / "source", SHARD) as writer:
        for name, shape in source.shapes().items():
            writer.add(name, torch.rand(shape, generator=generator))
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, small = TensorReader(tmp_path / "source"), TensorReader(tmp_path / "cut", anatomy=target)
    assert len(whole.files) == 8 and len(small.files) == 4
    for number, layer in enumerate(plan.layers):
        name = "model.layers.{}.mlp.down_proj.weight"
        expected = whole.get(name.format(layer))[plan.keep["hidden"]][:, plan.keep["neuron"][layer]]
        assert torch.equal(small.get(name.format(number)), expected)
    for folder in (tmp_path / "source", tmp_path / "cut"):  # pytest keeps the folders of three runs
        for path in folder.iterdir():
            path.unlink()


if __name__ == "__main__":
    cut(Path(sys.argv[1]))
