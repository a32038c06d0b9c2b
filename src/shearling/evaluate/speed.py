"""Speed of models side by side: tokens per second of generation and of prefill, one sequence at a time.

Shape suffix: `tokens_BT` holds token ids, batch B = 1, time T.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from shearling.errors import ConfigError, Problem


def measure_speed(
    models: Mapping[str, Any], *, prompt_tokens: int = 256, generate_tokens: int = 32, repeats: int = 3, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Measure causal language models of transformers on the device and in the precision they are in.

    Every model reads the same random prompt of `prompt_tokens` (prefill) and goes on greedily by `generate_tokens` (generation)
    with a key/value cache; an end-of-text token does not end it. A machine is noisy and drifts, so the models take turns, the
    order turning round each time, after one turn that is not counted; the medians over `repeats` turns count.

    Returns {name: {"generation": tokens per second, "prefill": tokens per second}}. The models' training flags are left as
    they were. Raises `ConfigError` where a count is below 1.
    """
    counts = {"prompt_tokens": prompt_tokens, "generate_tokens": generate_tokens, "repeats": repeats}
    problems = [Problem(name, str(value), "It must be at least 1.") for name, value in counts.items() if value < 1]
    if problems:
        raise ConfigError("speed cannot be measured", problems)
    if not models:
        return {}
    vocab = min(model.get_input_embeddings().num_embeddings for model in models.values())
    prompt_BT = torch.randint(vocab, (1, prompt_tokens), generator=torch.Generator().manual_seed(seed))
    training = {name: bool(model.training) for name, model in models.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    try:
        for model in models.values():
            model.eval()
            _timed_turn(model, prompt_BT, generate_tokens)
        for turn in range(repeats):
            for name in list(models)[:: -1 if turn % 2 else 1]:
                seconds[name].append(_timed_turn(models[name], prompt_BT, generate_tokens))
    finally:
        for name, model in models.items():
            model.train(training[name])
    return {
        name: {
            "generation": generate_tokens / median(generation for _, generation in turns),
            "prefill": prompt_tokens / median(prefill for prefill, _ in turns),
        }
        for name, turns in seconds.items()
    }


@torch.inference_mode()
def _timed_turn(model: Any, prompt_BT: Tensor, generate_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill, and of `generate_tokens` steps of one token each."""
    device = model.get_input_embeddings().weight.device
    tokens_BT, cache = prompt_BT.to(device), None
    stamps = [_now(device)]
    for step in range(1 + generate_tokens):
        # Only the last position's logits are asked for, as in serving: those of a whole prompt would dominate a small model.
        output = model(input_ids=tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens_BT, cache = output.logits[:, -1:].argmax(dim=-1), output.past_key_values
        if step in (0, generate_tokens):
            stamps.append(_now(device))
    return stamps[1] - stamps[0], stamps[2] - stamps[1]


def _now(device: torch.device) -> float:
    """Seconds on a steady clock, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
