"""Configuration of the gates, and the name of the method that learns them. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shearling.config import Config

LEARNED = "sheared-llama"
"""The method that learns gates in training; every other decides by scores alone."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]


class GateConfig(Config):
    """How gates start, learn, and are held to the target."""

    start: Literal["scores", "constant"] = "scores"
    """Starting logits: by rank of `prune.scores` (first-order Taylor importance if left out), or all alike (the paper's)."""
    start_low: Annotated[float, Field(ge=-4.6, le=4.6)] = 1.6
    """Starting logit of the least important gate; the most important starts at the limit, 4.605. `projected` feels the spread alone."""
    calibration_sequences: Annotated[int, Field(ge=1)] = 32
    """Training sequences on which scores are measured, of any method; they count as tokens of pruning."""
    constraint: Literal["projected", "lagrangian"] = "projected"
    """How gates are held to the ramp: shifted to the scheduled count at every step, or by learned multipliers (the paper's)."""
    ramp: Fraction = 0.5
    """Share of the steps over which the scheduled sizes go from the source's to the target's; the paper has 0.2 of 3,200 steps."""
    learning_rate: Rate | None = None
    """Peak learning rate of the logits; left out, so much that a logit can cross its whole range once over the schedule."""
    multiplier_learning_rate: Rate = 1.0
    """Peak learning rate of the multipliers."""
    final_learning_rate: Fraction = 0.1
    """Learning rates of logits and multipliers at the end of the cosine, as a share of the peak."""
    shared_second_moment: bool = True
    """One second moment of Adam for each vector of gates; false: one for each gate (the paper's)."""
    noise: Rate = 0.0
    """Scale of the hard-concrete noise at the first step; 1 is the paper's."""
    final_noise: Rate = 0.0
    """Scale of the noise at the last step."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.3
    """With `projected`: what the logits are divided by at the first step; less means fewer gates half open."""
    final_temperature: Annotated[float, Field(gt=0, le=10)] = 0.01
    """With `projected`: the same at the last step, small enough that nearly all gates end at 0 or 1."""
