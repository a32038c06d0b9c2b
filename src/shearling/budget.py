"""What of a recipe follows from the tokens that may be spent in all, for the methods that train while they prune. Pure, and no torch.

The proportions are those with which the methods were first compared, at 100,000 tokens in batches of 1,024 (docs/results.md); they were
chosen once and not tuned. A cap stands where a paper says how much is enough.
"""

from __future__ import annotations

from shearling.prune.config import LEARNED, LEAST_FITTED, GateConfig

AT = 100_000
"""Tokens at which the proportions were chosen."""
BATCH = 1_024
"""Tokens of a batch there."""
MOST_STEPS = 3_200
"""Of learned gates: the pruning steps of Sheared LLaMA, Table 7."""
MOST_CUTS = {"adapt-pruner": 50, "efficientllm": 500}
"""adapt-pruner: as many as its inner steps; efficientllm: ours, as a cut takes time by the number of units."""
COMPENSATED = 64
"""Sequences of 128 tokens on which cuts compensate, there; and the most."""
MOST_COMPENSATED = 8
"""Cuts of a method that is to compensate at each."""
CALIBRATED = 8
"""The same of one measurement of adapt-pruner, which measures some forty times."""
SEQUENCE = 128
"""Tokens of a sequence there."""
_STEPS = {LEARNED: 30, "adapt-pruner": 30, "efficientllm": 60}
_CUTS = {"adapt-pruner": 3, "efficientllm": 30}


def settings(method: str, tokens: int, batch_tokens: int, sequence_length: int, compensated: bool = False) -> tuple[str, ...]:
    """Assignments (`prune.steps=30`) by which a method spends its part of `tokens` on pruning. Other methods cut at once, in 0 steps.

    Args:
        method: a name of the registry.
        tokens: that pruning and recovery may spend together.
        batch_tokens: of one step of pruning.
        sequence_length: tokens of one sequence.
        compensated: whether cuts compensate; then there are fewer of them, as each takes its time.
    """
    if method not in _STEPS:
        return ("prune.steps=0", *_compensation(tokens, sequence_length, 1, compensated))
    grown = tokens / AT
    steps = max(1, round(_STEPS[method] * grown * BATCH / batch_tokens))
    if method == LEARNED:
        return (f"prune.steps={min(steps, MOST_STEPS)}", *_compensation(tokens, sequence_length, 1, compensated))
    cuts = min(max(1, round(_CUTS[method] * grown * BATCH / batch_tokens)), steps, MOST_CUTS[method])
    cuts = min(cuts, MOST_COMPENSATED) if compensated else cuts
    found: tuple[str, ...] = (f"prune.steps={steps}", f"prune.cuts={cuts}", *_compensation(tokens, sequence_length, cuts, compensated))
    if method == "adapt-pruner":
        most = GateConfig.model_fields["calibration_sequences"].default
        sequences = min(_in_proportion(CALIBRATED, tokens, sequence_length), most)
        found += ("prune.share=linear", f"prune.gates.calibration_sequences={sequences}")
    return found


def compensated_on(tokens: int, sequence_length: int, cuts: int = 1) -> int:
    """Sequences on which `cuts` cuts compensate together, where `tokens` may be spent in all."""
    return max(min(_in_proportion(COMPENSATED, tokens, sequence_length), COMPENSATED), LEAST_FITTED * cuts)


def _compensation(tokens: int, sequence_length: int, cuts: int, compensated: bool) -> tuple[str, ...]:
    return (f"prune.compensate={compensated_on(tokens, sequence_length, cuts)}",) if compensated else ()


def _in_proportion(sequences: int, tokens: int, sequence_length: int) -> int:
    """Sequences that are the same share of `tokens` as `sequences` were; at least 1."""
    return max(1, round(sequences * SEQUENCE * tokens / AT / sequence_length))
