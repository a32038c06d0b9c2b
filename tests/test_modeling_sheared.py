"""Models whose layers differ: the stock model where they do not, like any other model to transformers, with Shearling and without."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from models import FAMILIES, save_tiny_source, tiny_config, tiny_tokenizer
from shearling import modeling_sheared
from shearling.modeling_sheared import AUTO_MAP, BASES, PER_LAYER, ShearedConfig, ShearedForCausalLM

SIZES: dict[str, list[int]] = {"num_attention_heads": [6, 2, 4], "num_key_value_heads": [3, 1, 4], "intermediate_size": [40, 8, 24]}
"""Heads that do not divide hidden_size = 50, other groups and other query heads a group in each layer."""
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 8.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    **{f"{family} tied": (family, {"tie_word_embeddings": True}) for family in FAMILIES},
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "mistral window": ("mistral", {"sliding_window": 5}),
    "qwen2 window": ("qwen2", WINDOW),
    "qwen3 window": ("qwen3", WINDOW),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "mistral longrope": ("mistral", {"rope_parameters": LONG | {"original_max_position_embeddings": 16}}),
}
IDS = torch.randint(2, 96, (2, 11), generator=torch.Generator().manual_seed(1))


def sheared_config(family: str, **fields: Any) -> ShearedConfig:
    """A tiny config; `fields` over three layers of `SIZES`."""
    common = {"num_hidden_layers": 3, "hidden_size": 50, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 128}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    return ShearedConfig(family, **copy.deepcopy({**common, **tokens, **SIZES, **fields}))


def randomized(model: Any, seed: int = 0) -> Any:
    """The model with every weight and bias drawn anew, none of them zero or one; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 and "embed" not in name else 0.5
            parameter.copy_(1 + 0.2 * noise if "norm" in name else scale * noise)
    return model.eval()


def sheared_model(name: str, **fields: Any) -> Any:
    """A tiny model of one of `VARIANTS`."""
    family, more = VARIANTS[name]
    return randomized(ShearedForCausalLM(sheared_config(family, **more, **fields)))


def greedy(model: Any, ids_BT: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(ids_BT, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0, **options)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_layer_has_its_own_sizes(name: str) -> None:
    model = sheared_model(name)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for layer, (heads, groups, neurons) in enumerate(zip(*SIZES.values(), strict=True)):
        assert shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] == (heads * 8, 50)
        assert shapes[f"model.layers.{layer}.self_attn.v_proj.weight"] == (groups * 8, 50)
        assert shapes[f"model.layers.{layer}.self_attn.o_proj.weight"] == (50, heads * 8)
        assert shapes[f"model.layers.{layer}.mlp.up_proj.weight"] == (neurons, 50)
        assert shapes[f"model.layers.{layer}.mlp.down_proj.weight"] == (50, neurons)
    assert shapes["model.embed_tokens.weight"] == (96, 50)
    assert ("lm_head.weight" in shapes) != model.config.tie_word_embeddings


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_that_are_alike_are_the_stock_model_bit_by_bit(name: str, attention: str) -> None:
    family, more = VARIANTS[name]
    alike = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 40}
    config = sheared_config(family, **more, hidden_size=48, **{field: [size] * 3 for field, size in alike.items()})
    sheared = randomized(AutoModelForCausalLM.from_config(config, attn_implementation=attention))
    fields = {key: value for key, value in sheared.config.to_dict().items() if key not in ("base_model_type", "model_type")}
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields | alike), attn_implementation=attention)
    assert stock.state_dict().keys() == sheared.state_dict().keys()
    stock.load_state_dict(sheared.state_dict())
    ids = IDS.repeat(1, 2)
    with torch.no_grad():
        a, b = (model(ids, labels=ids, output_hidden_states=True) for model in (sheared, stock.eval()))
    assert torch.equal(a.logits, b.logits) and torch.equal(a.loss, b.loss)
    assert len(a.hidden_states) == len(b.hidden_states) == 4
    assert torch.equal(greedy(sheared, IDS), greedy(stock, IDS))


@pytest.mark.parametrize("name", [name for name in VARIANTS if "longrope" not in name])  # there the stock one differs, too: it rescales
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generating_with_a_cache_is_generating_without(name: str, attention: str) -> None:
    model = sheared_model(name)
    model.set_attn_implementation(attention)
    expected = greedy(model, IDS, use_cache=False)
    cached = greedy(model, IDS, return_dict_in_generate=True)
    assert expected.shape == (2, 27) and torch.equal(cached.sequences, expected)
    assert [layer.keys.shape[1] for layer in cached.past_key_values.layers] == SIZES["num_key_value_heads"]
    assert torch.equal(greedy(model, IDS, cache_implementation="static", disable_compile=True), expected)
    cache, found = None, []  # and by the logits, of words that do not repeat themselves as generated ones do
    with torch.no_grad():
        for ids in (IDS[:, :6], *IDS[:, 6:].split(1, 1)):
            step = model(ids, past_key_values=cache)
            cache, found = step.past_key_values, [*found, step.logits]
        torch.testing.assert_close(torch.cat(found, 1), model(IDS, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_padding_on_the_left_changes_nothing() -> None:
    model = sheared_model("qwen2 window")
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1]], 1)
    mask = (torch.arange(14) >= 3).long()[None]
    assert torch.equal(greedy(model, padded, attention_mask=mask)[:, 14:], greedy(model, IDS[:1])[:, 11:])


def test_what_is_set_on_the_config_holds_in_every_layer() -> None:
    model = sheared_model("llama")
    assert model(IDS).past_key_values is not None
    model.config.use_cache = False
    assert model(IDS).past_key_values is None
    model.set_attn_implementation("eager")
    assert [weights.shape for weights in model(IDS, output_attentions=True).attentions] == [(2, heads, 11, 11) for heads in (6, 2, 4)]
    assert all(module.config is model.config for module in (model.model, *(layer.self_attn for layer in model.model.layers)))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = sheared_model(name).to(dtype)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["auto_map"] == AUTO_MAP and values["model_type"] == "sheared" and {f: values[f] for f in PER_LAYER} == SIZES
    assert (tmp_path / "modeling_sheared.py").read_text() == Path(modeling_sheared.__file__).read_text()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert type(loaded) is ShearedForCausalLM and type(loaded.config) is ShearedConfig and not any(info.values())
    differ = {key for key, value in loaded.config.to_dict().items() if value != model.config.to_dict().get(key)}
    assert differ <= {"_name_or_path", "dtype"} and loaded.config.dtype == loaded.dtype == dtype
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
    rotary = (ShearedForCausalLM(model.config).model.rotary_emb, loaded.model.rotary_emb)
    assert torch.equal(rotary[0].inv_freq, rotary[1].inv_freq) and rotary[1].inv_freq.dtype == torch.float32
    if dtype == torch.float32:  # `.to` rounds the rotary frequencies of a model in memory, too, which loading does not
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_what_is_built_on_the_meta_device_takes_no_memory() -> None:
    with torch.device("meta"):
        model = ShearedForCausalLM(sheared_config("llama", hidden_size=2**14, intermediate_size=[2**20] * 3))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_tokenizer_beside_it_loads(tmp_path: Path) -> None:
    sheared_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("w3 w4").input_ids == [3, 4]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = sheared_model(name).train()
    expected = gradients(model)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in expected.values())
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()  # its name before 5.23
    runs = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: runs.append(1))
    found = gradients(model)
    assert len(runs) == 2 and all(torch.equal(found[key], gradient) for key, gradient in expected.items())


@pytest.mark.parametrize("name", ["mistral", "qwen3 tied"])
def test_it_learns(name: str) -> None:
    model = sheared_model(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(model(IDS, labels=IDS).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown family": ({"base_model_type": "gpt2"}, "base_model_type: found 'gpt2'"),
    "short list": ({"intermediate_size": [40, 8]}, "intermediate_size: found 2 sizes. There are 3 layers"),
    "one number": ({"num_attention_heads": 6}, "num_attention_heads: found 6. It must be a list of 3 sizes"),
    "left out": ({"num_key_value_heads": None}, "num_key_value_heads: found None. It must be a list"),
    "zero": ({"intermediate_size": [40, 0, 8]}, r"intermediate_size\[1\]: found 0. It must be a positive"),
    "true": ({"num_key_value_heads": [3, 1, True]}, r"num_key_value_heads\[2\]: found True"),
    "fraction": ({"num_attention_heads": [6, 2, 4.0]}, r"num_attention_heads\[2\]: found 4.0"),
    "no multiple": ({"num_attention_heads": [6, 2, 5]}, r"num_attention_heads\[2\]: found 5 query heads on 4 key/value heads"),
    "no head_dim": ({"head_dim": None}, "head_dim: found None. It must be given"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_sizes_are_refused_by_field_and_layer(name: str, family: str) -> None:
    change, message = WRONG[name]
    fields = {**sheared_config(family).to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        ShearedConfig.from_dict(fields)


def test_all_that_is_wrong_is_told_at_once_and_again_when_built_or_saved(tmp_path: Path) -> None:
    config = sheared_config("llama")
    config.num_attention_heads, config.intermediate_size = [6, 0, 4], [1]
    for use in (config.validate, lambda: ShearedForCausalLM(config)):
        with pytest.raises(ValueError, match=r"(?s)num_attention_heads\[1\].*intermediate_size: found 1 sizes"):
            use()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_sizes_it_is_the_stock_default(family: str) -> None:
    stock, config = AutoConfig.for_model(family).to_dict(), ShearedConfig(family).to_dict()
    assert all(config[field] == [stock[field]] * stock["num_hidden_layers"] for field in PER_LAYER)
    ours = {*PER_LAYER, "head_dim", "model_type"}
    assert {key: config[key] for key in stock if key not in ours} == {key: stock[key] for key in stock if key not in ours}
    assert set(BASES) == set(FAMILIES)


def test_configs_are_equal_where_all_their_fields_are() -> None:
    config = sheared_config("llama")
    assert config == sheared_config("llama") == copy.deepcopy(config)
    others = ({"intermediate_size": [40, 8, 25]}, {"rms_norm_eps": 1e-5}, {"head_dim": 6})
    assert all(config != sheared_config("llama", **other) for other in others) and config != sheared_config("mistral")


def run_apart(code: str, cwd: Path, **environment: str) -> str:
    """What a fresh interpreter prints; it has no PYTHONPATH."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env={**variables, "HF_HUB_OFFLINE": "1", **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


NOTHING_YET = """import sys, shearling
assert not {'torch', 'transformers'} & set(sys.modules)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained('stock'), AutoConfig.from_pretrained('stock')
assert 'transformers.modeling_utils' not in sys.modules  # it takes a second
assert type(AutoModelForCausalLM.from_pretrained('stock')).__name__ == 'LlamaForCausalLM'
assert 'shearling.modeling_sheared' not in sys.modules"""
ORDERS = {
    "ours first": NOTHING_YET,
    "transformers first": "from transformers import AutoConfig, AutoModelForCausalLM\nimport shearling",
    "our class alone": "from shearling.modeling_sheared import ShearedConfig\nfrom transformers import AutoConfig, AutoModelForCausalLM",
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_shearling_makes_the_model_known(order: str, tmp_path: Path) -> None:
    """In any order, and at no cost to whoever loads other models."""
    sheared_model("qwen2").save_pretrained(tmp_path / "model")
    os.remove(tmp_path / "model" / "modeling_sheared.py")
    save_tiny_source(tmp_path / "stock", "llama")
    code = f"""{ORDERS[order]}
config = AutoConfig.from_pretrained('model')
model = AutoModelForCausalLM.from_pretrained('model')
again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict()))
assert type(model) is type(again) and type(config) is type(model.config), (type(model), type(again))
print(type(model).__module__, config.num_attention_heads)"""
    assert run_apart(code, tmp_path) == f"shearling.modeling_sheared {SIZES['num_attention_heads']}"


def test_a_copy_of_the_file_loads_it_where_shearling_is_not_installed(tmp_path: Path) -> None:
    """With trust_remote_code, and only then; what is saved there has the copy beside it again."""
    model = sheared_model("mistral window")
    model.save_pretrained(tmp_path / "model")
    code = """import sys
sys.modules['shearling'] = None  # an import of it raises ImportError
import torch
from transformers import AutoConfig, AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained('model', trust_remote_code=False)
    sys.exit('loaded without trust')
except ValueError as error:
    assert 'trust_remote_code' in str(error), error
model = AutoModelForCausalLM.from_pretrained('model', trust_remote_code=True)
assert type(model).__module__.startswith('transformers_modules.') and type(model).__name__ == 'ShearedForCausalLM'
ids = torch.load('ids.pt')
assert torch.equal(model(ids).logits, torch.load('logits.pt'))
assert torch.equal(model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0), torch.load('tokens.pt'))
model.save_pretrained('again')
again = AutoModelForCausalLM.from_pretrained('again', trust_remote_code=True)
assert torch.equal(again(ids).logits, model(ids).logits)
print(type(AutoConfig.from_pretrained('again', trust_remote_code=True)).__name__, *[name for name in sys.modules if 'shearling' in name])"""
    for name, tensor in (("ids", IDS), ("logits", model(IDS).logits.detach()), ("tokens", greedy(model, IDS))):
        torch.save(tensor, tmp_path / f"{name}.pt")
    home = str(tmp_path / "home")
    assert run_apart(code, tmp_path, HF_HOME=home, HF_MODULES_CACHE=f"{home}/modules", OMP_NUM_THREADS="1") == "ShearedConfig shearling"
    assert (tmp_path / "again" / "modeling_sheared.py").read_text() == Path(modeling_sheared.__file__).read_text()


def test_a_copy_beside_it_is_not_run_where_shearling_is(tmp_path: Path) -> None:
    sheared_model("llama").save_pretrained(tmp_path)
    (tmp_path / "modeling_sheared.py").write_text("raise RuntimeError('the copy was run')")
    for trust in (None, False, True):
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)) is ShearedForCausalLM


def test_the_stock_config_of_a_layer_is_what_the_stock_class_says() -> None:
    config = sheared_config("qwen3", hidden_size=48)
    expected = tiny_config("qwen3", heads=2, groups=1, neurons=8, layers=3).to_dict()
    found = config.layer_config(1).to_dict()
    assert {key: found[key] for key in expected} == expected
