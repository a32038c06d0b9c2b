"""One training step: the forward and backward passes of its microbatches, and the update. A test can call it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shearling.errors import NumericsError
from shearling.objectives.lm import Objective


class GateTraining(Protocol):
    """What a step needs of gates in training (`shearling.prune.learn.GateLearner`)."""

    def draw(self, step: int, microbatch: int) -> None:
        """Set fresh gates on the model for this microbatch."""
        ...

    def update(self, step: int) -> None:
        """Add the constraint's gradient, and move gates and multipliers."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What one step measured."""

    loss: float
    """Mean loss of the step's tokens, nats."""
    domain_losses: dict[int, float]
    """The same by domain number, of the domains that occurred."""
    gradient_norm: float
    """Norm of the weights' gradient before clipping."""
    tokens: int


def train_step(
    model: nn.Module,
    ids_BT: Tensor,
    domains_B: np.ndarray,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    microbatches: int,
    clip: float,
    rate: float,
    gates: GateTraining | None = None,
) -> StepResult:
    """Take step number `step` at weight learning rate `rate`.

    `ids_BT` are the step's sequences, dealt to microbatches in order; the loss is the mean over all tokens of the step. Raises
    `NumericsError` before anything is updated where loss or gradient is not finite.
    """
    losses = []
    target_tokens = ids_BT.shape[0] * (ids_BT.shape[1] - 1)
    for number, chunk in enumerate(ids_BT.chunk(microbatches)):
        if gates is not None:
            gates.draw(step, number)
        found = objective(model, chunk)
        (found.sum() / target_tokens).backward()  # type: ignore[no-untyped-call]
        losses.append(found.detach().sum(1))
    sequence_losses = (torch.cat(losses) / (ids_BT.shape[1] - 1)).double().cpu().numpy()
    norm = float(nn.utils.clip_grad_norm_(_weights(optimizer), clip))
    loss = float(sequence_losses.mean())
    if not (np.isfinite(loss) and np.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NumericsError(
            f"step {step}: loss {loss} with gradient norm {norm}; nothing was updated. Lower the learning rate, or start from the "
            "last checkpoint with another seed."
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if gates is not None:
        gates.update(step)
    by_domain = {int(d): float(sequence_losses[domains_B == d].mean()) for d in np.unique(domains_B)}
    return StepResult(loss, by_domain, norm, ids_BT.numel())


def _weights(optimizer: torch.optim.Optimizer) -> Sequence[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
