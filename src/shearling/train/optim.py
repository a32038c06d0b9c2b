"""The device, the optimizer of the weights, and the precision of a forward pass."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from shearling.errors import ConfigError, Problem
from shearling.train.config import FitConfig, RuntimeConfig

Given = ParamSpec("Given")
Found = TypeVar("Found")


def choose_device(runtime: RuntimeConfig, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The device to compute on: of several processes on a machine, the GPU of its number. Sets the number of CPU threads.

    Raises `ConfigError` for a device that is not there, or that several processes would share.
    """
    _give_back_large_blocks()
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    name = runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    remedy = "Use auto, cpu, cuda or cuda:N with a GPU that torch can see."
    try:
        device = torch.device(name)
        if device.type == "cuda" and local_size > 1:
            if device.index is not None:
                remedy = "Each process takes the GPU of its number on its machine: use auto or cuda."
                raise RuntimeError(f"{local_size} processes on this machine would share it")
            device = torch.device("cuda", local_rank)
        elif device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        found = f"{name!r} ({str(error).splitlines()[0][:120]})"
        raise ConfigError("the device cannot be used", [Problem("runtime.device", found, remedy)]) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _give_back_large_blocks() -> None:
    """Have glibc map blocks of three megabytes and more by themselves, and so return them when they are freed.

    Left to itself it puts weights, gradients and activations of up to 32 MiB side by side, and holds what is free between them:
    a tenth of the peak of a small model's training on a CPU (docs/log.md).
    """
    with suppress(OSError, AttributeError, TypeError):  # another C library, or Windows
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 3 * 2**20)


_M_MMAP_THRESHOLD = -3


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


def in_precision(objective: Callable[Given, Found], device: torch.device, runtime: RuntimeConfig) -> Callable[Given, Found]:
    """The same objective, or losses, computed under autocast where the recipe asks for less than float32.

    Autocast keeps its low-precision copies of all weights until the end of the forward pass; with activation checkpointing, which is
    asked for to save memory, it makes them anew.
    """

    def context() -> AbstractContextManager[object]:
        reduced, keep = runtime.precision == "bfloat16", not runtime.activation_checkpointing
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=reduced, cache_enabled=keep)

    def computed(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        with context():
            return objective(*args, **kwargs)

    return computed
