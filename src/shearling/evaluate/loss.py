"""Held-out loss by domain, its batches dealt to the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from shearling.objectives.lm import Objective
from shearling.world import World


@torch.no_grad()
def heldout_losses(
    model: nn.Module,
    heldout: Mapping[str, np.ndarray],
    objective: Objective,
    *,
    batch_size: int,
    device: torch.device,
    world: World | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Loss in nats/token of every domain's held-out sequences ([n, T] token ids), and their unweighted `mean`; the same on all processes.

    The model is evaluated as it stands, gates included, and its train/eval mode is put back. `between` runs before each batch, on
    all processes as often.
    """
    world = world or World()
    batches = [(domain, start) for domain, sequences in heldout.items() for start in range(0, len(sequences), batch_size)]
    sums = torch.zeros(len(batches), dtype=torch.float64)  # by batch, so that the sum over them has one order
    training = model.training
    model.eval()
    try:
        for first in range(0, len(batches), world.size):
            between()
            # A sharded model's forward pass needs every process, so those that have no batch left repeat the last, uncounted.
            number = first + world.rank
            domain, start = batches[min(number, len(batches) - 1)]
            ids_BT = torch.from_numpy(np.asarray(heldout[domain][start : start + batch_size], dtype=np.int64)).to(device)
            found = objective(model, ids_BT)
            if number < len(batches):
                sums[number] = found.double().sum().cpu()
    finally:
        model.train(training)
    world.sum_(sums)
    losses = {}
    for domain, sequences in heldout.items():
        total = sum(float(value) for (name, _), value in zip(batches, sums, strict=True) if name == domain)
        losses[domain] = total / (len(sequences) * (sequences.shape[1] - 1))
    losses["mean"] = sum(losses.values()) / len(losses)
    return losses
