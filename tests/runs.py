"""Whole runs for tests: two domains of text, a recipe of a dozen steps, and faults at a chosen moment of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from faults import in_child
from shearling.show import Silent

DOMAINS = ("a", "b")
CLOCK = ("seconds", "evaluation_seconds", "tokens_per_second")
"""What depends on the clock in a line of a log."""
TARGET = {"num_hidden_layers": 2, "hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 24}
WHOLE_VALUES: dict[str, Any] = {
    "source": "owner/model",
    "target": {"num_hidden_layers": 2, "hidden_size": 36, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24},
    "data": {
        "domains": {
            "web": {"train": ["/text/web.jsonl"], "weight": 1.0, "where": {"key": ["a"]}},
            "hub": {"dataset": "owner/text", "subset": "en", "revision": "main", "weight": 2.0, "where": {"key": [1]}},
        },
        "root": "/text",
    },
    "mixture": {"update": "static", "reference": {"power_law": "/points.csv"}, "floor": 0.1},
    "teacher": {},
    "prune": {"distill": {"top_k": 8}, "compensate": 8},
    "train": {"lora": {}, "distill": {"top_k": 8}},
}
"""Plain values of a recipe of which every field can have another value; it is not there to be run."""
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(
    ["shearling.cli", "shearling.stages", "shearling.report", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama"]
)


def write_text(folder: Path, documents: int = 260) -> dict[str, str]:
    """Two domains of random words for the tokenizer of `models`, with different words; returns {domain: path}."""
    rng = random.Random(0)
    for name, words in zip(DOMAINS, ((3, 40), (30, 95)), strict=True):
        texts = (" ".join(f"w{rng.randint(*words)}" for _ in range(rng.randint(20, 60))) for _ in range(documents))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {name: str(folder / f"{name}.jsonl") for name in DOMAINS}


def recipe_values(source: Path, domains: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Plain values of a recipe of a few seconds; `changes` replace whole sections, or fields of those that are mappings."""
    fit = {"batch_size": 8, "learning_rate": 1e-3, "evaluate_every": 5}
    values: dict[str, Any] = {
        "source": str(source),
        "target": TARGET,
        "data": {"domains": dict(domains), "sequence_length": 32, "heldout_sequences": 4},
        "prune": {**fit, "steps": 12, "microbatches": 2, "gates": {"calibration_sequences": 4}},
        "train": {**fit, "steps": 10, "microbatches": 1},
        "evaluate": {"prompt_tokens": 16, "generate_tokens": 2},
        "runtime": {"threads": 1, "device": "cpu"},
    }
    for section, change in changes.items():
        old = values.get(section)
        values[section] = {**old, **change} if isinstance(old, dict) and isinstance(change, dict) and section != "target" else change
    return values


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def unfinished(out: Path, *stages: str) -> Path:
    """The run without the ledger's entries of these stages."""
    for stage in stages:
        (out / "stages" / f"{stage}.json").unlink()
    return out


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


class Notes(Silent):
    """Keeps what the user should read."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class SignalAt(Silent):
    """Sends this process `number` at one moment of a run: ("stage", name), ("note", its start), or (stage, step)."""

    def __init__(self, moment: tuple[str, Any], number: signal.Signals = signal.SIGTERM) -> None:
        self.moment, self.number, self.sent = moment, number, False

    def _at(self, moment: tuple[str, Any]) -> None:
        if moment == self.moment and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)

    def stage(self, name: str, done: bool) -> None:
        if not done:
            self._at(("stage", name))

    def note(self, text: str) -> None:
        self._at(("note", text.split()[0]))

    def count(self, what: str, done: int, unit: str) -> None:
        self._at(("count", what.split(":")[0]))

    def step(self, stage: str, step: int, steps: int, line: Mapping[str, Any]) -> None:
        self._at((stage, step))


def command(
    arguments: Sequence[str],
    stderr: Path,
    moment: tuple[str, Any] | None = None,
    number: int = signal.SIGTERM,
    file_bytes: int | None = None,
) -> int:
    """Exit code of the command line in a process of its own, its output in `stderr`.

    At `moment` it sends itself the signal `number`; with `file_bytes` no file of it can grow larger, as on a full disk.
    A process ended by a signal has that signal's negative number as its code.
    """
    process = _FORKSERVER.Process(target=_command, args=(list(arguments), str(stderr), moment, number, file_bytes))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{arguments} is at it still")
    assert process.exitcode is not None
    return process.exitcode


def forked(arguments: Sequence[str], stderr: Path, file_bytes: int | None = None) -> int:
    """The same in a fork of this process, which has imported everything already; for runs that are sent no signal."""

    def work() -> None:
        try:
            _command(list(arguments), str(stderr), None, 0, file_bytes)
        except SystemExit as ended:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 0)

    return in_child(work)


def _command(arguments: list[str], stderr: str, moment: tuple[str, Any] | None, number: int, file_bytes: int | None) -> None:
    import torch

    from shearling import cli

    torch.set_num_threads(1)
    output = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if moment is not None:
        cli.Terminal = lambda: SignalAt(moment, signal.Signals(number))  # type: ignore[assignment,misc]
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    sys.argv = ["shearling", *arguments]
    cli.main()
