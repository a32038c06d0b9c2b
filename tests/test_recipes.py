"""Every recipe of the repository is valid and feasible, and the large ones go through on tensors that hold no numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import shearling
from shearling.arch.families import anatomy_of
from shearling.io.tensors import MemoryReader
from shearling.prune.attach import Attachment
from shearling.prune.gates import Gates, gate_specs
from shearling.prune.plan import plan_from_masks
from shearling.prune.transform import transform
from shearling.recipe import load_recipe
from shearling.shapes import Target, target_anatomy

RECIPES = Path(__file__).parents[1] / "recipes"
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
EXPECTED: dict[str, tuple[dict[str, Any], int, int]] = {
    "quickstart": (SMOLLM2, 134_515_008, 65_049_264),
    "smollm2-65m": (SMOLLM2, 134_515_008, 65_049_264),
    "llama2-7b-to-1.3b": (LLAMA2_7B, 6_738_415_616, 1_345_423_360),
    "llama2-7b-to-2.7b": (LLAMA2_7B, 6_738_415_616, 2_701_560_320),
}


def test_every_recipe_is_expected_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_plan_of_a_recipe(name: str, tmp_path: Path) -> None:
    config, source, target = EXPECTED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = shearling.plan(tmp_path, recipe=RECIPES / f"{name}.yaml")
    assert (found["feasible"], found["source"]["parameters"], found["target"]["parameters"]) == (True, source, target)


@pytest.mark.parametrize("name", ["llama2-7b-to-1.3b", "llama2-7b-to-2.7b"])
def test_the_papers_settings(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    length = recipe.data.sequence_length
    assert recipe.prune.steps * recipe.prune.batch_size * length == 419_430_400
    assert recipe.train.steps * recipe.train.batch_size * length == 50_331_648_000
    for stage in (recipe.prune, recipe.train):
        assert (stage.learning_rate, stage.final_learning_rate, stage.clip, stage.weight_decay) == (1e-4, 0.1, 1.0, 0.0)
        assert stage.betas == (0.9, 0.95)
    assert (recipe.prune.warmup, recipe.train.warmup) == (0.1, 0.03)
    assert (recipe.prune.evaluate_every, recipe.train.evaluate_every) == (50, 400)
    gates = recipe.prune.gates
    assert (gates.start, gates.constraint, gates.ramp, gates.learning_rate, gates.noise) == ("constant", "lagrangian", 0.2, 1.0, 1.0)
    assert recipe.mixture.reference["wiki"] in (1.7590, 1.6297)


@pytest.mark.parametrize("name", ["llama2-7b-to-1.3b", "llama2-7b-to-2.7b"])
def test_a_dry_run_without_numbers(name: str) -> None:
    """Gated forward and backward pass of the 7B source, and its cut, on the meta device: every shape fits every other."""
    source = anatomy_of(LLAMA2_7B)
    target = target_anatomy(source, load_recipe(RECIPES / f"{name}.yaml").target or Target())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA2_7B))
    gates = Gates(gate_specs(source, target))
    masks = gates.hardened()
    with Attachment(model, source) as attachment:
        attachment.set({axis: mask.to("meta").requires_grad_() for axis, mask in masks.items()})
        logits = model(input_ids=torch.zeros(1, 8, dtype=torch.long, device="meta")).logits
        logits.sum().backward()
    assert logits.shape == (1, 8, 32000)
    plan = plan_from_masks(source, target, masks)
    cut = dict(transform(plan, source, target, MemoryReader(dict(model.named_parameters()))))
    assert {tensor_name: tuple(tensor.shape) for tensor_name, tensor in cut.items()} == target.shapes()
