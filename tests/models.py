"""Tiny real models for tests: stock transformers classes with seeded random weights, and a word-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CHAT_TEMPLATE = "{% for message in messages %}<s> {{ message['content'] }} {% endfor %}"


def tiny_config(
    family: str,
    *,
    tied: bool = False,
    layers: int = 3,
    hidden: int = 48,
    heads: int = 6,
    groups: int = 3,
    head_dim: int = 8,
    neurons: int = 40,
    vocab: int = 96,
) -> Any:
    """A transformers config of `family` at these sizes; `groups` are the key/value heads."""
    return AutoConfig.for_model(
        family,
        tie_word_embeddings=tied,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=neurons,
        vocab_size=vocab,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )


def tiny_model(family: str, *, seed: int = 0, **sizes: Any) -> Any:
    """A model of `tiny_config(family, **sizes)` in fp32 and eval mode; no two channels, heads or neurons of it are alike."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1 or "embed_tokens" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5 * 1.5)
    return model.eval()


def hooks(model: Any) -> int:
    """How many hooks there are on a model's modules, and on its weights' gradients."""
    found = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return found + sum(len(weight._post_accumulate_grad_hooks or ()) for weight in model.parameters())


def parameters_of(values: dict[str, Any]) -> int:
    """Of the real model of a config's plain values, stock or with blocks that differ, which must load."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    return sum(parameter.numel() for parameter in model.parameters())


def tiny_tokenizer(vocab: int = 96) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of exactly `vocab` words: `<s>`, `</s>`, `<unk>`, then `w3`, `w4`, ... split at whitespace."""
    words = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(3, vocab))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_source(path: Path, family: str, *, vocab: int = 96, **sizes: Any) -> Any:
    """Write a full Hugging Face directory (weights, config, generation config, tokenizer); return the model."""
    model = tiny_model(family, vocab=vocab, **sizes)
    model.save_pretrained(path)
    tiny_tokenizer(vocab).save_pretrained(path)
    return model
