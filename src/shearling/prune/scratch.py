"""Stock models that are not read from files: with any weights, or with those that training from scratch begins with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from shearling.io.loading import NOT_OURS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stock_of(config: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A stock model of a config's plain values, on the CPU and in eval mode; its weights are drawn from torch's global generator."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key not in (*NOT_OURS, "dtype", "torch_dtype")}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain), dtype=dtype)
    return model.eval()


def drawn(config: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """A model in fp32 with random weights, as transformers initialises its architecture: `_init_weights` with `initializer_range`.

    The weights follow from config and seed alone, and torch's global generator is left as it was. `config`: plain values of a
    config.json with the sizes of the model; `initializer_range` is what it says, or else the default of its class.
    """
    number = int.from_bytes(hashlib.sha256(f"{seed}/weights".encode()).digest()[:8], "big")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number)
        return stock_of(config, torch.float32)
