"""States of a model on their way: kept while it computes, and compared with another's through projectors that are thrown away.

The blocks of a smaller model are compared with the source's in the places of which they stand: the output of block i with what the
source's block next after it among those kept is given, so that what is kept learns to stand in for the blocks dropped in between.
(Ours; papers map layers evenly, which is the same where none is dropped.)

Projectors are one matrix for the head's state and one for all blocks' (as CoFi, arXiv 2204.00408, has them), from the model's hidden size
to the source's. They begin as the map that best turns the model's embeddings into the source's, so that a pruned stream is compared with
itself from the first step; they are trained along, and are no part of what is published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from shearling.world import World, local, whole

PROJECTORS = "projectors"
"""Name of the module that holds them, on a model in training."""


class States:
    """Keeps, while it is told to, what the head of a stock transformers model reads, and what some of its blocks give.

    `blocks`: their numbers; `hidden`: whether to keep what the head reads. The hooks stay on the model until `remove`.
    """

    def __init__(self, model: nn.Module, layers: str, hidden: bool, blocks: Sequence[int]) -> None:
        self._found: dict[str, Tensor] | None = None
        self._handles: list[Any] = []
        if hidden:
            head = cast("nn.Module", model.get_output_embeddings())  # type: ignore[operator]
            self._handles.append(head.register_forward_pre_hook(lambda module, args: self._keep("hidden", args[0])))
        stack = cast("nn.ModuleList", model.get_submodule(layers))
        for position, number in enumerate(blocks):
            self._handles.append(stack[number].register_forward_hook(self._of_block(position)))

    def begin(self) -> None:
        """Keep from now on."""
        self._found = {}

    def end(self) -> dict[str, Tensor]:
        """`hidden`, and `blocks/POSITION` in the order of `blocks`, each [B, T, H]; nothing is kept from now on."""
        found, self._found = self._found or {}, None
        return found

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _of_block(self, position: int) -> Any:
        return lambda module, args, out: self._keep(f"blocks/{position}", out[0] if isinstance(out, tuple) else out)

    def _keep(self, name: str, state_BTH: Tensor) -> None:
        if self._found is not None:
            self._found[name] = state_BTH


def stands_for(kept: Sequence[int], layers: int) -> list[int]:
    """Number of the source's block whose output each kept block's is compared with: the last before the next that is kept."""
    return [following - 1 for following in (*kept[1:], layers)]


def add_projectors(model: nn.Module, names: Sequence[str], source_hidden: int) -> nn.Module:
    """Put a projector [source's H, H] for each of `names` on a model that is not set up yet; returns the model. See `start_projectors`."""
    if names:
        own = embedding(model).shape[1]
        model.add_module(PROJECTORS, nn.ModuleDict({name: nn.Linear(own, source_hidden, bias=False) for name in names}))
    return model


@torch.no_grad()
def start_projectors(model: nn.Module, source: nn.Module, world: World) -> None:
    """Set every projector P to what minimises ||E P^T - E'||, E the model's embeddings [V, H] and E' the source's. A collective."""
    if not hasattr(model, PROJECTORS):
        return
    own_VH, theirs_VH = (whole(embedding(each).detach()).float() for each in (model, source))
    gram_HH, cross_HH = (own_VH.T @ own_VH).double(), (own_VH.T @ theirs_VH).double()
    gram_HH.diagonal().add_(1e-6 * gram_HH.diagonal().mean())  # channels that a mask closed
    best_HH = torch.linalg.solve(gram_HH, cross_HH).T.float()
    for module in cast("nn.ModuleDict", getattr(model, PROJECTORS)).values():
        weight = cast("nn.Parameter", module.weight)
        rows, size = -(-weight.shape[0] // world.size), len(local(weight))
        local(weight).copy_(best_HH[world.rank * rows :][:size] if world.size > 1 else best_HH)


def remove_projectors(model: nn.Module) -> None:
    """Throw the projectors away."""
    if hasattr(model, PROJECTORS):
        delattr(model, PROJECTORS)


def embedding(model: nn.Module) -> Tensor:
    """The embedding's weight [V, H]."""
    return cast("Tensor", model.get_input_embeddings().weight)  # type: ignore[operator]


def projected(model: nn.Module, name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str) -> Tensor:
    """Mean distance [B, T] of the states of `name` (`hidden` or `blocks`) from those expected, through the model's projector."""
    project = cast("nn.ModuleDict", getattr(model, PROJECTORS))[name]
    keys = sorted(key for key in found if key.partition("/")[0] == name)
    apart = [state_distance(project(found[key]).float(), expected[key].float(), kind) for key in keys]
    return torch.stack(apart).mean(0)


def state_distance(found_BTH: Tensor, expected_BTH: Tensor, kind: str) -> Tensor:
    """[B, T]: `relative`, |found - expected|^2 / |expected|^2 (SquareHead, arXiv 2310.06927, by token), or `cosine`, 1 - cos."""
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(found_BTH, expected_BTH, dim=-1)
    return (found_BTH - expected_BTH).square().sum(-1) / expected_BTH.square().sum(-1).clamp(min=1e-12)
