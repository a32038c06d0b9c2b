"""Which steps are skipped for what they measured. Pure functions; the decision is the same on every process, as its input is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

LEAST = 8
"""Losses that must be known before one can be a spike."""
FLOOR = 0.01
"""Least standard deviation that is reckoned with, as a part of the mean: in a window of equal losses every other would be a spike."""


def objection(loss: float, gradient_norm: float, recent: Sequence[float], deviations: float | None) -> str | None:
    """Why a step must not move the weights, or None.

    `loss` in nats/token, `recent` losses of steps that were not skipped, `deviations` beyond which a loss is a spike (None: never).
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(gradient_norm):
        return f"the gradient's norm is {gradient_norm}"
    if deviations is None or len(recent) < LEAST:
        return None
    mean = fmean(recent)
    spread = max(pstdev(recent), FLOOR * abs(mean), 1e-6)  # losses of 0 have neither
    if loss > mean + deviations * spread:
        return f"the loss {loss:.4f} stands {(loss - mean) / spread:.1f} deviations above the mean {mean:.4f} of {len(recent)} steps"
    return None


def remember(recent: Sequence[float], loss: float, window: int) -> list[float]:
    """The window after a step that was not skipped: its last `window` losses."""
    return [*recent, loss][-window:]
