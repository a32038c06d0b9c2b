"""The data engine against others, side by side in one run: preparing, loading, start-up and memory.

    python benchmarks/data.py --source MODEL --text TEXT --out DIR [--length 2048] [--batch-size 16] [--rounds 5] [--steps 400]
                              [--memory-steps 1000000] [--litdata PYTHON] [--mosaicml PYTHON] [--parts prepare,load,start,memory]

TEXT holds corpus/DOMAIN.jsonl.zst. MODEL gives the tokenizer. What is compared takes turns, A B A B ..., and medians of the ratios are
printed, since machines drift. `prepare` tokenises all of TEXT once with `shearling.data.prepare` and once with `datasets.map`, each in
a process of its own whose peak memory is taken. `load` draws batches of R rows from what was prepared, moving the shares every 50 steps,
against a loop over plain memory maps with fixed shares and, where interpreters are named that have them, litdata and mosaicml-streaming
(which get a warm page cache, fixed shares, and the better of 0 and 1 workers). `start` opens a loader, and goes on at step 1,000,000,
over an index of 1, 10 and 100 million rows that is simulated. `memory` takes a million steps over tiny rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from shearling.data import mixture
from shearling.data.config import DataConfig
from shearling.data.loader import Loader
from shearling.data.prepare import prepare
from shearling.data.tokens import TokenSet, open_tokens
from shearling.sources import open_source

UPDATE_EVERY = 50
"""Steps between updates of the shares."""


def own_preparation(args: argparse.Namespace, out: Path) -> int:
    """Prepare all of TEXT; the tokens that were made of it."""
    source = open_source(args.source)
    domains = {path.name.split(".")[0]: str(path) for path in sorted((args.text / "corpus").glob("*.jsonl.zst"))}
    config = DataConfig.model_validate({"domains": domains, "sequence_length": args.length, "heldout_sequences": 50})
    manifest = prepare(config, source.tokenizer(), source.anatomy.sizes["vocab"], out, seed=17)
    return sum(facts["tokens"] for facts in manifest["domains"].values())


def datasets_preparation(args: argparse.Namespace, out: Path) -> int:
    """The same text read and tokenised by `datasets`, written as Arrow files; the tokens that were made of it."""
    import datasets
    import pyarrow.compute as pc

    datasets.disable_progress_bars()
    tokenizer = open_source(args.source).tokenizer()
    files = [str(path) for path in sorted((args.text / "corpus").glob("*.jsonl.zst"))]
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(out))
    ids = rows.map(lambda batch: {"ids": tokenizer(batch["text"])["input_ids"]}, batched=True, remove_columns=rows.column_names)
    return int(pc.sum(pc.list_value_length(ids.data.column("ids"))).as_py())  # by offsets alone: counting is no part of preparing


PREPARATIONS: dict[str, Callable[[argparse.Namespace, Path], int]] = {"shearling": own_preparation, "datasets": datasets_preparation}


def bench_prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s and peak memory of each; the ratio of ours to the other, round by round."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PREPARATIONS}
    for number in range(args.prepare_rounds):
        for name in PREPARATIONS:
            shutil.rmtree(args.out / f"prepared-{name}", ignore_errors=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"  round {number + 1}, {name}: {found[name][-1]}", flush=True)
    ratios = [own["rate"] / other["rate"] for own, other in zip(found["shearling"], found["datasets"], strict=True)]
    return {
        "tokens": found["shearling"][0]["tokens"],
        **{f"{name}_tokens_per_second": median(row["rate"] for row in rows) for name, rows in found.items()},
        **{f"{name}_peak_mib": max(row["peak_mib"] for row in rows) for name, rows in found.items()},
        "ratio": median(ratios),
        "ratios": ratios,
    }


def prepare_one(args: argparse.Namespace) -> dict[str, Any]:
    """One preparation in this process."""
    began = time.perf_counter()
    tokens = PREPARATIONS[args.one](args, args.out / f"prepared-{args.one}")
    seconds = time.perf_counter() - began
    return {"tokens": tokens, "rate": tokens / seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def own_batches(tokens: TokenSet, batch_size: int, prefetch: int) -> Iterator[torch.Tensor]:
    """Batches of our loader; the shares follow made-up losses every 50 steps."""
    rng, domains = np.random.default_rng(0), len(tokens.domains)
    weights = mixture.starting_weights([None] * domains)
    with Loader(tokens, batch_size, 17, prefetch=prefetch) as loader:
        cursors, step = loader.start(), 0
        while True:
            step += 1
            if step % UPDATE_EVERY == 0:
                weights = mixture.update("paper", weights, rng.uniform(2, 3, domains), np.full(domains, 2.5))
            batch = loader.batch(step, weights, cursors)
            cursors = batch.cursors
            yield torch.from_numpy(batch.ids)


def memmap_batches(tokens: TokenSet, batch_size: int) -> Iterator[torch.Tensor]:
    """The plain loop: one memory map a domain, fixed shares, a permutation in memory."""
    rng = np.random.default_rng(17)
    dtype, length = np.dtype(tokens.manifest["dtype"]), tokens.sequence_length
    files = [[(shard["file"], shard["sequences"]) for shard in tokens.manifest["domains"][d]["shards"]["train"]] for d in tokens.domains]
    if any(len(shards) > 1 for shards in files):
        raise SystemExit("the plain loop reads one file a domain: use less text")
    maps = [np.memmap(tokens.path / file, dtype, "r", shape=(n, length)) for [(file, n)] in files]
    orders = [rng.permutation(len(rows)) for rows in maps]
    cursors = [0] * len(maps)
    while True:
        ids = np.empty((batch_size, length), np.int64)
        for row, domain in enumerate(rng.integers(len(maps), size=batch_size)):
            ids[row] = maps[domain][orders[domain][cursors[domain] % len(orders[domain])]]
            cursors[domain] += 1
        yield torch.from_numpy(ids)


def rate(batches: Iterator[torch.Tensor], steps: int, warmup: int = 20) -> float:
    """Tokens/s of so many batches after some that warm up. Each batch is touched."""
    for _ in range(warmup):
        next(batches)
    began, tokens = time.perf_counter(), 0
    for _ in range(steps):
        ids = next(batches)
        tokens += ids.numel()
    return tokens / (time.perf_counter() - began)


def bench_load(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of each loader, in turn; ours as a ratio to each other one."""
    tokens = open_tokens(args.out / "prepared-shearling")
    runs: dict[str, Callable[[], float]] = {
        "shearling": lambda: rate(own_batches(tokens, args.batch_size, 0), args.steps),
        "shearling, 2 ahead": lambda: rate(own_batches(tokens, args.batch_size, 2), args.steps),
        "memmap": lambda: rate(memmap_batches(tokens, args.batch_size), args.steps),
    }
    for library, python in (("litdata", args.litdata), ("mosaicml", args.mosaicml)):
        if python:
            runs[library] = partial(_peer, args, library, python)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            found[name].append(run())
    own = [name for name in runs if name.startswith("shearling")]
    return {
        "tokens_per_second": {name: median(rates) for name, rates in found.items()},
        "ratio": {
            name: {other: median(a / b for a, b in zip(found[name], found[other], strict=True)) for other in runs if other not in own}
            for name in own
        },
    }


def _peer(args: argparse.Namespace, library: str, python: str) -> float:
    """Tokens/s of another library, with the better number of workers."""
    work = args.out / f"peer-{library}"
    work.mkdir(parents=True, exist_ok=True)
    best = 0.0
    for workers in (0, 1):
        command = [python, str(Path(__file__).parent / "data_peers.py"), library, "--data", str(args.out / "prepared-shearling")]
        command += ["--work", str(work), "--batches", str(args.steps), "--batch-size", str(args.batch_size), "--workers", str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{library}: {done.stderr[-3000:]}")
        best = max(best, json.loads(done.stdout.splitlines()[-1])["tokens_per_second"])
    return best


class _Simulated:
    """Rows that are computed where they are asked for, so that an index can have any size."""

    def __init__(self, rows: int, length: int) -> None:
        self.shape, self.dtype = (rows, length), np.dtype("<u2")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        chosen = np.atleast_1d(np.asarray(index))
        return np.repeat((chosen % 2**16).astype(self.dtype)[:, None], self.shape[1], axis=1)


def simulated(rows: int, length: int, domains: int = 7) -> Any:
    """A token set of so many rows in all."""
    names = tuple(f"domain{number}" for number in range(domains))
    texts = {name: _Simulated(max(1, rows // domains), length) for name in names}
    return SimpleNamespace(domains=names, sequence_length=length, sequences=lambda name, split: texts[name])


def bench_start(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds until the first batch, at step 1 and gone on with at step 1,000,000, by rows in all."""
    found: dict[str, Any] = {}
    for millions in (1, 10, 100):
        times: dict[str, list[float]] = {"start": [], "resume": []}
        for _ in range(20 * args.rounds):
            for kind, step in (("start", 1), ("resume", 1_000_000)):
                tokens = simulated(millions * 10**6, 32)
                began = time.perf_counter()
                loader = Loader(tokens, args.batch_size, 17)
                weights = mixture.starting_weights([None] * len(tokens.domains))
                loader.batch(step, weights, loader.start() + (step - 1) * args.batch_size // len(tokens.domains))
                times[kind].append(1000 * (time.perf_counter() - began))
        found[f"{millions} million rows"] = {kind: median(values) for kind, values in times.items()}
    return found


def bench_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Resident MiB of this process after parts of the steps, and steps/s."""
    tokens, found = simulated(10**6, 8), {}
    weights, marks = mixture.starting_weights([None] * 7), {args.memory_steps // part for part in (100, 10, 4, 2, 1)}
    began = time.perf_counter()
    with Loader(tokens, 4, 17) as loader:
        cursors = loader.start()
        for step in range(1, args.memory_steps + 1):
            cursors = loader.batch(step, weights, cursors).cursors
            if step in marks:
                found[f"{step:,} steps"] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    return {"resident_mib": found, "steps_per_second": args.memory_steps / (time.perf_counter() - began)}


PARTS = {"prepare": bench_prepare, "load": bench_load, "start": bench_start, "memory": bench_memory}


def main() -> None:
    """Run the parts asked for and print what they found; data.json in DIR has all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prepare-rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--memory-steps", type=int, default=1_000_000)
    parser.add_argument("--litdata", help="the Python of an environment with litdata, numpy and torch")
    parser.add_argument("--mosaicml", help="the Python of an environment with mosaicml-streaming, numpy and torch")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--one", choices=tuple(PREPARATIONS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        print(json.dumps(prepare_one(args)))
        return
    results = args.out / "data.json"
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    for name in args.parts.split(","):
        print(name, flush=True)
        found[name] = PARTS[name](args)
        print(json.dumps(found[name], indent=1), flush=True)
        results.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
