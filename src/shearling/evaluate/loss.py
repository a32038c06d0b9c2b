"""Held-out loss by domain and how sure it is, its batches dealt to the processes of a run.

Legend: D domains, n of a domain's N held-out sequences, T tokens in a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shearling.data.order import sample_indices
from shearling.objectives.lm import TokenLosses
from shearling.world import World

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class HeldOut:
    """Losses in nats/token on held-out text."""

    losses: dict[str, float]
    """Of every domain, and their unweighted `mean`."""
    errors: dict[str, float | None]
    """Standard error of each; None of one sequence, which has none."""
    sequences: dict[str, Floats]
    """Loss of every sequence [n] of a domain."""


@torch.no_grad()
def heldout_losses(
    model: nn.Module,
    heldout: Mapping[str, Any],
    losses: TokenLosses,
    *,
    batch_size: int,
    device: torch.device,
    world: World | None = None,
    between: Callable[[], None] = lambda: None,
) -> HeldOut:
    """Loss of every domain's held-out sequences ([n, T] token ids), with standard errors std / sqrt(n); the same on all processes.

    The model is evaluated as it stands, gates included, and its train/eval mode is put back. `between` runs before each batch, on
    all processes as often.
    """
    world = world or World()
    begins = dict(zip(heldout, np.cumsum([0, *map(len, heldout.values())]).tolist(), strict=False))
    batches = [(domain, start) for domain, sequences in heldout.items() for start in range(0, len(sequences), batch_size)]
    found = torch.zeros(sum(map(len, heldout.values())), dtype=torch.float64)  # by sequence, so that the sum over them has one order
    training = model.training
    model.eval()
    try:
        for first in range(0, len(batches), world.size):
            between()
            # A sharded model's forward pass needs every process, so those that have no batch left repeat the last, uncounted.
            number = first + world.rank
            domain, start = batches[min(number, len(batches) - 1)]
            ids_BT = torch.from_numpy(np.asarray(heldout[domain][start : start + batch_size], dtype=np.int64)).to(device)
            losses_B = losses(model, ids_BT).double().mean(1).cpu()
            if number < len(batches):
                at = begins[domain] + start
                found[at : at + len(losses_B)] = losses_B
    finally:
        model.train(training)
    world.sum_(found)
    by_domain = {domain: found[begins[domain] : begins[domain] + len(rows)].numpy() for domain, rows in heldout.items()}
    return HeldOut(
        _with_mean({domain: float(losses.mean()) for domain, losses in by_domain.items()}),
        _with_mean_error({domain: _error(losses) for domain, losses in by_domain.items()}),
        by_domain,
    )


def update_subset(domain: str, size: int, count: int, seed: int) -> NDArray[np.int64]:
    """Which `count` of a domain's `size` held-out sequences stand in for all: [n] ascending, n = min(count, size).

    The first places of the keyed permutation of seed and domain: the same at every evaluation and on any number of processes.
    """
    # No domain's name has a slash, so this is the order of no domain's training text.
    return np.sort(sample_indices(np.arange(min(count, size)), size, seed, f"{domain}/heldout"))


def instead_of_all(found: HeldOut, subset: Mapping[str, NDArray[np.int64]], before: Mapping[str, Floats]) -> HeldOut:
    """What `found` on a subset says of all held-out sequences, from what an earlier model lost on each of them.

    The estimate is the difference estimator: the earlier model's mean over all N, and the mean change over the n of the subset. A
    sequence that is hard stays hard, so the changes vary far less than the losses do, and the subset's being harder or easier than the
    whole, which would push the shares the same way at every update, cancels. Its variance is that of two-phase sampling,
    s_loss^2 / N + (1 / n - 1 / N) s_change^2 (Cochran, Sampling Techniques, 3rd ed. 1977, chapter 12): with n = N that of all.

    Args:
        found: of the subset's sequences, in the subset's order.
        subset: the numbers [n] of the domains' sequences.
        before: the earlier model's losses [N] on all of them.

    Returns:
        Estimates for all; `sequences` are those of the subset.
    """
    losses: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    for domain, chosen in subset.items():
        now_n, all_N = found.sequences[domain], before[domain]
        change_n, n, size = now_n - all_N[chosen], len(chosen), len(all_N)
        losses[domain] = float(all_N.mean() + change_n.mean())
        known = n > 1
        errors[domain] = math.sqrt(now_n.var(ddof=1) / size + (1 / n - 1 / size) * change_n.var(ddof=1)) if known else None
    return HeldOut(_with_mean(losses), _with_mean_error(errors), found.sequences)


def packed(losses: Mapping[str, Floats]) -> dict[str, str]:
    """Losses of sequences [n] as text for a ledger: one word each, to seven digits."""
    return {domain: " ".join(f"{loss:.7g}" for loss in values.tolist()) for domain, values in losses.items()}


def unpacked(losses: Mapping[str, str]) -> dict[str, Floats]:
    """The inverse of `packed`, to seven digits."""
    return {domain: np.array(text.split(), dtype=np.float64) for domain, text in losses.items()}


def _error(losses_n: Floats) -> float | None:
    return float(losses_n.std(ddof=1)) / math.sqrt(len(losses_n)) if len(losses_n) > 1 else None


def _with_mean(losses: dict[str, float]) -> dict[str, float]:
    return {**losses, "mean": sum(losses.values()) / len(losses)}


def _with_mean_error(errors: dict[str, float | None]) -> dict[str, float | None]:
    """The domains' sequences are drawn apart, so the squares of their errors add up."""
    known = [error for error in errors.values() if error is not None]
    return {**errors, "mean": math.sqrt(sum(error**2 for error in known)) / len(errors) if len(known) == len(errors) else None}
