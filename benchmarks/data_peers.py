"""Tokens/s of another loader on the token rows that `shearling prepare` made, written to its own format first.

    python data_peers.py litdata|mosaicml --data DIR --work DIR --batches 400 [--batch-size 16] [--workers 0]

It runs in the other library's environment, without Shearling: it needs that library, torch and numpy. `benchmarks/data.py` calls it.
Domains have equal shares that never change, which is less than what is asked of ours. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import types
from collections.abc import Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np

WARMUP = 20
"""Batches that are not timed."""


def rows_of(data: Path) -> dict[str, list[np.ndarray]]:
    """Domain -> its training shards [n, T], mapped."""
    manifest = json.loads((data / "manifest.json").read_text())
    length, dtype = manifest["sequence_length"], np.dtype(manifest["dtype"])
    return {
        name: [np.memmap(data / shard["file"], dtype, "r", shape=(shard["sequences"], length)) for shard in facts["shards"]["train"]]
        for name, facts in manifest["domains"].items()
    }


def _tokens(data: Path, piece: tuple[str, int]) -> Iterator[Any]:
    import torch

    domain, number = piece
    for row in rows_of(data)[domain][number]:
        yield torch.from_numpy(row.astype(np.int32))


def litdata(args: argparse.Namespace) -> Iterator[Any]:
    """Batches of `CombinedStreamingDataset`."""
    from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    found = rows_of(args.data)
    length = next(iter(found.values()))[0].shape[1]
    for name, shards in found.items():
        if not (args.work / name / "index.json").exists():
            pieces = [(name, number) for number in range(len(shards))]
            loader = TokensLoader(block_size=length)
            optimize(partial(_tokens, args.data), pieces, str(args.work / name), chunk_bytes="64MB", num_workers=1, item_loader=loader)
    parts = [StreamingDataset(str(args.work / name), item_loader=TokensLoader(block_size=length), shuffle=True) for name in found]
    combined = CombinedStreamingDataset(parts, seed=17, weights=[1 / len(parts)] * len(parts), iterate_over_all=False)
    while True:
        yield from StreamingDataLoader(combined, batch_size=args.batch_size, num_workers=args.workers)


class _Empty(types.ModuleType):
    """A module that has every name, each a class of its own."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None), []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def mosaicml(args: argparse.Namespace) -> Iterator[Any]:
    """Batches of `StreamingDataset` over one stream a domain."""
    try:
        import torchvision  # noqa: F401
    except Exception:  # it imports torchvision for pictures alone, and breaks where that is missing or does not fit torch
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets"):
            sys.modules[name] = _Empty(name)
    from streaming import MDSWriter, Stream, StreamingDataset
    from torch.utils.data import DataLoader

    found = rows_of(args.data)
    for name, shards in found.items():
        if not (args.work / name / "index.json").exists():
            with MDSWriter(out=str(args.work / name), columns={"ids": "ndarray:int32"}, size_limit=2**26) as writer:
                for shard in shards:
                    for row in shard:
                        writer.write({"ids": row.astype(np.int32)})
    streams = [Stream(local=str(args.work / name), proportion=1 / len(found)) for name in found]
    dataset = StreamingDataset(streams=streams, batch_size=args.batch_size, shuffle=True, shuffle_seed=17)
    while True:
        for batch in DataLoader(dataset, batch_size=args.batch_size, num_workers=args.workers):
            yield batch["ids"]


def main() -> None:
    """Time the batches after some that warm it up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=("litdata", "mosaicml"))
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    batches = {"litdata": litdata, "mosaicml": mosaicml}[args.library](args)
    tokens, checksum = 0, 0
    for number, ids in enumerate(batches):
        if number == WARMUP:
            began, tokens = time.perf_counter(), 0
        tokens += ids.numel()
        checksum += int(ids[0, 0])
        if number == WARMUP + args.batches:
            break
    seconds = time.perf_counter() - began
    print(json.dumps({"library": args.library, "workers": args.workers, "tokens_per_second": (tokens - ids.numel()) / seconds}))


if __name__ == "__main__":
    main()
