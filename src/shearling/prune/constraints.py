"""Lagrangian constraints that drive every vector of gates to its target (Sheared LLaMA section 2.1; Wang et al. 2020).

For a vector of N gates with target T, s = 1 - (expected open) / N is its expected sparsity and t(k) the scheduled one, a linear
ramp from 0 to 1 - T/N. The loss sums over axes, with the mean over an axis' vectors,

    lambda_1 * (s - t) + lambda_2 * (s - t)^2

which weights and gates minimise and multipliers maximise. The multipliers are one pair for every vector, so that a layer that
lags is pushed by itself (the original shares one pair among the layers of an axis).

Or, ours, without multipliers: `project` shifts the logits of each vector so that its size is the scheduled one, which is what
multipliers that had come to rest would do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearling.prune.gates import HARD_CONCRETE, LIMIT, GateKind, Gates

_BISECTIONS = 40
"""Halvings of the interval of the shift: beyond fp32's 24 bits, with room for steep gates."""


def scheduled_sizes(gates: Gates, progress: float) -> dict[str, float]:
    """{axis: units every vector should have} at `progress` in [0, 1] along the ramp from the source to the target."""
    return {axis: spec.shape[-1] - (spec.shape[-1] - spec.target) * progress for axis, spec in gates.specs.items()}


def lagrangian(gates: Gates, progress: float, kind: GateKind = HARD_CONCRETE, temperature: float = 1.0) -> Tensor:
    """The constraint loss, a scalar, of logits divided by `temperature`; its gradient on the multipliers is what they ascend."""
    total: Tensor = next(iter(gates.log_alpha.values())).new_zeros(())
    sizes, scheduled = gates.expected_sizes(kind, temperature), scheduled_sizes(gates, progress)
    for axis, spec in gates.specs.items():
        excess = (scheduled[axis] - sizes[axis]) / spec.shape[-1]
        total = total + (gates.lambda_1[axis] * excess + gates.lambda_2[axis] * excess.square()).mean()
    return total


@torch.no_grad()
def push_apart(log_alpha: Tensor, gates: Tensor, weight: float) -> None:
    """Add to the loss' gradient in `log_alpha` that of a binarization term; `gates` has its shape, a vector in the last dimension.

    The term is the sum of z (1 - z) (DDP, arXiv 2603.08065, equation 15): a gate over a half opens, the others close. Ours: only gates
    that are neither open nor closed are pushed, so that the others can come back; `weight` is not learned but scheduled, and in
    units of the mean magnitude of the vector's own gradient, so that it needs no tuning by size and no place in a checkpoint.
    """
    if log_alpha.grad is not None:
        between = (gates > 0) & (gates < 1)
        log_alpha.grad += weight * log_alpha.grad.abs().mean(-1, keepdim=True) * (1 - 2 * gates) * between


def project(log_alpha: Tensor, wanted: float, temperature: float, settled: float, kind: GateKind = HARD_CONCRETE) -> Tensor:
    """Shift every vector (last dimension) so that its count is `wanted`, after division by `temperature`.

    Returns logits in [-LIMIT, LIMIT], of the shape of `log_alpha`. The gradient passes to `log_alpha` as if the shift were given
    and nothing were clipped, so with noise a gate at the limit can come back.
    """
    return shifted(log_alpha, shift_for(log_alpha, wanted, temperature, settled, kind), temperature)


@torch.no_grad()
def shift_for(log_alpha: Tensor, wanted: float, temperature: float, settled: float, kind: GateKind = HARD_CONCRETE) -> Tensor:
    """The shift of every vector that `project` subtracts, with a last dimension of 1; the count falls with it, so bisection finds it."""
    reach = log_alpha.abs().max() + (LIMIT + 1.0) * temperature
    low = torch.zeros_like(log_alpha[..., :1]) - reach
    high = low + 2 * reach
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        count = kind.count((log_alpha - middle) / temperature, settled).sum(-1, keepdim=True)
        low, high = torch.where(count > wanted, middle, low), torch.where(count > wanted, high, middle)
    return (low + high) / 2


def shifted(log_alpha: Tensor, shift: Tensor | float, temperature: float) -> Tensor:
    """Logits after a shift, see `project`."""
    scaled = (log_alpha - shift) / temperature
    return scaled + (scaled.clamp(-LIMIT, LIMIT) - scaled).detach()
