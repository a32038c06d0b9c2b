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

from shearling.prune.gates import LIMIT, Gates, expected_open, gate_values

_BISECTIONS = 40
"""Halvings of the interval of the shift: beyond fp32's 24 bits, with room for steep gates."""


def scheduled_sizes(gates: Gates, progress: float) -> dict[str, float]:
    """{axis: units every vector should have} at `progress` in [0, 1] along the ramp from the source to the target."""
    return {axis: spec.shape[-1] - (spec.shape[-1] - spec.target) * progress for axis, spec in gates.specs.items()}


def lagrangian(gates: Gates, progress: float) -> Tensor:
    """The constraint loss, a scalar; its gradient on the multipliers is what they ascend."""
    total: Tensor = next(iter(gates.log_alpha.values())).new_zeros(())
    sizes, scheduled = gates.expected_sizes(), scheduled_sizes(gates, progress)
    for axis, spec in gates.specs.items():
        excess = (scheduled[axis] - sizes[axis]) / spec.shape[-1]
        total = total + (gates.lambda_1[axis] * excess + gates.lambda_2[axis] * excess.square()).mean()
    return total


def blended_count(logits: Tensor, settled: float) -> Tensor:
    """The size of every vector (last dimension kept, of size 1): from P(z != 0) at `settled` 0 to the gates' own sum at 1.

    By P(z != 0) a half-open gate counts as nearly open, so half-open gates are dear and the gates move apart; but at the end the
    gates of a vector would sum to less than the target, and training would have seen a smaller model than is cut. By their sum
    half-open gates are cheap: 30 layers open by 0.8 each would do for 24. So the count goes over from the one to the other at the
    end, when few gates are half open.
    """
    likely, actual = expected_open(logits.clamp(-LIMIT, LIMIT)), gate_values(logits)
    return torch.lerp(likely, actual, settled).sum(-1, keepdim=True)


def project(log_alpha: Tensor, wanted: float, temperature: float, settled: float) -> Tensor:
    """Shift every vector (last dimension) so that its `blended_count` is `wanted`, after division by `temperature`.

    Returns logits in [-LIMIT, LIMIT], of the shape of `log_alpha`. The gradient passes to `log_alpha` as if the shift were given
    and nothing were clipped, so with noise a gate at the limit can come back.
    """
    return shifted(log_alpha, shift_for(log_alpha, wanted, temperature, settled), temperature)


@torch.no_grad()
def shift_for(log_alpha: Tensor, wanted: float, temperature: float, settled: float) -> Tensor:
    """The shift of every vector that `project` subtracts, with a last dimension of 1; the count falls with it, so bisection finds it."""
    reach = log_alpha.abs().max() + (LIMIT + 1.0) * temperature
    low = torch.zeros_like(log_alpha[..., :1]) - reach
    high = low + 2 * reach
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        count = blended_count((log_alpha - middle) / temperature, settled)
        low, high = torch.where(count > wanted, middle, low), torch.where(count > wanted, high, middle)
    return (low + high) / 2


def shifted(log_alpha: Tensor, shift: Tensor, temperature: float) -> Tensor:
    """Logits after a shift, see `project`."""
    scaled = (log_alpha - shift) / temperature
    return scaled + (scaled.clamp(-LIMIT, LIMIT) - scaled).detach()
