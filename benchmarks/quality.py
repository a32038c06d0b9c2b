"""Held-out loss of the sheared model against one-shot cuts of the same shape, recovered with the same tokens in all.

    python benchmarks/quality.py --source MODEL --text TEXT --out DIR [--seeds 17] [--methods sheared,taylor,random]

TEXT holds corpus/ and heldout/ as recipes/smollm2-65m.yaml asks. `taylor` and `random` cut at once by that score and spend on
recovery what pruning spends. Interrupted, the same command goes on; runs that are done are not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import shearling
from shearling.progress import Terminal

RECIPE = Path(__file__).parent.parent / "recipes" / "smollm2-65m.yaml"


def overrides(method: str, recipe: shearling.Recipe) -> list[str]:
    """What turns the recipe into this method at equal tokens."""
    if method == recipe.prune.method:
        return []
    steps = recipe.train.steps + recipe.prune.steps * recipe.prune.batch_size // recipe.train.batch_size
    if method in ("random", "magnitude"):  # no sequences go into a score
        steps += recipe.prune.gates.calibration_sequences // recipe.train.batch_size
    return [f"prune.method={method}", "prune.steps=0", f"train.steps={steps}"]


def main() -> None:
    """Run every method with every seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", default="17")
    parser.add_argument("--methods", default="sheared-llama,taylor,random")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    common = [f"source={args.source}", f"data.root={args.text.absolute()}", *args.set]
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds.split(","):
        for method in args.methods.split(","):
            settings = [*common, f"seed={seed}"]
            settings += overrides(method, shearling.load_recipe(RECIPE, settings))
            report = shearling.run(RECIPE, args.out / f"{method}-{seed}", overrides=settings, show=Terminal())
            rows.setdefault(method, []).append(
                {"tokens": sum(report["tokens"].values()), "cut": report["loss"]["pruned"]["mean"], **report["loss"]["final"]}
            )
            source = report["loss"]["source"]["mean"]
    print(f"source: {source:.3f} nats/token, mean of the domains")
    for method, found in rows.items():
        final = [row["mean"] for row in found]
        spread = f" (from {min(final):.3f} to {max(final):.3f})" if len(final) > 1 else ""
        cut = statistics.mean(row["cut"] for row in found)
        print(f"{method:14s} {found[0]['tokens']:,} tokens: {cut:.3f} after the cut, {statistics.mean(final):.3f}{spread} at the end")
    (args.out / "quality.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
