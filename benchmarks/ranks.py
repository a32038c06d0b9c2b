"""Two processes against one, with the same number of threads in all: seconds of pruning and of training, as ratios.

    python benchmarks/ranks.py --source MODEL [--processes 2] [--threads 2] [--length 128] [--rounds 3]

Each round runs the same small recipe (a few steps of each stage, on random words) once with one process of all threads and once under
torchrun with that many processes of an equal part. Medians over the rounds of the stages' own time in steps, and of their ratio.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

TARGET = {"hidden_size": 432, "num_hidden_layers": 24, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 3}
WORDS = [f"word{number}" for number in range(200)]


def write_text(folder: Path) -> None:
    rng = random.Random(0)
    lines = (json.dumps({"text": " ".join(rng.choices(WORDS, k=200))}) for _ in range(600))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")


def recipe(options: argparse.Namespace, folder: Path) -> Path:
    fit = {"batch_size": options.sequences, "microbatches": options.processes, "steps": options.steps, "evaluate_every": options.steps}
    values: dict[str, Any] = {
        "source": str(Path(options.source).resolve()),
        "target": TARGET,
        "data": {"domains": {"words": str(folder / "text.jsonl")}, "sequence_length": options.length, "heldout_sequences": 2},
        "prune": {**fit, "gates": {"calibration_sequences": 2}},
        "train": fit,
        "evaluate": {"speed": False},
        "runtime": {"save_every": None},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(values))
    return path


def seconds(options: argparse.Namespace, folder: Path, processes: int) -> dict[str, float]:
    """Seconds that the steps of each stage took, by the run's own log, without each stage's first step."""
    out = folder / "run"
    threads = ["--set", f"runtime.threads={options.threads // processes}"]
    command = ["-m", "shearling", "run", str(recipe(options, folder)), "--out", str(out), *threads]
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run([sys.executable, *launcher, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens = options.sequences * options.length
    found = {
        stage: sum(tokens / line["tokens_per_second"] for line in lines if line["stage"] == stage and line["step"] > 1)
        for stage in ("prune", "train")
    }
    shutil.rmtree(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        write_text(folder)
        rounds = [{n: seconds(options, folder, n) for n in (1, options.processes)} for _ in range(options.rounds)]
    finally:
        shutil.rmtree(folder)
    tokens = (options.steps - 1) * options.sequences * options.length
    print(f"{options.threads} threads in all, {options.sequences} sequences of {options.length} a step; medians of {options.rounds} rounds")
    for stage in ("prune", "train"):
        one, many = (median(r[n][stage] for r in rounds) for n in (1, options.processes))
        ratio = median(r[options.processes][stage] / r[1][stage] for r in rounds)
        speeds = f"one process {tokens / one:7.0f} tokens/s, {options.processes} processes {tokens / many:7.0f} tokens/s"
        print(f"{stage:6s} {speeds}, time ratio {ratio:.3f}")
    print(json.dumps(rounds))


if __name__ == "__main__":
    main()
