"""What methods that train while they prune make of a number of tokens."""

from __future__ import annotations

from typing import Any

import pytest

from shearling.budget import compensated_on, settings
from shearling.budget import filled as filled_for

AS_COMPARED = {
    "sheared-llama": ("prune.steps=30",),
    "adapt-pruner": ("prune.steps=30", "prune.cuts=3", "prune.share=linear", "prune.gates.calibration_sequences=8"),
    "efficientllm": ("prune.steps=60", "prune.cuts=30"),
    "taylor": ("prune.steps=0",),
    "from-scratch": ("prune.steps=0",),
}


def filled(values: dict[str, Any], hidden: int = 576) -> dict[str, Any]:
    return filled_for(values, lambda: hidden)


def values(method: str, tokens: int, batch_tokens: int = 1024, sequence_length: int = 128) -> dict[str, str]:
    return dict(assignment.split("=") for assignment in settings(method, tokens, batch_tokens, sequence_length))


@pytest.mark.parametrize("method", AS_COMPARED)
def test_the_methods_as_they_were_first_compared(method: str) -> None:
    assert settings(method, 100_000, 1024, 128) == AS_COMPARED[method]
    assert compensated_on(100_000, 128) == 64


def test_they_grow_with_the_tokens_whatever_the_batch() -> None:
    for method in ("sheared-llama", "adapt-pruner", "efficientllm"):
        once, ten, larger = (values(method, *given) for given in ((100_000,), (1_000_000,), (1_000_000, 4096)))
        assert int(ten["prune.steps"]) == 10 * int(once["prune.steps"])
        assert int(larger["prune.steps"]) == pytest.approx(int(ten["prune.steps"]) / 4, abs=1)
    assert values("adapt-pruner", 1_000_000)["prune.cuts"] == "30" and values("efficientllm", 1_000_000)["prune.cuts"] == "300"


def test_what_is_enough_is_enough() -> None:
    much = 10**9
    assert values("sheared-llama", much)["prune.steps"] == "3200"
    assert values("adapt-pruner", much)["prune.cuts"] == "50" and values("efficientllm", much)["prune.cuts"] == "500"
    assert int(values("efficientllm", much)["prune.steps"]) == 600_000
    assert values("adapt-pruner", much)["prune.gates.calibration_sequences"] == "32" and compensated_on(much, 128) == 64


@pytest.mark.parametrize("tokens", [1, 300, 1024, 5000])
def test_few_tokens_still_make_a_recipe(tokens: int) -> None:
    """No more cuts than steps, and something to measure on; whether it is enough is for others to say."""
    for method in ("sheared-llama", "adapt-pruner", "efficientllm"):
        found = values(method, tokens)
        assert 1 <= int(found.get("prune.cuts", 1)) <= int(found["prune.steps"])
        assert int(found.get("prune.gates.calibration_sequences", 1)) >= 1
    assert compensated_on(tokens, 128) >= 4


def test_each_cut_that_compensates_has_text_to_do_so() -> None:
    """At most eight of them, with four sequences each or more."""
    given = {method: dict(text.split("=") for text in settings(method, 100_000, 1024, 128, compensated=True)) for method in AS_COMPARED}
    assert {method: found["prune.compensate"] for method, found in given.items()} == dict.fromkeys(AS_COMPARED, "64")
    assert given["efficientllm"]["prune.cuts"] == "8" and given["adapt-pruner"]["prune.cuts"] == "3" and "prune.cuts" not in given["taylor"]
    few = dict(text.split("=") for text in settings("adapt-pruner", 20_000, 128, 128, compensated=True))
    assert few["prune.cuts"] == "5" and few["prune.compensate"] == "20"


def test_long_sequences_are_fewer() -> None:
    assert compensated_on(100_000, 1024) == 8 and values("adapt-pruner", 100_000, 1024, 512)["prune.gates.calibration_sequences"] == "2"


def test_a_recipe_of_tokens_alone_is_filled_and_adds_up() -> None:
    """What pruning and recovery take together is what was given, less than a step short of it; more tokens make larger steps."""
    for tokens in (20_000, 100_000, 10**6, 10**8):
        found = filled({"tokens": tokens, "target": {"parameters": 0.5}, "data": {"sequence_length": 128}})
        prune, train = found["prune"], found["train"]
        spent = (prune["compensate"] + prune["gates"]["calibration_sequences"]) * 128
        step = train["batch_size"] * 128
        assert spent <= 0.15 * tokens and tokens - step < spent + train["steps"] * step <= tokens
        assert train["batch_size"] % train["microbatches"] == 0
        assert train["learning_rate"] == 6e-4
    assert prune["method"] == "llm-pruner-global" and train["batch_size"] == 256
    wide = filled({"tokens": 10**6, "target": {"parameters": 0.5}, "data": {}}, hidden=4096)
    assert wide["train"]["learning_rate"] == 8.4e-5  # near the paper's 1e-4
    assert filled({"tokens": 10**5, "target": {"hidden_size": 32}, "data": {}})["prune"]["method"] == "taylor"


def test_what_a_recipe_says_stays() -> None:
    given = {"prune": {"steps": 7, "batch_size": 2}, "train": {"learning_rate": 1.0, "distill": None, "batch_size": 4}}
    found = filled({"tokens": 100_000, "target": {"parameters": 0.5}, "data": {"sequence_length": 100}, **given})
    assert found["prune"] == given["prune"] and given["train"].items() <= found["train"].items()
    assert found["train"]["steps"] == (100_000 - (7 * 2 + 32) * 100) // 400
    alone = {"tokens": 100_000, "data": {"sequence_length": 100}, "train": {"steps": 3}}
    assert "prune" not in filled(alone) and filled(alone)["train"]["steps"] == 3
    assert "distill" not in filled(alone)["train"]  # a source has nothing to learn from itself


@pytest.mark.parametrize("values", [{}, {"tokens": "many"}, {"tokens": 5, "data": []}, {"tokens": 5, "data": {"sequence_length": "x"}}])
def test_what_cannot_be_filled_is_left_to_be_refused(values: dict[str, Any]) -> None:
    assert filled(values) == values
