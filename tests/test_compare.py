"""Methods side by side: equal rows, whatever interrupts them; what is refused before the first; and what is made of the rows."""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import shearling
from runs import DOMAINS, TARGET, Notes, SignalAt, recipe_values
from shearling import cli
from shearling.compare import TABLE_FILE
from shearling.comparison import table
from shearling.contenders import Setting, contenders, most_pruning_tokens, recipe_of, reference_of_checkpoint
from shearling.errors import ArtifactError, ConfigError, NumericsError, OutputError, ShearlingError, Stopped
from shearling.io.files import write_atomic
from shearling.planning import expected_target
from shearling.recipe import load_recipe
from shearling.sources import open_source
from shearling.texts import find_text, open_text

BATCH = 8 * 32
TOKENS = 6 * BATCH
MODULE: Any = sys.modules["shearling.compare"]  # the name in the package is the function
METHODS = ["taylor", "sheared-llama", "from-scratch"]


def values_of(source: Path, domains: Mapping[str, str], **more: Any) -> dict[str, Any]:
    fit = {"batch_size": 8, "microbatches": 1, "learning_rate": 1e-3, "evaluate_every": 2}
    train = {**fit, "steps": 5}
    prune = {**fit, "method": "sheared-llama", "steps": 2, "gates": {"calibration_sequences": 2}}
    values = recipe_values(source, domains, train=train, prune=prune, evaluate={"speed": False})
    return {**values, **more}


@pytest.fixture(scope="module", autouse=True)
def _faster() -> Iterator[None]:
    """No page of each row's run, which others look at; and what is imported by now is not looked through at every collection of garbage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("shearling.report"), "write_report", lambda path: None)
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()


@pytest.fixture(scope="module")
def values(good_source: Path, domains: dict[str, str]) -> dict[str, Any]:
    return values_of(good_source, domains)


@pytest.fixture(scope="module")
def compared(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "out"
    shearling.compare(values, out, METHODS, seeds=2, tokens=TOKENS)
    return out


def setting_of(values: dict[str, Any], tokens: int = 100_000, sets: tuple[str, ...] = ()) -> Setting:
    recipe = load_recipe(values, sets)
    return Setting(recipe, open_source(recipe.source), sets, tokens, tokens)


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def read(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "comparison.json").read_text()))


def test_every_row_spends_the_same_on_the_same_text(compared: Path) -> None:
    found = read(compared)
    assert {(row["label"], row["seed"]) for row in found["rows"]} == {(name, seed) for name in METHODS for seed in (17, 18)}
    for row in found["rows"]:
        assert TOKENS - BATCH < row["tokens"] <= TOKENS and row["curve"][-1][0] == row["tokens"]
        assert row["parameters"] == found["rows"][0]["parameters"] and row["shape"] == "alike"
        report = json.loads((compared / row["folder"] / "report.json").read_text())
        assert report["loss"]["final"] == row["loss"]["final"] and report["loss"]["source"] == found["source"]["loss"]
        assert sum(report["tokens"].values()) == row["tokens"] and report["seed"] == row["seed"]
        assert not (compared / row["folder"] / "data").exists()  # the text is there once
        assert (compared / row["folder"] / "model").exists() and not (compared / row["folder"] / "checkpoints").exists()
    spent = {row["label"]: row["pruning_tokens"] for row in found["rows"]}
    assert spent == {"taylor": 2 * 32, "sheared-llama": 2 * BATCH + 2 * 32, "from-scratch": 0}
    text = open_text(find_text(compared / "text"))
    assert all(len(text.sequences(domain, "heldout")) for domain in DOMAINS)


def test_the_default_is_what_tokens_make_of_a_recipe(values: dict[str, Any]) -> None:
    """With the recipe's batches, and nothing else of its sections; what is left for recovery is all of the rest."""
    setting = setting_of({**values, "target": {"parameters": 0.7}}, tokens=100_000)
    (default,) = contenders(["default"])
    recipe = recipe_of(default, setting, 5)
    assert (recipe.prune.method, recipe.prune.steps, recipe.tokens) == ("llm-pruner-global", 0, 100_000) and recipe.prune.compensate >= 4
    assert recipe.train.distill is not None and recipe.train.batch_size == setting.recipe.train.batch_size and recipe.seed == 5
    spent = most_pruning_tokens(recipe, setting.source)
    assert 0 <= 100_000 - spent - recipe.train.steps * setting.batch_tokens < setting.batch_tokens
    with pytest.raises(ConfigError, match="as it is written"):
        contenders(["default+lora"])


def test_cuts_can_be_compared_by_themselves(values: dict[str, Any], compared: Path, tmp_path: Path) -> None:
    """What they cost is what they cost in a whole comparison; and neither goes on as the other."""
    found = shearling.compare(values, tmp_path / "out", ["taylor", "sheared-llama"], tokens=TOKENS, cuts_only=True)
    whole = {row["label"]: row for row in read(compared)["rows"] if row["seed"] == 17}
    for row in found["rows"]:
        assert row["loss"]["final"] == row["loss"]["cut"] == whole[row["label"]]["loss"]["cut"]
        assert row["tokens"] == row["pruning_tokens"] == whole[row["label"]]["pruning_tokens"]
    assert "Nothing was recovered" in (tmp_path / "out" / "comparison.md").read_text()
    with pytest.raises(ConfigError, match="cuts_only: found True -> False"):
        shearling.compare(values, tmp_path / "out", ["taylor"], tokens=TOKENS)


def test_the_seeds_differ_and_their_spread_is_told(compared: Path) -> None:
    found = read(compared)
    for one in found["contenders"]:
        finals = [row["loss"]["final"]["mean"] for row in found["rows"] if row["label"] == one["label"]]
        assert len(set(finals)) == 2 and one["final"]["mean"] == pytest.approx(sum(finals) / 2)
        assert one["spread"]["mean"] == pytest.approx(abs(finals[0] - finals[1]) / 2**0.5)
        assert (one["ratio"] is None) == (one["label"] == "from-scratch")
    text = (compared / "comparison.md").read_text()
    assert text.count("\n| ") == 1 + len(METHODS) and all(f"| {name} | alike |" in text for name in METHODS)
    assert (compared / "comparison.png").read_bytes().startswith(b"\x89PNG")


class AtRow(SignalAt):
    """A signal at a step of one row."""

    def __init__(self, row: str, moment: tuple[str, Any]) -> None:
        super().__init__(moment)
        self.row, self.now = row, ""

    def note(self, text: str) -> None:
        self.now = text if text.startswith("row ") else self.now

    def _at(self, moment: tuple[str, Any]) -> None:
        if self.row in self.now:
            super()._at(moment)


def test_interrupted_it_goes_on_to_the_same_table(
    compared: Path, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, names = tmp_path / "out", ["taylor", "sheared-llama"]
    with pytest.raises(Stopped):
        shearling.compare(values, out, names, tokens=TOKENS, show=AtRow("sheared-llama", ("prune", 1)))
    assert [row["label"] for row in read(out)["rows"]] == ["taylor"]  # what is done can be looked at
    write, died = write_atomic, []

    def dies(path: Path, data: bytes | str) -> None:
        if Path(path).parent.name == "rows" and not died:
            died.append(path)
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(MODULE, "write_atomic", dies)
    with pytest.raises(KeyboardInterrupt):  # the run is done, and the row is not written down
        shearling.compare(values, out, names, tokens=TOKENS)
    notes = Notes()
    shearling.compare(values, out, names, tokens=TOKENS, show=notes)
    assert "row 1 of 2: taylor, seed 17: done before" in notes.notes
    first = [row for row in read(compared)["rows"] if row["seed"] == 17 and row["label"] in names]
    assert without_clock(read(out)["rows"]) == without_clock(first)
    assert table(read(out)).splitlines()[2] == (compared / "comparison.md").read_text().splitlines()[2].removesuffix(
        " compute from scratch |"
    )


def test_rows_that_are_done_stay_and_methods_are_added(compared: Path, values: dict[str, Any], tmp_path: Path) -> None:
    out, before = Path(shutil.copytree(compared, tmp_path / "out")), read(compared)
    (out / "taylor-17").rename(tmp_path / "gone")  # a run may be deleted once its row is written down
    other = shutil.copytree(compared / "taylor-17" / "pruned", tmp_path / "other_tool")
    added = f"checkpoint:{other}"
    found = shearling.compare(values, out, [added], tokens=TOKENS)
    assert without_clock([row for row in found["rows"] if row["name"] in METHODS]) == without_clock(before["rows"])
    (row,) = [row for row in found["rows"] if row["checkpoint"]]
    assert row["label"] == "other_tool" and row["tokens"] == TOKENS and row["pruning_tokens"] == 0
    cut = {row["label"]: row["loss"]["cut"] for row in before["rows"] if row["seed"] == 17}
    assert row["loss"]["cut"] == pytest.approx(cut["taylor"])  # the same held-out text
    assert found["methods"] == [*METHODS, added] and len(found["contenders"]) == 4
    assert "other_tool | alike" in (out / "comparison.md").read_text() and "(1 of 2 seeds)" in (out / "comparison.md").read_text()
    reference = {line["heldout"]["mean"]: line["reference"] for line in lines_of(out / row["folder"]) if line.get("reference")}
    assert all(given == {domain: found["source"]["loss"][domain] for domain in DOMAINS} for given in reference.values())


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_what_would_make_rows_unequal_is_refused(compared: Path, values: dict[str, Any], tmp_path: Path) -> None:
    before = (compared / "settings.json").read_bytes()
    for options, changed, field in (
        ({"tokens": TOKENS + BATCH}, {}, "tokens"),
        ({"tokens": TOKENS, "learning_rates": [1e-3]}, {}, "learning_rates"),
        ({"tokens": TOKENS, "scratch_tokens": 2 * TOKENS}, {}, "scratch_tokens"),
        ({"tokens": TOKENS}, {"target": {**TARGET, "intermediate_size": 25}}, "target.intermediate_size"),
        ({"tokens": TOKENS}, {"seed": 18}, "seed"),
        ({"tokens": TOKENS, "overrides": ["train.clip=2"]}, {}, "train.clip"),
    ):
        with pytest.raises(ConfigError, match="choose another --out") as refused:
            shearling.compare({**values, **changed}, compared, METHODS, seeds=2, **options)
        assert [problem.field for problem in refused.value.problems] == [field]
    assert (compared / "settings.json").read_bytes() == before
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not a comparison"):
        shearling.compare(values, tmp_path / "else", ["random"], tokens=TOKENS)


def test_each_rate_is_tried_on_the_first_seed_and_the_best_goes_on(values: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rates = [1e-6, 3e-3]
    found = shearling.compare(values, out, ["random"], seeds=2, tokens=2 * BATCH, learning_rates=rates)
    assert [(row["seed"], row["learning_rate"]) for row in found["rows"]] == [(17, 3e-3), (17, 1e-6), (18, 3e-3)]
    cuts = {row["seed"]: row["loss"]["cut"] for row in found["rows"]}
    assert all(row["loss"]["cut"] == cuts[row["seed"]] for row in found["rows"])  # cut once, recovered twice
    (one,) = found["contenders"]
    assert one["learning_rate"] == 3e-3 and one["seeds"] == [17, 18]
    assert "| 0.003 |" in (out / "comparison.md").read_text()
    used = [[line["learning_rate"]["weights"] for line in lines_of(out / f"random-17-lr{rate:g}") if line["step"]] for rate in rates]
    assert [3e3 * rate for rate in used[0]] == pytest.approx(used[1])


def test_rows_that_fail_are_told_and_the_others_go_on(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, *arguments: Any) -> dict[str, Any]:
        raise NumericsError("3 steps in a row were bad")

    monkeypatch.setattr(MODULE._Comparison, "_made", fails)
    with pytest.raises(NumericsError, match="random: 3 steps in a row"):
        shearling.compare(values, tmp_path / "out", ["random"], tokens=TOKENS)
    assert read(tmp_path / "out")["rows"][0]["failed"] and "random, seed 17, failed" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("names", "changed", "options", "said"),
    [
        (["tailor"], {}, {}, ["Did you mean 'taylor'"]),
        (["taylor+compensat", "random+glue"], {}, {}, ["Did you mean 'taylor+compensate'", "+rotate"]),
        (["from-scratch+rotate", "recipe+lora"], {}, {}, ["nothing to turn", "as it is written"]),
        ([], {}, {}, ["sheared-llama"]),
        (["checkpoint:/there/is/none"], {}, {}, ["none: source", "nothing there"]),
        (["checkpoint:/a/model", "checkpoint:/b/model"], {}, {}, ["rename one of the folders"]),
        (["random"], {"target": None}, {}, ["Give the recipe a target"]),
        (["random", "sheared-llama"], {}, {"tokens": 300}, ["sheared-llama: tokens: found 300", "take up to 576"]),
        (["random"], {}, {"seeds": 0, "learning_rates": [0.0], "scratch_tokens": 5}, ["seeds", "learning_rates", "from-scratch"]),
        (["random"], {}, {"overrides": ["prune.method=taylor"]}, ["named with --methods"]),
        (
            ["random"],
            {},
            {"overrides": ["mixture.evaluation_share=0.07", "train.steps=8", "train.evaluate_every=4"]},
            ["random: recipe", "evaluate less often"],
        ),
        (["from-scratch"], {}, {"overrides": ["prune.compensate=4"]}, ["from-scratch: prune.compensate", "draws its weights"]),
    ],
)
def test_everything_wrong_is_said_before_the_first_row(
    names: list[str], changed: dict[str, Any], options: dict[str, Any], said: list[str], values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ShearlingError) as refused:
        shearling.compare({**values, **changed}, tmp_path / "out", names, **{"tokens": TOKENS, **options})
    assert isinstance(refused.value, ConfigError | ArtifactError)
    assert all(text in str(refused.value) for text in said), refused.value
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_vocabulary_is_refused_and_a_large_one_noted(
    compared: Path, values: dict[str, Any], good_source: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(good_source, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["w3"], vocab["w4"] = vocab["w4"], vocab["w3"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ArtifactError, match="another than the source's"):
        shearling.compare(values, tmp_path / "out", [f"checkpoint:{other}"], tokens=TOKENS)
    notes = Notes()
    with pytest.raises(ConfigError):  # of the tokens, after what is told of the row
        shearling.compare(values, compared, [f"checkpoint:{good_source}"], tokens=2 * TOKENS, show=notes)
    assert any("more than the target's" in note for note in notes.notes)


def test_the_recipes_own_method_is_no_others(values: dict[str, Any]) -> None:
    own = {**values["prune"], "method": "flap", "scores": "activation", "compensate": 5, "steps": 0, "rotate": "tied"}
    setting = setting_of({**values, "prune": own}, sets=("prune.weight_decay=0.5",))
    (plain, both, learned, recipe) = contenders(["minitron", "minitron+distill+lora+compensate", "sheared-llama", "recipe"])
    assert both.label == "minitron+compensate+lora+distill"
    found = recipe_of(plain, setting, 3).prune
    assert (found.method, found.scores, found.compensate, found.rotate, found.steps) == ("minitron", None, 0, "no", 0)
    assert found.weight_decay == 0.5 and found.gates.calibration_sequences == 2 and found.batch_size == 8
    around = recipe_of(both, setting, 3, 5e-5)
    assert (
        around.prune.compensate == 64
        and around.train.lora is not None
        and around.train.distill is not None
        and around.train.learning_rate == 5e-5
        and around.seed == 3
    )
    assert recipe_of(learned, setting, 3).prune.steps == 120  # 30 of 1,024 tokens each, in batches of 256
    assert recipe_of(recipe, setting, 3).prune == setting.recipe.prune


def test_a_method_that_cannot_take_the_sizes_gets_their_parameters(values: dict[str, Any]) -> None:
    """So that all come to as many: those that find their own shape, those of one axis, and a turned head that is no longer tied."""
    setting = setting_of(values)
    wanted = expected_target(setting.source, setting.recipe).parameters()
    for name in ("taylor", "random", "from-scratch"):
        assert recipe_of(*contenders([name]), setting, 17).target == setting.recipe.target
    for name in ("llm-pruner-global", "efficientllm", "flap"):
        target = recipe_of(*contenders([name]), setting, 17).target
        assert target is not None and target.model_dump(exclude_none=True) == {"parameters": wanted}


def test_tokens_of_pruning_are_known_from_above(values: dict[str, Any], compared: Path) -> None:
    setting = setting_of(values, TOKENS)
    spent = {row["label"]: row["pruning_tokens"] for row in read(compared)["rows"]}
    for name in METHODS:
        assert most_pruning_tokens(recipe_of(*contenders([name]), setting, 17), setting.source) == spent[name]
    more = {
        name: most_pruning_tokens(recipe_of(*contenders([name]), setting, 17), setting.source) for name in ("taylor+rotate+compensate",)
    }
    assert more == {"taylor+rotate+compensate": (2 + 2 + 4) * 32}


def test_a_checkpoint_is_steered_as_the_others_are(values: dict[str, Any]) -> None:
    losses = {**dict.fromkeys(DOMAINS, 4.0), "mean": 4.0}
    assert reference_of_checkpoint(setting_of(values), losses)["reference"] == dict.fromkeys(DOMAINS, 4.0)
    given = {**values, "mixture": {"reference": dict.fromkeys(DOMAINS, 3.0)}}
    assert reference_of_checkpoint(setting_of(given), losses)["reference"] == dict.fromkeys(DOMAINS, 3.0)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def compare(recipe: Any, out: Path, methods: list[str], **more: Any) -> dict[str, Any]:
        asked.update(more, methods=methods, out=out)
        (out / TABLE_FILE).write_text("| the table |\n")
        return {"rows": []}

    monkeypatch.setattr(MODULE, "compare", compare)
    line = ["compare", "recipe.yaml", "--out", str(tmp_path), "--methods", "taylor, random", "--methods", "recipe", "--seeds", "3"]
    line += ["--learning-rates", "1e-4,3e-4", "--set", "train.clip=2"]
    cli.app(line, standalone_mode=False)
    assert asked["methods"] == ["taylor", "random", "recipe"] and asked["learning_rates"] == [1e-4, 3e-4] and asked["seeds"] == 3
    assert asked["overrides"] == ["train.clip=2"] and asked["tokens"] is None and capsys.readouterr().out == "| the table |\n\n"
    with pytest.raises(ConfigError, match="1e-4,3e-4"):
        cli.app([*line[:6], "--learning-rates", "fast"], standalone_mode=False)
