"""Runs whose stages learn from the source: through the whole pipeline, broken off, on two processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import shearling
from models import save_tiny_source
from ranks import Ranks
from runs import SignalAt, command, contents, metrics, recipe_values
from shearling.errors import ConfigError, Stopped

SOURCES: dict[str, dict[str, Any]] = {"llama": {"tied": True, "layers": 4}}
ALL = {"text": 0.5, "logits": 1.0, "hidden": 0.1, "blocks": 0.1, "warmup": 0.5}
FEW = {"text": 0.0, "divergence": "jsd", "top_k": 5, "temperature": 2.0, "hidden": 0.3, "state_distance": "cosine"}


def values_of(source: Path, domains: dict[str, str], **more: Any) -> dict[str, Any]:
    stages = {"prune": {"steps": 6, "distill": ALL}, "train": {"steps": 5, "microbatches": 2, "distill": FEW}}
    values = recipe_values(source, domains, **stages, evaluate={"speed": False})
    values["data"]["attend"] = "document"
    for section, change in more.items():
        values[section] |= change
    return values


def weights(path: Path) -> set[str]:
    with safe_open(path / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_both_stages_learn_from_the_source(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """What is logged adds up, and nothing of it is published; broken off in either stage it ends with the same bits."""
    values = values_of(sources("llama"), domains)
    shearling.run(values, tmp_path / "whole")
    for stage in ("prune", "train"):
        lines = [line for line in metrics(tmp_path / "whole") if line["stage"] == stage and line["step"]]
        config = ALL if stage == "prune" else FEW
        for line in lines:
            terms, share = line["terms"], min(1.0, line["step"] / 3) if stage == "prune" else 1.0
            assert set(terms) == {"text", "logits", *(["hidden", "blocks"] if stage == "prune" else ["hidden"])}
            heat, rest = config.get("temperature", 1.0), ("hidden", "blocks") if stage == "prune" else ("hidden",)
            parts = share * (terms["logits"] + sum(config[name] * terms[name] for name in rest))  # type: ignore[operator]
            assert line["loss"] == pytest.approx(config["text"] * terms["text"] + parts, rel=1e-5), (line, heat)
            assert line["loss"] == pytest.approx(sum(line["domain_loss"].values()) / 2, rel=0.2)
    before, after = weights(sources("llama")), weights(tmp_path / "whole" / "model")
    assert after < before and not any("projectors" in name for name in after)
    for moment in (("prune", 2), ("train", 3)):
        with pytest.raises(Stopped):
            shearling.run(values, tmp_path / "broken", show=SignalAt(moment, signal.SIGTERM))
    shearling.run(values, tmp_path / "broken")
    assert contents(tmp_path / "broken" / "model") == contents(tmp_path / "whole" / "model")


def test_a_source_that_is_not_cut_is_its_own_teacher(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """In fp32 it has nothing to learn: its predictions and states are what they should be before the first step."""
    values = values_of(sources("llama"), domains, train={"distill": ALL | {"warmup": 0}}, runtime={"precision": "float32"})
    values["target"] = None
    shearling.run(values, tmp_path / "run")
    first = next(line for line in metrics(tmp_path / "run") if line["stage"] == "train" and line["step"] == 1)
    assert first["terms"]["text"] > 1
    assert max(first["terms"][name] for name in ("logits", "hidden", "blocks")) < 1e-6


def test_two_processes_learn_what_one_does(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """The same losses to rounding: the source is sharded, and projectors are trained on both."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values_of(sources("llama"), domains, runtime={"precision": "float32"})))
    assert command(["run", str(recipe), "--out", str(tmp_path / "one")], tmp_path / "one.txt") == 0, (tmp_path / "one.txt").read_text()
    both = Ranks(["run", str(recipe), "--out", str(tmp_path / "two")], tmp_path / "ranks")
    assert both.codes() == [0, 0], both.text()
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 13
    for mine, theirs in zip(one, two, strict=True):
        if mine["step"]:
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-6)
            assert theirs["terms"] == pytest.approx(mine["terms"], rel=1e-5)


def test_states_of_a_sliced_model_are_refused(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    values = values_of(sources("llama"), domains, prune={"method": "efficientllm", "slice_every": 1, "cuts": 2})
    with pytest.raises(ConfigError, match="slice_every"):
        shearling.run(values, tmp_path / "run")


def test_a_teacher_is_trained_on_the_text_first(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """As a run of its own, which is broken off and gone on with; its tokens count, and it is the one that is learnt from."""
    teacher = {"steps": 4, "batch_size": 8, "microbatches": 2, "learning_rate": 1e-2, "evaluate_every": 2}
    values = {**values_of(sources("llama"), domains), "teacher": teacher}
    for moment in (("train", 2), ("prune", 2)):  # the teacher's stage is that of the inner run
        with pytest.raises(Stopped):
            shearling.run(values, tmp_path / "run", show=SignalAt(moment, signal.SIGTERM))
    assert not (tmp_path / "run" / "model").exists()
    report = shearling.run(values, tmp_path / "run")
    assert report["tokens"]["teacher"] == 4 * 8 * 32
    inner = json.loads((tmp_path / "run" / "teacher" / "report.json").read_text())
    assert inner["tokens"]["train"] == 4 * 8 * 32 and inner["loss"]["final"]["mean"] < inner["loss"]["source"]["mean"] - 0.01
    assert weights(tmp_path / "run" / "teacher" / "model") == weights(sources("llama"))
    plain = {key: value for key, value in values.items() if key != "teacher"}
    shearling.run(plain, tmp_path / "plain")
    by_whom = {**plain, "teacher": {"model": str(tmp_path / "run" / "teacher" / "model")}, "train": {**plain["train"]}}
    by_whom["prune"] = {**plain["prune"], "distill": {**ALL, "blocks": 0}}
    with pytest.raises(ConfigError, match="blocks"):
        shearling.run({**plain, "teacher": by_whom["teacher"]}, tmp_path / "refused")
    shearling.run(by_whom, tmp_path / "given")
    first = {name: next(line["terms"] for line in metrics(tmp_path / name) if line["step"] == 1) for name in ("run", "plain", "given")}
    assert first["run"]["logits"] == first["given"]["logits"] and abs(first["run"]["logits"] / first["plain"]["logits"] - 1) > 1e-3


def test_predictions_are_cached_for_all_runs(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """The second run asks the source nothing and ends with the same bits; so does one in another folder."""
    learnt = {"top_k": 4, "cache": str(tmp_path / "cache")}
    values = values_of(sources("llama"), domains, prune={"distill": learnt}, train={"distill": learnt})
    shearling.run(values, tmp_path / "first")
    held = contents(tmp_path / "cache")
    assert held and {len(data) % (32 + 32 * 4 * 4 + 32 * 5 * 2 + 4) for data in held.values()} == {0}
    shearling.run(values, tmp_path / "second")
    assert contents(tmp_path / "cache") == held
    moved = str(tmp_path / "elsewhere")
    changes = [f"{stage}.distill.cache={moved}" for stage in ("prune", "train")]
    with pytest.raises(Stopped):
        shearling.run(values, tmp_path / "third", show=SignalAt(("train", 2), signal.SIGTERM))
    shearling.run(values, tmp_path / "third", overrides=changes)
    models = [contents(tmp_path / name / "model") for name in ("first", "second", "third")]
    assert models[0] == models[1] == models[2]


def test_a_teacher_of_other_tokens_is_refused(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    save_tiny_source(tmp_path / "other", "llama", vocab=120)
    learnt = {"prune": {"distill": {}}, "train": {"distill": None}}
    values = {**values_of(sources("llama"), domains, **learnt), "teacher": {"model": str(tmp_path / "other")}}
    with pytest.raises(ConfigError, match=r"teacher\.model.*120 tokens"):
        shearling.run(values, tmp_path / "run")
    values["prune"]["distill"] = None
    with pytest.raises(ConfigError, match="nothing learns from it"):
        shearling.run(values, tmp_path / "run")


def test_target_and_tokens_are_a_whole_recipe(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """The default: one cut that compensates, recovered from text and source with all tokens that are left; run twice it is the same run."""
    values = recipe_values(sources("llama"), domains, target={"parameters": 0.7}, evaluate={"speed": False})
    values = {key: value for key, value in values.items() if key not in ("prune", "train")} | {"tokens": 20_000}
    report = shearling.run(values, tmp_path / "run")
    assert 20_000 - 32 * 8 < sum(report["tokens"].values()) <= 20_000 and report["tokens"]["prune"] <= 3_000
    first = next(line for line in metrics(tmp_path / "run") if line["stage"] == "train" and line["step"] == 1)
    assert set(first["terms"]) == {"text", "logits"}
    assert shearling.run(values, tmp_path / "run") == report


def test_two_processes_share_a_cache_with_one(sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """One that has all it needs still computes along with one that has not; what they cached serves a process alone."""
    learnt = {"distill": {"top_k": 4, "cache": str(tmp_path / "cache")}}
    values = values_of(sources("llama"), domains, train=learnt, runtime={"precision": "float32"})
    values["prune"]["distill"] = None
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values))
    both = Ranks(["run", str(recipe), "--out", str(tmp_path / "two")], tmp_path / "ranks")
    assert both.codes() == [0, 0], both.text()
    (folder,) = (tmp_path / "cache").iterdir()
    held = contents(folder)
    assert len(held) == 2
    first = next(iter(held))
    (folder / first).unlink()  # so that some sequences are missing, and others are not
    half = Ranks(["run", str(recipe), "--out", str(tmp_path / "half")], tmp_path / "ranks2")
    assert half.codes() == [0, 0], half.text()
    assert command(["run", str(recipe), "--out", str(tmp_path / "one")], tmp_path / "one.txt") == 0, (tmp_path / "one.txt").read_text()
    losses = [[line["loss"] for line in metrics(tmp_path / name) if line["step"]] for name in ("two", "half", "one")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-6)
