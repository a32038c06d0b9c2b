"""Anatomies whose blocks differ: names, shapes and numbers are those of the real model, and a config by block is read or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import FAMILIES, tiny_config
from shearling.arch.families import PER_BLOCK, Anatomy, anatomy_of
from shearling.errors import ArtifactError
from shearling.modeling_sheared import ShearedConfig, ShearedForCausalLM

BLOCKS = [{"group": 3, "query": 2, "neuron": 40}, {"group": 1, "query": 2, "neuron": 8}, {"group": 2, "query": 1, "neuron": 24}]
LISTS = {"num_attention_heads": [6, 2, 2], "num_key_value_heads": [3, 1, 2], "intermediate_size": [40, 8, 24]}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama, both biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
}


def config_of(variant: str, tied: bool = False, **fields: Any) -> dict[str, Any]:
    """Plain values of a config by block, at a width that no number of heads divides."""
    family, more = VARIANTS[variant]
    common = {key: value for key, value in tiny_config(family, tied=tied).to_dict().items() if key != "model_type"}
    return {**common, "hidden_size": 50, **LISTS, **more, "base_model_type": family, "model_type": "sheared", **fields}


def anatomy_by_hand(variant: str, tied: bool = False) -> Anatomy:
    family, more = VARIANTS[variant]
    return anatomy_of(tiny_config(family, tied=tied).to_dict() | more).with_sizes(hidden=50).with_blocks(BLOCKS)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_shapes_and_numbers_are_those_of_the_model(variant: str, tied: bool) -> None:
    values = config_of(variant, tied)
    anatomy = anatomy_of(values)
    assert anatomy == anatomy_by_hand(variant, tied)
    with torch.device("meta"):
        model = ShearedForCausalLM(ShearedConfig(**values))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert anatomy.shapes() == shapes
    assert anatomy.parameters() == sum(parameter.numel() for parameter in model.parameters()) == sum(anatomy.parameters_by_part().values())
    for part, words in (("attention", "self_attn"), ("mlp", ".mlp."), ("embedding", "embed_tokens")):
        own = [parameter.numel() for name, parameter in model.named_parameters() if words in name and "_norm" not in name]
        assert anatomy.parameters_by_part()[part] == sum(own)


def test_sizes_of_a_block() -> None:
    anatomy = anatomy_by_hand("llama")
    assert anatomy.sizes["layer"] == 3 and [anatomy.sizes[axis] for axis in ("group", "query", "neuron")] == [3, 2, 40]  # the largest
    for layer, block in enumerate(BLOCKS):
        assert anatomy.sizes_in(layer) == {**anatomy.sizes, **block}
    assert anatomy.sizes_in(None) == anatomy.sizes
    alike = anatomy.with_blocks([BLOCKS[1]] * 5)
    assert alike.blocks == () and alike == anatomy.with_sizes(layer=5, **BLOCKS[1]) and alike.sizes_in(4) == alike.sizes
    # largest sizes that no one block has
    apart = anatomy.with_blocks([{"group": 3, "query": 1, "neuron": 8}, {"group": 1, "query": 2, "neuron": 9}])
    assert [apart.sizes[axis] for axis in ("layer", "group", "query", "neuron")] == [2, 3, 2, 9] and len(apart.blocks) == 2
    assert apart.with_sizes(hidden=10).blocks == ()


def test_the_block_of_a_tensor() -> None:
    anatomy = anatomy_by_hand("qwen2").with_blocks(BLOCKS * 4)
    numbers = {name: anatomy.layer_of(name) for name in anatomy.tensors()}
    assert numbers["model.layers.0.mlp.up_proj.weight"] == 0 and numbers["model.layers.11.self_attn.q_proj.bias"] == 11
    outside = {name for name, number in numbers.items() if number is None}
    assert outside == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_lists_that_are_all_alike_are_blocks_that_are_alike() -> None:
    lists = {field: [sizes[0]] * 3 for field, sizes in LISTS.items()}
    assert anatomy_of(config_of("llama", **lists)) == anatomy_of(tiny_config("llama").to_dict()).with_sizes(hidden=50)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"intermediate_size": 40}, ("intermediate_size", "list of 3")),
        ({"intermediate_size": [40, 8]}, ("intermediate_size", "[40, 8]")),
        ({"num_key_value_heads": [3, 0, 2]}, ("num_key_value_heads", "[3, 0, 2]", "positive")),
        ({"num_key_value_heads": [3, True, 2]}, ("num_key_value_heads", "positive")),
        ({"num_attention_heads": None, "intermediate_size": ["a"] * 3}, ("num_attention_heads", "intermediate_size")),
        ({"num_attention_heads": [6, 3, 3]}, ("block 2", "3 query heads on 2", "multiple")),
        ({"num_hidden_layers": 4}, tuple(PER_BLOCK)),
        ({"base_model_type": "gpt2"}, ("base_model_type", "'gpt2'", "llama, mistral, qwen2, qwen3")),
        ({"base_model_type": None}, ("base_model_type", "None")),
        ({"hidden_size": -1}, ("hidden_size", "-1")),
        ({"num_hidden_layers": 0, **{field: [] for field in PER_BLOCK}}, ("num_hidden_layers", "0")),
        ({"num_hidden_layers": None}, ("num_hidden_layers", "None", "num_attention_heads")),
    ],
)
def test_a_config_by_block_that_cannot_be_used(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ArtifactError) as refused:
        anatomy_of(config_of("llama") | change, "some/config.json")
    for word in ("some/config.json", *words):
        assert word in str(refused.value)
