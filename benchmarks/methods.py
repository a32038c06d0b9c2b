"""Every method from one source to one share of its parameters, with the same tokens in all: the table of docs/results.md.

    python benchmarks/methods.py --source MODEL --text TEXT --out DIR [--shares 0.8,0.5] [--tokens 100000]
                                 [--methods a,b] [--variants plain,compensated,rotated] [--seeds 17,18]

TEXT holds corpus/ and heldout/ as recipes/smollm2-65m.yaml asks. Tokens that a method spends on scores, gates and training between cuts
count: recovery gets what is left. All cuts are made first, then what is to be recovered is. At shares above 0.5 nothing is recovered:
what is asked is what the cut itself costs. Interrupted, the same command goes on; rows that are done are not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import shearling
from shearling.progress import Terminal

RECIPE = Path(__file__).parent.parent / "recipes" / "smollm2-65m.yaml"
SETTINGS: dict[str, list[str]] = {
    "random": [],
    "taylor": [],
    "sheared-llama": ["prune.steps=30"],
    "llm-pruner": [],
    "llm-pruner-global": [],
    "saap": [],
    "adapt-pruner": ["prune.steps=30", "prune.cuts=3", "prune.share=linear", "prune.gates.calibration_sequences=8"],
    "efficientllm": ["prune.steps=60", "prune.cuts=30"],
    "minitron": [],
    "magnitude": [],
    "flap": ["prune.axes=[group, neuron]"],
    "shortgpt": [],
    "last-blocks": [],
    "every-nth": [],
}
"""Method -> what is set beside its name. What stands here was chosen once and not tuned."""
COMMON = [
    "data.max_train_sequences=400",
    "data.heldout_sequences=16",
    "prune.evaluate_every=1000",
    "train.evaluate_every=1000",
    "evaluate.speed=false",
    "runtime.save_every=50",
    "runtime.keep_checkpoints=2",
]
RECOVERED = 0.5
"""The largest share at which the cut model is recovered."""


VARIANTS = {"plain": [], "compensated": ["prune.compensate=64"], "rotated": ["prune.rotate=untied", "prune.compensate=64"]}
"""What is done around the cut, for any method."""


def row(method: str, variant: str, share: float, seed: int, recover: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the report's numbers, made or gone on with in its own run directory; with or without recovery."""
    out = args.out / f"{method}-{variant}-{share}-{seed}"
    if (out / "row.json").exists():
        found: dict[str, Any] = json.loads((out / "row.json").read_text())
        if found["final"] is not None or not recover:
            return found
    settings = [f"source={args.source}", f"data.root={args.text.absolute()}", f"seed={seed}", *COMMON, *args.set]
    settings += ["target=null", f"target.parameters={share}", f"prune.method={method}", "prune.steps=0", *SETTINGS[method]]
    settings += VARIANTS[variant]
    recipe = shearling.load_recipe(RECIPE, settings)
    report = shearling.prune(RECIPE, out, overrides=settings, show=Terminal())
    if recover:
        left = args.tokens - report["tokens"]["prune"]
        steps = max(1, left // (recipe.train.batch_size * recipe.data.sequence_length))
        settings += [f"train.steps={steps}"]
        report = shearling.run(RECIPE, out, overrides=settings, accept_changed=["train.steps"], show=Terminal())
    found = {
        "method": method,
        "variant": variant,
        "share": share,
        "seed": seed,
        "parameters": report["model"]["parameters"],
        "shape": "by block" if isinstance(report["model"]["shape"]["intermediate_size"], list) else "alike",
        "tokens": sum(report["tokens"].values()),
        "pruning_tokens": report["tokens"]["prune"],
        "seconds": report["seconds"]["prune"],
        "source": report["loss"]["source"]["mean"],
        "cut": report["loss"]["pruned"]["mean"],
        "final": report["loss"].get("final", {}).get("mean"),
    }
    (out / "row.json").write_text(json.dumps(found, indent=1))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, best first in each share."""
    lines = []
    for share in sorted({found["share"] for found in rows}, reverse=True):
        of_share = sorted((r for r in rows if r["share"] == share), key=lambda r: (r["final"] or r["cut"], r["cut"]))
        lines += [
            f"**{share:.0%} of the parameters** (source {of_share[0]['source']:.3f})",
            "",
            "| method | shape | parameters | tokens of pruning | tokens in all | loss after the cut | loss at the end |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for r in of_share:
            name = r["method"] + ("" if r["variant"] == "plain" else f", {r['variant']}")
            final = f"{r['final']:.3f}" if r["final"] else ""
            numbers = f"{r['parameters']:,} | {r['pruning_tokens']:,} | {r['tokens']:,} | {r['cut']:.3f} | {final}"
            lines.append(f"| {name} | {r['shape']} | {numbers} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Make every row that is missing, and print the table of all that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--shares", default="0.5,0.8")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--methods", default=",".join(SETTINGS))
    parser.add_argument("--seeds", default="17")
    parser.add_argument("--variants", default="plain,compensated")
    parser.add_argument("--cuts-only", action="store_true", help="recover nothing yet")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    cases = list(itertools.product(map(float, args.shares.split(",")), args.variants.split(","), args.methods.split(",")))
    for recover, seed in itertools.product((False,) if args.cuts_only else (False, True), map(int, args.seeds.split(","))):
        for share, variant, method in cases:
            if recover and share > RECOVERED:
                continue
            found = row(method, variant, share, seed, recover, args)
            print(f"{method} {variant} {share} seed {seed}: {found['cut']:.3f} after the cut, {found['final']} at the end", flush=True)
    rows = [json.loads(path.read_text()) for path in sorted(args.out.glob("*/row.json"))]
    text = table(rows)
    (args.out / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
