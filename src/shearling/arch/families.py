"""The model families: each a table of its tensors by named axes, and the config fields that hold the sizes.

Nothing else in the house asks which family a model is of. A new decoder family is a table here.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shearling.arch.axes import PER_LAYER, count, dimensions
from shearling.errors import ArtifactError, Problem


@dataclass(frozen=True)
class TensorRow:
    """One row of a family's table. `name` is relative to the block for tensors of a block."""

    name: str
    pattern: str
    when: str | None = None
    """Config field that must be true for the tensor to exist; a leading "!" turns it round; None: always."""


@dataclass(frozen=True)
class Anchors:
    """Modules at which gates act, by name; those of a block are relative to it."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    block_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    final_norm: str = "model.norm"
    attention_output: str = "self_attn.o_proj"
    mlp_output: str = "mlp.down_proj"


@dataclass(frozen=True)
class Family:
    """One family of decoders."""

    model_type: str
    block: tuple[TensorRow, ...]
    outer: tuple[TensorRow, ...]
    hidden_divisible_by_heads: bool = False
    """Transformers refuses `hidden_size % num_attention_heads != 0` for this family, even where head_dim is given."""
    defaults: tuple[tuple[str, Any], ...] = ()
    """Values of the config fields that `when` asks for, where a config file leaves them out."""
    anchors: Anchors = Anchors()


SIZE_FIELDS = {
    "layer": "num_hidden_layers",
    "hidden": "hidden_size",
    "group": "num_key_value_heads",
    "neuron": "intermediate_size",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
}
"""Config field that holds each axis' size; `query` is num_attention_heads / num_key_value_heads."""

PER_LAYER_LISTS = ("layer_types", "no_rope_layers")
"""Config lists with one entry per layer, cut with the layers."""

LAYER_COUNTS = ("max_window_layers",)
"""Config fields that count the first layers of some kind, recounted over the kept layers."""

SHEARED = "sheared"
"""The `model_type` of a model whose blocks differ; `base_model_type` then names the family."""
PER_BLOCK = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Config fields that are lists in such a model."""

_Q, _KV = "(group query head_dim)", "(group head_dim)"


def _attention(bias: str | None, output_bias: str | None) -> tuple[TensorRow, ...]:
    rows = [
        TensorRow("self_attn.q_proj.weight", f"{_Q} hidden"),
        TensorRow("self_attn.k_proj.weight", f"{_KV} hidden"),
        TensorRow("self_attn.v_proj.weight", f"{_KV} hidden"),
        TensorRow("self_attn.o_proj.weight", f"hidden {_Q}"),
    ]
    if bias:
        rows += [TensorRow(f"self_attn.{p}_proj.bias", _Q if p == "q" else _KV, bias) for p in "qkv"]
    if output_bias:
        rows += [TensorRow("self_attn.o_proj.bias", "hidden", output_bias)]
    return tuple(rows)


_MLP = (
    TensorRow("mlp.gate_proj.weight", "neuron hidden"),
    TensorRow("mlp.up_proj.weight", "neuron hidden"),
    TensorRow("mlp.down_proj.weight", "hidden neuron"),
)
_NORMS = (TensorRow("input_layernorm.weight", "hidden"), TensorRow("post_attention_layernorm.weight", "hidden"))
_OUTER = (
    TensorRow("model.embed_tokens.weight", "vocab hidden"),
    TensorRow("model.norm.weight", "hidden"),
    TensorRow("lm_head.weight", "vocab hidden", "!tie_word_embeddings"),
)
_MLP_BIASES = (
    TensorRow("mlp.gate_proj.bias", "neuron", "mlp_bias"),
    TensorRow("mlp.up_proj.bias", "neuron", "mlp_bias"),
    TensorRow("mlp.down_proj.bias", "hidden", "mlp_bias"),
)
_QK_NORMS = (TensorRow("self_attn.q_norm.weight", "head_dim"), TensorRow("self_attn.k_norm.weight", "head_dim"))

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            (*_attention("attention_bias", "attention_bias"), *_MLP, *_MLP_BIASES, *_NORMS),
            _OUTER,
            hidden_divisible_by_heads=True,
            defaults=(("attention_bias", False), ("mlp_bias", False), ("tie_word_embeddings", False)),
        ),
        Family("mistral", (*_attention(None, None), *_MLP, *_NORMS), _OUTER, defaults=(("tie_word_embeddings", False),)),
        Family(
            "qwen2",
            (*_attention("qkv_bias", None), *_MLP, *_NORMS),
            _OUTER,
            defaults=(("qkv_bias", True), ("tie_word_embeddings", False)),
        ),
        Family(
            "qwen3",
            (*_attention("attention_bias", "attention_bias"), *_QK_NORMS, *_MLP, *_NORMS),
            _OUTER,
            defaults=(("attention_bias", False), ("tie_word_embeddings", False)),
        ),
    )
}


@dataclass(frozen=True)
class Anatomy:
    """A family at one size: everything that is known of a model before its weights are opened."""

    family: Family
    sizes: Mapping[str, int]
    """Size of every axis of `shearling.arch.axes.AXES`."""
    flags: Mapping[str, Any]
    """Values of the config fields that decide which tensors exist."""
    blocks: tuple[Mapping[str, int], ...] = ()
    """Sizes of the `PER_LAYER` axes of each block, where blocks differ; `sizes` then has the largest. Empty: all blocks are alike."""

    def rows(self, rows: tuple[TensorRow, ...]) -> Iterator[TensorRow]:
        """The rows of a table that exist in this model."""
        for row in rows:
            if row.when is None or bool(self.flags[row.when.lstrip("!")]) != row.when.startswith("!"):
                yield row

    def tensors(self) -> dict[str, str]:
        """Full tensor name -> pattern, in the order of the model, blocks numbered from 0."""
        outer = list(self.rows(self.family.outer))
        head = {row.name: row.pattern for row in outer[:1]}
        blocks = {
            f"{self.family.anchors.layers}.{layer}.{row.name}": row.pattern
            for layer in range(self.sizes["layer"])
            for row in self.rows(self.family.block)
        }
        return {**head, **blocks, **{row.name: row.pattern for row in outer[1:]}}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full tensor name -> shape."""
        return {name: dimensions(pattern, self.sizes_in(self.layer_of(name))) for name, pattern in self.tensors().items()}

    def layer_of(self, name: str) -> int | None:
        """Number of the block that a tensor is of, by its full name; None for one outside the blocks."""
        prefix = f"{self.family.anchors.layers}."
        return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None

    def moved(self, name: str, layers: Sequence[int]) -> tuple[str, int | None]:
        """Full name and block of a tensor once block i is block `layers[i]`; outside the blocks as it is, and None."""
        number = self.layer_of(name)
        if number is None:
            return name, None
        prefix = f"{self.family.anchors.layers}."
        return f"{prefix}{layers[number]}{name.removeprefix(f'{prefix}{number}')}", layers[number]

    def sizes_in(self, layer: int | None) -> Mapping[str, int]:
        """Size of every axis in a block (None: outside of them)."""
        return self.sizes if layer is None or not self.blocks else {**self.sizes, **self.blocks[layer]}

    def parameters(self) -> int:
        """Number of parameters; a tied matrix counts once."""
        return sum(self.parameters_by_part().values())

    def parameters_by_part(self) -> dict[str, int]:
        """Parameters of the parts `embedding`, `attention`, `mlp`, `norms` and `lm_head`."""
        parts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "lm_head"), 0)
        for name, pattern in self.tensors().items():
            parts[_part(name)] += count(pattern, self.sizes_in(self.layer_of(name)))
        return parts

    def with_sizes(self, **sizes: int) -> Anatomy:
        """The same family at other sizes, alike in all blocks."""
        return Anatomy(self.family, {**self.sizes, **sizes}, self.flags)

    def with_blocks(self, blocks: Sequence[Mapping[str, int]]) -> Anatomy:
        """The same with these blocks, each given by the sizes of its `PER_LAYER` axes."""
        largest = {axis: max(block[axis] for block in blocks) for axis in PER_LAYER}
        alike = all(dict(block) == largest for block in blocks)
        return Anatomy(self.family, {**self.sizes, **largest, "layer": len(blocks)}, self.flags, () if alike else tuple(blocks))


def _part(name: str) -> str:
    if "embed_tokens" in name:
        return "embedding"
    if name.startswith("lm_head"):
        return "lm_head"
    if "norm" in name:
        return "norms"
    return "attention" if ".self_attn." in name else "mlp"


def anatomy_of(config: Mapping[str, Any], where: str = "config.json") -> Anatomy:
    """Read the anatomy off a Hugging Face config as plain values; raise `ArtifactError` that names what is wrong."""
    model_type = config.get("model_type")
    differing = model_type == SHEARED
    family = FAMILIES.get(str(config.get("base_model_type") if differing else model_type))
    if family is None:
        remedy = f"Shearling knows {', '.join(sorted(FAMILIES))}; a family is a table in shearling/arch/families.py."
        field = "base_model_type" if differing else "model_type"
        raise ArtifactError(f"{where}: this family of models is not known", [Problem(field, repr(config.get(field)), remedy)])
    if differing:
        return _of_blocks(config, family, where)
    heads = config.get("num_attention_heads")
    filled = {**dict(family.defaults), **{key: value for key, value in config.items() if value is not None}}
    filled.setdefault("num_key_value_heads", heads)
    if "head_dim" not in filled and _is_size(heads) and _is_size(config.get("hidden_size")):
        filled["head_dim"] = config["hidden_size"] // heads
    fields = [*SIZE_FIELDS.values(), "num_attention_heads"]
    problems = [
        Problem(field, reprlib.repr(filled.get(field)), "It must be a positive whole number; sizes that differ by layer are not supported.")
        for field in fields
        if not _is_size(filled.get(field))
    ]
    if not problems and filled["num_attention_heads"] % filled["num_key_value_heads"]:
        found = f"{filled['num_attention_heads']} query heads on {filled['num_key_value_heads']} key/value heads"
        problems.append(Problem("num_attention_heads", found, "Query heads must be a multiple of key/value heads."))
    if problems:
        raise ArtifactError(f"{where}: not a usable config", problems)
    sizes = {axis: int(filled[field]) for axis, field in SIZE_FIELDS.items()}
    sizes["query"] = filled["num_attention_heads"] // filled["num_key_value_heads"]
    return Anatomy(family, sizes, {field: filled[field] for field, _ in family.defaults})


def _of_blocks(config: Mapping[str, Any], family: Family, where: str) -> Anatomy:
    """The anatomy of a model whose blocks differ, by the lists of its config (`shearling.modeling_sheared.ShearedConfig`)."""
    layers = config.get("num_hidden_layers")
    problems = [] if _is_size(layers) else [Problem("num_hidden_layers", reprlib.repr(layers), "It must be a positive whole number.")]
    for field in PER_BLOCK:
        found = config.get(field)
        if not (isinstance(found, list) and len(found) == layers and all(map(_is_size, found))):
            problems.append(Problem(field, reprlib.repr(found), f"It must be a list of {layers} positive whole numbers, one a block."))
    if problems:
        raise ArtifactError(f"{where}: not a usable config", problems)
    blocks = []
    for number, (heads, groups, neurons) in enumerate(zip(*(config[field] for field in PER_BLOCK), strict=True)):
        alike = {**config, **dict(zip(PER_BLOCK, (heads, groups, neurons), strict=True)), "model_type": family.model_type}
        sizes = anatomy_of(alike, f"{where}, block {number}")
        blocks.append({axis: sizes.sizes[axis] for axis in PER_LAYER})
    return sizes.with_blocks(blocks)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
