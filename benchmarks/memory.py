"""Memory that the steps of pruning and of training take in each CPU process, next to what `shearling plan` says they take.

    python benchmarks/memory.py [--processes 1,2] [--set FIELD=VALUE]
    python benchmarks/memory.py --source MODEL --target hidden_size=432,num_hidden_layers=24

Each run is the command `shearling run` with a few steps of each stage on random words, alone or under torchrun, without and with
activation checkpointing. From the first step of a stage to its last, the resident memory of every process is read some hundred times a
second; its peak counts, less what a process holds that has imported everything and does nothing. The C library is told to give memory
that was freed back at once, so that what is counted is what is held. Without --source, the model is a random Llama of the sizes
given. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shearling.planning import stage_memory
from shearling.recipe import Recipe, load_recipe
from shearling.sources import open_source

STAGES = ("prune", "train")
MB = 1e6
IDLE = """
import transformers.models.llama.modeling_llama, torch.distributed.fsdp, torch.utils.tensorboard
import shearling.cli, shearling.stages
print(open("/proc/self/status").read())
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
Peaks = dict[tuple[str, int], int]


def make_source(options: argparse.Namespace, folder: Path) -> Path:
    """A random Llama with a word-level tokenizer: `<s>`, `</s>`, `<unk>`, then w3, w4, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    heads = options.hidden // 64
    config = LlamaConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        intermediate_size=options.neurons,
        vocab_size=options.vocab,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(3, options.vocab))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def make_recipe(options: argparse.Namespace, folder: Path) -> Path:
    """A few steps of each stage on words that every tokenizer knows how to split."""
    rng = random.Random(0)
    words = [f"w{number}" for number in range(3, options.vocab)]
    lines = (json.dumps({"text": " ".join(rng.choices(words, k=200))}) for _ in range(options.batch * options.length // 10))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    source = Path(options.source).resolve() if options.source else make_source(options, folder / "source")
    target = {field: int(size) for field, _, size in (part.partition("=") for part in options.target.split(","))}
    fit = {"batch_size": options.batch, "microbatches": options.microbatches, "steps": options.steps, "evaluate_every": options.steps}
    values: dict[str, Any] = {
        "source": str(source),
        "target": target,
        "data": {"domains": {"words": str(folder / "text.jsonl")}, "sequence_length": options.length, "heldout_sequences": 2},
        "prune": {**fit, "scores": "random"},
        "train": fit,
        "evaluate": {"speed": False, "batch_size": 1},
        "runtime": {"save_every": None, "device": "cpu", "threads": 1},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(values))
    return path


def resident(status: str) -> int:
    """Bytes in memory, by a process' /proc/PID/status."""
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def ranks(process: subprocess.Popen[bytes], size: int) -> dict[int, Path]:
    """Rank -> folder below /proc of the run's own processes, as far as they have started."""
    if size == 1:
        return {0: Path(f"/proc/{process.pid}")}
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = dict(pair.partition("=")[::2] for pair in Path(f"/proc/{child}/environ").read_text().split("\0"))
        if "RANK" in variables:
            found[int(variables["RANK"])] = Path(f"/proc/{child}")
    return found


def stage_now(log: Path, steps: int) -> str | None:
    """The stage whose steps are going on, by the run's log."""
    lines = log.read_text().splitlines() if log.exists() else []
    try:
        last = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:  # a line half written
        return None
    return last["stage"] if last and last["step"] < steps else None


def measure(recipe: Path, out: Path, steps: int, size: int, changes: list[str]) -> Peaks:
    """(stage, process) -> the most memory that it held during the stage's steps."""
    launcher = [] if size == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    overrides = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, *launcher, "-m", "shearling", "run", str(recipe), "--out", str(out), *overrides]
    peaks: Peaks = {}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=ENVIRONMENT)
        while process.poll() is None:
            time.sleep(0.005)
            if (stage := stage_now(out / "metrics.jsonl", steps)) is None:
                continue
            for rank, folder in ranks(process, size).items():
                status = (folder / "status").read_text()
                if "VmRSS:" in status:
                    peaks[stage, rank] = max(peaks.get((stage, rank), 0), resident(status))
        if process.returncode:
            output.seek(0)
            sys.exit(output.read().decode(errors="replace"))
    return peaks


def estimates(recipe: Recipe, size: int) -> dict[str, dict[str, int]]:
    """What each stage takes by the estimate of `shearling plan`. On CPUs gathered weights are kept unless the recipe says otherwise."""
    source, keeps = open_source(recipe.source), size > 1 and not recipe.runtime.reshard_after_forward
    return {stage: stage_memory(source, recipe, stage, world_size=size, keeps_gathered=keeps) for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="a model's directory; left out, a random Llama")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--neurons", type=int, default=1408)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--target", default="hidden_size=384,num_hidden_layers=6,num_attention_heads=6,num_key_value_heads=6")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="FIELD=VALUE", help="as the command's --set")
    options = parser.parse_args()
    idle = resident(subprocess.run([sys.executable, "-c", IDLE], check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout)
    folder = Path(tempfile.mkdtemp())
    rows: list[dict[str, Any]] = []
    try:
        path = make_recipe(options, folder)
        for again in (False, True):
            changes = [*options.changes, f"runtime.activation_checkpointing={str(again).lower()}"]
            recipe = load_recipe(path, changes)
            for size in map(int, options.processes.split(",")):
                estimated = estimates(recipe, size)
                peaks = measure(path, folder / f"run-{again}-{size}", options.steps, size, changes)
                for (stage, rank), peak in sorted(peaks.items()):
                    row = {"stage": stage, "checkpointing": again, "processes": size, "process": rank}
                    rows.append({**row, "measured": peak - idle, "estimated": estimated[stage]})
    finally:
        shutil.rmtree(folder)
    print(f"an idle process holds {idle / MB:.0f} MB")
    print("| stage | activation checkpointing | processes | process | measured, MB | estimated, MB | measured / estimated |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        total = row["estimated"]["total"]
        cells = (row["stage"], "yes" if row["checkpointing"] else "no", row["processes"], row["process"])
        print(f"| {' | '.join(map(str, cells))} | {row['measured'] / MB:.0f} | {total / MB:.0f} | {row['measured'] / total:.2f} |")
    print(json.dumps({"idle": idle, "rows": rows}))


if __name__ == "__main__":
    main()
