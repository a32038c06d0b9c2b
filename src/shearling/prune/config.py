"""Configuration of the gates, and the name of the method that learns them. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shearling.config import Config

LEARNED = "sheared-llama"
"""The method that learns gates in training; every other decides by scores alone."""
LEAST_FITTED = 4
"""Sequences on which a cut compensates at least: two batches of two, of which one judges what is fitted to the other."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]


class GateConfig(Config):
    """How gates start, learn, and are held to the target."""

    kind: Literal["hard_concrete", "deterministic"] = "hard_concrete"
    """What a logit's gate is: hard-concrete (the paper's), or a ramp from 0 to 1 that counts as what it is (after arXiv 2603.08065)."""
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
    """With `projected`, or `deterministic` gates: what the logits are divided by at the first step; less means fewer gates half open."""
    final_temperature: Annotated[float, Field(gt=0, le=10)] = 0.01
    """The same at the last step, small enough that nearly all gates end at 0 or 1."""

    @model_validator(mode="after")
    def _deterministic_gates_have_no_noise(self) -> GateConfig:
        if self.kind == "deterministic" and (self.noise or self.final_noise):
            given = f"noise ({self.noise}) and final_noise ({self.final_noise})"
            raise ValueError(f"deterministic gates have no noise: leave {given} out, or set 0")
        return self


class AllocationConfig(Config):
    """How a budget of parameters is spread over axes and blocks, where a method does not learn gates."""

    compare: Literal["raw", "parameters", "z"] | None = None
    """Scores of units of different axes and blocks: as they are, by parameter that goes with the unit, or standardised in each block;
    left out, as the method has it."""
    cap: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Largest share of the units of a block (and of the channels) that may go."""
    protect: Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], Field(strict=False)] = (0, 0)
    """How many of the first and of the last blocks are left as they are."""
    fluctuation: Annotated[float, Field(ge=0)] | None = None
    """Weight of a score's fluctuation over the calibration batches: what fluctuates goes first. Left out, as the method has it."""
    adaptation: Annotated[float, Field(ge=0)] = 0.02
    """Adapt-Pruner's A: how much a block's importance slows its pruning, in each inner step."""
    inner_steps: Annotated[int, Field(ge=1)] = 50
    """Adapt-Pruner's K: the inner steps that would take all of a block; scores are measured anew at each."""
