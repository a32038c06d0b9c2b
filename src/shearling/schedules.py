"""Schedules: pure functions of the step, so that nothing about them needs saving."""

from __future__ import annotations

import math


def ramp(step: int, steps: int) -> float:
    """Linear from 0 at step 0 to 1 at step `steps` and after."""
    return 1.0 if steps <= 0 else min(1.0, max(0.0, step / steps))


def cosine_with_warmup(step: int, steps: int, warmup: int, floor: float) -> float:
    """Learning-rate factor of step `step` (1-based) of `steps`: linear to 1 over `warmup` steps, then cosine to `floor`."""
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def geometric(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at `steps` by equal factors; linear where one of the two is 0."""
    progress = ramp(step, steps)
    if start <= 0 or end <= 0:
        return start + (end - start) * progress
    return float(start * (end / start) ** progress)
