"""A Llama, Mistral, Qwen2 or Qwen3 whose layers differ in heads and neurons: transformers' own code, built layer by layer.

The file imports nothing but torch and transformers: a copy of it lies beside a checkpoint, and loads it with `trust_remote_code=True`
where Shearling is not installed. Every layer is the stock decoder layer, made from the stock config with that layer's sizes. What
they share is stock as well: embedding, rotary embedding, final norm, masks, cache, loss. The names of the weights are the stock ones.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

BASES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""The families: model_type -> how transformers' class names begin."""
PER_LAYER = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Config fields that hold one size for each layer."""
AUTO_MAP = {"AutoConfig": "modeling_sheared.ShearedConfig", "AutoModelForCausalLM": "modeling_sheared.ShearedForCausalLM"}
"""The field `auto_map` of a config.json that has a copy of this file beside it."""


def stock_class(base_model_type: str, part: str) -> Any:
    """Transformers' class of a family: `("qwen2", "DecoderLayer")` -> `Qwen2DecoderLayer`."""
    room = "configuration" if part == "Config" else "modeling"
    module = import_module(f"transformers.models.{base_model_type}.{room}_{base_model_type}")
    return getattr(module, BASES[base_model_type] + part)


class ShearedConfig(PreTrainedConfig):  # type: ignore[misc]
    """Config of a model whose layers differ: every field of the stock config of `base_model_type`, those of `PER_LAYER` as lists.

    `head_dim` is explicit and the same in all layers. Without any of the lists, it is the stock config's default, alike in all layers.
    Raises `ValueError` with everything that is wrong, by field and layer: lists of another length than `num_hidden_layers`, sizes that
    are not positive whole numbers, query heads that are no multiple of the key/value heads, an unknown `base_model_type`.
    """

    model_type = "sheared"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, base_model_type: str = "llama", **fields: Any) -> None:
        if base_model_type not in BASES:
            raise ValueError(f"base_model_type: found {base_model_type!r}. It must be one of {', '.join(BASES)}.")
        fields.pop("model_type", None)
        sizes = {field: fields.pop(field) for field in PER_LAYER if field in fields}
        head_dim = fields.get("head_dim")
        if sizes and not _is_size(head_dim):
            fields.pop("head_dim", None)  # for `validate` to refuse
        # The stock config fills in its defaults, brings old spellings up to date and checks everything but the sizes, which it cannot
        # hold; Llama's would refuse head counts that do not divide hidden_size, though head_dim is given. One head suits it always.
        stock = stock_class(base_model_type, "Config")(**fields, **dict.fromkeys(PER_LAYER if sizes else (), 1))
        if not sizes:
            sizes = {field: [getattr(stock, field)] * stock.num_hidden_layers for field in PER_LAYER}
            head_dim = getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads
        super().__init__()
        self.__dict__.update(vars(stock), base_model_type=base_model_type, head_dim=head_dim)
        for field in PER_LAYER:
            setattr(self, field, list(found) if isinstance(found := sizes.get(field), tuple) else found)
        self.validate()

    def validate(self) -> None:
        """Raise `ValueError` with everything that is wrong with the sizes."""
        layers = self.num_hidden_layers
        problems = [] if _is_size(layers) else [f"num_hidden_layers: found {layers!r}. It must be a positive whole number."]
        if not _is_size(self.head_dim):
            problems.append(f"head_dim: found {self.head_dim!r}. It must be given, as a positive whole number.")
        for field in PER_LAYER:
            found = getattr(self, field)
            if not isinstance(found, list):
                problems.append(f"{field}: found {found!r}. It must be a list of {layers} sizes, one for each layer.")
            elif len(found) != layers:
                problems.append(f"{field}: found {len(found)} sizes. There are {layers} layers (num_hidden_layers).")
            else:
                wrong = ((layer, size) for layer, size in enumerate(found) if not _is_size(size))
                problems += [f"{field}[{layer}]: found {size!r}. It must be a positive whole number." for layer, size in wrong]
        if not problems:
            for layer, (heads, groups) in enumerate(zip(self.num_attention_heads, self.num_key_value_heads, strict=True)):
                if heads % groups:
                    found = f"found {heads} query heads on {groups} key/value heads"
                    problems.append(f"num_attention_heads[{layer}]: {found}. They must be a multiple.")
        if problems:
            raise ValueError("\n".join(["these layers cannot be built", *(f"  - {problem}" for problem in problems)]))

    def __eq__(self, other: object) -> bool:
        # newer transformers would compare the fields that this class declares: none of those that tell two such models apart
        return isinstance(other, ShearedConfig) and vars(self) == vars(other)

    def layer_config(self, layer: int) -> Any:
        """The stock config with the sizes of one layer."""
        cls = stock_class(self.base_model_type, "Config")
        stock = cls.__new__(cls)  # its constructor would check Llama's hidden_size against the heads
        stock.__dict__.update(vars(self), **{field: getattr(self, field)[layer] for field in PER_LAYER})
        return stock


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class ShearedForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The stock ...ForCausalLM of `config.base_model_type`, with each layer at its own sizes. Raises `ValueError` for bad sizes."""

    config_class = ShearedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = [f"{name}DecoderLayer" for name in BASES.values()]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ShearedConfig) -> None:
        config.validate()  # `from_pretrained` may have changed fields since
        super().__init__(config)
        base = config.base_model_type
        self._stock = stock_class(base, "ForCausalLM")
        common = config.layer_config(0)
        common.num_hidden_layers = 0  # what is around the layers; none is made that would have to be thrown away
        self.model = stock_class(base, "Model")(common)
        for layer in range(config.num_hidden_layers):
            self.model.layers.append(stock_class(base, "DecoderLayer")(config.layer_config(layer), layer))
        # From here on all look at one config, so that what is set there (attention implementation, use_cache) holds everywhere. Sizes
        # were read when the modules were made; only the rotary embedding keeps the stock config, from which it computes again.
        for module in (self.model, *self.model.layers.modules()):
            if hasattr(module, "config"):
                module.config = config
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: Any = 0,
        **kwargs: Any,
    ) -> Any:
        """The stock forward: ids [B, T] -> `CausalLMOutputWithPast` with logits [B, T, V], and the loss where labels [B, T] are given."""
        return self._stock.forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _get_static_cache_init_shape(self) -> None:
        """Newer transformers ask for the shape of caches of fixed size, the same in all layers: none, so each finds out by its keys."""
        return None


# `save_pretrained` then writes a copy of this file and `auto_map`.
ShearedConfig.register_for_auto_class("AutoConfig")
ShearedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
