"""The whole of it on models made in seconds: every family end to end, and interrupted runs that end as uninterrupted ones do."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import shearling
from faults import in_child_killed_at
from models import CHAT_TEMPLATE, FAMILIES
from runs import DOMAINS, TARGET, Notes, SignalAt, command, contents, metrics, recipe_values, unfinished
from shearling.errors import ConfigError, NumericsError, OutputError, Stopped
from shearling.prune.methods import METHODS
from shearling.recipe import load_recipe
from shearling.run import RunDirectory
from shearling.show import Silent

SOURCES: dict[str, dict[str, Any]] = {
    "llama": {"tied": True},
    "mistral": {"tied": False},
    "qwen2": {"tied": True},
    "qwen3": {"tied": False},
}
TARGETS: dict[str, dict[str, int]] = {
    "llama": TARGET,
    "mistral": {**TARGET, "num_key_value_heads": 2, "num_attention_heads": 4, "hidden_size": 37},
    "qwen2": {**TARGET, "num_key_value_heads": 2, "num_attention_heads": 2},
    "qwen3": {"num_hidden_layers": 1, "intermediate_size": 11},
}


@pytest.fixture(scope="module")
def values(sources: Callable[[str], Path], domains: dict[str, str]) -> dict[str, Any]:
    return recipe_values(sources("llama"), domains, mixture={"update": "unclipped"})


@pytest.fixture(scope="module")
def finished(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    shearling.run(values, out)
    return out


def same_result(one: Path, other: Path) -> None:
    assert contents(one / "model") == contents(other / "model")
    assert contents(one / "pruned") == contents(other / "pruned")
    assert (one / "plan.json").read_bytes() == (other / "plan.json").read_bytes()
    assert metrics(one) == metrics(other)
    reports = [json.loads((run / "report.json").read_text()) for run in (one, other)]
    for key in ("loss", "tokens", "epochs", "verify"):
        assert reports[0][key] == reports[1][key], key
    assert reports[0]["data"]["domains"] == reports[1]["data"]["domains"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_end_to_end(family: str, sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    out, source, target = tmp_path / "run", sources(family), TARGETS[family]
    report = shearling.run(recipe_values(source, domains, target=target), out)
    assert report == json.loads((out / "report.json").read_text())
    stock, info = AutoModelForCausalLM.from_pretrained(out / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert {field: getattr(stock.config, field) for field in target} == target
    assert report["model"]["parameters"] == sum(p.numel() for p in stock.parameters())
    assert report["source"]["parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())
    assert report["model"]["shape"].items() >= target.items()
    assert stock.config.tie_word_embeddings is SOURCES[family]["tied"]
    for stage in ("source", "pruned", "final"):
        losses = report["loss"][stage]
        assert set(losses) == {*DOMAINS, "mean"}
        assert losses["mean"] == pytest.approx(sum(losses[domain] for domain in DOMAINS) / 2)
    assert report["tokens"] == {"prune": 12 * 8 * 32 + 4 * 32, "train": 10 * 8 * 32}
    assert 0 <= report["verify"]["relative_difference"] <= 1e-4 and report["verify"]["max_abs_logit_difference"] < 1e-2
    for side in ("source", "model"):
        assert all(report["speed"][side][kind] > 0 for kind in ("generation", "prefill"))


def test_companions_come_along(finished: Path, sources: Callable[[str], Path]) -> None:
    before, after = (AutoTokenizer.from_pretrained(path) for path in (sources("llama"), finished / "model"))
    assert after.get_vocab() == before.get_vocab()
    assert after("w3 w50 other").input_ids == before("w3 w50 other").input_ids
    assert after.chat_template == CHAT_TEMPLATE
    settings = [GenerationConfig.from_pretrained(path).to_dict() for path in (sources("llama"), finished / "model")]
    assert settings[0] == settings[1]


def test_the_final_model_is_the_trained_one(finished: Path) -> None:
    """model/ gives the losses that the report says, and other weights than pruned/."""
    report = json.loads((finished / "report.json").read_text())
    for name, key in (("model", "final"), ("pruned", "pruned")):
        found = shearling.evaluate(finished / name, finished, speed=False, device="cpu")["loss"]
        assert found == pytest.approx(report["loss"][key], rel=1e-6)
    assert contents(finished / "model")["model.safetensors"] != contents(finished / "pruned")["model.safetensors"]


def test_training_lowers_the_loss(finished: Path) -> None:
    loss = json.loads((finished / "report.json").read_text())["loss"]
    assert loss["final"]["mean"] < loss["pruned"]["mean"]


def test_the_log_has_each_step_once(finished: Path) -> None:
    lines = metrics(finished)
    assert [(line["stage"], line["step"]) for line in lines] == [
        *(("prune", step) for step in range(13)),
        *(("train", step) for step in range(11)),
    ]
    evaluated = {(line["stage"], line["step"]) for line in lines if "heldout" in line}
    assert evaluated == {*(("prune", step) for step in (0, 5, 10, 12)), *(("train", step) for step in (0, 5, 10))}
    for line in lines:
        assert sum(line["weights"].values()) == pytest.approx(1)
        if line["step"]:
            assert line["loss"] > 0 and line["gradient_norm"] > 0 and line["learning_rate"]["weights"] > 0
    pruning = [line for line in lines if line["stage"] == "prune" and line["step"]]
    assert set(pruning[-1]["sizes"]) == {"hidden", "layer", "neuron", "query"}
    assert all(set(size) == {"expected", "target", "worst"} for line in pruning for size in line["sizes"].values())


def test_what_a_run_directory_holds(finished: Path) -> None:
    assert {path.name for path in finished.iterdir() if not path.name.startswith(".")} == {
        *("recipe.yaml", "metrics.jsonl", "plan.json", "report.json", "report.html"),
        *("data", "events", "stages", "checkpoints", "pruned", "model"),
    }
    assert not list(finished.rglob(".tmp-*")) and not list(finished.rglob(".aside-*"))
    assert list((finished / "events").glob("events.out.tfevents.*"))
    plan = json.loads((finished / "plan.json").read_text())
    assert len(plan["keep"]["hidden"]) == 36 and len(plan["keep"]["layer"]) == 2
    page = (finished / "report.html").read_text()
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "") and 'src="https' not in page


def test_training_goes_on_where_pruning_ended(finished: Path) -> None:
    """In the text, of which every sequence drawn counts, and in the steps of TensorBoard."""
    report = json.loads((finished / "report.json").read_text())
    sequences = {name: facts["train_sequences"] for name, facts in report["data"]["domains"].items()}
    used = sum(report["epochs"][name] * sequences[name] for name in DOMAINS)
    assert used == pytest.approx((12 + 10) * 8, abs=0.001 * sum(sequences.values()))
    events = EventAccumulator(str(finished / "events")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 23))


def test_running_again_does_nothing(finished: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_model(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded")

    before = contents(finished)
    monkeypatch.setattr("shearling.sources.Source.load_model", no_model)
    monkeypatch.setattr("shearling.stages.load_stock", no_model)
    report = shearling.run(values, finished)
    after = contents(finished)
    assert report == json.loads(before["report.json"])
    changing = ("report.html", ".lock")
    assert {k: v for k, v in after.items() if k not in changing} == {k: v for k, v in before.items() if k not in changing}


def test_the_stages_alone_make_the_same(finished: Path, values: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = shearling.prepare(values, out)
    assert (out / "data").is_dir() and not (out / "pruned").exists() and set(report["data"]["domains"]) == set(DOMAINS)
    report = shearling.prune(values, out)
    assert (out / "pruned").is_dir() and not (out / "model").exists() and "final" not in report["loss"]
    report = shearling.train(values, out)
    assert (out / "model").is_dir() and "speed" not in report
    assert "speed" in shearling.run(values, out)
    same_result(out, finished)
    assert shearling.report(out) == json.loads((out / "report.json").read_text())


def test_a_signal_at_any_stage_changes_nothing(finished: Path, values: dict[str, Any], tmp_path: Path) -> None:
    """One run, stopped by SIGTERM (or another of the three signals) again and again, each time going on."""
    out = tmp_path / "run"
    moments: list[tuple[tuple[str, Any], signal.Signals]] = [
        (("count", "a"), signal.SIGTERM),
        (("stage", "prepare"), signal.SIGINT),
        (("stage", "source"), signal.SIGUSR1),
        (("note", "scoring"), signal.SIGTERM),
        (("prune", 1), signal.SIGTERM),
        (("prune", 5), signal.SIGTERM),  # an evaluation, with an update of the mixture
        (("prune", 12), signal.SIGTERM),
        (("stage", "train"), signal.SIGTERM),
        (("train", 3), signal.SIGTERM),
        (("train", 10), signal.SIGTERM),
    ]
    for moment, number in moments:
        show = SignalAt(moment, number)
        with pytest.raises(Stopped, match="same command") as stopped:
            shearling.run(values, out, show=show)
        assert show.sent and number.name in str(stopped.value), moment
        assert not list(out.rglob(".tmp-*"))
    shearling.run(values, out)
    same_result(out, finished)


def test_signals_to_the_command(finished: Path, values: dict[str, Any], tmp_path: Path) -> None:
    """Processes of their own: SIGTERM ends with 75 and a checkpoint, SIGKILL with what was saved; the same command goes on."""
    out, recipe, stderr = tmp_path / "run", tmp_path / "recipe.yaml", tmp_path / "stderr"
    recipe.write_text(json.dumps(values))
    run = ["run", str(recipe), "--out", str(out), "--set", "runtime.save_every=2"]
    for moment, number, code in (
        (("prune", 5), signal.SIGKILL, -signal.SIGKILL),
        (("prune", 9), signal.SIGTERM, 75),
        (("train", 1), signal.SIGKILL, -signal.SIGKILL),
        (("train", 4), signal.SIGTERM, 75),
        (("train", 7), signal.SIGKILL, -signal.SIGKILL),
    ):
        assert command(run, stderr, moment, number) == code, stderr.read_text()
        if code == 75:
            checkpoints = sorted(path.name for path in (out / "checkpoints" / moment[0]).iterdir())
            assert checkpoints[-1] == f"step-{moment[1]:08d}"
            assert f"after step {moment[1]}" in stderr.read_text() and "same command" in stderr.read_text()
    assert command(run, stderr) == 0, stderr.read_text()
    assert str(out / "model") in stderr.read_text()
    same_result(out, finished)


def test_a_kill_while_the_directory_is_made(values: dict[str, Any], tmp_path: Path) -> None:
    """Whatever a kill leaves of an empty run directory, the same command goes on."""
    recipe, k, killed = load_recipe(values), 0, True

    def enter(out: Path) -> None:
        with RunDirectory(out, recipe) as directory:
            directory.do("prepare", lambda: {}, Silent())

    while killed:
        k += 1
        out = tmp_path / str(k)
        killed = in_child_killed_at(k, lambda out=out: enter(out))
        enter(out)
        assert load_recipe(out / "recipe.yaml") == recipe and not list(out.glob(".tmp-*"))
    assert k > 5


def test_another_recipe_is_refused(finished: Path, values: dict[str, Any]) -> None:
    before = contents(finished)
    with pytest.raises(ConfigError) as refused:
        shearling.run(values, finished, overrides=["train.steps=11", "seed=3"])
    assert refused.value.exit_code == 2
    assert {problem.field for problem in refused.value.problems} == {"train.steps", "seed"}
    assert "11" in str(refused.value) and "10" in str(refused.value)
    after = contents(finished)
    assert {k: v for k, v in after.items() if k != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}
    shearling.run(values, finished, overrides=["runtime.save_every=7", "runtime.keep_checkpoints=3"])  # no part of the result


def test_a_directory_of_something_else_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="not a run"):
        shearling.run(values, tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


def test_what_rounding_may_explain_is_looked_at_in_fp64(
    finished: Path, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published where fp64 shows no difference, with both numbers in the report; refused where it shows a small one."""
    monkeypatch.setattr(importlib.import_module("shearling.prune.verify"), "TOLERANCE", 0.0)
    out = unfinished(shutil.copytree(finished, tmp_path / "good"), "prune", "train", "evaluate")
    report = shearling.run(values, out)
    assert 0 < report["verify"]["relative_difference"] < 1e-5 and report["verify"]["relative_difference_float64"] < 1e-11
    assert "all of it rounding" in (out / "report.html").read_text()
    assert contents(out / "pruned") == contents(finished / "pruned")

    def bent(*args: Any) -> Any:
        for name, tensor in transform(*args):
            yield name, tensor * (1.0001 if name.endswith("layers.1.mlp.up_proj.weight") else 1)

    pruning = importlib.import_module("shearling.pruning")
    transform = pruning.transform
    monkeypatch.setattr(pruning, "transform", bent)
    out = unfinished(shutil.copytree(finished, tmp_path / "bent"), "prune", "train", "evaluate")
    with pytest.raises(NumericsError, match=r"in fp64.*layers\.1\.mlp\.up_proj\.weight"):
        shearling.run(values, out)


def test_without_a_target_it_trains_on(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = shearling.run(recipe_values(sources("qwen3"), domains, target=None), out)
    assert report["model"]["parameters"] == report["source"]["parameters"]
    assert report["tokens"] == {"prune": 0, "train": 10 * 8 * 32}
    assert report["loss"]["pruned"] == pytest.approx(report["loss"]["source"], rel=1e-6)
    assert "before_hardening" not in report["loss"]
    assert [line["stage"] for line in metrics(out)] == ["train"] * 11
    AutoModelForCausalLM.from_pretrained(out / "model")


@pytest.mark.parametrize("method", ["taylor", "llm-pruner", "magnitude", "minitron", "random"])
def test_one_shot_pruning(method: str, sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """Every method that scores all axes gives a stock checkpoint of the target's shape, and the plan says how."""
    changes = {"method": method, "steps": 0, "gates": {"calibration_sequences": 4}}
    report = shearling.prune(recipe_values(sources("llama"), domains, prune=changes), tmp_path / "run")
    assert report["tokens"]["prune"] == (0 if method in ("random", "magnitude") else 4 * 32)
    assert report["model"]["shape"].items() >= TARGET.items()
    assert "before_hardening" not in report["loss"]
    assert [line["step"] for line in metrics(tmp_path / "run") if line["stage"] == "prune"] == [0]
    made_by = json.loads((tmp_path / "run" / "plan.json").read_text())["made_by"]
    assert made_by["method"] == method and set(made_by["scores"]) == {"hidden", "layer", "neuron", "query"}


@pytest.mark.parametrize("method", ["shortgpt", "last-blocks", "every-nth"])
def test_depth_pruning(method: str, sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    values = recipe_values(sources("qwen3"), domains, target={"num_hidden_layers": 2}, prune={"method": method, "steps": 0})
    report = shearling.prune(values, tmp_path / "run")
    assert report["model"]["shape"]["num_hidden_layers"] == 2
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert len(plan["keep"]["layer"]) == 2 and plan["made_by"]["scores"] == {"layer": METHODS[method].scores["layer"]}


def test_one_shot_needs_a_score(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prune\.gates\.start"):
        shearling.run(values, tmp_path / "run", overrides=["prune.steps=0", "prune.gates.start=constant"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("update", ["static", "paper", "unclipped"])
def test_the_mixture_follows_its_rule(update: str, values: dict[str, Any], tmp_path: Path) -> None:
    """The first shares are the given ones; the next follow the held-out losses by the rule."""
    changed = json.loads(json.dumps(values))
    for name, weight in (("a", 3.0), ("b", 1.0)):
        changed["data"]["domains"][name] = {"train": values["data"]["domains"][name], "weight": weight}
    reference = {"a": 9.5, "b": 6.0}  # a comes below its own, b stays above
    changed |= {"mixture": {"update": update, "reference": reference, "step_size": 0.3, "smoothing": 0.02}}
    shearling.train(changed, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    weights = torch.tensor([0.75, 0.25], dtype=torch.float64)
    wanted = torch.tensor([reference[domain] for domain in DOMAINS], dtype=torch.float64)

    def moved(line: dict[str, Any]) -> torch.Tensor:
        if update == "static":
            return weights
        gain = torch.tensor([line["heldout"][domain] for domain in DOMAINS], dtype=torch.float64) - wanted
        grown = weights * torch.exp(0.3 * (gain.clamp(min=0) if update == "paper" else gain))
        return 0.98 * grown / grown.sum() + 0.02 / 2

    for line in lines:
        begins_training = line["stage"] == "train" and line["step"] == 0  # with the cut model's losses, and moves before its first step
        if begins_training:
            weights = moved(line)
        assert [line["weights"][domain] for domain in DOMAINS] == pytest.approx(weights.tolist(), rel=1e-9), line["step"]
        if "heldout" in line and line["step"]:
            weights = moved(line)
    heldout = [line["heldout"] for line in lines if "heldout" in line]
    assert min(line["a"] for line in heldout) < reference["a"] and min(line["b"] for line in heldout) > reference["b"]


def test_a_speed_that_cannot_be_measured_ends_no_run(finished: Path, values: dict[str, Any], tmp_path: Path) -> None:
    out, told = unfinished(Path(shutil.copytree(finished, tmp_path / "run")), "evaluate"), Notes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shearling.stages.measure_speed", lambda *args, **kwargs: 1 / 0)
        report = shearling.run(values, out, show=told)
    assert "ZeroDivisionError" in report["speed_error"] and "speed" not in report
    assert sum("speed could not be measured" in note for note in told.notes) == 1
    same_result(out, finished)
