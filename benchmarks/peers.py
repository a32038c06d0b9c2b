"""Cuts of other tools, each in an environment of its own, as stock checkpoints of at most N parameters: rivals that can be recovered.

    python benchmarks/peers.py --source MODEL --out DIR --parameters N [--peers optipfair,mergekit] [--envs DIR] [--data DATA]

MODEL is a Hugging Face directory, a hub id or a GGUF file. A peer's checkpoint is DIR/PEER, and DIR/PEER/peer.json says how it was made:
versions, settings, parameters, tokens looked at, seconds. The peers:

    optipfair       neurons of the MLP by weights alone, and the last layers where neurons are not enough
    optipfair-text  layers and neurons by what it sees on 32 training rows of DATA; how much of either by the loss on them
    mergekit        a run of layers before the last one left out
    mergekit-text   the run of layers with the least angular distance on 32 training rows of DATA

DATA is a folder that `shearling prepare` made, or a run directory; with it the held-out loss of every checkpoint is measured, too. Every
checkpoint must load with plain transformers and have the shape that was planned. Environments stand in --envs (left out: DIR/envs) and
are made once; pip's own settings say where packages come from (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares the
gigabytes of CUDA). Interrupted, the same command goes on; a peer that is done is not done again.

mergekit 0.1.5 drops layers of Llama and Mistral alone: with transformers 5, configs that list a kind for each layer (Qwen2, Qwen3) keep the
list of the source, and are refused when mergekit saves them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shearling
from shearling.arch.families import Anatomy
from shearling.data.tokens import TokenSet
from shearling.errors import ArtifactError, ConfigError, OutputError, Problem, ShapeError, ShearlingError
from shearling.export import stage_model, staging
from shearling.io.files import RunLock, read_json, sweep_temporary, write_atomic
from shearling.io.tensors import ShardWriter
from shearling.sources import Source, open_source
from shearling.texts import find_text, open_text

HERE = Path(__file__).parent
SEQUENCES = 32
"""Training rows that a peer may look at, as many as our scores do by default."""
CHOICES = 9
"""Numbers of dropped layers that are tried where text tells which is best."""
DONE = "installed.json"
"""Written last into an environment: what was installed there."""


@dataclass(frozen=True)
class Peer:
    """A way of a tool."""

    tool: str
    requirement: str
    looks: bool
    """Whether it looks at text."""


PEERS = {
    "optipfair": Peer("optipfair", "optipfair==0.4.2", looks=False),
    "optipfair-text": Peer("optipfair", "optipfair==0.4.2", looks=True),
    "mergekit": Peer("mergekit", "mergekit==0.1.5", looks=False),
    "mergekit-text": Peer("mergekit", "mergekit==0.1.5", looks=True),
}


def neurons_that_fit(anatomy: Anatomy, layers: int, limit: int) -> int:
    """The most neurons a block, 0 to those of `anatomy`, with which `layers` blocks have at most `limit` parameters; -1: not even 0."""
    one, two = (anatomy.with_sizes(layer=layers, neuron=neurons).parameters() for neurons in (1, 2))
    each = two - one
    return max(-1, min(anatomy.sizes["neuron"], 1 + (limit - one) // each))


def layers_that_fit(anatomy: Anatomy, limit: int) -> int:
    """The most whole blocks, 0 to those of `anatomy`, with which the model has at most `limit` parameters; -1: not even 0."""
    one, two = (anatomy.with_sizes(layer=layers).parameters() for layers in (1, 2))
    return max(-1, min(anatomy.sizes["layer"], 1 + (limit - one) // (two - one)))


def choices_of(peer: Peer, anatomy: Anatomy, limit: int) -> list[tuple[int, int]]:
    """(layers dropped, neurons kept) that come into question, each as near to `limit` parameters as the tool can get from below.

    mergekit: as few layers as must go. OptiPFair: as few layers as leave a neuron, and then as many neurons as fit; where it looks at
    text, up to `CHOICES` numbers of layers, evenly from there to where all neurons stay. Raises `ShapeError` where nothing fits.
    """
    layers, neurons = anatomy.sizes["layer"], anatomy.sizes["neuron"]
    if limit >= anatomy.parameters():
        found = f"{limit:,}, where the source has {anatomy.parameters():,}"
        raise ShapeError("nothing is to be cut", [Problem("--parameters", found, "Ask for fewer than the source has.")])
    if peer.tool == "mergekit":
        kept = layers_that_fit(anatomy, limit)
        ways = [(layers - kept, neurons)] if kept >= 2 else []  # the first and the last block stay
    else:
        fits = [(dropped, neurons_that_fit(anatomy, layers - dropped, limit)) for dropped in range(layers)]
        ways = [way for way in fits if way[1] >= 1]
        whole = next((at for at, way in enumerate(ways) if way[1] == neurons), len(ways) - 1)
        ways = ways[: whole + 1]
        if ways:
            chosen = np.unique(np.linspace(0, len(ways) - 1, min(CHOICES, len(ways))).round().astype(int)) if peer.looks else [0]
            ways = [ways[at] for at in chosen]
    if not ways:
        what = "layers and neurons" if peer.tool == "optipfair" else "layers between the first and the last"
        remedy = f"Ask for more: it cuts {what} alone, and all else is larger than this."
        raise ShapeError(f"{peer.tool} cannot reach this size", [Problem("--parameters", f"{limit:,}", remedy)])
    return ways


def environment(peer: Peer, envs: Path) -> Path:
    """The Python of the tool's environment, which is made where it is not there or was made for something else.

    Raises `OutputError` where something stands in its place that is no environment, `ShearlingError` where pip fails.
    """
    folder = envs / peer.tool
    pinned = next(line for line in (HERE.parent / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    wanted, python = [pinned, peer.requirement], folder / "bin" / "python"
    if (folder / DONE).is_file() and read_json(folder / DONE) == wanted:
        return python
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise OutputError(f"{folder}: not an environment of Python; choose another --envs")
    print(f"{peer.tool}: making its environment in {folder} ({', '.join(wanted)})", flush=True)
    began = time.perf_counter()
    with RunLock(envs / f".{peer.tool}.lock"):
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        ended = subprocess.run(pip, capture_output=True, text=True)
        if ended.returncode:
            lines = [line for line in ended.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
            raise ShearlingError(f"{peer.tool}: pip could not install {' and '.join(wanted)}:\n" + "\n".join(lines[-12:]))
        write_atomic(folder / DONE, json.dumps(wanted))
    print(f"{peer.tool}: installed in {time.perf_counter() - began:.0f} s", flush=True)
    return python


@contextlib.contextmanager
def directory_of(source: Source, work: Path) -> Iterator[Path]:
    """A Hugging Face directory of the source; a GGUF is written out as one, in fp32, below `work` for as long as it is needed."""
    if source.gguf_file is None:
        source.check()
        yield source.directory
        return
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix=".tmp-source-") as folder:
        reader = source.reader()
        with ShardWriter(folder) as writer:
            for tensor in source.anatomy.tensors():
                writer.add(tensor, reader.get(tensor))
        stage_model(Path(folder), source.config, source.save_companions, torch.float32)
        yield Path(folder)


def calibration_rows(tokens: TokenSet) -> np.ndarray:
    """`SEQUENCES` training rows [B, T] of prepared text, from all domains alike and evenly from each domain's rows."""
    share = -(-SEQUENCES // len(tokens.domains))
    by_domain = []
    for domain in tokens.domains:
        rows = tokens.sequences(domain, "train")
        by_domain.append([np.asarray(rows[int(at)]) for at in np.linspace(0, len(rows) - 1, min(share, len(rows))).astype(int)])
    turns = [rows[turn] for turn in range(share) for rows in by_domain if turn < len(rows)]
    return np.stack(turns[:SEQUENCES])


def cut(directory: Path, source: Source, asked: dict[str, Any], out: Path, python: Path, rows_BT: np.ndarray | None) -> dict[str, Any]:
    """Have a peer cut `directory`, check what it wrote, and publish it below `out` with its peer.json, whose values are returned.

    `asked`: see `asked_of`. Raises `ShearlingError` where the tool fails, `ArtifactError` where its checkpoint does not load or is not of a
    planned shape.
    """
    name, limit = asked["peer"], asked["parameters_at_most"]
    tool, choices = PEERS[name].tool, choices_of(PEERS[name], source.anatomy, limit)
    with staging(out / name) as staged, tempfile.TemporaryDirectory(dir=out, prefix=".tmp-job-") as folder:
        work = Path(folder).absolute()
        job = {"tool": tool, "source": str(directory.absolute()), "out": str(staged.absolute()), "choices": choices, "rows": None}
        if rows_BT is not None:
            np.save(work / "rows.npy", rows_BT)
            job["rows"] = str(work / "rows.npy")
        (work / "job.json").write_text(json.dumps(job))
        ended = subprocess.run([str(python), str(HERE / "peers_cut.py"), str(work / "job.json")], stdout=subprocess.PIPE, text=True)
        if ended.returncode:
            raise ShearlingError(f"{name}: the tool ended with code {ended.returncode}; what it said stands above")
        found = json.loads(ended.stdout.splitlines()[-1])
        source.save_companions(staged)
        values = {**asked, **checked(name, staged, source, choices, limit), **found}
        (staged / "peer.json").write_text(json.dumps(values, indent=1) + "\n")
    return values


def checked(name: str, staged: Path, source: Source, choices: Sequence[tuple[int, int]], limit: int) -> dict[str, Any]:
    """Load a peer's checkpoint with plain transformers and count it; its shape, or `ArtifactError` where it is none that was planned."""
    written = open_source(staged)
    model = written.load_model()
    parameters, sizes = sum(weight.numel() for weight in model.parameters()), written.anatomy.sizes
    planned = [source.anatomy.with_sizes(layer=source.anatomy.sizes["layer"] - dropped, neuron=kept) for dropped, kept in choices]
    if parameters > limit or all((p.sizes, p.parameters()) != (sizes, parameters) for p in planned):
        found = f"{sizes['layer']} layers, {sizes['neuron']} neurons, {parameters:,} parameters"
        raise ArtifactError(f"{name}: not what was asked of it", [Problem("checkpoint", found, f"At most {limit:,} were asked for.")])
    return {"parameters": parameters, "layers": sizes["layer"], "neurons": sizes["neuron"]}


def asked_of(name: str, source: Source, limit: int, tokens: TokenSet | None) -> dict[str, Any]:
    """What a checkpoint hangs on. `tokens`: the text that the peer looks at; None where it looks at none."""
    return {
        "peer": name,
        "requirement": PEERS[name].requirement,
        "parameters_at_most": limit,
        "source": source.fingerprint(),
        "text": None if tokens is None else tokens.manifest["fingerprint"],
    }


def done_before(final: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The peer.json of a checkpoint that is there; None where none is. Raises `OutputError` where it was made for something else."""
    if not (final / "peer.json").is_file():
        return None
    values: dict[str, Any] = read_json(final / "peer.json")
    if differing := [key for key, value in asked.items() if values.get(key) != value]:
        raise OutputError(f"{final}: was made with another {' and '.join(differing)}; choose another --out")
    return values


def measured(final: Path, values: dict[str, Any], data: Path, tokens: TokenSet) -> dict[str, Any]:
    """Enter the held-out loss on `data` (`tokens` is it, opened) in peer.json, in nats/token, unless it stands there."""
    fingerprint = tokens.manifest["fingerprint"]
    if values.get("heldout", {}).get("text") != fingerprint:
        loss = shearling.evaluate(final, data, speed=False)["loss"]
        values = {**values, "heldout": {"text": fingerprint, "loss": loss}}
        write_atomic(final / "peer.json", json.dumps(values, indent=1) + "\n")
    return values


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The peers as Markdown."""
    lines = ["| peer | layers | neurons | parameters | tokens looked at | held-out loss | seconds |", "|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        loss = f"{row['heldout']['loss']['mean']:.3f}" if "heldout" in row else ""
        tokens = f"{sum(row['tokens'].values()):,}"
        said = f"{row['layers']} | {row['neurons']} | {row['parameters']:,} | {tokens} | {loss} | {row['seconds']}"
        lines.append(f"| {row['peer']} ({row['requirement']}) | {said} |")
    return "\n".join(lines)


def make(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[ShearlingError]]:
    """Make what is missing; the peer.json of every peer that is there then, and why others are not.

    Raises `ShearlingError` for what is wrong before any of them is made, or with all.
    """
    names = args.peers.split(",")
    problems = [Problem("--peers", name, f"The peers are {', '.join(PEERS)}.") for name in names if name not in PEERS]
    if args.data is None:
        problems += [Problem("--data", "none", f"{name} looks at text.") for name in names if name in PEERS and PEERS[name].looks]
    if problems:
        raise ConfigError("this cannot be done", problems)
    source = open_source(args.source)
    rows: list[dict[str, Any]] = []
    failures: list[ShearlingError] = []
    if source.anatomy.blocks:
        raise ShapeError("the source's blocks differ", [Problem("--source", source.name, "Give one whose blocks are alike.")])
    for name in names:
        choices_of(PEERS[name], source.anatomy, args.parameters)
    tokens = None if args.data is None else open_text(find_text(args.data))
    with RunLock(args.out / ".lock"):
        sweep_temporary(args.out)
        for name in names:
            try:
                rows.append(one(name, source, args, tokens))
            except ShearlingError as error:  # another may well be made
                print(f"error: {error}", file=sys.stderr, flush=True)
                failures.append(error)
    return rows, failures


def one(name: str, source: Source, args: argparse.Namespace, tokens: TokenSet | None) -> dict[str, Any]:
    """The peer.json of one peer, which is made if it is not there, and measured on `tokens` (`--data`, opened) if they are given."""
    text = tokens if PEERS[name].looks else None
    asked = asked_of(name, source, args.parameters, text)
    values = done_before(args.out / name, asked)
    print(f"{name}: {'cutting' if values is None else 'done before'}", flush=True)
    if values is None:
        python = environment(PEERS[name], args.envs or args.out / "envs")
        with directory_of(source, args.out) as directory:
            values = cut(directory, source, asked, args.out, python, None if text is None else calibration_rows(text))
    print(f"{name}: {values['parameters']:,} parameters", flush=True)
    return values if tokens is None else measured(args.out / name, values, args.data, tokens)


def main() -> None:
    """Make every peer that is missing, and print the table of those asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--parameters", required=True, type=int)
    parser.add_argument("--peers", default="optipfair,mergekit")
    parser.add_argument("--envs", type=Path)
    parser.add_argument("--data", type=Path)
    try:
        rows, failures = make(parser.parse_args())
        if rows:
            print(table(rows))
        if failures:
            sys.exit(failures[0].exit_code)
    except ShearlingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
