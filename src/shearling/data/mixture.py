"""The shares of the domains: how they follow the losses, and which domain each sequence of a step is drawn from. Pure functions.

Legend: D domains, n sequences of a step. Weights are shares that sum to 1; losses are in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shearling.errors import NumericsError

Floats = NDArray[np.float64]


def paper(weights_D: Floats, losses_D: Floats, reference_D: Floats, smoothing: float, step_size: float) -> Floats:
    """w proportional to w exp(eta max(loss - reference, 0)), smoothed: arXiv 2310.06694, algorithm 1."""
    return _exponentiated(weights_D, np.maximum(losses_D - reference_D, 0.0), smoothing, step_size)


def unclipped(weights_D: Floats, losses_D: Floats, reference_D: Floats, smoothing: float, step_size: float) -> Floats:
    """As `paper` without the max, so a domain below its reference shrinks: the reference code of arXiv 2310.06694."""
    return _exponentiated(weights_D, losses_D - reference_D, smoothing, step_size)


def static(weights_D: Floats, losses_D: Floats, reference_D: Floats, smoothing: float, step_size: float) -> Floats:
    """The weights as they are: `constant` in the reference code of arXiv 2310.06694."""
    return weights_D


UPDATES: dict[str, Callable[[Floats, Floats, Floats, float, float], Floats]] = {"paper": paper, "unclipped": unclipped, "static": static}


def starting_weights(shares: Sequence[float | None]) -> Floats:
    """Weights [D] to begin with: the shares given, made to sum to 1, or equal ones where none is given."""
    given = np.array([1.0 if share is None else share for share in shares], dtype=np.float64)
    return np.asarray(given / given.sum())


def update(
    rule: str,
    weights: Floats,
    losses: Floats,
    reference: Floats,
    *,
    smoothing: float = 1e-4,
    step_size: float = 1.0,
    domains: Sequence[str] = (),
) -> Floats:
    """New weights after a held-out evaluation.

    Args:
        rule: a name in `UPDATES`.
        weights: [D], the weights until now, each >= 0.
        losses: [D], held-out losses, nats per token.
        reference: [D], reference losses, nats per token; of no account to `static`.
        smoothing: c in (1 - c) w + c / D, the part shared out evenly (DoReMi, arXiv 2305.10429, algorithm 1).
        step_size: eta, the factor on the loss difference.
        domains: names for the message of an error.

    Returns:
        [D], summing to 1.

    Raises:
        NumericsError: a weight, loss or reference loss that is not finite.
    """
    for what, values in (("weight", weights), ("held-out loss", losses), ("reference loss", reference)):
        for index in np.flatnonzero(~np.isfinite(values)).tolist():
            name = domains[index] if domains else f"number {index}"
            remedy = "The mixture cannot follow it; lower the learning rate or look at this domain's data."
            raise NumericsError(f"domain {name}: the {what} is {values[index]}. {remedy}")
    return UPDATES[rule](weights, losses, reference, smoothing, step_size)


def _exponentiated(weights_D: Floats, gain_D: Floats, smoothing: float, step_size: float) -> Floats:
    """Exponentiated gradient in logs, so that no loss, however large, overflows."""
    logits_D = np.log(weights_D, where=weights_D > 0, out=np.full(len(weights_D), -np.inf)) + step_size * gain_D
    alpha_D = np.exp(logits_D - logits_D.max())
    mixed_D = (1 - smoothing) * alpha_D / alpha_D.sum() + smoothing / len(alpha_D)
    return np.asarray(mixed_D / mixed_D.sum())


def draw(weights: Floats, n: int, seed: int, step: int) -> NDArray[np.int64]:
    """The domain of each of the n sequences of a step: n independent draws by `weights` [D], a function of the arguments alone.

    Returns [n], each in [0, D). A domain of weight 0 is never drawn.
    """
    key = np.array([seed % 2**64, step % 2**64], dtype=np.uint64)
    uniform_n = np.random.Generator(np.random.Philox(key=key)).random(n)
    cumulative_D = np.cumsum(weights, dtype=np.float64)
    return np.searchsorted(cumulative_D / cumulative_D[-1], uniform_n, side="right").astype(np.int64)
