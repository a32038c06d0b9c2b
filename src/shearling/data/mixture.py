"""The shares of the domains: how they begin, how they follow the losses, and the bounds they keep to. Pure functions.

A rule is a function of the table `UPDATES`. `paper` and `unclipped` follow held-out losses; `static`, `stratified` and `temperature`
never change the shares. Which to take is not settled: arXiv 2411.05735 (Aioli) compared the dynamic mixers of its time, DoReMi and others,
and found none that beat equal shares (`stratified`) consistently in mean perplexity, and that each is sensitive to its settings.

Legend: D domains. Weights are shares that sum to 1; losses are in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shearling.data.mixture_config import SETTING
from shearling.errors import NumericsError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Knobs:
    """What a rule goes by beside weights and losses; the fields of `MixtureConfig`, and what is known of the domains."""

    smoothing: float = 1e-4
    """c in (1 - c) w + c / D, the part shared out evenly (DoReMi, arXiv 2305.10429, algorithm 1)."""
    step_size: float = 1.0
    """eta, the factor on the loss difference."""
    temperature: float = 1.0
    """T of `temperature`."""
    tokens_D: Floats | None = None
    """Training tokens of each domain, which `temperature` needs."""


def paper(weights_D: Floats, losses_D: Floats, reference_D: Floats, knobs: Knobs) -> Floats:
    """w proportional to w exp(eta max(loss - reference, 0)), smoothed: arXiv 2310.06694, algorithm 1."""
    return _exponentiated(weights_D, np.maximum(losses_D - reference_D, 0.0), knobs)


def unclipped(weights_D: Floats, losses_D: Floats, reference_D: Floats, knobs: Knobs) -> Floats:
    """As `paper` without the max, so a domain below its reference shrinks: the reference code of arXiv 2310.06694.

    Adding a constant to every loss changes nothing.
    """
    return _exponentiated(weights_D, losses_D - reference_D, knobs)


def static(weights_D: Floats, losses_D: Floats, reference_D: Floats, knobs: Knobs) -> Floats:
    """The weights as they are: `constant` in the reference code of arXiv 2310.06694."""
    return weights_D


def stratified(weights_D: Floats, losses_D: Floats, reference_D: Floats, knobs: Knobs) -> Floats:
    """Equal shares: the baseline that arXiv 2411.05735 found hard to beat."""
    return np.full(len(weights_D), 1.0 / len(weights_D))


def temperature(weights_D: Floats, losses_D: Floats, reference_D: Floats, knobs: Knobs) -> Floats:
    """w proportional to (training tokens)^(1 / T): arXiv 1907.05019, section 4.2; XLM-R (arXiv 1911.02116) has an exponent of 0.3."""
    assert knobs.tokens_D is not None, "temperature needs the domains' training tokens"
    relative_D = (knobs.tokens_D / knobs.tokens_D.max()) ** (1.0 / knobs.temperature)
    return np.asarray(relative_D / relative_D.sum())


UPDATES: dict[str, Callable[[Floats, Floats, Floats, Knobs], Floats]] = {
    "paper": paper,
    "unclipped": unclipped,
    "static": static,
    "stratified": stratified,
    "temperature": temperature,
}


def starting_weights(shares: Sequence[float | None]) -> Floats:
    """Weights [D] to begin with: the shares given, made to sum to 1, or equal ones where none is given."""
    given = np.array([1.0 if share is None else share for share in shares], dtype=np.float64)
    return np.asarray(given / given.sum())


def start(
    rule: str, weights: Floats, knobs: Knobs | None = None, *, floor: Sequence[float] | None = None, cap: Sequence[float] | None = None
) -> Floats:
    """The shares [D] of the first step: `weights` [D], or those that the rule sets by itself, within the bounds of `bounded`."""
    nothing_D = np.zeros(len(weights))
    found = UPDATES[rule](weights, nothing_D, nothing_D, knobs or Knobs()) if rule in SETTING else weights
    return bounded(found, floor, cap)


def update(
    rule: str,
    weights: Floats,
    losses: Floats,
    reference: Floats,
    knobs: Knobs | None = None,
    *,
    floor: Sequence[float] | None = None,
    cap: Sequence[float] | None = None,
    domains: Sequence[str] = (),
) -> Floats:
    """New weights after a held-out evaluation.

    Args:
        rule: a name in `UPDATES`.
        weights: [D], the weights until now, each >= 0.
        losses: [D], held-out losses, nats per token.
        reference: [D], reference losses, nats per token; of no account to rules that never change the shares.
        knobs: what the rule goes by beside them; the paper's if left out.
        floor: [D], least shares, kept to by `bounded`; none if left out.
        cap: [D], largest shares.
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
    return bounded(UPDATES[rule](weights, losses, reference, knobs or Knobs()), floor, cap)


def bounded(weights: Floats, floor: Sequence[float] | None = None, cap: Sequence[float] | None = None) -> Floats:
    """The shares within floor <= w <= cap that are closest to `weights` in KL divergence, either way round.

    By the conditions of Karush, Kuhn and Tucker they are w = min(max(s weights, floor), cap), with the one factor s by which they sum to 1:
    of both sum w log(w / weights) and sum weights log(weights / w). It is found exactly in at most D rounds: scale those that are free to
    what is left; where caps are overrun by more than floors are underrun, s can only grow, so the overrun caps stay, and the other
    way round (Bitran and Hax, "Disaggregation and Resource Allocation Using Convex Knapsack Problems", Management Science 27, 1981).
    Domains of weight 0 get more than their floor only where all others are at their caps, and then alike.

    Args:
        weights: [D], each >= 0, summing to 1.
        floor: [D], each >= 0, summing to at most 1; 0 if left out.
        cap: [D], each at least its floor, summing to at least 1; 1 if left out.

    Returns:
        [D], summing to 1; `weights` themselves where they are within the bounds.
    """
    floor_D = np.zeros(len(weights)) if floor is None else np.asarray(floor, dtype=np.float64)
    cap_D = np.ones(len(weights)) if cap is None else np.asarray(cap, dtype=np.float64)
    if (weights >= floor_D).all() and (weights <= cap_D).all():
        return weights
    found_D, free_D, left = np.empty(len(weights)), np.ones(len(weights), dtype=bool), 1.0
    while free_D.any():
        base = weights[free_D] if weights[free_D].sum() > 0 else np.ones(free_D.sum())
        scaled = left * (base / base.sum())
        over, under = np.maximum(scaled - cap_D[free_D], 0.0), np.maximum(floor_D[free_D] - scaled, 0.0)
        found_D[free_D] = np.clip(scaled, floor_D[free_D], cap_D[free_D])
        if over.sum() == under.sum():  # as where neither is
            return found_D
        settled = over > 0 if over.sum() > under.sum() else under > 0
        free_D[np.flatnonzero(free_D)[settled]] = False
        left = 1.0 - float(found_D[~free_D].sum())
    return np.asarray(found_D / found_D.sum())  # every bound is met, as where they sum to 1 but for rounding


def _exponentiated(weights_D: Floats, gain_D: Floats, knobs: Knobs) -> Floats:
    """Exponentiated gradient in logs, so that no loss, however large, overflows; then smoothed."""
    logits_D = np.log(weights_D, where=weights_D > 0, out=np.full(len(weights_D), -np.inf)) + knobs.step_size * gain_D
    alpha_D = np.exp(logits_D - logits_D.max())
    mixed_D = (1 - knobs.smoothing) * alpha_D / alpha_D.sum() + knobs.smoothing / len(alpha_D)
    return np.asarray(mixed_D / mixed_D.sum())
