"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): put on a stock model, trained in the place of its weights, merged in the end.

Of a target projection with weight W [O, I], what is computed is that of W + (alpha / rank) B A (equation 3): A [R, I] is drawn, B [O, R]
starts at zero, so the model starts as what it was. W and everything else is frozen. The layers are peft's, injected into the stock
model: it stays the object that it is, and its modules keep their names, so that objectives, evaluation and sharding see no difference.
Only parameters are named otherwise until they are merged: a weight `q_proj.weight` is `q_proj.base_layer.weight`, and beside it are
`q_proj.lora_A.default.weight` and `q_proj.lora_B.default.weight`.

There is no dropout: every noise in the house is a function of the step, and peft's would not be.

Shapes: O output and I input channels of a projection, R the rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shearling.arch.axes import parse_pattern
from shearling.arch.families import Anatomy
from shearling.errors import ConfigError, Problem
from shearling.train.config import LoraConfig
from shearling.world import forget_gathered, local, whole

_ADAPTER = "default"
"""Peft's name for the one adapter that a layer has."""


def check_targets(config: LoraConfig, anatomy: Anatomy) -> None:
    """Raise `ConfigError` that names every target which is no projection in the blocks of this family; no weight has to be open."""
    matrices = [row.name for row in anatomy.rows(anatomy.family.block) if len(parse_pattern(row.pattern)) == 2]
    _refuse_unknown(config, {_last(name.removesuffix(".weight")) for name in matrices})


def add_adapters(model: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """Put an adapter on every target projection of a stock transformers model, in place, and freeze everything else; returns the model.

    For a model on the CPU that is not sharded yet: `parallelize` comes after it. An adapter's A is uniform within 1 / sqrt(I), as peft
    and the code of the paper have it, and follows from `seed` and the projection's name alone; B is zero. Torch's own generator is left
    as it was. Raises `ConfigError` that names every target which the model does not have.
    """
    import peft

    projections = dict(_projections(model))
    _refuse_unknown(config, {_last(name) for name in projections})
    chosen = [name for name in projections if _last(name) in config.targets]
    asked = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, bias="none", target_modules=chosen)
    with torch.random.fork_rng(devices=[]):  # peft draws, too
        peft.inject_adapter_in_model(asked, model, _ADAPTER)
    with torch.no_grad():
        for name, layer in _adapted(model):
            a_RI, b_OR = _factors(layer)
            key = hashlib.sha256(f"{seed}/lora/{name}".encode()).digest()
            draw = torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))
            bound = a_RI.shape[1] ** -0.5
            a_RI.copy_(torch.empty(a_RI.shape).uniform_(-bound, bound, generator=draw))
            b_OR.zero_()
    return model


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Add every adapter to the weight that it stands beside, in fp32, and take it away, in place; returns the model.

    Modules, parameters and their names are those of the stock model again, and all of them ask for gradients as before. On one process
    the weights are bitwise those of peft's `merge_and_unload`; on several, on which it is a collective, they are the same bits, since
    every process computes whole products and keeps its rows. Memory: one product [O, I] in fp32. A model without adapters is left
    as it is.
    """
    layers = list(_adapted(model))
    forget_gathered(model)
    for name, layer in layers:
        a_RI, b_OR = (whole(factor).float() for factor in _factors(layer))
        product_OI = (b_OR @ a_RI) * layer.scaling[_ADAPTER]
        projection = layer.get_base_layer()
        own = local(projection.weight)
        own.copy_(own.float().add_(_rows_like(projection.weight, product_OI)))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, projection)
    forget_gathered(model)
    if layers:
        model.requires_grad_(True)
        del model.peft_config
    return model


def _projections(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a stock model by name, without its head, whose weight may be the embedding's."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def _refuse_unknown(config: LoraConfig, known: Collection[str]) -> None:
    remedy = f"The projections of this model are {', '.join(sorted(known))}."
    problems = [Problem("train.lora.targets", repr(target), remedy) for target in config.targets if target not in known]
    if problems:
        raise ConfigError("adapters are asked for where this model has no projection", problems)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have an adapter (peft's `lora.Linear`), by the names of the projections in whose place they stand."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] of a layer."""
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


def _rows_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The rows of `other`, which is whole, that `tensor`, of its shape, has on this process. FSDP2 deals rows as `torch.chunk` does."""
    if not isinstance(tensor, DTensor):
        return other
    dealt = other.chunk(tensor.device_mesh.size())
    rank = tensor.device_mesh.get_local_rank()
    return dealt[rank] if rank < len(dealt) else other[:0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
