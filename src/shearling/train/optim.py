"""The optimizer of the weights, and what is set on a model before it trains."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from shearling.errors import ConfigError, Problem
from shearling.objectives.lm import Objective
from shearling.train.config import FitConfig, RuntimeConfig


def choose_device(runtime: RuntimeConfig) -> torch.device:
    """The device to compute on; sets the number of CPU threads. Raises `ConfigError` for a device that is not there."""
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    name = runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        remedy = "Use auto, cpu, cuda or cuda:N with a GPU that torch can see."
        found = f"{name!r} ({str(error).splitlines()[0][:120]})"
        raise ConfigError("the device cannot be used", [Problem("runtime.device", found, remedy)]) from None
    return device


def prepare_model(model: nn.Module, runtime: RuntimeConfig) -> None:
    """Set a stock transformers model up for training, in place."""
    if runtime.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if runtime.compile:
        model.compile()
    for module in model.modules():  # the method has no dropout, and its noise would not be a function of the step
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    model.train()


def build_optimizer(model: nn.Module, config: FitConfig) -> torch.optim.AdamW:
    """AdamW over all weights of the model, fused; the learning rate is set at every step."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        eps=1e-8,
        weight_decay=config.weight_decay,
        fused=True,
    )


def in_precision(objective: Objective, device: torch.device, precision: str) -> Objective:
    """The same objective, computed under autocast where `precision` asks for less than float32."""

    def context() -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")

    def computed(model: nn.Module, ids_BT: Tensor) -> Tensor:
        with context():
            return objective(model, ids_BT)

    return computed
