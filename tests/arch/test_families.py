"""The tables against the models of transformers: names, shapes and numbers of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models import FAMILIES, tiny_config
from shearling.arch.families import FAMILIES as TABLES
from shearling.arch.families import anatomy_of
from shearling.errors import ArtifactError

SEVEN_B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama, biases of attention": ("llama", {"attention_bias": True}),
    "llama, biases of the MLP": ("llama", {"mlp_bias": True}),
    "llama, both biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
    "llama, heads wider than the stream": ("llama", {"head_dim": 16}),
    "mistral, one group": ("mistral", {"num_key_value_heads": 1}),
}


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_shapes_and_counts_are_those_of_transformers(variant: str, tied: bool) -> None:
    family, fields = VARIANTS[variant]
    config = tiny_config(family, tied=tied)
    for field, value in fields.items():
        setattr(config, field, value)
    model, anatomy = on_meta(config), anatomy_of(config.to_dict())
    assert anatomy.shapes() == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert anatomy.parameters() == sum(p.numel() for p in model.parameters())
    assert next(iter(anatomy.tensors())) == "model.embed_tokens.weight"


def test_every_table_is_tested() -> None:
    assert set(FAMILIES) == set(TABLES)


def test_the_flags_decide_which_tensors_exist() -> None:
    def names(family: str, **fields: Any) -> set[str]:
        return {name.removeprefix("model.layers.0.") for name in anatomy_of(tiny_config(family).to_dict() | fields).tensors()}

    assert {f"self_attn.{p}_proj.bias" for p in "qkvo"} <= names("llama", attention_bias=True) - names("llama")
    assert {f"mlp.{p}_proj.bias" for p in ("gate", "up", "down")} <= names("llama", mlp_bias=True) - names("llama")
    assert {f"self_attn.{p}_proj.bias" for p in "qkv"} <= names("qwen2") and "self_attn.o_proj.bias" not in names("qwen2")
    assert {"self_attn.q_norm.weight", "self_attn.k_norm.weight"} == {n for n in names("qwen3") - names("mistral") if "layers" not in n}
    assert "lm_head.weight" in names("qwen3") and "lm_head.weight" not in names("qwen3", tie_word_embeddings=True)


def test_the_papers_sizes() -> None:
    source = anatomy_of(SEVEN_B)
    assert source.parameters() == 6_738_415_616
    assert source.with_sizes(layer=24, hidden=2048, group=16, neuron=5504).parameters() == 1_345_423_360
    assert source.with_sizes(hidden=2560, group=20, neuron=6912).parameters() == 2_701_560_320
    assert source.with_sizes(layer=24, hidden=1024, group=8, neuron=2816).parameters() == 373_867_520
    assert sum(p.numel() for p in on_meta(AutoConfig.for_model(**SEVEN_B)).parameters()) == 6_738_415_616


def test_smollm2() -> None:
    source = anatomy_of(SMOLLM2_135M)
    assert source.sizes["head_dim"] == 64 and source.sizes["query"] == 3
    assert source.parameters() == 134_515_008
    assert source.with_sizes(layer=24, hidden=432, query=2, neuron=1024).parameters() == 65_049_264


def test_parts_sum_to_the_whole() -> None:
    for family in FAMILIES:
        anatomy = anatomy_of(tiny_config(family).to_dict())
        parts = anatomy.parameters_by_part()
        assert sum(parts.values()) == anatomy.parameters()
        assert parts["embedding"] == parts["lm_head"] == 96 * 48
        assert parts["mlp"] == 3 * 3 * 40 * 48
        assert parts["norms"] == 7 * 48 + (3 * 2 * 8 if family == "qwen3" else 0)
        assert anatomy_of(tiny_config(family, tied=True).to_dict()).parameters_by_part()["lm_head"] == 0


def test_what_a_config_leaves_out_is_filled_in() -> None:
    anatomy = anatomy_of(SEVEN_B)
    assert (anatomy.sizes["group"], anatomy.sizes["query"], anatomy.sizes["head_dim"]) == (32, 1, 128)
    assert anatomy_of({**SEVEN_B, "head_dim": None, "num_key_value_heads": None, "attention_bias": None}) == anatomy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ("model_type", "'gpt2'", "llama, mistral, qwen2, qwen3")),
        ({"model_type": None}, ("model_type", "None")),
        ({"hidden_size": None}, ("hidden_size", "None")),
        ({"intermediate_size": [11008] * 32}, ("intermediate_size", "differ by layer")),
        ({"num_key_value_heads": [32] * 32}, ("num_key_value_heads", "differ by layer")),
        ({"num_attention_heads": [32] * 32}, ("num_attention_heads", "differ by layer")),
        ({"num_hidden_layers": 0, "vocab_size": "32000"}, ("num_hidden_layers", "vocab_size", "'32000'")),
        ({"vocab_size": True}, ("vocab_size", "True")),
        ({"num_key_value_heads": 5}, ("32 query heads on 5", "multiple")),
        ({"head_dim": -1}, ("head_dim", "-1")),
    ],
)
def test_a_config_that_cannot_be_used(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ArtifactError) as refused:
        anatomy_of(SEVEN_B | change, "some/config.json")
    for word in ("some/config.json", *words):
        assert word in str(refused.value)


def test_every_problem_of_a_config_at_once() -> None:
    with pytest.raises(ArtifactError) as refused:
        anatomy_of({"model_type": "llama"})
    fields = {problem.field for problem in refused.value.problems}
    assert fields >= {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
