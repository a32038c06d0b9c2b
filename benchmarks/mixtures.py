"""Mixture policies side by side: in a simulation, and on a real model that was cut and recovers. Table and picture of docs/mixtures.md.

    python benchmarks/mixtures.py --out DIR                                             the simulation alone
    python benchmarks/mixtures.py --out DIR --cut MODEL --source MODEL --text TEXT [--seeds 17,18,19] [--tokens 40960] [--policies a,b]

MODEL of --cut is a cut checkpoint (`pruned/` of a run), that of --source what it was cut from: its held-out losses are the reference.
TEXT holds corpus/ and heldout/ as recipes/smollm2-65m.yaml asks. All policies begin with the shares of RedPajama (arXiv 2310.06694,
table 1) but for those that set their own. Interrupted, the same command goes on; rows that are done are not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

import shearling
from shearling.data import mixture
from shearling.progress import Terminal

RECIPE = Path(__file__).parent.parent / "recipes" / "smollm2-65m.yaml"
SHARES = {"wiki": 0.045, "books": 0.045, "qa": 0.02, "web": 0.15, "docs": 0.67, "papers": 0.025, "code": 0.045}
"""RedPajama's, by the domain that stands for each: docs for CommonCrawl, web for C4, qa for StackExchange."""
POLICIES: dict[str, list[str]] = {
    "static": ["mixture.update=static"],
    "stratified": ["mixture.update=stratified"],
    "paper": ["mixture.update=paper"],
    "unclipped": ["mixture.update=unclipped"],
    "paper eta=0.2": ["mixture.update=paper", "mixture.step_size=0.2"],
}
UPDATES = 10
"""Evaluations that move the shares in a real run."""


def simulate(rule: str, seed: int, updates: int = 64) -> np.ndarray:
    """Excess losses [updates + 1, D] over the reference of a made-up model of which everything is known.

    A domain's loss is floor + size * (effective tokens)^-exponent, effective tokens being its own and a tenth of all others'. The
    reference is what each would have after three times the tokens, shared out so that all reach it together.
    """
    rng = np.random.default_rng(seed)
    weights = mixture.starting_weights(list(SHARES.values()))
    domains = len(weights)
    size, exponent, floor = rng.uniform(2, 4, domains), rng.uniform(0.15, 0.3, domains), rng.uniform(1.5, 2.2, domains)

    def losses(tokens_D: np.ndarray) -> np.ndarray:
        return np.asarray(floor + size * (0.02 + 0.9 * tokens_D + 0.1 * tokens_D.sum()) ** -exponent)

    reference = losses(np.full(domains, 3.0 / domains))
    tokens, excess = np.zeros(domains), [losses(np.zeros(domains)) - reference]
    for _ in range(updates):
        tokens = tokens + weights / updates
        found = losses(tokens) + rng.normal(0, 0.01, domains)
        weights = mixture.update(rule, weights, found, reference)
        excess.append(losses(tokens) - reference)
    return np.array(excess)


def spread(excess_D: np.ndarray) -> float:
    """How far apart the domains are: largest minus smallest excess."""
    return float(excess_D.max() - excess_D.min())


def real(policy: str, seed: int, args: argparse.Namespace, reference: dict[str, float]) -> dict[str, Any]:
    """Recover the cut model under a policy; what the run measured, update by update."""
    out = args.out / f"{policy.replace(' ', '-')}-{seed}"
    if not (out / "row.json").exists():
        per_step = 8 * 128
        steps = args.tokens // per_step
        settings = [f"source={args.cut}", f"data.root={args.text.absolute()}", f"seed={seed}", "target=null", "evaluate.speed=false"]
        settings += ["data.max_train_sequences=2000", "data.heldout_sequences=16", f"train.steps={steps}", "prune.steps=0"]
        settings += [f"train.evaluate_every={max(1, steps // UPDATES)}", "runtime.save_every=50", "runtime.keep_checkpoints=2"]
        settings += [f"data.domains.{name}.weight={share}" for name, share in SHARES.items()]
        settings += [f"mixture.reference={json.dumps(reference)}", *POLICIES[policy], *args.set]
        report = shearling.run(RECIPE, out, overrides=settings, show=Terminal())
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found = [{"tokens": line.get("tokens", 0), "heldout": line["heldout"]} for line in lines if "heldout" in line]
        shares = [line["weights"] for line in lines]
        row = {"policy": policy, "seed": seed, "final": report["loss"]["final"], "curve": found, "shares": shares[-1]}
        (out / "row.json").write_text(json.dumps(row, indent=1))
    loaded: dict[str, Any] = json.loads((out / "row.json").read_text())
    return loaded


def source_losses(args: argparse.Namespace) -> dict[str, float]:
    """Held-out losses of the source on the text that the runs are measured on."""
    path = args.out / "source.json"
    if not path.exists():
        settings = [f"source={args.source}", f"data.root={args.text.absolute()}", "target=null", "data.max_train_sequences=2000"]
        shearling.prepare(RECIPE, args.out / "source", overrides=[*settings, "data.heldout_sequences=16"], show=Terminal())
        found = shearling.evaluate(args.source, args.out / "source", speed=False)
        path.write_text(json.dumps({name: loss for name, loss in found["loss"].items() if name != "mean"}))
    losses: dict[str, float] = json.loads(path.read_text())
    return losses


def table(rows: list[dict[str, Any]], reference: dict[str, float]) -> list[str]:
    """A line a policy, best mean loss first, with the standard deviation over the seeds."""
    lines = [
        "| policy | seeds | mean loss | worst domain's loss | worst excess | spread of the excess | largest share at the end |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    found = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == policy]
        excess = [{name: row["final"][name] - loss for name, loss in reference.items()} for row in own]
        columns = [
            [row["final"]["mean"] for row in own],
            [max(row["final"][name] for name in reference) for row in own],
            [max(values.values()) for values in excess],
            [max(values.values()) - min(values.values()) for values in excess],
            [max(row["shares"].values()) for row in own],
        ]
        found.append((mean(columns[0]), policy, len(own), columns))
    for _, policy, seeds, columns in sorted(found):
        cells = [f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if seeds > 1 else "") for values in columns]
        lines.append(f"| {policy} | {seeds} | {' | '.join(cells)} |")
    return lines


def picture(path: Path, simulated: dict[str, np.ndarray], rows: list[dict[str, Any]], reference: dict[str, float]) -> None:
    """Excess of every domain over updates under static and paper: simulated above, real below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row["policy"] in simulated and row["seed"] == rows[0]["seed"]]
    figure, axes = pyplot.subplots(2 if shown else 1, 2, figsize=(11, 7 if shown else 4), sharey="row", squeeze=False)
    for axis, (rule, excess) in zip(axes[0], simulated.items(), strict=True):
        for number, name in enumerate(SHARES):
            axis.plot(excess[:, number], label=name)
        axis.set(title=f"simulated, {rule}", xlabel="update", ylabel="loss above reference, nats/token")
        axis.axhline(0, color="grey", linewidth=0.5)
    for row in shown:
        axis = axes[1][list(simulated).index(row["policy"])]
        for name, loss in reference.items():
            tokens = [point["tokens"] / 1000 for point in row["curve"]]
            axis.plot(tokens, [point["heldout"][name] - loss for point in row["curve"]], label=name)
        axis.set(title=f"SmolLM2-135M cut to a half, {row['policy']}", xlabel="thousand tokens", ylabel="loss above reference, nats/token")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Make every row that is missing; print the tables of all that are there, and write them and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--cut", type=Path)
    parser.add_argument("--source")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=40_960)
    parser.add_argument("--seeds", default="17,18,19")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = ["| rule (simulation, 20 seeds) | mean excess | worst excess | spread of the excess |", "|---|---:|---:|---:|"]
    for rule in ("static", "stratified", "paper"):
        ends = [simulate(rule, seed)[-1] for seed in range(20)]
        columns = [[end.mean() for end in ends], [end.max() for end in ends], [spread(end) for end in ends]]
        lines.append(f"| {rule} | " + " | ".join(f"{mean(values):.3f} ± {stdev(values):.3f}" for values in columns) + " |")
    rows, reference = [], {}
    if args.cut:
        reference = source_losses(args)
        policies = args.policies.split(",")
        for seed, policy in itertools.product(map(int, args.seeds.split(",")), policies):
            rows.append(real(policy, seed, args, reference))
            (args.out / "results.md").write_text("\n".join([*lines, "", *table(rows, reference)]) + "\n")
    picture(args.out / "mixtures.png", {rule: simulate(rule, 0) for rule in ("static", "paper")}, rows, reference)
    text = "\n".join([*lines, "", *(table(rows, reference) if rows else [])])
    (args.out / "results.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
