"""`examples/flat_loop.py`, the method written out in one function, and `shearling.run` give the same losses at every step."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import shearling
from models import save_tiny_source, tiny_model
from runs import metrics, recipe_values, write_text
from shearling.objectives.lm import in_training
from shearling.prune.config import GateConfig
from shearling.recipe import load_recipe
from shearling.train.step import train_step

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "flat_loop.py")
STEPS = {"prune": 12, "train": 10}
GATES = {
    "kind": "hard_concrete",
    "start": "scores",
    "start_low": 1.6,
    "calibration_sequences": 4,
    "constraint": "projected",
    "ramp": 0.5,
    "learning_rate": 0.8,
    "final_learning_rate": 0.1,
    "shared_second_moment": True,
    "noise": 0.0,
    "final_noise": 0.0,
    "temperature": 0.3,
    "final_temperature": 0.03,
}
"""All that the gates hang on, so that the test does not hang on defaults."""
EVERY_AXIS = {"num_hidden_layers": 2, "hidden_size": 36, "num_key_value_heads": 2, "num_attention_heads": 2, "intermediate_size": 24}
SOME_AXES = {"hidden_size": 40, "num_attention_heads": 3, "intermediate_size": 24}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"sizes": {"tied": True}, "target": EVERY_AXIS, "reference": {"a": 8.0, "b": 7.0}, "learning_rate": 1e-3},
    "qwen2": {"sizes": {"tied": False}, "target": SOME_AXES, "reference": {"a": 5.2, "b": 4.5}, "learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Does the run of a family's case, once; its directory, with the source beside it."""

    def run(family: str) -> Path:
        case, folder = CASES[family], tmp_path_factory.getbasetemp() / f"flat-{family}"
        if not folder.exists():
            folder.mkdir()
            save_tiny_source(folder / "source", family, **case["sizes"])
            text, rate = write_text(folder), case["learning_rate"]
            values = recipe_values(
                folder / "source",
                {"a": {"train": text["a"], "weight": 2.0}, "b": {"train": text["b"], "weight": 1.0}},
                target=case["target"],
                mixture={"update": "paper", "reference": case["reference"], "smoothing": 0.05, "step_size": 0.5},
                prune={
                    "steps": STEPS["prune"],
                    "microbatches": 4,
                    "learning_rate": rate,
                    "weight_decay": 0.1,
                    "warmup": 0.2,
                    "gates": GATES,
                },
                train={"steps": STEPS["train"], "learning_rate": rate, "microbatches": 2, "warmup": 0.1},
                evaluate={"speed": False, "batch_size": 3},
                runtime={"precision": "float32", "threads": 1},
            )
            shearling.run(values, folder / "run")
        return folder / "run"

    return run


@pytest.mark.parametrize("family", CASES)
def test_the_flat_loop_gives_the_losses_of_a_run(family: str, run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run, target, recipe = run_of(family), CASES[family]["target"], load_recipe(run_of(family) / "recipe.yaml")
    losses = runpy.run_path(EXAMPLE)["shear"](
        recipe.source,
        run / "data",
        target,
        **{section: recipe.model_dump()[section] for section in ("prune", "train", "mixture", "seed")},
        shares={name: domain.weight for name, domain in recipe.data.domains.items()},
        eval_batch=recipe.evaluate.batch_size,
        out=tmp_path,
    )
    lines = metrics(run)
    expected = [line["loss"] for line in lines if line["step"]]
    assert len(expected) == sum(STEPS.values())
    assert losses == pytest.approx(expected, rel=0, abs=1e-5)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tmp_path, run / "model")]
    flat, ours = (model.state_dict() for model in models)
    assert {field: getattr(models[0].config, field) for field in target} == target
    parameters = sum(parameter.numel() for parameter in models[0].parameters())
    assert parameters == json.loads((run / "report.json").read_text())["model"]["parameters"]
    assert flat.keys() == ours.keys()
    for name, weight in flat.items():
        torch.testing.assert_close(weight, ours[name], rtol=0, atol=1e-4, msg=name)
    for stage in STEPS:
        shares = [line["weights"]["a"] for line in lines if line["stage"] == stage and line["step"]]
        assert abs(shares[0] - shares[-1]) > 0.01, "this run does not try the mixture"


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_the_flat_loop_takes_gradients_to_the_same_bits(microbatches: int, clip: float) -> None:
    """In the order in which they are added, and in what clipping multiplies them by."""
    flat, model, twin = runpy.run_path(EXAMPLE), tiny_model("llama", layers=2), tiny_model("llama", layers=2)
    ids = torch.randint(0, 96, (12, 16), generator=torch.Generator().manual_seed(0))
    found: list[torch.Tensor] = []

    class Capture(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            found.extend(p.grad.clone() for p in model.parameters())

    options: dict[str, Any] = {"step": 1, "microbatches": microbatches, "clip": clip, "rate": 0.1}
    result = train_step(
        model, ids, np.zeros(12, np.int64), in_training(flat["token_losses"]), Capture(model.parameters(), lr=0.1), **options
    )
    loss = flat["take_gradients"](twin, [], ids, microbatches, clip)
    assert loss == pytest.approx(result.loss, rel=1e-7) and 0.5 < result.gradient_norm < 1e9
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(twin.parameters(), found, strict=True))


def test_the_command_does_a_run_again(
    run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [EXAMPLE, str(run_of("llama")), "--out", str(tmp_path / "model")])
    runpy.run_path(EXAMPLE, run_name="__main__")
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    lines = [line for line in metrics(run_of("llama")) if line["step"]]
    assert [(stage, int(step)) for stage, step, _ in printed] == [(line["stage"], line["step"]) for line in lines]
    assert [float(loss) for _, _, loss in printed] == pytest.approx([line["loss"] for line in lines], rel=0, abs=1e-5)
    assert (tmp_path / "model" / "config.json").exists()


def test_every_field_of_the_gates_is_given() -> None:
    """A field that is new in the recipe is new in the method: write it out in the flat loop."""
    assert GATES.keys() | {"multiplier_learning_rate"} == set(GateConfig.model_fields)
