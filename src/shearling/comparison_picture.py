"""The picture of a comparison: held-out loss over the tokens that were spent, and the final losses by domain.

A file of its own, so it has colours of its own where those of `shearling.pictures` are the page's.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from shearling.pictures import PALETTE

DASHES = ("-", "--", ":", "-.")
"""They change when the colours are used up."""
INCHES = (8.0, 9.0)
DPI = 130
FAR = 3.0
"""Where one curve has so many times the tokens of another, the axis of tokens is logarithmic."""
_STYLE = {
    "text.parse_math": False,  # names come from users
    "font.size": 10,
    "axes.grid": True,
    "grid.color": "#c9ced4",
    "grid.linewidth": 0.5,
    "axes.edgecolor": "#c9ced4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
}


def draw(found: Mapping[str, Any]) -> bytes:
    """A PNG of what `shearling.compare` found: above, the mean over the seeds with a band from the lowest to the highest of them; below,
    a bar for each method and domain, the source's loss as a line across."""
    contenders, source = found["contenders"], found["source"]
    domains = [domain for domain in source["loss"] if domain != "mean"]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=INCHES, layout="constrained")
        above, below = figure.subplots(2, 1)
        handles = [_curve(above, number, one["curve"]) for number, one in enumerate(contenders)]
        above.axhline(source["loss"]["mean"], color="black", linewidth=1, linestyle=(0, (1, 2.5)))
        ends = [one["curve"]["tokens"][-1] for one in contenders]
        if max(ends) > FAR * min(ends):
            above.set_xscale("log", nonpositive="mask")
        above.set(xlabel="tokens, pruning included", ylabel="mean held-out loss, nats per token")
        width = 0.8 / len(contenders)
        for number, one in enumerate(contenders):
            colour, dashes = _look(number)
            places = [place + (number - (len(contenders) - 1) / 2) * width for place in range(len(domains))]
            spread = [one["spread"][domain] or 0.0 for domain in domains]
            hatch = None if dashes == "-" else "//"
            heights = [one["final"][domain] for domain in domains]
            below.bar(places, heights, width, yerr=spread if any(spread) else None, color=colour, hatch=hatch, error_kw={"linewidth": 0.8})
        for place, domain in enumerate(domains):
            below.hlines(source["loss"][domain], place - 0.45, place + 0.45, color="black", linewidth=1, linestyle=(0, (1, 2.5)))
        below.set_xticks(range(len(domains)), domains)
        below.set(ylabel="held-out loss at the end, nats per token")
        below.set_title("this axis does not begin at 0", loc="right", fontsize=8)
        below.grid(False, axis="x")
        lowest = min([source["loss"][domain] for domain in domains] + [one["final"][domain] for one in contenders for domain in domains])
        below.set_ylim(bottom=0.9 * lowest)
        labels = [one["label"].lstrip("_") or "_" for one in contenders]  # matplotlib leaves out what begins with _
        above.legend(handles, labels, fontsize=9, frameon=False, title="dotted: the source", title_fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _look(number: int) -> tuple[str, str]:
    return PALETTE[number % len(PALETTE)], DASHES[number // len(PALETTE) % len(DASHES)]


def _curve(axes: Any, number: int, curve: Mapping[str, Any]) -> Any:
    colour, dashes = _look(number)
    (line,) = axes.plot(curve["tokens"], curve["mean"], color=colour, linestyle=dashes, marker="o", markersize=3)
    axes.fill_between(curve["tokens"], curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
    return line
