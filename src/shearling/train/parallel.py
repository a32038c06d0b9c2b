"""A stock model over the processes of a run: activation checkpointing, then compile, then FSDP2.

On one process there is nothing to shard, and `fully_shard` is left out: over a mesh of one it gives the same bits
(tests/train/test_parallel.py) and takes 1.4 to 1.7 times as long on a CPU (docs/log.md).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shearling.errors import ConfigError, Problem
from shearling.train.config import FitConfig, RuntimeConfig
from shearling.world import World, forget_gathered, whole


def make_mesh(device: torch.device, world: World) -> DeviceMesh | None:
    """What a model is sharded over: all processes in one row, or None for one alone. A collective."""
    return init_device_mesh(device.type, (world.size,)) if world.size > 1 else None


def parallelize(model: nn.Module, blocks: str, runtime: RuntimeConfig, device: torch.device, mesh: DeviceMesh | None) -> nn.Module:
    """Set a stock transformers model up on `device`, sharded over `mesh` if there is one; in place.

    `blocks` is the name of its list of layers. Parameters keep their names; sharded, each is a DTensor that holds rows of its own on
    each process. The model must hold the same weights on all of them. Needs no word of the other processes.
    """
    for module in model.modules():  # the method has no dropout, and its noise would not be a function of the step
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    if runtime.activation_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its name before 5.23
        enable({"use_reentrant": False})  # type: ignore[operator]
    layers = cast("nn.ModuleList", model.get_submodule(blocks))
    if runtime.compile:
        # Gates come and go as hooks: code that was compiled without them must not be taken for a block that has them.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        for layer in layers:
            layer.compile()
    if mesh is None:
        return model.to(device)  # type: ignore[no-any-return,operator]
    again = frees_after_forward(runtime, device)
    for part in (*layers, model):
        sharded = fully_shard(part, mesh=mesh, reshard_after_forward=again)
        # the step's loss is divided by all of its tokens, so gradients are summed, not averaged
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    return model


def frees_after_forward(runtime: RuntimeConfig, device: torch.device) -> bool:
    """Whether a block's gathered weights are freed after its forward pass: as the recipe says, or else on GPUs."""
    return device.type == "cuda" if runtime.reshard_after_forward is None else runtime.reshard_after_forward


def before_backward(model: nn.Module, last: bool, frees: bool) -> None:
    """Where gathered weights are kept, keep them until the step's `last` backward pass, since they do not change before."""
    if hasattr(model, "set_reshard_after_backward"):
        model.set_reshard_after_backward(frees or last)  # type: ignore[operator]


def rows_of(tensor: Tensor, world: World) -> tuple[int, int]:
    """First row and end of what lies on this process. FSDP2 deals rows as `torch.chunk` does."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if tensor.dim() else 1
    total = tensor.shape[0]
    each = -(-total // world.size)
    return min(world.rank * each, total), min((world.rank + 1) * each, total)


def whole_weights(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Name -> whole parameter: not copied on one process; on several, on process 0's CPU, and empty on the others. A collective."""
    forget_gathered(model)
    weights = {}
    for name, parameter in model.named_parameters():
        found = whole(parameter.detach())
        if world.first:
            weights[name] = found if world.size == 1 else found.cpu()
    return weights


def check_microbatches(stages: dict[str, FitConfig], size: int) -> None:
    """Raise `ConfigError` where the microbatches of a stage cannot be dealt evenly to `size` processes."""
    problems = []
    for name, config in stages.items():
        if config.steps and config.microbatches % size:
            fitting = [str(n) for n in range(1, config.microbatches + 1) if config.microbatches % n == 0]
            remedy = f"They are dealt evenly to {size} processes: set a multiple of {size}, or start {' or '.join(fitting)} of them."
            problems.append(Problem(f"{name}.microbatches", str(config.microbatches), remedy))
    if problems:
        raise ConfigError(f"{size} processes were started, which the recipe does not fit", problems)
