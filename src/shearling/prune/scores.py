"""Scores of every gate, from which starting logits are made: larger means more important.

A score is a function of the gated model and some calibration sequences, and gives {axis: tensor of the gates' shape}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from shearling.prune.attach import Attachment
from shearling.prune.gates import GateSpec
from shearling.world import World

Objective = Callable[[nn.Module, Tensor], Tensor]
"""(model, token ids [B, T]) -> losses of any shape; their mean is scored by."""
Scores = dict[str, Tensor]


def taylor(
    model: nn.Module,
    attachment: Attachment,
    specs: Mapping[str, GateSpec],
    objective: Objective,
    batches_BT: Sequence[Tensor],
    world: World | None = None,
    between: Callable[[], None] = lambda: None,
) -> Scores:
    """Mean over batches of |dL/dz| at z = 1, the first-order change of the loss when a gate closes (Molchanov et al. 2017, 1611.06440).

    Only gates get gradients; the weights' are neither computed nor changed. Small batches tell more than large ones, since
    gradients of opposite sign cancel inside a batch. They are dealt to the processes of `world`; the scores are the same on all.
    `between` runs before each batch, on all processes as often.
    """
    world = world or World()
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    device = next(model.parameters()).device
    totals = {axis: torch.zeros(spec.shape, device=device) for axis, spec in specs.items()}
    training = model.training
    model.eval().requires_grad_(False)
    try:
        for first in range(0, len(batches_BT), world.size):
            between()
            ids_BT = batches_BT[min(first + world.rank, len(batches_BT) - 1)]  # a sharded model needs every process for each pass
            gates = {axis: torch.ones(spec.shape, device=device, requires_grad=True) for axis, spec in specs.items()}
            attachment.set(gates)
            objective(model, ids_BT).mean().backward()  # type: ignore[no-untyped-call]
            for axis, gate in gates.items():
                change = torch.zeros_like(gate) if gate.grad is None else gate.grad.abs()
                for found in world.gather(change)[: len(batches_BT) - first]:  # added in the order of the batches
                    totals[axis] += found
    finally:
        attachment.set({})
        model.train(training)
        for parameter, want in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(want)
    return {axis: total.cpu() / max(len(batches_BT), 1) for axis, total in totals.items()}


def random(specs: Mapping[str, GateSpec], generator: torch.Generator) -> Scores:
    """Uniform scores: the control that every other score has to beat."""
    return {axis: torch.rand(spec.shape, generator=generator) for axis, spec in specs.items()}


def ranks(scores: Tensor) -> Tensor:
    """The rank of each score inside its vector (last dimension), from 0 for the least to 1 for the most important."""
    order = scores.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return order.to(torch.float32) / max(scores.shape[-1] - 1, 1)
