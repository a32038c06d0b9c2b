"""Zero-padding: the stock model of the padded tensors computes what the model with differing layers does, and nothing but zeros is new."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import FAMILIES, tiny_config
from shearling.arch.axes import PER_LAYER, kept_positions, parse_pattern, slice_tensor
from shearling.arch.families import Anatomy, anatomy_of
from shearling.errors import ShapeError
from shearling.io.tensors import MemoryReader
from shearling.modeling_sheared import ShearedForCausalLM
from shearling.prune.pad import LARGEST, pad_tensor, pad_to_uniform, padded_config, padding_cost, uniform_anatomy
from shearling.prune.verify import compare_logits, logits_of
from test_masked_equals_cut import model_of, wholly_double
from test_modeling_sheared import IDS, VARIANTS, greedy, randomized, sheared_config

Blocks = list[tuple[int, int, int]]
"""Groups, query heads a group and neurons of each layer."""
BLOCKS: Blocks = [(3, 2, 40), (1, 2, 8), (2, 1, 24)]


def anatomy_with(family: str, blocks: Blocks, hidden: int = 48, **fields: Any) -> Anatomy:
    config = {**tiny_config(family, layers=len(blocks)).to_dict(), **fields, "hidden_size": hidden}
    return anatomy_of(config).with_blocks([dict(zip(PER_LAYER, block, strict=True)) for block in blocks])


def model_with(family: str, blocks: Blocks, hidden: int = 48, seed: int = 0, **fields: Any) -> Any:
    """A model of these blocks in fp64, with norms in fp64 and no weight zero."""
    lists = {
        "num_attention_heads": [group * query for group, query, _ in blocks],
        "num_key_value_heads": [group for group, _, _ in blocks],
        "intermediate_size": [neuron for _, _, neuron in blocks],
    }
    config = sheared_config(family, **{"num_hidden_layers": len(blocks), "hidden_size": hidden, **lists, **fields})
    return wholly_double(randomized(ShearedForCausalLM(config), seed).double())


def padded_model(model: Any, anatomy: Anatomy) -> tuple[Any, Anatomy]:
    """The stock model of the padded tensors, and its anatomy."""
    uniform, tensors = pad_to_uniform(anatomy, MemoryReader(model.state_dict()))
    state = dict(tensors)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == uniform.shapes()
    stock = wholly_double(model_of(state, padded_config(model.config.to_dict(), uniform), torch.float64))
    assert type(stock).__module__.startswith("transformers.")
    return stock, uniform


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_padded_stock_model_is_the_same_function(name: str, attention: str) -> None:
    family, fields = VARIANTS[name]
    model = model_with(family, BLOCKS, **fields)
    stock, uniform = padded_model(model, anatomy_with(family, BLOCKS, **fields))
    assert not uniform.blocks and [uniform.sizes[axis] for axis in PER_LAYER] == [3, 2, 40]
    for each in (model, stock):
        each.set_attn_implementation(attention)
    assert compare_logits(stock, logits_of(model, IDS), IDS).relative_difference <= 1e-10
    assert torch.equal(greedy(stock, IDS), greedy(model, IDS))


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    tied=st.booleans(),
    blocks=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 40)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_any_blocks(family: str, tied: bool, blocks: Blocks, seed: int) -> None:
    """Llama's, too, where heads are added until they divide hidden_size."""
    model = model_with(family, blocks, seed=seed, tie_word_embeddings=tied)
    stock, uniform = padded_model(model, anatomy_with(family, blocks, tie_word_embeddings=tied))
    assert all(uniform.sizes[axis] >= max(block[i] for block in blocks) for i, axis in enumerate(PER_LAYER))
    assert compare_logits(stock, logits_of(model, IDS), IDS).relative_difference <= 1e-10


@pytest.mark.parametrize("name", ["qwen2", "llama biases", "qwen3 biases"])
def test_what_is_new_is_zero_and_what_was_there_is_where_it_was(name: str) -> None:
    family, fields = VARIANTS[name]
    model, anatomy = model_with(family, BLOCKS, **fields), anatomy_with(family, BLOCKS, **fields)
    uniform, tensors = pad_to_uniform(anatomy, MemoryReader(model.state_dict()))
    before, seen = model.state_dict(), []
    for tensor_name, tensor in tensors:
        seen.append(tensor_name)
        pattern, sizes = uniform.tensors()[tensor_name], anatomy.sizes_in(anatomy.layer_of(tensor_name))
        keep = {"group": range(sizes["group"]), "query": [range(sizes["query"])] * sizes["group"], "neuron": range(sizes["neuron"])}
        assert torch.equal(slice_tensor(tensor, pattern, uniform.sizes, keep), before[tensor_name])
        assert tensor.count_nonzero() == before[tensor_name].numel() == before[tensor_name].count_nonzero()
        assert tensor.is_contiguous() and tensor.data_ptr() != before[tensor_name].data_ptr() and tensor.dtype == torch.float64
    assert seen == list(anatomy.tensors())


def test_query_heads_are_added_inside_each_group() -> None:
    """Two groups of one query head in two of three: group 0 has heads 0 to 2, so its own stands at 0, and that of group 1 at 3."""
    heads = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # (group query head_dim) hidden, of head_dim 1
    sizes = {"hidden": 2, "group": 2, "query": 1, "head_dim": 1, "neuron": 1}
    padded = pad_tensor(heads, "(group query head_dim) hidden", sizes, {**sizes, "query": 3})
    assert padded.tolist() == [[1, 2], [0, 0], [0, 0], [3, 4], [0, 0], [0, 0]]
    assert pad_tensor(heads.T, "hidden (group query head_dim)", sizes, {**sizes, "query": 2, "group": 3}).tolist() == [
        [1, 0, 3, 0, 0, 0],
        [2, 0, 4, 0, 0, 0],
    ]
    with pytest.raises(ValueError, match="does not have pattern"):
        pad_tensor(heads[:1], "(group query head_dim) hidden", sizes, {**sizes, "query": 3})


def test_what_is_alike_already_is_copied() -> None:
    model, anatomy = model_with("qwen3", [(3, 2, 40)] * 2), anatomy_with("qwen3", [(3, 2, 40)] * 2)
    uniform, tensors = pad_to_uniform(anatomy, MemoryReader(model.state_dict()))
    assert not anatomy.blocks and uniform == anatomy and padding_cost(anatomy)["ratio"] == 1
    for name, tensor in tensors:
        assert torch.equal(tensor, model.state_dict()[name]) and tensor.data_ptr() != model.state_dict()[name].data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cost_is_counted(family: str) -> None:
    model, anatomy = model_with(family, BLOCKS), anatomy_with(family, BLOCKS)
    stock, _ = padded_model(model, anatomy)
    before, after = (sum(parameter.numel() for parameter in each.parameters()) for each in (model, stock))
    assert padding_cost(anatomy) == {"before": before, "after": after, "ratio": after / before}
    assert after > 1.3 * before


@pytest.mark.parametrize(
    ("hidden", "blocks", "expected"),
    [
        (48, [(3, 1, 8), (1, 2, 8)], (3, 2)),  # 6 heads divide 48
        (48, [(5, 1, 8), (1, 1, 9)], (6, 1)),  # 5 do not, 6 do
        (50, [(3, 1, 8), (1, 2, 8)], (5, 2)),  # not 6, but 10, as 5 times 2: as 3 or 4 times something it cannot be
        (64, [(2, 3, 8)], (2, 4)),  # alike in all layers, and yet no stock Llama
    ],
)
def test_where_the_heads_must_divide_hidden_size(hidden: int, blocks: Blocks, expected: tuple[int, int]) -> None:
    uniform = uniform_anatomy(anatomy_with("llama", blocks, hidden))
    assert (uniform.sizes["group"], uniform.sizes["query"]) == expected
    others = [uniform_anatomy(anatomy_with(family, blocks, hidden)).sizes for family in ("mistral", "qwen2", "qwen3")]
    asked = tuple(max(block[i] for block in blocks) for i in (0, 1))
    assert all((sizes["group"], sizes["query"]) == asked for sizes in others)


@settings(max_examples=40, deadline=None)
@given(
    hidden=st.integers(1, 64),
    blocks=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=3),
)
def test_it_is_the_cheapest_that_transformers_takes_or_refused(hidden: int, blocks: Blocks) -> None:
    anatomy = anatomy_with("llama", blocks, hidden)
    group, query = (max(block[i] for block in blocks) for i in (0, 1))
    most = LARGEST * group * query
    fitting = [
        2 * g * q + 2 * g  # heads of q and o, and of k and v
        for heads in range(1, most + 1)
        for g in range(group, heads + 1)
        if heads % g == 0 and (q := heads // g) >= query and hidden % heads == 0
    ]
    try:
        sizes = uniform_anatomy(anatomy).sizes
    except ShapeError as error:
        assert not fitting and error.problems[0].field == "num_attention_heads" and str(hidden) in str(error)
        with pytest.raises(ShapeError):
            pad_to_uniform(anatomy, MemoryReader({}))
    else:
        assert 2 * sizes["group"] * sizes["query"] + 2 * sizes["group"] == min(fitting)
        config = tiny_config("llama", hidden=hidden, heads=sizes["group"] * sizes["query"], groups=sizes["group"])
        assert math.gcd(config.hidden_size, config.num_attention_heads) == config.num_attention_heads


def test_padding_is_at_positions_that_slicing_knows() -> None:
    """The pattern alone says where: also of an axis that lies inside another, as no family has it yet."""
    sizes, wider = {"neuron": 2, "hidden": 3, "group": 1, "query": 1}, {"neuron": 4, "hidden": 3, "group": 1, "query": 1}
    tensor = torch.arange(1.0, 7.0)
    padded = pad_tensor(tensor, "(hidden neuron)", sizes, wider)
    positions = kept_positions(parse_pattern("(hidden neuron)")[0], wider, {"neuron": range(2)})
    assert positions == [0, 1, 4, 5, 8, 9] and padded.nonzero().flatten().tolist() == positions and torch.equal(padded[positions], tensor)
