"""What of a recipe follows from the tokens that may be spent in all: the default recipe, and what methods that train while they prune take.

Pure, and no torch.

The proportions are those with which the methods were first compared, at 100,000 tokens in batches of 1,024 (docs/results.md); they were
chosen once and not tuned. A cap stands where a paper says how much is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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


MOST_TOKENS = 65_536
"""Tokens on which the default's cut compensates, at most: they are held as states of the stream."""
SHARE = 15
"""Percent of the tokens that scores and compensation may take together."""
MOST_SEQUENCES = 256
"""Sequences of a step of recovery, at most: the paper's."""
STEPS = 85
"""Steps of recovery below which a step has fewer sequences."""
RATE, WIDTH = 6e-4, 576
"""Peak learning rate of recovery, at this hidden size of the source; at others inversely as large (Yang et al., arXiv 2203.03466)."""
IN_A_PASS = 8
"""Sequences of a microbatch."""


def filled(values: Mapping[str, Any], hidden: Callable[[], int]) -> dict[str, Any]:
    """Plain values of a recipe in which what `tokens` decides is given, wherever the recipe left it out; docs/recipes.md has the reasons.

    `hidden`: gives the source's hidden size, on which the learning rate hangs; asked only where that is left out.
    Without `tokens`, and where sections are no mappings (which is for others to complain of), the values as they are.
    """
    tokens, data = values.get("tokens"), values.get("data")
    prune, train, target = (values.get(name) or {} for name in ("prune", "train", "target"))
    sound = all(isinstance(section, Mapping) for section in (data, prune, train, target))
    if type(tokens) is not int or tokens < 1 or not sound or not isinstance(data, Mapping):
        return dict(values)
    length = data.get("sequence_length", 4096)
    if type(length) is not int or length < 1:
        return dict(values)
    small = max(LEAST_FITTED, tokens * SHARE // 100 // length // 3)  # a third of the share is for scores, two for the fit
    found = dict(values)
    if target and "method" not in prune and "steps" not in prune:
        gates = {
            "calibration_sequences": max(1, min(small, GateConfig.model_fields["calibration_sequences"].default)),
            **(prune.get("gates") or {}),
        }
        method = "llm-pruner-global" if {key for key, size in target.items() if size is not None} == {"parameters"} else "taylor"
        fit = max(LEAST_FITTED, min(2 * small, COMPENSATED, MOST_TOKENS // length))
        prune = {"method": method, "compensate": fit, **prune, "gates": gates}
        found["prune"] = prune
    spent = _spent(prune, length) if target else 0
    left = max(0, tokens - spent)
    batch = train.get("batch_size")
    if type(batch) is not int or batch < 1:
        batch = _power_of_two(min(left // (STEPS * length), MOST_SEQUENCES))
    steps = max(1, left // (batch * length))
    own: dict[str, Any] = {"steps": steps, "batch_size": batch, "microbatches": max(1, batch // IN_A_PASS)}
    own |= {} if "learning_rate" in train else {"learning_rate": float(f"{RATE * WIDTH / hidden():.1e}")}
    own |= {"evaluate_every": max(1, steps // 4)} | ({"distill": {"text": 1.0, "logits": 1.0}} if target else {})
    found["train"] = {**own, **train}
    return found


def _spent(prune: Mapping[str, Any], length: int) -> int:
    """Tokens of a prune section: its steps, one measurement of scores a cut, compensation."""
    gates = prune.get("gates") or {}
    numbers = [prune.get("steps", 0), prune.get("batch_size", 32), prune.get("cuts", 1), prune.get("compensate", 0)]
    numbers.append(
        gates.get("calibration_sequences", GateConfig.model_fields["calibration_sequences"].default) if isinstance(gates, Mapping) else 0
    )
    if not all(type(number) is int for number in numbers):
        return 0
    steps, batch, cuts, fitted, scored = numbers
    return int((steps * batch + cuts * scored + fitted) * length)


def _power_of_two(number: int) -> int:
    """The largest that is not above it; at least 1."""
    return int(1 << (max(1, number).bit_length() - 1))
