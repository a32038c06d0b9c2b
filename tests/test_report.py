"""The report: complete, self-contained, escaped, deterministic, and there for unfinished runs too."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import shearling
from models import save_tiny_source
from runs import Notes, recipe_values, write_text
from shearling import pictures
from shearling.errors import ArtifactError, StorageError
from shearling.report import summary_table, write_report
from shearling.texts import ALL

LAYERS, HIDDEN, GROUPS, QUERY, NEURONS = (30, 24), (576, 432), (3, 3), (3, 2), (1536, 1024)
PRUNE, TRAIN = 60, 120
DOMAINS = {"web": 3.1, "code": 1.9, "books": 3.4}
SECTIONS = [
    "Numbers",
    "Held-out loss",
    "Mixture",
    "Sizes on their way to the target",
    "What was kept",
    "Training loss",
    "Recipe",
]


def shape_at(which: int) -> dict[str, int]:
    return {
        "num_hidden_layers": LAYERS[which],
        "hidden_size": HIDDEN[which],
        "num_attention_heads": GROUPS[which] * QUERY[which],
        "num_key_value_heads": GROUPS[which],
        "head_dim": 64,
        "intermediate_size": NEURONS[which],
        "vocab_size": 49152,
    }


def plan_like_a_real_one() -> dict[str, Any]:
    rng = np.random.default_rng(1)

    def choose(size: int, kept: int) -> list[int]:
        return sorted(rng.permutation(size)[:kept].tolist())

    layers = choose(LAYERS[0], LAYERS[1])
    return {
        "format": 1,
        "source": {"fingerprint": "ab" * 32, "shape": shape_at(0)},
        "target": {"shape": shape_at(1)},
        "keep": {
            "layer": layers,
            "hidden": choose(HIDDEN[0], HIDDEN[1]),
            "group": {str(layer): choose(GROUPS[0], GROUPS[1]) for layer in layers},
            "query": {str(layer): [choose(QUERY[0], QUERY[1]) for _ in range(GROUPS[1])] for layer in layers},
            "neuron": {str(layer): choose(NEURONS[0], NEURONS[1]) for layer in layers},
        },
        "made_by": {"method": "learned gates", "steps": PRUNE},
    }


def metrics_like_real_ones(domains: dict[str, float] = DOMAINS) -> list[dict[str, Any]]:
    rng = np.random.default_rng(2)
    axes = {"layer": LAYERS, "hidden": HIDDEN, "query": QUERY, "neuron": NEURONS}
    lines: list[dict[str, Any]] = []
    weights = np.full(len(domains), 1 / len(domains))
    for stage, steps in (("prune", PRUNE), ("train", TRAIN)):
        for step in range(steps + 1):
            done = step / steps
            above = 0.1 + 0.9 * done if stage == "prune" else 0.3 + 1.4 * math.exp(-4 * done)
            heldout = {name: base + above * (1 + 0.2 * i) for i, (name, base) in enumerate(domains.items())}
            heldout["mean"] = sum(heldout.values()) / len(domains)
            line: dict[str, Any] = {"stage": stage, "step": step}
            if step % 10 == 0:
                line["heldout"] = heldout
            if step:
                weights = weights * np.exp(rng.normal([0.02, -0.02, 0.01][: len(domains)], 0.03))
                weights /= weights.sum()
                line["loss"] = heldout["mean"] + rng.normal(0, 0.12)
                line["weights"] = dict(zip(domains, weights.tolist(), strict=True))
                line["domain_loss"] = {name: heldout[name] + rng.normal(0, 0.2) for name in domains}
            if step and stage == "prune":
                ramp = min(1.0, 1.5 * done)
                target = {axis: a + (b - a) * ramp for axis, (a, b) in axes.items()}
                line["sizes"] = {
                    axis: {"expected": x + (axes[axis][0] - x) * 0.15 * (1 - done), "target": x, "worst": x * 0.08 * (1.05 - done)}
                    for axis, x in target.items()
                }
                line["multipliers"] = {axis: {"lambda_1": ramp * (i - 1.2), "lambda_2": 2 * ramp + i / 5} for i, axis in enumerate(axes)}
            lines.append(line)
    return lines


def report_like_a_real_one(domains: dict[str, float] = DOMAINS) -> dict[str, Any]:
    def loss(above: float) -> dict[str, float]:
        values = {name: base + above for name, base in domains.items()}
        return {**values, "mean": sum(values.values()) / len(values)}

    return {
        "shearling": "0.1.0",
        "seed": 17,
        "source": {
            "name": "example/Source-135M",
            "parameters": 134515008,
            "shape": shape_at(0),
            "parameters_by_part": {"embedding": 28311552, "attention": 26542080, "mlp": 79626240, "norms": 35136, "lm_head": 0},
        },
        "model": {
            "path": "runs/smaller",
            "parameters": 68977440,
            "shape": shape_at(1),
            "parameters_by_part": {"embedding": 21233664, "attention": 15925248, "mlp": 31850496, "norms": 21168, "lm_head": 0},
        },
        "loss": {
            "source": loss(0.0),
            "before_hardening": loss(1.0),
            "pruned": loss(1.7),
            "final": loss(0.35),
            "reference": loss(0.15),
        },
        "loss_error": {"final": dict.fromkeys([*domains, "mean"], 0.014)},
        "evaluation": {"prune": {"seconds": 126.7, "share": 0.42, "sequences": None}},
        "data": {"table": {name: {**dict.fromkeys(ALL, 1.37), "documents": 98765, "repeated_above": None} for name in domains}},
        "tokens": {"prune": 983040, "train": 1966080},
        "verify": {"max_abs_logit_difference": 2.1e-05, "relative_difference": 1.3e-06},
        "speed": {"source": {"generation": 31.4, "prefill": 902.0}, "model": {"generation": 49.9, "prefill": 1630.5}},
        "seconds": {"prepare": 4.2, "prune": 301.7, "cut": 2.9, "train": 498.0, "evaluate": 31.0},
        "recipe": {"source": "example/Source-135M", "target": {"num_hidden_layers": 24}, "seed": 17},
    }


def make_run(
    run: Path,
    *,
    report: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    metrics: list[dict[str, Any]] | None = None,
) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    if report is not None:
        (run / "report.json").write_text(json.dumps(report))
    if plan is not None:
        (run / "plan.json").write_text(json.dumps(plan))
    if metrics is not None:
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    return make_run(run, report=report_like_a_real_one(), plan=plan_like_a_real_one(), metrics=metrics_like_real_ones())


class Page(HTMLParser):
    """What a test asks of a page: its references, ids, headings, text, and that every element is closed."""

    VOID = ("meta", "link", "br", "hr", "img", "input", "wbr")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"<{tag} {name}> runs a script"
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    def count(self, css_class: str) -> int:
        return self.text.count(f'class="{css_class}"')


def test_whole_run_has_every_section_and_picture(whole_run: Path) -> None:
    page = Page(write_report(whole_run))
    assert page.headings == SECTIONS
    assert page.tags.count("svg") == 3 + 4 + 2 + 3, "loss, mixture, training; sizes; multipliers; heads, neurons, hidden"
    assert page.count("missing") == 0
    assert page.count("on") == LAYERS[1] and page.count("off") == LAYERS[0] - LAYERS[1]
    shown = " ".join(page.texts)
    for expected in (
        "134.5 M → 69.0 M",
        "0.51×",
        "2.800 → 4.500 → 3.150",
        "3.150 ± 0.014",
        *("42%", "98,765", "137.0%", "1.37", "never"),
        "2.1e-05",
        "before the cut",
        "num_hidden_layers: 24",
        "learned gates",
    ):
        assert expected in shown
    assert "lm_head" not in shown, "a part that neither model has is no row"


def test_page_needs_nothing_from_outside(whole_run: Path) -> None:
    page = Page(write_report(whole_run))
    assert page.references and all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in page.text and "url(http" not in page.text
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= set(page.ids)
    assert len(page.text) < 2_000_000


def test_same_run_same_bytes(whole_run: Path) -> None:
    first = write_report(whole_run).read_bytes()
    assert write_report(whole_run).read_bytes() == first
    assert sorted(path.name for path in whole_run.iterdir()) == ["metrics.jsonl", "plan.json", "report.html", "report.json"]


NASTY = {"<script>alert(1)</script>": 3.0, "_hid & $x$ [bold]": 2.0, "日本語": 2.5}


def test_names_are_escaped_and_shown(tmp_path: Path) -> None:
    report = report_like_a_real_one(NASTY)
    report["source"]["name"] = "<img src=http://x onerror=alert(1)>"
    report["recipe"] = {"note": "</pre></details><script>1</script>"}
    report["seconds"] = {"<b>": 1.0}
    plan = {**plan_like_a_real_one(), "made_by": {"</pre><script>": 1}}
    page = Page(write_report(make_run(tmp_path, report=report, plan=plan, metrics=metrics_like_real_ones(NASTY))))
    assert not {"script", "img", "b"} & set(page.tags)
    for name in NASTY:
        assert page.texts.count(name) == 4, "in two legends and two tables"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary_table(report))
    assert "[bold]" in console.export_text()


@pytest.mark.parametrize("held", ["report", "plan", "metrics"])
def test_an_unfinished_run_says_what_is_missing(tmp_path: Path, held: str) -> None:
    parts: dict[str, Any] = {"report": report_like_a_real_one(), "plan": plan_like_a_real_one(), "metrics": metrics_like_real_ones()}
    page = Page(write_report(make_run(tmp_path, **{held: parts[held]})))
    assert page.headings == SECTIONS
    assert page.count("missing") >= 3


def test_every_part_of_the_report_may_be_absent(tmp_path: Path) -> None:
    whole = report_like_a_real_one()
    for part in whole:
        for partial in (
            {k: v for k, v in whole.items() if k != part},
            {part: whole[part]},
            {**whole, part: None} if part != "seed" else whole,
        ):
            write_report(make_run(tmp_path, report=partial))
            summary_table(partial)
    no_reference = {**whole, "loss": {**whole["loss"], "reference": None}}
    text = write_report(make_run(tmp_path, report=no_reference, metrics=metrics_like_real_ones())).read_text()
    assert ">reference</span>" not in text and ">source</span>" in text


def test_logs_at_their_edges(tmp_path: Path) -> None:
    lines = metrics_like_real_ones()
    lines[5]["loss"] = None
    write_report(make_run(tmp_path, metrics=lines[:1]))
    write_report(make_run(tmp_path, metrics=lines[:2]))
    write_report(make_run(tmp_path, metrics=[line for line in lines if line["stage"] == "train"]))
    long = [{"stage": "train", "step": step, "loss": 2.0 + 1 / step} for step in range(1, 5001)]
    assert len(write_report(make_run(tmp_path, metrics=long)).read_text()) < 100_000


def test_a_plan_that_leaves_axes_whole(tmp_path: Path) -> None:
    plan = plan_like_a_real_one()
    plan["keep"] = {"neuron": {str(layer): [0] for layer in range(LAYERS[0])}}
    page = Page(write_report(make_run(tmp_path, plan=plan)))
    assert page.count("on") == LAYERS[0]
    assert page.tags.count("svg") == 3


def picture_pixels(svg: str) -> np.ndarray:
    data = re.search(r"data:image/png;base64,([^\"]+)", svg)
    assert data
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))).convert("RGBA"))


def test_pictures_of_what_was_kept_count_right() -> None:
    plan = plan_like_a_real_one()
    plan["keep"]["group"] = {layer: [2] for layer in plan["keep"]["group"]}
    plan["keep"]["query"] = {layer: [[0, 2]] for layer in plan["keep"]["query"]}
    heads, neurons, hidden = pictures.heads_picture(plan), pictures.neurons_picture(plan), pictures.hidden_picture(plan)
    assert heads and neurons and hidden

    def share(svg: str, colour: tuple[int, ...]) -> float:
        """Pixels of a colour among those that are not clear."""
        pixels = picture_pixels(svg)
        return float((pixels == colour).all(axis=-1).sum() / (pixels[..., 3] > 0).sum())

    cells = LAYERS[0] * GROUPS[0] * (1 + QUERY[0])
    assert share(heads.svg, pictures.KEY_VALUE_RGBA) == pytest.approx(LAYERS[1] / cells)
    assert share(heads.svg, pictures.KEPT_RGBA) == pytest.approx(2 * LAYERS[1] / cells)
    assert share(heads.svg, pictures.GONE_RGBA) == pytest.approx(1 - LAYERS[1] / LAYERS[0])
    assert share(hidden[0].svg, pictures.KEPT_RGBA) == pytest.approx(HIDDEN[1] / HIDDEN[0])
    assert neurons[1] * picture_pixels(neurons[0].svg).shape[1] == NEURONS[0]
    assert share(neurons[0].svg, pictures.GONE_RGBA) == pytest.approx(1 - LAYERS[1] / LAYERS[0])


def test_long_runs_are_thinned_to_means() -> None:
    x = np.arange(1.0, 10_001.0)
    short_x, short_y = pictures._thinned(x, 3 * x)
    assert len(short_x) == pictures.MOST_POINTS and (short_x[0], short_x[-1]) == (1, 10_000)
    assert np.all(np.diff(short_x) > 0) and np.allclose(short_y, 3 * short_x)
    assert np.allclose(pictures._smoothed(np.array([1.0, 2.0, 6.0, 3.0]), 3), [1.5, 3.0, 11 / 3, 4.5])


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not the directory of a run"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text("[1]")
    with pytest.raises(ArtifactError, match=r"report\.json"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text('{"loss": ')
    with pytest.raises(ArtifactError, match="JSON"):
        write_report(tmp_path)


def test_summary_table() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary_table(report_like_a_real_one()))
    rows = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "│" in line]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert cells["Parameters"] == ["134,515,008", "68,977,440", "68,977,440", "0.51×"]
    assert cells["Held-out loss, mean"] == ["2.8000", "4.5000", "3.1500", "1.12×"]
    assert cells["Generation, tok/s"] == ["31.4", "", "49.9", "1.59×"]
    assert list(cells) == [
        "Parameters",
        *(f"Held-out loss, {name}" for name in (*DOMAINS, "mean")),
        "Generation, tok/s",
        "Prefill, tok/s",
    ]


@pytest.mark.parametrize("error", [RuntimeError("no fonts"), ImportError("no matplotlib"), StorageError("the disk is full")])
def test_a_page_that_cannot_be_drawn_ends_no_run(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told and recorded, and mended by the next run; whoever asks for the page itself gets the error."""

    def fail(run: Path) -> None:
        raise error

    told = Notes()
    save_tiny_source(tmp_path / "source", "llama")
    values, out = recipe_values(tmp_path / "source", write_text(tmp_path, 30)), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["shearling.report"], "write_report", fail)
        report = shearling.prepare(values, out, show=told)
        assert report == json.loads((out / "report.json").read_text()) and set(report["data"]["domains"]) == {"a", "b"}
        assert report["report_error"] == f"{type(error).__name__}: {error}"
        assert str(error) in told.notes[-1] and "shearling report" in told.notes[-1]
        with pytest.raises(type(error), match=str(error)):
            shearling.report(out)
    assert "report_error" not in shearling.prepare(values, out)
    assert "report_error" not in json.loads((out / "report.json").read_text()) and (out / "report.html").exists()
    monkeypatch.setattr("shearling.wiring.write_atomic", lambda path, text: fail(path))
    with pytest.raises(type(error)):  # the numbers are no optional part
        shearling.prepare(values, out)
