"""Pictures of a run as inline SVG that takes its colours from the page, so that one picture serves light and dark.

matplotlib draws with stand-in colours, which are then replaced by CSS variables of the page (`CSS_COLOURS`). Names that come
from a user (domains) stand in the legend, which is HTML: matplotlib would read `$` and a leading `_` as instructions. Every
function returns None where the run does not hold what the picture shows.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

Metrics = Sequence[Mapping[str, Any]]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe & Ito (2008): told apart with any common colour blindness."""
INK, LINE = "#010203", "#040506"
CSS_COLOURS = {INK: "currentColor", LINE: "var(--line)", **{colour: f"var(--c{i})" for i, colour in enumerate(PALETTE)}}
KEPT_RGBA, DROPPED_RGBA, GONE_RGBA, KEY_VALUE_RGBA = (43, 140, 217, 255), (136, 136, 136, 110), (136, 136, 136, 38), (224, 112, 32, 255)
"""Cells of what is kept, dropped, in a dropped layer, and of a kept key/value head; mid tones that show on black and on white."""
MOST_POINTS = 600
MOST_COLUMNS = 384
WIDE = (5.2, 3.0)
"""Inches. Drawn about as wide as a phone shows it, so that the words stay readable there."""
SMALL = (3.5, 2.4)
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Mark:
    """One entry of a legend: a line of `style` (a CSS border style), or a "box" or "band"; `colour` as CSS."""

    label: str
    colour: str
    style: str = "solid"


@dataclass(frozen=True)
class Picture:
    """An SVG element, and the legend that belongs to it."""

    svg: str
    legend: tuple[Mark, ...] = ()


def prune_steps(metrics: Metrics) -> int:
    """Number of steps of the prune stage so far: where the stages meet on the axis of steps."""
    return max((int(line["step"]) for line in metrics if line["stage"] == "prune"), default=0)


def domains_of(metrics: Metrics, report: Mapping[str, Any]) -> list[str]:
    """Every domain of a run in the order in which it comes up, without the mean."""
    seen: dict[str, None] = {}
    for values in (report.get("loss") or {}).values():
        seen.update(dict.fromkeys(values or {}))
    for line in metrics:
        for key in ("weights", "heldout", "domain_loss"):
            seen.update(dict.fromkeys(line.get(key) or {}))
    return [domain for domain in seen if domain != "mean"]


def heldout_picture(metrics: Metrics, report: Mapping[str, Any]) -> Picture | None:
    """Held-out loss by domain over steps; horizontal lines are the source's losses (dotted) and the reference (dashed)."""
    domains, cut, loss = domains_of(metrics, report), prune_steps(metrics), report.get("loss") or {}
    measured = sum(bool(line.get("heldout")) for line in metrics)
    if not measured:
        return None
    dots = {"marker": "o", "markersize": 3} if measured <= 60 else {}  # more of them run into one thick line

    def draw(axes: Any) -> None:
        for i, name in enumerate([*domains, "mean"]):
            colour, style = (INK, "-") if name == "mean" else _line(i)
            _by_stage(axes, metrics, "heldout", name, color=colour, linestyle=style, **dots)
            for kind, dashes in (("source", (0, (1, 2.5))), ("reference", (0, (6, 4)))):
                value = (loss.get(kind) or {}).get(name)
                if value is not None:
                    axes.axhline(value, color=colour, linestyle=dashes, linewidth=1)
        _mark_cut(axes, cut)
        axes.set(xlabel=_steps_label(cut), ylabel="held-out loss, nats per token")

    marks = [*_domain_marks(domains), Mark("mean", "currentColor")]
    marks += [Mark("source", "currentColor", "dotted")] if loss.get("source") else []
    marks += [Mark("reference", "currentColor", "dashed")] if loss.get("reference") else []
    return Picture(_svg("heldout", WIDE, draw), tuple(marks))


def weights_picture(metrics: Metrics, report: Mapping[str, Any]) -> Picture | None:
    """Share of each domain in the mixture over steps."""
    domains, cut = domains_of(metrics, report), prune_steps(metrics)
    if not any(line.get("weights") for line in metrics):
        return None

    def draw(axes: Any) -> None:
        for i, name in enumerate(domains):
            colour, style = _line(i)
            _by_stage(axes, metrics, "weights", name, color=colour, linestyle=style)
        _mark_cut(axes, cut)
        axes.set(xlabel=_steps_label(cut), ylabel="share of the tokens of a step")
        axes.set_ylim(bottom=0)

    return Picture(_svg("weights", WIDE, draw), _domain_marks(domains))


def training_picture(metrics: Metrics) -> Picture | None:
    """Training loss over steps: every step faint, the mean over a twentieth of the run bold."""
    cut, steps = prune_steps(metrics), sum("loss" in line for line in metrics)
    if not steps:
        return None

    def draw(axes: Any) -> None:
        for stage in ("prune", "train"):
            x, y = _series(metrics, stage, lambda line: (line.get("terms") or {}).get("text", line.get("loss")))
            axes.plot(*_thinned(x, y), color=LINE, linewidth=1)
            axes.plot(*_thinned(x, _smoothed(y, max(steps // 20, 1))), color=PALETTE[0])
        _mark_cut(axes, cut)
        axes.set(xlabel=_steps_label(cut), ylabel="training loss, nats per token")

    return Picture(_svg("training", WIDE, draw), (Mark("every step", "var(--line)"), Mark("smoothed", "var(--c0)")))


def size_pictures(metrics: Metrics) -> dict[str, Picture]:
    """For each axis that is pruned: its expected size, the ramp, and a band as wide as the worst vector is off."""
    axes_seen = dict.fromkeys(axis for line in metrics for axis in line.get("sizes") or {})
    legend = (Mark("expected", "var(--c0)"), Mark("ramp", "var(--c1)", "dashed"), Mark("worst vector", "var(--c0)", "band"))

    def picture(axis: str) -> Picture:
        def draw(axes: Any) -> None:
            x, expected = _thinned(*_axis_series(metrics, "sizes", axis, "expected"))
            _, target = _thinned(*_axis_series(metrics, "sizes", axis, "target"))
            _, worst = _thinned(*_axis_series(metrics, "sizes", axis, "worst"))
            if len(worst) == len(target):
                axes.fill_between(x, target - worst, target + worst, color=PALETTE[0], alpha=0.2, linewidth=0)
            axes.plot(x, expected, color=PALETTE[0])
            axes.plot(x, target, color=PALETTE[1], linestyle="--", linewidth=1.4)
            axes.set(xlabel="step of the prune stage")

        return Picture(_svg(f"size-{axis}", SMALL, draw), legend)

    return {axis: picture(axis) for axis in axes_seen}


def multiplier_pictures(metrics: Metrics) -> dict[str, Picture]:
    """What holds the gates to the ramp over the prune stage, a picture for each kind (lambda_1, ..., or shift), a line for each axis."""
    names = list(dict.fromkeys(axis for line in metrics for axis in line.get("multipliers") or {}))
    kinds = list(dict.fromkeys(kind for line in metrics for values in (line.get("multipliers") or {}).values() for kind in values))
    legend = tuple(Mark(name, _css(_line(i)[0]), _border(i)) for i, name in enumerate(names))

    def picture(which: str) -> Picture:
        def draw(axes: Any) -> None:
            for i, name in enumerate(names):
                colour, style = _line(i)
                axes.plot(*_thinned(*_axis_series(metrics, "multipliers", name, which)), color=colour, linestyle=style)
            axes.set(xlabel="step of the prune stage")

        return Picture(_svg(which, SMALL, draw), legend)

    return {which: picture(which) for which in kinds}


def heads_picture(plan: Mapping[str, Any]) -> Picture | None:
    """Layers x heads: for each group its key/value head and then its query heads, kept or dropped."""
    shape = (plan.get("source") or {}).get("shape")
    if not shape or "keep" not in plan:
        return None
    layers, groups = shape["num_hidden_layers"], shape["num_key_value_heads"]
    query = shape["num_attention_heads"] // groups
    cells = np.empty((layers, groups, 1 + query, 4), np.uint8)
    for layer in range(layers):
        kept = _kept_in(plan, "group", layer, groups)
        cells[layer] = GONE_RGBA if kept is None else DROPPED_RGBA
        queries = (plan["keep"].get("query") or {}).get(str(layer)) or [range(query)] * len(kept or [])
        for group, chosen in zip(kept or [], queries, strict=True):
            cells[layer, group, 0] = KEY_VALUE_RGBA
            cells[layer, group, [1 + head for head in chosen]] = KEPT_RGBA
    across = max(6, min(48, 900 // (groups * (1 + query))))
    gap = max(across // 2, 2)
    # Cells as blocks of pixels with clear ones between: one small image, where a shape for each of them would take megabytes.
    tiles = _tiles(cells.reshape(layers, -1, 4), across, 24)
    blocks = tiles.reshape(tiles.shape[0], groups, -1, 4)
    image = np.concatenate([blocks, np.zeros((tiles.shape[0], groups, gap, 4), np.uint8)], axis=2).reshape(tiles.shape[0], -1, 4)

    def draw(axes: Any) -> None:
        width = across * (1 + query) + gap
        axes.imshow(image, extent=(0, image.shape[1], layers - 0.5, -0.5), aspect="auto", interpolation="none")
        shown = range(0, groups, max(1, -(-groups // 16)))
        axes.set_xticks([group * width + (width - gap) / 2 for group in shown], [str(group) for group in shown])
        axes.set(xlabel="group of the source", ylabel="layer of the source")
        _bare(axes)

    legend = (
        Mark("key/value head kept", _rgba(KEY_VALUE_RGBA), "box"),
        Mark("query head kept", _rgba(KEPT_RGBA), "box"),
        Mark("dropped", _rgba(DROPPED_RGBA), "box"),
        Mark("in a dropped layer", _rgba(GONE_RGBA), "box"),
    )
    return Picture(_svg("heads", (WIDE[0], _rows_height(layers)), draw), legend)


def neurons_picture(plan: Mapping[str, Any]) -> tuple[Picture, int] | None:
    """Layers x neurons as shades, and how many neurons lie in one column: the share of them that is kept is its shade."""
    shape = (plan.get("source") or {}).get("shape")
    if not shape or "keep" not in plan:
        return None
    layers, neurons = shape["num_hidden_layers"], shape["intermediate_size"]
    each = -(-neurons // MOST_COLUMNS)
    image = np.empty((layers, -(-neurons // each), 4), np.uint8)
    for layer in range(layers):
        kept = _kept_in(plan, "neuron", layer, neurons)
        if kept is None:
            image[layer] = GONE_RGBA
            continue
        columns = np.bincount(np.arange(neurons) // each)
        share = np.bincount(np.asarray(kept, np.int64) // each, minlength=len(columns)) / columns
        image[layer] = np.rint(np.outer(1 - share, DROPPED_RGBA) + np.outer(share, KEPT_RGBA)).astype(np.uint8)

    def draw(axes: Any) -> None:
        axes.imshow(image, extent=(0, neurons, layers - 0.5, -0.5), aspect="auto", interpolation="none")
        axes.set(xlabel="neuron of the source", ylabel="layer of the source")
        _bare(axes)

    legend = (
        Mark("all kept", _rgba(KEPT_RGBA), "box"),
        Mark("none kept", _rgba(DROPPED_RGBA), "box"),
        Mark("dropped layer", _rgba(GONE_RGBA), "box"),
    )
    return Picture(_svg("neurons", (WIDE[0], _rows_height(layers)), draw), legend), each


def hidden_picture(plan: Mapping[str, Any]) -> tuple[Picture, int] | None:
    """Channels of the residual stream in reading order, and how many stand in a row."""
    shape = (plan.get("source") or {}).get("shape")
    if not shape or "keep" not in plan:
        return None
    hidden = shape["hidden_size"]
    across = next((width for width in (96, 128, 64, 112, 80) if hidden % width == 0), 96)
    cells = np.zeros((-(-hidden // across) * across, 4), np.uint8)
    cells[:hidden] = DROPPED_RGBA
    kept = plan["keep"].get("hidden")
    cells[list(range(hidden) if kept is None else kept)] = KEPT_RGBA
    image = _tiles(cells.reshape(-1, across, 4), 10, 18)
    rows = len(cells) // across

    def draw(axes: Any) -> None:
        axes.imshow(image, extent=(0, across, rows * across, 0), aspect="auto", interpolation="none")
        starts = range(0, rows, max(1, rows // 8))
        axes.set_yticks([(row + 0.5) * across for row in starts], [str(row * across) for row in starts])
        axes.set_xticks([])
        axes.set(ylabel="channel")
        axes.spines[:].set_visible(False)
        axes.grid(False)

    legend = (Mark("kept", _rgba(KEPT_RGBA), "box"), Mark("dropped", _rgba(DROPPED_RGBA), "box"))
    return Picture(_svg("hidden", (WIDE[0], 0.35 + 0.12 * rows), draw), legend), across


def _svg(name: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """Draw on fresh axes of `size` (inches at 72 to a CSS unit); the same drawing gives the same text."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # matplotlib's style sheet would hold for the whole page, and its ids are not unique among several pictures of one page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.S)
    text = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    for stand_in, css in CSS_COLOURS.items():
        text = text.replace(stand_in, css)
    return text.strip()


def _line(index: int) -> tuple[str, Any]:
    """Colour and dashes of the index-th line: dashes change when the colours are used up."""
    return PALETTE[index % len(PALETTE)], "-" if index < len(PALETTE) else (0, (6, 1.5))


def _border(index: int) -> str:
    return "solid" if index < len(PALETTE) else "dashed"


def _css(colour: str) -> str:
    return CSS_COLOURS[colour]


def _rgba(colour: tuple[int, int, int, int]) -> str:
    return f"rgba({colour[0]}, {colour[1]}, {colour[2]}, {colour[3] / 255:.2f})"


def _domain_marks(domains: Iterable[str]) -> tuple[Mark, ...]:
    return tuple(Mark(name, _css(_line(i)[0]), _border(i)) for i, name in enumerate(domains))


def _steps_label(cut: int) -> str:
    return "step (prune, then train)" if cut else "step"


def _mark_cut(axes: Any, cut: int) -> None:
    if cut:
        axes.axvline(cut, color=INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.annotate("cut", (cut, 1), (3, -1), xycoords=("data", "axes fraction"), textcoords="offset points", va="top", fontsize=9)


def _by_stage(axes: Any, metrics: Metrics, key: str, name: str, **style: Any) -> None:
    """Both stages as lines of their own: the cut between them is a leap, not a slope."""
    for stage in ("prune", "train"):
        x, y = _series(metrics, stage, lambda line: (line.get(key) or {}).get(name))
        axes.plot(*_thinned(x, y), **style)


def _series(metrics: Metrics, stage: str, read: Callable[[Mapping[str, Any]], Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps on the common axis and the values of a stage, where there are any."""
    offset = prune_steps(metrics) if stage == "train" else 0
    found = [(offset + line["step"], read(line)) for line in metrics if line["stage"] == stage]
    points = np.array([(x, y) for x, y in found if y is not None], np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _axis_series(metrics: Metrics, key: str, axis: str, which: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the prune stage logged of an axis."""
    return _series(metrics, "prune", lambda line: ((line.get(key) or {}).get(axis) or {}).get(which))


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most MOST_POINTS points, each the mean of as many neighbours; the first and last as they are."""
    if len(x) <= MOST_POINTS:
        return x, y
    edges = np.linspace(1, len(x) - 1, MOST_POINTS - 1).astype(int)
    means = [np.add.reduceat(v[:-1], edges[:-1]) / np.diff(edges) for v in (x, y)]
    return np.concatenate([x[:1], means[0], x[-1:]]), np.concatenate([y[:1], means[1], y[-1:]])


def _smoothed(y: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean over a centred window of about `width` points, narrower at the ends."""
    half = width // 2
    sums = np.concatenate([[0.0], np.cumsum(y)])
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def _kept_in(plan: Mapping[str, Any], axis: str, layer: int, size: int) -> Sequence[int] | None:
    """Kept indices of a per-layer axis; None where the layer itself is dropped. What the plan does not name is kept whole."""
    keep = plan["keep"]
    if keep.get("layer") is not None and layer not in keep["layer"]:
        return None
    chosen: Sequence[int] | None = (keep.get(axis) or {}).get(str(layer))
    return range(size) if chosen is None else chosen


def _tiles(cells: NDArray[np.uint8], across: int, down: int) -> NDArray[np.uint8]:
    """Each cell (row, column, RGBA) as a block of `down` x `across` pixels, two of them clear to its right and below."""
    tiles = cells.repeat(down, axis=0).repeat(across, axis=1)
    for clear in (1, 2):
        tiles[down - clear :: down] = 0
        tiles[:, across - clear :: across] = 0
    return tiles


def _rows_height(layers: int) -> float:
    """Inches for a picture with one row for each layer."""
    return 0.7 + max(1.2, min(0.115 * layers, 9.0))


def _bare(axes: Any) -> None:
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.yaxis.get_major_locator().set_params(integer=True)
