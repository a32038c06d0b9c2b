"""Every method from one source to one share of its parameters, with the same tokens in all: the table of docs/results.md.

    python benchmarks/methods.py --source MODEL --text TEXT --out DIR [--shares 0.8,0.5,recipe] [--tokens 100000]
                                 [--methods a,b] [--variants plain,compensated,rotated] [--seeds 17,18]

TEXT holds corpus/ and heldout/ as recipes/smollm2-65m.yaml asks. Tokens that a method spends on scores, gates and training between cuts
count: recovery gets what is left. All cuts are made first, then what is to be recovered is. At shares above 0.5 nothing is recovered:
what is asked is what the cut itself costs. The share `recipe` is the recipe as it is, its shape, data and tokens: its own method takes
the recipe's steps of pruning, others cut at once. Interrupted, the same command goes on; rows that are done are not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from statistics import mean
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


def settings_of(method: str, variant: str, share: float | str, seed: int, args: argparse.Namespace) -> tuple[list[str], int]:
    """What turns the recipe into this row, and the tokens that the row may spend in all."""
    common = [f"source={args.source}", f"data.root={args.text.absolute()}", f"seed={seed}"]
    if share != "recipe":
        common += [*COMMON, *args.set, "target=null", f"target.parameters={share}", f"prune.method={method}", "prune.steps=0"]
        return [*common, *SETTINGS[method], *VARIANTS[variant]], args.tokens or 100_000
    recipe = shearling.load_recipe(RECIPE, [*common, *args.set])
    sequences = sum(stage.steps * stage.batch_size for stage in (recipe.prune, recipe.train)) + recipe.prune.gates.calibration_sequences
    at_once = [] if method == recipe.prune.method else ["prune.steps=0"]
    settings = [*common, *args.set, f"prune.method={method}", *at_once, *VARIANTS[variant]]
    return settings, args.tokens or sequences * recipe.data.sequence_length


def row(method: str, variant: str, share: float | str, seed: int, recover: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the report's numbers, of the cut or of the recovery that goes on from it, in a run directory of its own."""
    out = args.out / f"{method}-{variant}-{share}-{seed}"
    found: dict[str, Any] = json.loads((out / "row.json").read_text()) if (out / "row.json").exists() else {}
    if found and (found["final"] is not None or not recover):
        return found
    settings, tokens = settings_of(method, variant, share, seed, args)
    if not recover:
        report = shearling.prune(RECIPE, out, overrides=settings, show=Terminal())
    else:
        recipe = shearling.load_recipe(RECIPE, settings)
        left = tokens - found["pruning_tokens"]
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
        "domains": report["loss"].get("final"),
    }
    (out / "row.json").write_text(json.dumps(found, indent=1))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, best first in each share; of several seeds the means, and between what the losses at the end lie."""
    lines = []
    for share in sorted({found["share"] for found in rows}, key=str, reverse=True):
        of_share: dict[str, list[dict[str, Any]]] = {}
        for r in (r for r in rows if r["share"] == share):
            of_share.setdefault(r["method"] + ("" if r["variant"] == "plain" else f", {r['variant']}"), []).append(r)
        what = "The recipe's shape" if share == "recipe" else f"{share:.0%} of the parameters"
        lines += [
            f"**{what}** (source {mean(seeds[0]['source'] for seeds in of_share.values()):.3f})",
            "",
            "| method | shape | parameters | tokens of pruning | tokens in all | loss after the cut | loss at the end |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        order = []
        for name, seeds in of_share.items():
            r, cut, ends = seeds[0], mean(r["cut"] for r in seeds), [r["final"] for r in seeds if r["final"]]
            final = f"{mean(ends):.3f}" if ends else ""
            final += f" ({min(ends):.3f} to {max(ends):.3f})" if len(ends) > 1 else ""
            numbers = f"{r['parameters']:,} | {r['pruning_tokens']:,} | {r['tokens']:,} | {cut:.3f} | {final}"
            order.append((mean(ends) if ends else cut, cut, f"| {name} | {r['shape']} | {numbers} |"))
        lines += [*(line for *_, line in sorted(order)), ""]
    return "\n".join(lines)


def main() -> None:
    """Make every row that is missing, and print the table of all that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--shares", default="0.5,0.8")
    parser.add_argument("--tokens", type=int, help="of each row in all; left out, those of the recipe for its shape, else 100,000")
    parser.add_argument("--methods", default=",".join(SETTINGS))
    parser.add_argument("--seeds", default="17")
    parser.add_argument("--variants", default="plain,compensated")
    parser.add_argument("--cuts-only", action="store_true", help="recover nothing yet")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    shares = [share if share == "recipe" else float(share) for share in args.shares.split(",")]
    cases = list(itertools.product(shares, args.variants.split(","), args.methods.split(",")))
    for recover, seed in itertools.product((False,) if args.cuts_only else (False, True), map(int, args.seeds.split(","))):
        for share, variant, method in cases:
            if recover and share != "recipe" and share > RECOVERED:
                continue
            found = row(method, variant, share, seed, recover, args)
            print(f"{method} {variant} {share} seed {seed}: {found['cut']:.3f} after the cut, {found['final']} at the end", flush=True)
    rows = [json.loads(path.read_text()) for path in sorted(args.out.glob("*/row.json"))]
    text = table(rows)
    (args.out / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
