"""What steers the mixture of a run: where its shares begin, what they keep to, what they are compared with, what evaluations may cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import shearling
from models import save_tiny_source
from ranks import Ranks
from runs import DOMAINS, SignalAt, contents, metrics, recipe_values, write_text
from shearling import stages
from shearling.cli import app
from shearling.data import mixture
from shearling.data.mixture_config import MixtureConfig
from shearling.data.reference import fit_reference
from shearling.errors import ArtifactError, ConfigError, DataError, Stopped
from shearling.recipe import load_recipe
from shearling.show import Silent
from shearling.steering import evaluation_cost, expected_note, measured_note
from shearling.train.config import FitConfig

SHARE = 0.12
"""Of it follow 3 sequences of each domain for each evaluation inside pruning (12 steps of 8, 2 of them), and 5 inside training (10, 1)."""
HELDOUT = 10


class Notes(Silent):
    """Keeps what the user should read."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Values of a recipe of a few seconds, by its mixture; the first domain has three times the weight of the second."""
    folder = tmp_path_factory.mktemp("steering")
    save_tiny_source(folder / "source", "llama")
    paths = write_text(folder, 1200)
    domains = {name: {"train": paths[name], "weight": weight} for name, weight in zip(DOMAINS, (3.0, 1.0), strict=True)}

    def make(**mixture: Any) -> dict[str, Any]:
        found = recipe_values(folder / "source", domains, data={"heldout_sequences": HELDOUT}, mixture=mixture)
        found["evaluate"]["speed"] = False
        return found

    return make


@pytest.fixture(scope="module")
def unclipped(values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with shares that move."""
    out = tmp_path_factory.mktemp("unclipped") / "run"
    shearling.run(values(update="unclipped"), out)
    return out


def ledger(out: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "stages" / f"{stage}.json").read_text())
    return found


def shares(out: Path, stage: str, step: int) -> dict[str, float]:
    """Logged of a step: those that it was drawn by."""
    (line,) = [line for line in metrics(out) if (line["stage"], line["step"]) == (stage, step)]
    found: dict[str, float] = line["weights"]
    return found


def test_continued_pretraining_takes_over_the_last_shares_of_pruning(unclipped: Path) -> None:
    """And moves them by the cut model's losses before its first step, as the original does."""
    pruned, source = ledger(unclipped, "prune"), ledger(unclipped, "source")["loss"]
    assert list(pruned["shares"].values()) == pruned["weights"] and shares(unclipped, "prune", 12) != pruned["shares"]
    last, loss, reference = (np.array([part[name] for name in DOMAINS]) for part in (pruned["shares"], pruned["loss"]["pruned"], source))
    expected = mixture.update("unclipped", last, loss, reference)
    for step in (0, 1):
        assert list(shares(unclipped, "train", step).values()) == expected.tolist()
    assert json.loads((unclipped / "report.json").read_text())["shares"] == {
        stage: ledger(unclipped, stage)["shares"] for stage in ("prune", "train")
    }


@pytest.mark.parametrize("stage", ["prune", "train"])
def test_a_run_begins_with_the_last_shares_of_another(
    stage: str, unclipped: Path, values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    other, show = tmp_path / "other", Notes()
    other.mkdir()
    for name in ("recipe.yaml", "stages"):
        (other / name).symlink_to(unclipped / name)
    if stage == "prune":
        (other / "stages").unlink()
        (other / "stages").mkdir()
        (other / "stages" / "prune.json").write_bytes((unclipped / "stages" / "prune.json").read_bytes())
    shearling.prune(values(start=str(other)), tmp_path / "run", show=show)
    assert shares(tmp_path / "run", "prune", 0) == shares(tmp_path / "run", "prune", 1) == ledger(unclipped, stage)["shares"]
    assert sum(note.startswith(f"beginning with the last shares of {other}: a ") for note in show.notes) == 1


def test_a_run_whose_shares_cannot_be_taken_is_refused_before_any_work(
    unclipped: Path, values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    unfinished, others = tmp_path / "unfinished", tmp_path / "others"
    for folder in (unfinished, others):
        (folder / "stages").mkdir(parents=True)
        (folder / "recipe.yaml").write_text("")
    (others / "stages" / "train.json").write_text(json.dumps({"shares": {"a": 0.5, "code": 0.5}}))
    cases = {
        tmp_path / "nothing": "no run",
        unfinished: "a run that has finished neither prune nor train",
        others: "shares of a, code where the domains are a, b",
    }
    for path, words in cases.items():
        for command in (shearling.run, shearling.prepare):
            with pytest.raises(ArtifactError, match=r"mixture\.start") as refused:
                command(values(start=str(path)), tmp_path / "run")
            assert words in str(refused.value) and str(path) in str(refused.value)
            assert not (tmp_path / "run").exists()
    before = contents(unclipped)
    with pytest.raises(ArtifactError, match="no run"):  # nor is the run that is there deleted for it
        shearling.run(values(start=str(tmp_path / "nothing")), unclipped, overwrite=True)
    with pytest.raises(ConfigError, match=r"mixture\.start.*would delete"):
        shearling.run(values(start=str(unclipped)), unclipped, overwrite=True)
    assert {name: data for name, data in contents(unclipped).items() if name != ".lock"} == {
        name: data for name, data in before.items() if name != ".lock"
    }


def test_shares_keep_to_floor_and_cap_all_along(values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The given share of 0.75 is above the cap; then the first domain loses all that it may."""
    shearling.prune(values(update="unclipped", reference={"a": 30.0, "b": 1.0}, floor={"a": 0.4}, cap=0.7), tmp_path / "run")
    found = [line["weights"]["a"] for line in metrics(tmp_path / "run")]
    assert found == pytest.approx([0.7] * 6 + [0.4] * 7, abs=1e-12)
    assert ledger(tmp_path / "run", "prune")["shares"] == {"a": pytest.approx(0.4), "b": pytest.approx(0.6)}


def test_rules_that_set_the_shares_never_change_them(values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = shearling.train(values(update="stratified", reference=None), tmp_path / "even")
    assert {tuple(line["weights"].values()) for line in metrics(tmp_path / "even")} == {(0.5, 0.5)}
    sizes = np.array([report["data"]["domains"][name]["train_sequences"] for name in DOMAINS])
    shearling.prune(values(update="temperature", temperature=2.0, cap=0.9), tmp_path / "sizes")
    for line in metrics(tmp_path / "sizes"):
        assert list(line["weights"].values()) == pytest.approx(np.sqrt(sizes) / np.sqrt(sizes).sum(), abs=1e-12)


class Evaluations:
    """Every evaluation of a run: the rows that it was given."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows: list[dict[str, np.ndarray]] = []
        original = stages.heldout_losses

        def heldout_losses(model: Any, heldout: Any, *args: Any, **kwargs: Any) -> Any:
            self.rows.append({name: np.asarray(rows[:]) for name, rows in heldout.items()})
            return original(model, heldout, *args, **kwargs)

        patch.setattr(stages, "heldout_losses", heldout_losses)


@pytest.fixture(scope="module")
def budgeted(values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluations]:
    """A run with a budget of evaluations."""
    out = tmp_path_factory.mktemp("budgeted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        seen = Evaluations(patch)
        shearling.run(values(update="unclipped", evaluation_share=SHARE), out)
    return out, seen


def test_inside_a_stage_a_fixed_part_is_evaluated_and_at_its_ends_all(budgeted: tuple[Path, Evaluations]) -> None:
    out, seen = budgeted
    # source; prune at steps 5, 10, 12; the cut model; train at 5, 10.
    assert [{len(rows) for rows in evaluation.values()} for evaluation in seen.rows] == [{10}, {3}, {3}, {10}, {10}, {5}, {10}]
    for name in DOMAINS:
        first, again = seen.rows[1][name], seen.rows[2][name]
        assert np.array_equal(first, again)
        every = {row.tobytes() for row in seen.rows[0][name]}
        assert {row.tobytes() for row in first} < every and len({row.tobytes() for row in first}) == 3
    assert [ledger(out, stage)["evaluation"]["sequences"] for stage in ("prune", "train")] == [3, 5]


def test_what_moves_the_shares_is_near_what_all_would_say(budgeted: tuple[Path, Evaluations], unclipped: Path) -> None:
    """The first evaluation inside pruning sees the same model in both runs, and differs by its errors at most."""
    whole, part = ([line for line in metrics(out) if "heldout" in line] for out in (unclipped, budgeted[0]))
    assert whole[0]["heldout"] == part[0]["heldout"] and whole[0]["heldout_error"] == part[0]["heldout_error"]
    assert part[1]["step"] == 5 and part[1]["heldout"] != whole[1]["heldout"]
    for name in (*DOMAINS, "mean"):
        assert abs(part[1]["heldout"][name] - whole[1]["heldout"][name]) < 4 * part[1]["heldout_error"][name]
        assert 0 < part[1]["heldout_error"][name] < 4 * whole[1]["heldout_error"][name]
    found = [line["weights"]["a"] for line in (metrics(unclipped)[6], metrics(budgeted[0])[6])]
    assert found[0] != found[1] and found[1] == pytest.approx(found[0], abs=0.05)


def test_a_budgeted_run_that_was_stopped_ends_as_if_it_was_not(
    budgeted: tuple[Path, Evaluations], values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for moment in (("prune", 4), ("prune", 10), ("train", 5)):
        with pytest.raises(Stopped):
            shearling.run(values(update="unclipped", evaluation_share=SHARE), tmp_path / "run", show=SignalAt(moment))
    shearling.run(values(update="unclipped", evaluation_share=SHARE), tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(budgeted[0])


def test_two_processes_evaluate_the_same_part(values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    recipe = values(update="unclipped", evaluation_share=SHARE)
    recipe["train"]["microbatches"] = 2
    recipe["runtime"]["precision"] = "float32"
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    runs = [tmp_path / "one", tmp_path / "two"]
    for size, out in enumerate(runs, 1):
        ranks = Ranks(["train", str(tmp_path / "recipe.yaml"), "--out", str(out)], tmp_path / f"output-{size}", size=size)
        assert ranks.codes() == [0] * size, ranks.text()
    assert metrics(runs[0]) == metrics(runs[1])


def test_a_report_says_how_sure_losses_are_and_what_evaluations_took(budgeted: tuple[Path, Evaluations]) -> None:
    out, _ = budgeted
    report = json.loads((out / "report.json").read_text())
    assert set(report["loss_error"]) == {"source", "before_hardening", "pruned", "final"}
    for errors in report["loss_error"].values():
        assert set(errors) == {*DOMAINS, "mean"} and all(0 < error < 0.5 for error in errors.values())
    final = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-1]
    assert final["heldout_error"] == report["loss_error"]["final"] and final["heldout"] == report["loss"]["final"]
    for stage in ("prune", "train"):
        found = report["evaluation"][stage]
        assert 0 < found["seconds"] < ledger(out, stage)["training_seconds"]
        assert found["share"] == pytest.approx(found["seconds"] / ledger(out, stage)["training_seconds"], abs=0.01)
    assert final["evaluation_seconds"] == pytest.approx(report["evaluation"]["train"]["seconds"], abs=0.001)
    loss, error = report["loss"]["final"]["a"], report["loss_error"]["final"]["a"]
    assert f"{loss:.3f} ± {error:.3f}" in (out / "report.html").read_text()
    assert shearling.report(out)["loss_error"] == report["loss_error"]
    told = CliRunner().invoke(app, ["evaluate", str(out / "model"), "--data", str(out), "--no-speed", "--device", "cpu"]).stdout
    assert f"{loss:.4f} ± {error:.4f} nats/token" in told


def test_reference_losses_by_a_power_law(values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """For the target's parameters unless told; the log, the ledger, the report and a note have the losses that were used."""
    rows = [("a", 4.0), ("b", 4.5), ("more", 1.0)]
    points = [(name, size, base + (size / 1e4) ** -0.2) for name, base in rows for size in (1e4, 1e5, 1e6)]
    (tmp_path / "points.csv").write_text("domain,parameters,loss\n" + "".join(f"{d},{size},{loss}\n" for d, size, loss in points))
    recipe, show = values(reference={"power_law": str(tmp_path / "points.csv")}), Notes()
    report = shearling.prune(recipe, tmp_path / "run", show=show)
    expected = {name: found.loss for name, found in fit_reference(points[:6], report["model"]["parameters"]).items()}
    assert report["loss"]["reference"] == expected == ledger(tmp_path / "run", "prune")["reference"]
    assert all(line["reference"] == expected for line in metrics(tmp_path / "run") if "heldout" in line)
    (note,) = [note for note in show.notes if note.startswith("reference losses by the power law")]
    assert f"a {expected['a']:.4f} (interpolates: no error can be given), b {expected['b']:.4f}" in note
    other = json.loads(json.dumps(recipe))
    other["mixture"]["reference"]["parameters"] = 1e7
    path = tmp_path / "points.csv"
    found = load_recipe(other), shearling.api.open_source(recipe["source"])
    assert stages.reference_losses(*found, {}, DOMAINS) == {name: fit_reference(points, 1e7)[name].loss for name in DOMAINS}
    path.write_text(path.read_text().replace("b,", "c,"))
    with pytest.raises(DataError, match="domain: found no b"):
        shearling.run(recipe, tmp_path / "missing")
    path.unlink()
    with pytest.raises(DataError, match=r"points\.csv: cannot be read"):
        shearling.run(recipe, tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    assert shearling.report(tmp_path / "run")["loss"]["reference"] == expected, "the report says what was used, with the table gone, too"


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ({"floor": 0.6}, "sum to 1.2"),
        ({"cap": {"a": 0.4, "b": 0.5}}, "sum to 0.9"),
        ({"floor": {"c": 0.1}}, "names c where the domains are a, b"),
        ({"floor": {"a": 0.5}, "cap": 0.45}, "sum to 0.9"),
        ({"evaluation_share": 0.01}, "allows for 0 held-out sequences of each of 2 domains at each of 2 evaluations"),
    ],
)
def test_what_cannot_be_is_refused_with_the_recipe(mixture: dict[str, Any], words: str, values: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_recipe(values(**mixture))
    assert words in str(refused.value)


def test_paths_of_the_mixture_start_from_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"source": "a/b", "data": {"domains": {"a": "a.txt"}}, "mixture": {"start": "runs/x", "reference": {"power_law": "p.csv"}}}
    (tmp_path / "r.yaml").write_text(json.dumps(values))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = load_recipe(tmp_path / "r.yaml").mixture
    assert (found.start, found.reference.power_law) == (str(tmp_path / "runs/x"), str(tmp_path / "p.csv"))  # type: ignore[union-attr]
    for override in ("mixture.reference={power_law: q.csv}", "mixture.reference.power_law=q.csv"):
        found = load_recipe(tmp_path / "r.yaml", ["mixture.start=y", override]).mixture
        assert (found.start, found.reference.power_law) == (str(tmp_path / "here/y"), str(tmp_path / "here/q.csv"))  # type: ignore[union-attr]


def test_evaluations_that_take_long_are_told() -> None:
    paper = FitConfig(steps=3200, batch_size=32, evaluate_every=50, warmup=0.1)
    note = expected_note("prune", paper, MixtureConfig(), [500] * 7)
    assert note and note.startswith("prune evaluates 2.2 tokens for each that it trains on, which takes about 42% of its time")
    assert expected_note("prune", paper, MixtureConfig(evaluation_share=0.05), [500] * 7) is None
    assert expected_note("train", FitConfig(steps=48000, batch_size=256, evaluate_every=400, warmup=0), MixtureConfig(), [500] * 7) is None
    assert expected_note("prune", FitConfig(steps=0, batch_size=1, evaluate_every=1, warmup=0), MixtureConfig(), [500]) is None
    assert "41% of its 1,000 s" in str(measured_note("prune", 1000.0, 410.0))
    assert measured_note("prune", 1000.0, 330.0) is None and measured_note("prune", 50.0, 40.0) is None
    assert evaluation_cost(0.0, 0.0, None) == {"seconds": 0.0, "share": 0.0, "sequences": None}
