"""The control that keeps nothing of the source: random weights in the target's shape, from pruning to a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import shearling
from models import tiny_config
from runs import DOMAINS, TARGET, contents, recipe_values, unfinished
from shearling.arch.families import anatomy_of
from shearling.errors import ConfigError
from shearling.planning import expected_target
from shearling.prune.methods import choose
from shearling.prune.scratch import drawn
from shearling.recipe import load_recipe
from shearling.sources import open_source

SCRATCH = {"method": "from-scratch", "batch_size": 8, "evaluate_every": 5}


def values_of(source: Path, domains: dict[str, str], **more: Any) -> dict[str, Any]:
    values = recipe_values(source, domains, train={"steps": 6, "evaluate_every": 3}, evaluate={"speed": False}, **more)
    return {**values, "prune": {**SCRATCH}}


@pytest.fixture(scope="module")
def finished(good_source: Path, domains: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scratch") / "run"
    shearling.run(values_of(good_source, domains), out)
    return out


def test_weights_follow_from_the_seed_alone_and_leave_torchs_generator_alone() -> None:
    values = {**tiny_config("llama", layers=2).to_dict(), "initializer_range": 0.05}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = drawn(values, 7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = drawn(values, 7).state_dict(), drawn(values, 8).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    matrices = [name for name in one if one[name].dim() == 2]
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    assert torch.cat([one[name].flatten() for name in matrices]).std() == pytest.approx(0.05, rel=0.05)
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for name, tensor in one.items() if "norm" in name)


def test_what_is_published_is_what_was_drawn(finished: Path, good_source: Path) -> None:
    config = json.loads((finished / "pruned" / "config.json").read_text())
    assert {field: config[field] for field in TARGET} == TARGET
    stock = AutoModelForCausalLM.from_pretrained(finished / "pruned", dtype=torch.float32).state_dict()
    expected = drawn(config, 17).state_dict()
    assert stock.keys() == expected.keys() and all(torch.equal(stock[name], expected[name]) for name in stock)
    source = AutoModelForCausalLM.from_pretrained(good_source, dtype=torch.float32).state_dict()
    assert not torch.equal(stock["model.embed_tokens.weight"][:, :24], source["model.embed_tokens.weight"][:, :24])


def test_the_run_says_so_and_goes_on_from_it(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["tokens"] == {"prune": 0, "train": 6 * 8 * 32} and report["verify"] == {"weights": "as drawn", "sequences": 2}
    assert abs(report["loss"]["pruned"]["mean"] - torch.tensor(96.0).log().item()) < 0.2  # knows nothing
    assert report["loss"]["final"]["mean"] < report["loss"]["pruned"]["mean"]
    assert set(report["loss"]["final"]) == {*DOMAINS, "mean"}
    assert not (finished / "plan.json").exists()  # nothing of the source is kept
    assert "unless weights are drawn at random" in (finished / "report.html").read_text()
    shape = anatomy_of(json.loads((finished / "model" / "config.json").read_text()))
    assert report["model"]["parameters"] == shape.parameters()


def test_done_again_it_draws_the_same(finished: Path, good_source: Path, domains: dict[str, str]) -> None:
    before = contents(finished / "pruned")
    (finished / "plan.json").write_text("{}")  # as a try with another method would leave it
    shearling.prune(values_of(good_source, domains), unfinished(finished, "prune"))
    assert contents(finished / "pruned") == before and not (finished / "plan.json").exists()


def test_a_budget_gives_the_shape_that_scores_would_cut(good_source: Path, domains: dict[str, str], tmp_path: Path) -> None:
    values = values_of(good_source, domains, target={"parameters": 0.6})
    found = shearling.prune(values, tmp_path / "run")["model"]
    scored = load_recipe({**values, "prune": {"method": "random"}})
    assert found["parameters"] == expected_target(open_source(good_source), scored).parameters()
    assert json.loads((tmp_path / "run" / "pruned" / "config.json").read_text())["hidden_size"] == found["shape"]["hidden_size"] < 48


@pytest.mark.parametrize(
    ("field", "value"),
    [("rotate", "untied"), ("compensate", 4), ("steps", 3), ("cuts", 2), ("scores", "taylor"), ("slice_every", 1), ("keep_moments", False)],
)
def test_what_is_for_a_cut_is_refused(field: str, value: Any, good_source: Path, domains: dict[str, str], tmp_path: Path) -> None:
    values = values_of(good_source, domains)
    values["prune"][field] = value
    with pytest.raises(ConfigError) as refused:
        shearling.run(values, tmp_path / "run")
    (problem,) = refused.value.problems
    assert problem.field == f"prune.{field}" and "leave it out" in problem.remedy and not (tmp_path / "run").exists()
    values["target"] = None  # which leaves the source's shape, and nothing to cut either
    with pytest.raises(ConfigError, match="leave it out"):
        shearling.run(values, tmp_path / "run")


def test_no_score_and_no_sequence_is_asked_for(good_source: Path, domains: dict[str, str]) -> None:
    recipe = load_recipe(values_of(good_source, domains))
    choice = choose(recipe.prune, open_source(good_source).anatomy, recipe.target)
    assert not choice.scores and choice.sequences(recipe.prune) == 0
