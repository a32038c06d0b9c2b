"""Methods that find their own shape under a budget of parameters, in one cut or in many, through the whole pipeline."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import shearling
from runs import Notes, SignalAt, contents, metrics, recipe_values
from shearling.arch.families import anatomy_of
from shearling.errors import ArtifactError, ConfigError, OutputError, ShapeError, Stopped
from shearling.prune import verify

SOURCES: dict[str, dict[str, Any]] = {"llama": {"tied": True, "layers": 4}, "qwen3": {"tied": False, "layers": 4}}
METHODS: dict[str, dict[str, Any]] = {
    "taylor": {},
    "sheared-llama": {"steps": 8},
    "llm-pruner-global": {},
    "llm-pruner-global in two cuts": {"cuts": 2},
    "llm-pruner-global alike": {"shape": "uniform", "axes": ["hidden", "group", "neuron"]},
    "saap": {},
    "adapt-pruner": {"steps": 6, "cuts": 3, "share": "linear"},
    "efficientllm": {"steps": 6, "cuts": 3},
}


def values_of(source: Path, domains: dict[str, str], name: str, share: float = 0.7, **more: Any) -> dict[str, Any]:
    prune = {"method": name.split()[0], "steps": 0, "gates": {"calibration_sequences": 4}, "evaluate_every": 2, **METHODS[name]}
    return recipe_values(source, domains, target={"parameters": share}, prune=prune, **more)


@pytest.mark.parametrize("family", SOURCES)
@pytest.mark.parametrize("name", METHODS)
def test_a_budget_is_met_and_the_result_is_a_model(
    name: str, family: str, sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    report = shearling.run(values_of(sources(family), domains, name), out)
    budget = int(0.7 * report["source"]["parameters"])
    found = report["model"]["parameters"]
    config = json.loads((out / "model" / "config.json").read_text())
    anatomy = anatomy_of(config)
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    assert found == anatomy.parameters() == sum(p.numel() for p in model.parameters())
    # within the smallest unit that goes at once: a neuron, or one of every block
    uniform = "alike" in name or name in ("taylor", "sheared-llama", "efficientllm")
    neuron = 3 * anatomy.sizes["hidden"]
    assert budget - neuron * (anatomy.sizes["layer"] if uniform else 1) < found <= budget, (found, budget)
    assert (config["model_type"] == family) == (not anatomy.blocks)
    assert not (uniform and anatomy.blocks)
    assert report["verify"]["relative_difference"] <= 1e-4
    assert report["loss"]["final"]["mean"] < report["loss"]["source"]["mean"] + 2
    ids = torch.arange(8).reshape(1, 8)
    cached = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
    plan = json.loads((out / "plan.json").read_text())
    assert plan["target"]["shape"] == report["model"]["shape"] and plan["made_by"]["method"] == name.split()[0]
    assert "<html" in (out / "report.html").read_text()


def test_blocks_differ_where_they_may(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """And the checkpoint loads in plain transformers with the code that lies beside it."""
    report = shearling.prune(values_of(sources("llama"), domains, "llm-pruner-global"), tmp_path / "run")
    assert len(set(report["model"]["shape"]["intermediate_size"])) > 1
    load = (
        "import sys; sys.modules['shearling'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path / 'run' / 'pruned')!r}, trust_remote_code=True)).__name__)"
    )
    environment = {"HF_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ShearedForCausalLM", done.stderr[-2000:]


def test_padding_gives_a_stock_checkpoint_of_the_same_function(
    sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path
) -> None:
    shearling.prune(values_of(sources("qwen3"), domains, "saap"), tmp_path / "run")
    found = shearling.pad(tmp_path / "run" / "pruned", tmp_path / "padded")
    assert found["after"] > found["before"] and found["relative_difference"] < 1e-5
    assert json.loads((tmp_path / "padded" / "config.json").read_text())["model_type"] == "qwen3"
    assert not list((tmp_path / "padded").glob("*.py"))
    own, padded = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tmp_path / "run" / "pruned", tmp_path / "padded")
    )
    ids = torch.arange(40).reshape(2, 20)
    assert torch.allclose(own(ids).logits, padded(ids).logits, atol=1e-5)
    with pytest.raises(OutputError):
        shearling.pad(tmp_path / "run" / "pruned", tmp_path / "padded")


def test_a_run_pads_its_result_where_asked(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    found = shearling.run(values_of(sources("llama"), domains, "saap", export={"pad_to_uniform": True}), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "padded" / "config.json").read_text())
    assert config["model_type"] == "llama" and found["padded"]["after"] == anatomy_of(config).parameters()
    assert found["padded"]["before"] == found["model"]["parameters"] < found["padded"]["after"]
    alike = shearling.run(values_of(sources("llama"), domains, "taylor", export={"pad_to_uniform": True}), tmp_path / "alike")
    assert "padded" not in alike and not (tmp_path / "alike" / "padded").exists()


def test_padding_that_rounding_may_hide_is_compared_in_fp64(
    sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shearling.prune(values_of(sources("llama"), domains, "saap"), tmp_path / "run")
    monkeypatch.setattr(verify, "TOLERANCE", 1e-12)  # as if these weights were such that fp32 cannot tell
    assert shearling.pad(tmp_path / "run" / "pruned", tmp_path / "padded")["relative_difference"] < 1e-12


@pytest.mark.parametrize("name", ["adapt-pruner", "efficientllm"])
def test_a_signal_between_cuts_changes_nothing(name: str, sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    values = values_of(sources("llama"), domains, name, runtime={"precision": "float32"})
    shearling.run(values, tmp_path / "whole")
    for step in (1, 3, 5):
        with pytest.raises(Stopped):
            shearling.run(values, tmp_path / "broken", show=SignalAt(("prune", step), signal.SIGTERM))
    shearling.run(values, tmp_path / "broken")
    assert contents(tmp_path / "whole" / "model") == contents(tmp_path / "broken" / "model")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    parameters = [line["parameters"] for line in metrics(tmp_path / "whole") if "parameters" in line]
    assert parameters == sorted(parameters, reverse=True) and len(set(parameters)) >= 2


@pytest.mark.parametrize("rotate", ["no", "tied", "untied"])
@pytest.mark.parametrize("family", SOURCES)
def test_rotated_and_compensated(rotate: str, family: str, sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """A stock checkpoint that computes what the turned, fitted, masked source does; the plan says how it was made."""
    values = values_of(sources(family), domains, "taylor")
    values["prune"] |= {"rotate": rotate, "compensate": 8}
    report = shearling.run(values, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["model_type"] == family and config["tie_word_embeddings"] is (SOURCES[family]["tied"] and rotate != "untied")
    assert report["model"]["parameters"] <= 0.7 * report["source"]["parameters"]
    assert report["verify"]["relative_difference"] <= 1e-4 or report["verify"]["relative_difference_float64"] <= 1e-8
    made_by = json.loads((tmp_path / "run" / "plan.json").read_text())["made_by"]
    assert made_by["compensated_on"] == 8 and made_by.get("rotated", "no") == rotate
    assert (made_by["scores"]["hidden"] == "first-channels") == (rotate != "no")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    hidden = plan["keep"]["hidden"]
    assert (hidden == list(range(len(hidden)))) == (rotate != "no")
    assert report["tokens"]["prune"] == 32 * (4 + 8 + (4 if rotate != "no" else 0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == report["model"]["parameters"]


def test_learned_gates_on_a_turned_stream_go_on_after_a_signal(
    sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path
) -> None:
    values = values_of(sources("llama"), domains, "sheared-llama", runtime={"precision": "float32"})
    values["prune"] |= {"rotate": "untied", "compensate": 8}
    shearling.prune(values, tmp_path / "whole")
    with pytest.raises(Stopped):
        shearling.prune(values, tmp_path / "broken", show=SignalAt(("prune", 3), signal.SIGTERM))
    shearling.prune(values, tmp_path / "broken")
    assert contents(tmp_path / "whole" / "pruned") == contents(tmp_path / "broken" / "pruned")


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "sizes": ({"target": {"hidden_size": 24}}, ConfigError, "finds its own shape"),
    "no steps": ({"prune": {"method": "efficientllm", "steps": 0}}, ConfigError, "prune.steps"),
    "alike and adapted": ({"prune": {"method": "adapt-pruner", "shape": "uniform"}}, ConfigError, "prune.shape"),
    "query by block": ({"prune": {"axes": ["query", "neuron"]}}, ConfigError, "prune.axes"),
    "a shape by a method that has none": ({"prune": {"method": "taylor", "shape": "per_layer"}}, ConfigError, "prune.shape"),
    "too little": ({"target": {"parameters": 0.1}}, ShapeError, "target.parameters"),
    "too much": ({"target": {"parameters": 10**9}}, ShapeError, "target.parameters"),
    "more cuts than steps": ({"prune": {"steps": 2, "cuts": 3}}, ConfigError, "Cuts"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_said_before_any_work(case: str, sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    changes, kind, match = WRONG[case]
    values = values_of(sources("llama"), domains, "llm-pruner-global")
    for section, change in changes.items():
        values[section] = change if section == "target" else {**values[section], **change}
    with pytest.raises(kind, match=match):
        shearling.run(values, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_depth_by_a_budget(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """`prune.axes: [layer]` takes whole blocks alone, whatever the score."""
    values = values_of(sources("qwen3"), domains, "taylor")
    values["prune"]["axes"] = ["layer"]
    report = shearling.prune(values, tmp_path / "run")
    shape = report["model"]["shape"]
    assert shape["num_hidden_layers"] == 2 and {**shape, "num_hidden_layers": 4} == report["source"]["shape"]


def test_a_model_whose_blocks_differ_is_trained_further(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """As it is, and learning from another model; to cut it once more it has to be padded."""
    shearling.prune(values_of(sources("llama"), domains, "saap"), tmp_path / "cut")
    source, teacher = tmp_path / "cut" / "pruned", {"model": str(sources("llama"))}
    before = json.loads((source / "config.json").read_text())
    assert isinstance(before["intermediate_size"], list)
    learnt = {"distill": {"hidden": 0.5}}
    report = shearling.run({**recipe_values(source, domains, train=learnt), "target": None, "teacher": teacher}, tmp_path / "run")
    assert report["loss"]["pruned"] == report["loss"]["source"] and report["loss"]["final"]["mean"] < report["loss"]["source"]["mean"]
    after = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert after["intermediate_size"] == before["intermediate_size"] and after["model_type"] == before["model_type"]
    with pytest.raises(ArtifactError, match=r"blocks of different sizes.*shearling pad"):
        shearling.run(values_of(source, domains, "taylor"), tmp_path / "again")


@pytest.mark.parametrize("name", ["llm-pruner-global", "efficientllm", "sheared-llama"])
def test_every_cut_compensates(name: str, sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """Each on its own sequences, all of which count, while training goes on between; broken off it ends with the same bits."""
    cuts = {} if name == "sheared-llama" else {"cuts": 2}
    prune = {"method": name, "steps": 6, "compensate": 9, "gates": {"calibration_sequences": 4}, "evaluate_every": 2, **cuts}
    values = recipe_values(sources("llama"), domains, target={"parameters": 0.7}, prune=prune, runtime={"precision": "float32"})
    values["evaluate"]["speed"] = False
    notes = Notes()
    report = shearling.prune(values, tmp_path / "whole", show=notes)
    fitted = [note for note in notes.notes if note.startswith("fitting")]
    assert [note.rpartition(" on ")[2] for note in fitted] == (["9 sequences"] if not cuts else ["4 sequences"] * 2)
    measured = 4 * sum(note.startswith("scoring") for note in notes.notes)
    assert report["tokens"]["prune"] == (6 * 8 + 4 * len(fitted) + (5 if not cuts else 0) + measured) * 32
    for step in (2, 4):
        with pytest.raises(Stopped):
            shearling.prune(values, tmp_path / "broken", show=SignalAt(("prune", step), signal.SIGTERM))
    again = shearling.prune(values, tmp_path / "broken")
    assert contents(tmp_path / "broken" / "pruned") == contents(tmp_path / "whole" / "pruned") and again["tokens"] == report["tokens"]


def test_too_few_sequences_to_compensate_on_are_refused(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    prune = {"method": "taylor", "steps": 4, "cuts": 3, "compensate": 11}
    with pytest.raises(ConfigError, match="12 in all"):
        shearling.prune(recipe_values(sources("llama"), domains, prune=prune), tmp_path / "run")
