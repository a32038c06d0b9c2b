"""Speed: right counts, models left alone, and a bigger model is slower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shearling.errors import ConfigError
from shearling.evaluate import speed
from shearling.evaluate.speed import measure_speed


def tiny(layers: int = 1, vocab: int = 64) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


class Clock:
    """A clock that is read at known moments: every model call takes one second for each of its tokens and layers."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[int, int, int]] = []

    def watch(self, model: Any) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            tokens, cache = kwargs["input_ids"], kwargs["past_key_values"]
            assert tokens.shape[1] == 1 or tokens.max() < 48, "the prompt lies in every model's vocabulary"
            assert torch.is_inference_mode_enabled() and not module.training
            self.calls.append((module.config.num_hidden_layers, tokens.shape[1], cache.get_seq_length() if cache else 0))
            self.now += tokens.shape[1] * module.config.num_hidden_layers

        model.register_forward_pre_hook(hook, with_kwargs=True)
        return model


def test_counts_turns_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(speed, "_now", lambda device: clock.now)
    models = {"source": clock.watch(tiny(2)), "model": clock.watch(tiny(1, vocab=48)).train()}
    models["source"].eval()
    rates = measure_speed(models, prompt_tokens=6, generate_tokens=3, repeats=2)
    assert rates == {"source": {"generation": 0.5, "prefill": 0.5}, "model": {"generation": 1.0, "prefill": 1.0}}
    turns = [clock.calls[i : i + 4] for i in range(0, len(clock.calls), 4)]
    assert [turn[0][0] for turn in turns] == [2, 1, 2, 1, 1, 2]
    assert all([call[1:] for call in turn] == [(6, 0), (1, 6), (1, 7), (1, 8)] for turn in turns)
    assert models["model"].training and not models["source"].training


def test_a_real_clock_gives_positive_rates() -> None:
    rates = measure_speed({"only": tiny()}, prompt_tokens=4, generate_tokens=2, repeats=1)
    assert rates["only"]["generation"] > 0 and rates["only"]["prefill"] > 0


def test_generation_is_greedy() -> None:
    model, seen = tiny(2).eval(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    measure_speed({"model": model}, prompt_tokens=5, generate_tokens=4, repeats=1, seed=3)
    turn = torch.cat(seen[:5], dim=1)
    assert torch.equal(turn, torch.cat(seen[5:], dim=1)), "the same prompt and the same continuation each turn"
    with torch.no_grad():
        assert torch.equal(model(input_ids=turn).logits[:, 4:-1].argmax(-1), turn[:, 5:])


def test_wrong_counts_are_named() -> None:
    with pytest.raises(ConfigError, match="generate_tokens") as caught:
        measure_speed({"model": tiny()}, generate_tokens=0, repeats=0)
    assert len(caught.value.problems) == 2
    assert measure_speed({}) == {}
