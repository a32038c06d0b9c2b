"""What the rows of a comparison say together: means and spreads over seeds, excess over the source, compute at equal loss, the table.

Losses are nats/token, spreads sample standard deviations over the seeds. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from shearling.contenders import SCRATCH

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """Mean held-out loss of one contender over the tokens it has spent, pruning included: mean, least and largest of the seeds [n]."""

    tokens: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Ratio:
    """How many times its tokens another spent; `bound` is "more than" or "less than" where the number is only a bound, or empty."""

    times: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound} {self.times:.2g}".strip()


def curve_of(rows: Sequence[Values]) -> Curve:
    """The curve of one contender's rows, one of each seed; where seeds were measured at other tokens, between their points by line."""
    points = [np.array([(at, losses["mean"]) for at, losses in row["curve"]], np.float64) for row in rows]
    first, last = max(p[0, 0] for p in points), min(p[-1, 0] for p in points)
    tokens = np.unique(np.concatenate([p[:, 0] for p in points]))
    tokens = tokens[(tokens >= first) & (tokens <= last)]
    losses_SN = np.stack([np.interp(tokens, p[:, 0], p[:, 1]) for p in points])
    found = losses_SN.mean(0), losses_SN.min(0), losses_SN.max(0)
    return Curve(tokens.tolist(), *(values.tolist() for values in found))


def ratio_at_equal_loss(scratch: Curve, loss: float, tokens: float) -> Ratio | None:
    """How many times `tokens` training from scratch needed for `loss`: where its curve first comes to it, by line over log tokens.

    None where `tokens` is 0. A bound where the curve never comes to it, or is there at its first point (after 0 tokens: less than the
    next one's).
    """
    if not tokens:
        return None
    reached = next((i for i, value in enumerate(scratch.mean) if value <= loss), None)
    if reached is None:
        return Ratio(scratch.tokens[-1] / tokens, "more than")
    at = scratch.tokens[reached]
    if at and scratch.mean[reached] == loss:
        return Ratio(at / tokens)
    if reached == 0 or scratch.tokens[reached - 1] <= 0:  # no logarithm to go from
        after = at or next((later for later in scratch.tokens if later > 0), 0.0)
        return Ratio(after / tokens, "less than")
    before, above, below = scratch.tokens[reached - 1], scratch.mean[reached - 1], scratch.mean[reached]
    way = (above - loss) / (above - below)
    return Ratio(exp(log(before) + way * (log(at) - log(before))) / tokens)


def summarise(rows: Sequence[Values], source: Values) -> dict[str, Any]:
    """The contenders by their final loss, best first, and the curve of each, as plain values.

    Args:
        rows: of the rows that are done, see `shearling.compare`; each has `label`, `seed`, `learning_rate`, and `loss` and `curve`
            or `failed`.
        source: its held-out `loss` by domain, with `mean`.
    """
    labels = dict.fromkeys(row["label"] for row in rows)
    chosen = {label: found for label in labels if (found := _chosen([row for row in rows if row["label"] == label]))}
    scratch = curve_of(chosen[SCRATCH]) if SCRATCH in chosen else None
    measured = [row["speed"]["source"] for found in chosen.values() for row in found if row["speed"] and not row["checkpoint"]]
    speed = {kind: mean(rates[kind] for rates in measured) for kind in ("prefill", "generation")} if measured else {}
    found = [_contender(label, own, source["loss"], scratch, speed) for label, own in chosen.items()]
    return {"contenders": sorted(found, key=lambda one: one["final"]["mean"])}


def _chosen(rows: Sequence[Values]) -> list[Values]:
    """Of each seed the row of the learning rate that ended lowest on the first seed; rows that failed are none."""
    done = [row for row in rows if "failed" not in row]
    if not done:
        return []
    first = min(row["seed"] for row in done)
    best = min((row for row in done if row["seed"] == first), key=lambda row: float(row["loss"]["final"]["mean"]))["learning_rate"]
    return sorted((row for row in done if row["learning_rate"] == best), key=lambda row: int(row["seed"]))


def best_rate(rows: Sequence[Values]) -> float | None:
    """The learning rate of recovery that ended lowest on the first seed of these rows of one contender; None where all failed."""
    chosen = _chosen(rows)
    return float(chosen[0]["learning_rate"]) if chosen else None


def _contender(label: str, rows: Sequence[Values], source: Values, scratch: Curve | None, speed: Values) -> dict[str, Any]:
    """What the rows of all seeds of one contender say."""
    finals = {domain: [row["loss"]["final"][domain] for row in rows] for domain in rows[0]["loss"]["final"]}
    final, tokens = {domain: mean(losses) for domain, losses in finals.items()}, mean(row["tokens"] for row in rows)
    excess = {domain: final[domain] - source[domain] for domain in final if domain != "mean"}
    worst = max(excess, key=lambda domain: excess[domain])
    found: dict[str, Any] = {
        "label": label,
        "name": rows[0]["name"],
        "seeds": [row["seed"] for row in rows],
        "learning_rate": rows[0]["learning_rate"],
        "shape": rows[0]["shape"],
        "parameters": rows[0]["parameters"],
        "pruning_tokens": round(mean(row["pruning_tokens"] for row in rows)),
        "tokens": round(tokens),
        "cut": {domain: mean(row["loss"]["cut"][domain] for row in rows) for domain in rows[0]["loss"]["cut"]},
        "final": final,
        "spread": {domain: stdev(losses) if len(losses) > 1 else None for domain, losses in finals.items()},
        "excess": {**excess, "mean": mean(excess.values())},
        "worst": worst,
        "seconds": round(mean(sum(row["seconds"].values()) for row in rows), 1),
        "speed": None,
        "ratio": None,
        "curve": asdict(curve_of(rows)),
    }
    if scratch is not None and label != SCRATCH and (ratio := ratio_at_equal_loss(scratch, final["mean"], tokens)):
        found["ratio"] = asdict(ratio)
    if all(row["speed"] for row in rows) and (speed or not rows[0]["checkpoint"]):
        beside = [row["speed"]["source"] if not row["checkpoint"] else speed for row in rows]
        found["speed"] = {
            kind: mean(row["speed"]["model"][kind] / base[kind] for row, base in zip(rows, beside, strict=True))
            for kind in ("prefill", "generation")
        }
    return found


def table(found: Values) -> str:
    """A comparison as Markdown: a line of what is common to all, the table, and how to read it."""
    contenders, source = found["contenders"], found["source"]
    domains = [domain for domain in source["loss"] if domain != "mean"]
    fast, rates = any(one["speed"] for one in contenders), any(one["learning_rate"] is not None for one in contenders)
    most = max((len(one["seeds"]) for one in contenders), default=0)
    scratch = next((one for one in contenders if one["label"] == SCRATCH), None)
    head = ["method", "shape", "parameters", "tokens of pruning", "tokens in all", "loss after the cut", "loss at the end", *domains]
    head += ["mean excess", "worst excess", *(["prefill", "generation"] if fast else []), "seconds"]
    head += [*(["learning rate"] if rates else []), *(["compute from scratch"] if scratch else [])]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    for one in contenders:
        cells = [_escaped(one["label"]), one["shape"], f"{one['parameters']:,}", f"{one['pruning_tokens']:,}", f"{one['tokens']:,}"]
        fewer = f" ({len(one['seeds'])} of {most} seeds)" if len(one["seeds"]) < most else ""
        cells += [f"{one['cut']['mean']:.3f}", _spread(one, "mean") + fewer, *(_spread(one, domain) for domain in domains)]
        cells += [f"{one['excess']['mean']:.3f}", f"{one['excess'][one['worst']]:.3f} ({_escaped(one['worst'])})"]
        cells += [f"{one['speed'][kind]:.2f}×" if one["speed"] else "" for kind in ("prefill", "generation")] if fast else []
        cells += [f"{one['seconds']:,.0f}", *([f"{one['learning_rate']:g}"] if rates else [])]
        cells += [str(Ratio(**one["ratio"])) if one["ratio"] else ""] if scratch else []
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"{_escaped(row['label'])}, seed {row['seed']}, failed: {row['failed']}" for row in found["rows"] if "failed" in row]
    lines = [_headline(found, most), "", *lines, "", _explained(found, most, fast, rates, scratch)]
    return "\n".join([*lines, *(line for text in failed for line in ("", " ".join(text.split())))]) + "\n"


def _headline(found: Values, seeds: int) -> str:
    source = found["source"]
    name = Path(source["name"]).name if Path(source["name"]).is_absolute() else source["name"]  # the rest of a path tells nothing of it
    rows = "1 seed" if seeds == 1 else f"{seeds} seeds"
    return (
        f"{_escaped(name)}: {source['parameters']:,} parameters, held-out loss {source['loss']['mean']:.3f}. "
        f"{found['tokens']:,} tokens a row, {rows}."
    )


def _explained(found: Values, seeds: int, fast: bool, rates: bool, scratch: Values | None) -> str:
    words = ["Losses are nats/token on held-out text, the mean over the domains where none is named; excess is above the source's."]
    words += ["Nothing was recovered."] if found["cuts_only"] else []
    words += ["After ± stands the standard deviation over the seeds."] if seeds > 1 else ["One seed, so no spread."]
    words += ["Speeds are relative to the source's."] if fast else []
    words += ["Seconds are those of pruning and recovery, by the clock of this machine."]
    words += ["The learning rate is the one of those tried that ended lowest on the first seed."] if rates else []
    if scratch:
        words.append(
            f"Compute from scratch: how many times a row's tokens training from scratch needed for the same mean loss; it had "
            f"{scratch['tokens']:,} tokens, and its "
            "learning rate comes down only towards the end, so before that its curve lies higher than shorter runs would end."
        )
    return " ".join(words)


def _spread(one: Values, domain: str) -> str:
    spread = one["spread"][domain]
    return f"{one['final'][domain]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _escaped(text: str) -> str:
    """A name in a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
