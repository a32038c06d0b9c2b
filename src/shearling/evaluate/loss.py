"""Held-out loss by domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from shearling.objectives.lm import Objective


@torch.no_grad()
def heldout_losses(
    model: nn.Module,
    heldout: Mapping[str, np.ndarray],
    objective: Objective,
    *,
    batch_size: int,
    device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Loss in nats/token of every domain's held-out sequences ([n, T] token ids), and their unweighted `mean`.

    The model is evaluated as it stands, gates included, and its train/eval mode is put back. `between` runs before each batch.
    """
    training = model.training
    model.eval()
    losses = {}
    for domain, sequences in heldout.items():
        total, tokens = 0.0, 0
        for start in range(0, len(sequences), batch_size):
            between()
            ids_BT = torch.from_numpy(np.asarray(sequences[start : start + batch_size], dtype=np.int64)).to(device)
            found = objective(model, ids_BT)
            total += float(found.double().sum())
            tokens += found.numel()
        losses[domain] = total / tokens
    model.train(training)
    losses["mean"] = sum(losses.values()) / len(losses)
    return losses
