"""Gates over the axes of a model, of two kinds (`KINDS`).

`hard_concrete` (Louizos et al. 2018, arXiv 1712.01312; Sheared LLaMA section 2.1): a gate z in [0, 1] is
s = sigmoid((noise * logit(u) + log_alpha) / beta) stretched to (gamma, zeta) and clipped, with u uniform on (0, 1). Clipping gives
exact zeros and ones:

    P(z = 0) = sigmoid((beta * log(-gamma / zeta) - log_alpha) / noise)
    P(z = 1) = sigmoid((log_alpha - beta * log((1 - gamma) / (zeta - 1))) / noise)

with noise = 1 in the paper.

`deterministic`, after DDP (Huang et al. 2026, "Deterministic Differentiable Structured Pruning", arXiv 2603.08065): a gate is

    z = clamp((1 + x) / 2, 0, 1),   x = log_alpha / temperature

exactly 0 at x = -1 and 1 at x = 1, without noise or stretch, sharper as the temperature falls, and it counts as what it is. At
`ramp_values` stands what of this is the paper's and what is ours.

Gates of an axis come in vectors along the last dimension (one vector in all for `layer` and `hidden`, one a layer for `group` and
`neuron`, one a group for `query`), and every vector is to keep the same number of units.

Shapes: L layers, G key/value heads, Q query heads in each, M neurons, D hidden channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shearling.arch.families import Anatomy
from shearling.shapes import PRUNABLE

GAMMA, ZETA = -0.1, 1.1
BETA = 2 / 3
LIMIT = math.log(100.0)
"""|log_alpha| is kept within this, so that no gate is ever beyond recall."""
EPSILON = 1e-6
"""Uniform noise is drawn from (EPSILON, 1 - EPSILON)."""
ZERO_EDGE = BETA * math.log(-GAMMA / ZETA)
"""log_alpha at or under which a gate without noise is exactly 0 (-1.5986); over its negative it is exactly 1."""

_CLOSED_COUNT, _OPEN_COUNT = (1 / (1 + math.exp(ZERO_EDGE - limit)) for limit in (-LIMIT, LIMIT))


def gate_values(log_alpha: Tensor, uniform: Tensor | None = None, noise: float = 1.0) -> Tensor:
    """Gates z in [0, 1], of the shape of `log_alpha`; without `uniform` (or noise) the median gate, which has no randomness."""
    logit = log_alpha
    if uniform is not None and noise > 0:
        logit = logit + noise * (torch.log(uniform) - torch.log1p(-uniform))
    return (torch.sigmoid(logit / BETA) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def probability_open(log_alpha: Tensor, noise: float = 1.0) -> Tensor:
    """P(z != 0) of every gate."""
    return torch.sigmoid((log_alpha - ZERO_EDGE) / noise)


def expected_open(log_alpha: Tensor) -> Tensor:
    """P(z != 0), scaled so that a gate at the limit counts exactly 1 or 0.

    At the clamp P(z != 0) is 0.998 or 0.047, so with the unscaled count finished gates at the target violate the constraint,
    and some gates have to stay half open to meet it (the original's floor). Scaled, finished gates at the target satisfy it.
    """
    return (probability_open(log_alpha) - _CLOSED_COUNT) / (_OPEN_COUNT - _CLOSED_COUNT)


def blended_count(logits: Tensor, settled: float) -> Tensor:
    """What every hard-concrete gate counts for: from P(z != 0) at `settled` 0 to the gate itself at 1.

    By P(z != 0) a half-open gate counts as nearly open, so half-open gates are dear and the gates move apart; but at the end the
    gates of a vector would sum to less than the target, and training would have seen a smaller model than is cut. By their sum
    half-open gates are cheap: 30 layers open by 0.8 each would do for 24. So the count goes over from the one to the other at the
    end, when few gates are half open.
    """
    likely, actual = expected_open(logits.clamp(-LIMIT, LIMIT)), gate_values(logits)
    return torch.lerp(likely, actual, settled)


def ramp_values(logits: Tensor, uniform: Tensor | None = None, noise: float = 0.0) -> Tensor:
    """Deterministic gates in [0, 1], of the shape of `logits`; there is no noise, and the configuration refuses it.

    In DDP the weights are frozen. A unit is multiplied by ReLU(x) without an upper bound, folded into the weights at the end
    (equation 11), and counted by another function, clamp(1.2 sigmoid(C (x - mu) / mu) - 0.1) with C = 2.4 and mu falling from 0.5 as
    the root of time (equations 12 to 14). Both clamps pass gradients straight through, so a closed unit still hears the loss and the
    constraint. A binarization term, z (1 - z) under a multiplier, drives the counts to 0 and 1 (equation 15).

    Ours: the ReLU is capped at 1, since a plan keeps a unit or drops it and the weights learn any scale; the gate is its own
    count, so that the size that is held is that of the model in training, and nothing is stretched; the temperature takes the place of
    mu. Straight through is the paper's, and so is the binarization (`constraints.push_apart`), which a gate that counts as what it
    is cannot do without: half-open gates are cheap. The paper was not at hand but for its abstract: this is as two reviews of it
    and its authors' code (github.com/yellowtree123/Deterministic-Differentiable-Pruning) give it.
    """
    line = (1 + logits) / 2
    return line + (line.clamp(0.0, 1.0) - line).detach()


@dataclass(frozen=True)
class GateKind:
    """How a logit becomes a gate, and what that gate counts for in the size of its vector."""

    value: Callable[..., Tensor]
    """(logits, uniform noise of their shape or None, its scale) -> gates in [0, 1], of the same shape."""
    count: Callable[[Tensor, float], Tensor]
    """(logits, how far counts have gone over to the gates themselves, in [0, 1]) -> what each counts for, of the same shape."""
    sharpened: bool = False
    """Whether the temperature divides the logits under multipliers, too; under `projected` it always does."""
    binarization: float = 0.0
    """Weight of `constraints.push_apart` at the last step, to which it grows as the square of the steps."""


HARD_CONCRETE = GateKind(gate_values, blended_count)
DETERMINISTIC = GateKind(ramp_values, lambda logits, settled: ramp_values(logits), sharpened=True, binarization=16.0)
"""The weight of 16 was found by trials on tiny models: the least with which gates of all axes end at 0 or 1 in 60 steps."""
KINDS = {"hard_concrete": HARD_CONCRETE, "deterministic": DETERMINISTIC}
"""Every kind of gate by its name in `GateConfig.kind`."""


@dataclass(frozen=True)
class GateSpec:
    """The gates of one axis: their shape, whose last dimension is one vector, and how many of a vector are to be kept."""

    axis: str
    shape: tuple[int, ...]
    target: int


SPANNED = {
    "layer": ("layer",),
    "hidden": ("hidden",),
    "group": ("layer", "group"),
    "query": ("layer", "group", "query"),
    "neuron": ("layer", "neuron"),
}
"""The axes whose sizes are the shape of an axis' gates."""


def unit_specs(source: Anatomy, axes: Collection[str]) -> dict[str, GateSpec]:
    """The units of `axes`, all of which are there: specs whose target is the source's size."""
    sizes = source.sizes
    return {axis: GateSpec(axis, tuple(sizes[a] for a in SPANNED[axis]), sizes[axis]) for axis in PRUNABLE if axis in axes}


def gate_specs(source: Anatomy, target: Anatomy) -> dict[str, GateSpec]:
    """Which gates the way from `source` to `target` needs. An axis that keeps its size has no gates."""
    wanted = {axis: target.sizes[axis] for axis in PRUNABLE if target.sizes[axis] != source.sizes[axis]}
    return {axis: replace(spec, target=wanted[axis]) for axis, spec in unit_specs(source, wanted).items()}


class Gates(nn.Module):
    """The logits of all gates and the Lagrange multipliers, all fp32 and whole on every rank.

    `log_alpha[axis]` has the spec's shape; `lambda_1[axis]` and `lambda_2[axis]` have one entry a vector (shape[:-1]).
    """

    def __init__(self, specs: Mapping[str, GateSpec], start: float = LIMIT) -> None:
        super().__init__()
        self.specs = dict(specs)
        self.log_alpha = nn.ParameterDict({axis: nn.Parameter(torch.full(spec.shape, start)) for axis, spec in specs.items()})
        self.lambda_1 = nn.ParameterDict({axis: nn.Parameter(torch.zeros(spec.shape[:-1])) for axis, spec in specs.items()})
        self.lambda_2 = nn.ParameterDict({axis: nn.Parameter(torch.zeros(spec.shape[:-1])) for axis, spec in specs.items()})

    def uniform(self, axis: str, generator: torch.Generator) -> Tensor:
        """Uniform noise for the gates of an axis; `generator` lives on the CPU so that every device and rank draws the same."""
        log_alpha = self.log_alpha[axis]
        noise = torch.rand(log_alpha.shape, generator=generator) * (1 - 2 * EPSILON) + EPSILON
        return noise.to(log_alpha.device)

    def hardened(self) -> dict[str, Tensor]:
        """Gates in {0, 1} with exactly the target count open in every vector: those of the largest logits."""
        masks = {}
        for axis, log_alpha in self.log_alpha.items():
            top = log_alpha.detach().topk(self.specs[axis].target, dim=-1).indices
            masks[axis] = torch.zeros_like(log_alpha, requires_grad=False).scatter_(-1, top, 1.0)
        return masks

    def expected_sizes(self, kind: GateKind = HARD_CONCRETE, temperature: float = 1.0) -> dict[str, Tensor]:
        """{axis: expected count of every vector, shape[:-1]}, of logits divided by `temperature`."""
        return {axis: kind.count(log_alpha / temperature, 0.0).sum(-1) for axis, log_alpha in self.log_alpha.items()}

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep every logit within the limit; call it after each optimizer step (the stored logit, not a copy, is clamped)."""
        for log_alpha in self.log_alpha.values():
            log_alpha.clamp_(-LIMIT, LIMIT)
