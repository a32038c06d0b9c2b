"""The report of a run: what is in its directory as one HTML page that needs nothing else, and as a table for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from shearling import pictures
from shearling.errors import ArtifactError, Problem
from shearling.io.files import read_json, write_atomic
from shearling.pictures import Mark, Picture
from shearling.prune.plan import PLAN_LIMIT, PLAN_PARTS
from shearling.texts import cells
from shearling.train.log import METRICS_FILE, read_metrics

REPORT_FILE, PLAN_FILE, PAGE_FILE = "report.json", "plan.json", "report.html"
RECIPE_FILES = ("recipe.yaml", "recipe.json")

SIZE_WORDS = {"layer": "layers", "hidden": "hidden channels", "group": "groups in a layer", "query": "queries in a group"}
SIZE_WORDS["neuron"] = "neurons in a layer"
LOSS_COLUMNS = {
    "source": "source",
    "before_hardening": "before the cut",
    "pruned": "after the cut",
    "final": "final",
    "reference": "reference",
}

Values = Mapping[str, Any]


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` of a run directory from what is there of report.json, metrics.jsonl and plan.json; returns its path.

    A run that is unfinished has a report too, which says what is missing. The same directory gives the same bytes. Raises
    `ArtifactError` where this is no run directory or a file of it is damaged, `StorageError` where the page cannot be written.
    """
    run_dir = Path(run_dir)
    if not any((run_dir / name).is_file() for name in (REPORT_FILE, METRICS_FILE, PLAN_FILE)):
        found = "none of its files" if run_dir.is_dir() else "no directory"
        remedy = f"Give the directory of a run; it holds {METRICS_FILE} or {REPORT_FILE}."
        raise ArtifactError(f"{run_dir}: not the directory of a run", [Problem("run directory", found, remedy)])
    report, plan = _read_object(run_dir / REPORT_FILE), _read_object(run_dir / PLAN_FILE)
    page = _page(report, plan, read_metrics(run_dir), _recipe(run_dir, report))
    write_atomic(run_dir / PAGE_FILE, page.encode("utf-8", errors="replace"))
    return run_dir / PAGE_FILE


def summary_table(report: Mapping[str, Any]) -> Table:
    """A finished or unfinished run at a glance: size, held-out loss in nats per token, speed in tokens per second."""
    table = Table(title="Run")
    for column in ("", "source", "after the cut", "final", "final / source"):
        table.add_column(column, justify="right" if column else "left")

    def row(label: str, source: Any, pruned: Any, final: Any, form: str) -> None:
        cells = ("" if value is None else format(value, form) for value in (source, pruned, final))
        table.add_row(Text(label), *cells, _ratio(final, source))

    source, model = _part(report, "source"), _part(report, "model")
    row("Parameters", source.get("parameters"), model.get("parameters"), model.get("parameters"), ",")
    losses = [_part(report, "loss", kind) for kind in ("source", "pruned", "final")]
    for name in _loss_rows(losses):
        first, cut, last = (loss.get(name) for loss in losses)
        row(f"Held-out loss, {name}", first, cut, last, ".4f")
    for kind, label in (("generation", "Generation, tok/s"), ("prefill", "Prefill, tok/s")):
        row(label, _part(report, "speed", "source").get(kind), None, _part(report, "speed", "model").get(kind), ",.1f")
    return table


def _page(report: Values, plan: Values, metrics: pictures.Metrics, recipe: str | None) -> str:
    sections = (
        _section("Numbers", _tables(report, plan)),
        _section("Held-out loss", _loss(report, metrics)),
        _section("Mixture", _mixture(report, metrics)),
        _section("Sizes on their way to the target", _sizes(metrics)),
        _section("What was kept", _kept(plan)),
        _section("Training loss", _training(metrics)),
        _section("Recipe", _details(recipe, plan)),
    )
    title = escape(_title(report))
    version = escape(str(report.get("shearling", "")))
    seed = f", seed {escape(str(report['seed']))}" if "seed" in report else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{title}</h1>\n<p class="by">Shearling {version}{seed}</p>\n{_headline(report)}\n'
        f"{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _title(report: Values) -> str:
    name, model = _part(report, "source").get("name"), _part(report, "model")
    source = name and (Path(name).name if Path(name).is_absolute() else name)  # the rest of a path tells nothing of the model
    size = "a smaller model" if "parameters" not in model else f"a model of {_short(model['parameters'])} parameters"
    return f"{source or 'a source model'} → {size}{'' if model.get('path') else ', not finished yet'}"


def _headline(report: Values) -> str:
    """The few numbers that decide whether the run went well."""
    source, model, speed = _part(report, "source"), _part(report, "model"), _part(report, "speed")
    tiles = []
    if "parameters" in source:
        ratio = _ratio(model.get("parameters"), source["parameters"])
        now = _short(model.get("parameters"))
        tiles.append(("parameters", f"{_short(source['parameters'])} → {now}", ratio and f"{ratio} of the source"))
    losses = {kind: _part(report, "loss", kind).get("mean") for kind in ("source", "pruned", "final")}
    if any(value is not None for value in losses.values()):
        shown = " → ".join(_number(value, ".3f") for value in losses.values())
        tiles.append(("mean held-out loss", shown, "source → after the cut → final, nats per token"))
    for kind in ("generation", "prefill"):
        before, after = (_part(speed, which).get(kind) for which in ("source", "model"))
        if before is not None and after is not None:
            tiles.append((f"{kind} speed", _ratio(after, before), f"{before:,.0f} → {after:,.0f} tokens per second"))
    verify = _part(report, "verify")
    if "max_abs_logit_difference" in verify:
        relative = f"{_number(verify.get('relative_difference'), '.1e')} of the logits' size"
        if "relative_difference_float64" in verify:
            relative += f", all of it rounding: {_number(verify['relative_difference_float64'], '.1e')} in fp64"
        tiles.append(
            ("masked and cut model differ by", _number(verify["max_abs_logit_difference"], ".1e"), f"at most, in a logit; {relative}")
        )
    if not tiles:
        return _missing("No numbers are there yet: the run has not opened its source or has not been measured.")
    items = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd><dd class=note>{escape(c)}</dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{"".join(items)}</dl>'


def _tables(report: Values, plan: Values) -> str:
    source, model = _part(report, "source"), _part(report, "model")
    parts = _compared(_part(source, "parameters_by_part"), _part(model, "parameters_by_part"), ",")
    if "parameters" in source:
        parts += _compared({"all": source["parameters"]}, {"all": model.get("parameters")}, ",")
    shape = _compared(_part(source, "shape") or _part(plan, "source", "shape"), _part(model, "shape") or _part(plan, "target", "shape"), "")
    speeds = _compared(_part(report, "speed", "source"), _part(report, "speed", "model"), ",.1f")
    head = ("", "source", "model", "ratio")
    evaluating = {stage: f"{cost['share']:.0%}" for stage, cost in _part(report, "evaluation").items()}
    seconds = [(stage, f"{value:,.1f}", evaluating.get(stage, "")) for stage, value in _part(report, "seconds").items()]
    tokens = [(stage, f"{value:,}") for stage, value in _part(report, "tokens").items()]
    return _grid(
        _table("Parameters by part", head, parts, "the parameters"),
        _table("Shape", head, shape, "the shapes"),
        _table("Speed, tokens per second", head, speeds, "the speed"),
        _table("Seconds by stage", ("stage", "seconds", "in evaluations"), seconds, "the time of the stages"),
        _table("Tokens trained on", ("stage", "tokens"), tokens, "the number of tokens"),
    ) + _table("Text by domain", *cells(_part(report, "data", "table")), "the text")


def _loss(report: Values, metrics: pictures.Metrics) -> str:
    losses = {kind: _part(report, "loss", kind) for kind in LOSS_COLUMNS if _part(report, "loss", kind)}
    errors = {kind: _part(report, "loss_error", kind) for kind in losses}
    rows = [(name, *(_sure(losses[kind].get(name), errors[kind].get(name)) for kind in losses)) for name in _loss_rows(losses.values())]
    how = (
        "Lower is better. A line is the loss on held-out text of one domain; the dotted line of its colour is what the source had, "
        "the dashed one the reference, which the mixture steers towards. At the upright line the gates become a cut. In the table a "
        "standard error over the sequences stands after ±."
    )
    return _figure(pictures.heldout_picture(metrics, report), how, "No held-out loss has been logged yet.") + _table(
        "Held-out loss, nats per token", ("domain", *(LOSS_COLUMNS[kind] for kind in losses)), rows, "the held-out losses"
    )


def _mixture(report: Values, metrics: pictures.Metrics) -> str:
    how = "A domain whose line rises is further from its reference loss than the others, and so is drawn from more often."
    return _figure(pictures.weights_picture(metrics, report), how, "No weights of the mixture have been logged yet.")


def _sizes(metrics: pictures.Metrics) -> str:
    sizes = {SIZE_WORDS.get(axis, axis): picture for axis, picture in pictures.size_pictures(metrics).items()}
    how = (
        "One panel for each axis. The expected size should keep to the dashed ramp; the band around the ramp is as wide as the "
        "worst vector of gates is off, and should have closed at the end, when the gates become a choice."
    )
    multipliers = {which.replace("_", " "): picture for which, picture in pictures.multiplier_pictures(metrics).items()}
    how_multipliers = (
        "What holds the gates to the ramp, a line for each axis. Lagrange multipliers: lambda 1 weighs the distance from the ramp, "
        "lambda 2 its square; they grow while the sizes are off. Projected gates: the shift of an axis' logits that meets the ramp."
    )
    return _panels(sizes, how, "No sizes have been logged: the run has not pruned yet.") + _panels(
        multipliers, how_multipliers, "No multipliers have been logged yet."
    )


def _kept(plan: Values) -> str:
    layers = _part(plan, "source", "shape").get("num_hidden_layers")
    if layers is None or "keep" not in plan:
        return _missing("Nothing is chosen yet: the plan is made at the end of the prune stage, unless weights are drawn at random.")
    kept = plan["keep"].get("layer")
    kept = list(range(layers)) if kept is None else kept
    cells = "".join(f'<span class="{"on" if layer in kept else "off"}">{layer}</span>' for layer in range(layers))
    label = f"kept layers: {', '.join(map(str, kept))}"
    strip = f'<div class="strip" role="img" aria-label="{label}">{cells}</div>'
    caption = "<figcaption>Layers of the source by number; the coloured ones are kept.</figcaption>"
    blocks = [
        f"<figure><h3>Layers: {len(kept)} of {layers}</h3>{strip}{caption}</figure>",
        _figure(
            pictures.heads_picture(plan),
            "A row is a layer of the source. Each block of cells is a group: its key/value head first, then its query heads.",
            "",
            "Attention heads",
        ),
    ]
    if neurons := pictures.neurons_picture(plan):
        each = f"A column stands for {neurons[1]} neighbouring neurons: the bluer, the more of them are kept." if neurons[1] > 1 else ""
        blocks.append(_figure(neurons[0], f"A row is a layer of the source. {each}", "", "MLP neurons"))
    if hidden := pictures.hidden_picture(plan):
        how = f"The channels of the residual stream, read like text, {hidden[1]} in a line; every layer keeps the same ones."
        blocks.append(_figure(hidden[0], how, "", "Hidden channels"))
    return "".join(blocks)


def _training(metrics: pictures.Metrics) -> str:
    how = "The loss on the text trained on, whose mixture shifts; so judge by the held-out loss, and look here for spikes."
    return _figure(pictures.training_picture(metrics), how, "No step has been logged yet.")


def _details(recipe: str | None, plan: Values) -> str:
    blocks = [f"<details><summary>The recipe with every default filled in</summary><pre>{escape(recipe)}</pre></details>"] if recipe else []
    if "made_by" in plan:
        made_by = escape(json.dumps(plan["made_by"], indent=2, ensure_ascii=False))
        blocks.append(f"<details><summary>How the plan was made</summary><pre>{made_by}</pre></details>")
    return "".join(blocks) if recipe else _missing("The run directory holds no recipe.") + "".join(blocks)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def _figure(picture: Picture | None, how: str, missing: str, title: str = "") -> str:
    """A picture with its legend and the sentence that says how to read it; `missing` where there is none."""
    if picture is None:
        return _missing(missing)
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f"<figure>{heading}{_legend(picture.legend)}{_labelled(picture.svg, how)}<figcaption>{escape(how)}</figcaption></figure>"


def _panels(panels: Mapping[str, Picture], how: str, missing: str) -> str:
    """Small pictures side by side, by their titles, under one legend that they share."""
    if not panels:
        return _missing(missing)
    figures = (f"<figure><h3>{escape(title)}</h3>{_labelled(picture.svg, title)}</figure>" for title, picture in panels.items())
    legend = _legend(next(iter(panels.values())).legend)
    return f'<p class="how">{escape(how)}</p>{legend}<div class="panels">{"".join(figures)}</div>'


def _labelled(svg: str, label: str) -> str:
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _legend(marks: Sequence[Mark]) -> str:
    return f'<div class="legend">{"".join(_legend_entry(mark) for mark in marks)}</div>'


def _legend_entry(mark: Mark) -> str:
    if mark.style in ("box", "band"):
        swatch = f'<i class="{mark.style}" style="background:{mark.colour}"></i>'
    else:
        swatch = f'<i style="border-top:3px {mark.style} {mark.colour}"></i>'
    return f"<span>{swatch}{escape(mark.label)}</span>"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], what: str) -> str:
    if not rows:
        return f"<div><h3>{escape(title)}</h3>{_missing(f'Not there yet: the run has not measured {what}.')}</div>"
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr><th>{escape(str(row[0]))}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f'<div class="wide"><h3>{escape(title)}</h3><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _grid(*blocks: str) -> str:
    return f'<div class="grid">{"".join(blocks)}</div>'


def _compared(source: Values, model: Values, form: str) -> list[tuple[str, str, str, str]]:
    """Rows of a table: name, source, model, ratio; what both lack or have as 0 (an lm_head that is tied) is left out."""
    names = [name for name in dict.fromkeys([*source, *model]) if source.get(name) or model.get(name)]
    source, model = _means(source), _means(model)
    return [
        (name, _number(source.get(name), form), _number(model.get(name), form), _ratio(model.get(name), source.get(name))) for name in names
    ]


def _means(values: Values) -> Values:
    """Sizes that differ by block as their mean."""
    return {name: round(sum(value) / len(value), 1) if isinstance(value, list) and value else value for name, value in values.items()}


def _loss_rows(losses: Iterable[Values]) -> list[str]:
    names = dict.fromkeys(name for loss in losses for name in loss)
    return [*(name for name in names if name != "mean"), *(["mean"] if "mean" in names else [])]


def _part(values: Values, *path: str) -> Values:
    """The mapping at `path`; empty where the run has not come so far."""
    for key in path:
        values = values.get(key) or {}
    return values


def _number(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def _sure(loss: Any, error: Any) -> str:
    return _number(loss, ".3f") + ("" if loss is None or error is None else f" ± {error:.3f}")


def _ratio(value: Any, base: Any) -> str:
    return "" if value is None or not base else f"{value / base:.2f}×"


def _short(count: int | None) -> str:
    """134515008 -> "134.5 M"."""
    if count is None:
        return "–"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def _read_object(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where there is no file."""
    if not path.exists():
        return {}
    values = read_json(path, limit=PLAN_LIMIT, parts=PLAN_PARTS)  # a plan is by far the largest that is read here
    if not isinstance(values, dict):
        raise ArtifactError(f"{path}: cannot be read", [Problem(path.name, type(values).__name__, "It must hold a JSON object.")])
    return values


def _recipe(run_dir: Path, report: Values) -> str | None:
    """The resolved recipe as text: that of the report, else a file beside it."""
    if report.get("recipe"):
        return yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True)
    found = next((run_dir / name for name in RECIPE_FILES if (run_dir / name).is_file()), None)
    return found.read_text(encoding="utf-8", errors="replace") if found else None


_CSS = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1c2126; --soft: #5d6670; --line: #c9ced4; --card: #f5f6f8;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9 }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --ink: #e6e9ec; --soft: #9aa4ae; --line: #49525b; --card: #1e2328;
  --c0: #3fa3e0; --c1: #f08040; --c2: #22c08f; --c3: #e09cc4; --c4: #f0b030; --c5: #8fd0f7 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 1rem clamp(.8rem, 3vw, 2rem) 4rem }
h1 { font-size: clamp(1.3rem, 4.5vw, 1.9rem); line-height: 1.25; margin: .6rem 0 0; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 0 0 .3rem }
.by, .how, figcaption, .note, .missing { color: var(--soft) }
.by { margin: .2rem 0 1.2rem }
figcaption { font-size: .9rem; margin-top: .3rem }
.missing { padding: .6rem .9rem; background: var(--card); border-left: 3px solid var(--line); margin: .4rem 0 }
.tiles, .grid, .panels { display: grid; gap: 1rem; margin: 0 0 1rem; align-items: start }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); align-items: stretch }
.tiles div { background: var(--card); border-radius: .5rem; padding: .7rem .9rem }
.tiles dt { font-size: .9rem; color: var(--soft) }
.tiles dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums }
.tiles dd.note { font-size: .85rem; font-weight: 400 }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.6rem 2rem }
.panels { grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); margin-top: .6rem }
.panels figure { margin: 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem clamp(.2rem, 1vw, .5rem); text-align: right; border-bottom: 1px solid var(--line) }
th:first-child { text-align: left; padding-left: 0 }
tbody th { font-weight: 400; overflow-wrap: anywhere }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom }
figure { margin: 0 0 1.8rem; max-width: 40rem }
svg { display: block; width: 100%; height: auto }
svg * { stroke-linejoin: round; stroke-linecap: butt }
svg text { font-family: system-ui, sans-serif !important }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .9rem; margin-bottom: .2rem; overflow-wrap: anywhere }
.legend i { display: inline-block; width: 1.5rem; margin-right: .4rem; vertical-align: middle }
.legend i.box { width: .9rem; height: .9rem; border-radius: 2px }
.legend i.band { height: .8rem; opacity: .25 }
.strip { display: flex; flex-wrap: wrap; gap: 3px }
.strip span { min-width: 1.9rem; padding: .15rem .2rem; text-align: center; border-radius: 3px; font-size: .85rem }
.strip .on { background: #1f78bd; color: #fff }
.strip .off { background: rgba(136, 136, 136, .2); color: var(--soft) }
details { margin: .4rem 0 }
summary { cursor: pointer }
pre { overflow-x: auto; background: var(--card); padding: .8rem; border-radius: .5rem; font-size: .85rem }
@media print { section { break-inside: avoid } }
"""
