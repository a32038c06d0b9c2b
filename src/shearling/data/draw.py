"""Which domain each sequence of a step comes from. Pure functions of (seed, step, weights).

Legend: D domains, n sequences of a step, K steps in a row. Weights are shares that sum to 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kind = Literal["multinomial", "low-discrepancy"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def draw(weights: Floats, n: int, seed: int, first: int, steps: int = 1, kind: Kind = "multinomial") -> NDArray[np.int64]:
    """The domain of each of the n sequences of the steps `first`, `first + 1`, ...

    What a step is made of hangs on (weights, n, seed, kind) and its own number alone, so it does not matter which steps are asked for
    together. A domain of weight 0 is never drawn.

    - `multinomial`: n independent draws. The count of a domain of share w has the variance n w (1 - w), and over many steps the
      variances add up.
    - `low-discrepancy`: in each step the count of a domain differs from n w by less than 1. Over any number of steps in a row of the
      same weights, wherever they begin, the sum of its counts differs from the sum of n w by less than ceil(log2(D)) (for D = 2 by
      less than 1, for D = 7 by less than 3), and over all seeds its mean is n w. See `quota_counts`. The order inside a step is shuffled.

    Args:
        weights: [D], each finite and >= 0, not all 0; those that do not sum to 1 are taken as if divided by their sum.
        n: sequences in a step.
        seed: any integer.
        first: any integer.
        steps: K, at least 1.
        kind: how.

    Returns:
        [K, n], each in [0, D).
    """
    uniform_Kn = uniforms(seed, first, steps, n)
    return _COMPOSE[kind](np.asarray(weights, dtype=np.float64), uniform_Kn, seed, first)


def _multinomial(weights_D: Floats, uniform_Kn: Floats, seed: int, first: int) -> NDArray[np.int64]:
    cumulative_D = np.cumsum(weights_D)
    return np.searchsorted(cumulative_D / cumulative_D[-1], uniform_Kn, side="right").astype(np.int64)


def _low_discrepancy(weights_D: Floats, uniform_Kn: Floats, seed: int, first: int) -> NDArray[np.int64]:
    steps, n = uniform_Kn.shape
    counts_KD = quota_counts(weights_D, n, seed, first, steps)
    sorted_Kn = np.repeat(np.tile(np.arange(len(weights_D)), steps), counts_KD.ravel()).reshape(steps, n)
    return np.take_along_axis(sorted_Kn, np.argsort(uniform_Kn, axis=1, kind="stable"), axis=1)


_COMPOSE: dict[Kind, Callable[[Floats, Floats, int, int], NDArray[np.int64]]] = {
    "multinomial": _multinomial,
    "low-discrepancy": _low_discrepancy,
}


def quota_counts(weights: Floats, n: int, seed: int, first: int, steps: int) -> NDArray[np.int64]:
    """How many sequences each domain has in each of the steps, in `low-discrepancy` draws.

    A domain has floor(n w) sequences in every step, and in some steps one more, an extra. The domains are the leaves of a balanced
    binary tree. A node knows by a formula, without looking at the steps before, how many extras M(t) it has had before step t, and
    deals them to its two children evenly. Let f, a, b be the fractions of n times the share of the node and of its children. If
    a + b < 1, the extras of the node are those of the children, and one child has had floor(M(t) a / (a + b) + phase). Otherwise each
    step has one or two extras for the children, and what is dealt in the same way are the misses: t - M(t), in proportion 1 - a to
    1 - b. So no child has two extras in a step, which keeps every step within 1. Each dealing adds less than 1 to a child's share of
    the deviation of its node, over any steps in a row, and the root has none, which gives the depth of the tree as the bound. The
    phase is uniform in [0, 1), by seed and node. All of it is done in whole numbers of any size, so nothing is rounded.

    The dealing is systematic sampling (Madow, "On the theory of systematic sampling, II", Ann. Math. Statist. 20, 1949) along the
    steps, and the tree keeps it a quota in each; this tree we made ourselves.

    Args:
        weights: [D], as in `draw`.
        n: sequences in a step.
        seed: any integer.
        first: number of the first step, any integer.
        steps: K.

    Returns:
        [K, D], each row of sum n.
    """
    ratios = [float(weight).as_integer_ratio() for weight in weights]
    scale = max(below for _, below in ratios)  # all are powers of two
    units = [above * (scale // below) for above, below in ratios]
    one = sum(units)
    assert one > 0 and min(units) >= 0, weights
    wholes, rests = zip(*(divmod(n * unit, one) for unit in units), strict=True)
    extras_DK = np.empty((len(units), steps + 1), dtype=np.int64)
    times = range(first, first + steps + 1)

    def deal(start: int, end: int, had: list[int]) -> None:
        if end - start == 1:
            extras_DK[start] = [count - had[0] for count in had]
            return
        middle = (start + end) // 2
        left, right = sum(rests[start:middle]) % one, sum(rests[middle:end]) % one
        phase = int.from_bytes(hashlib.sha256(f"{seed}/{start}-{end}".encode()).digest()[:8], "little")
        if left + right < one:
            both = left + right or 1
            phase = phase * both >> 64
            lefts = [(count * left + phase) // both for count in had]
            rights = [count - other for count, other in zip(had, lefts, strict=True)]
        else:
            both = 2 * one - left - right
            phase = phase * both >> 64
            misses = [((time - count) * (one - left) + phase) // both for time, count in zip(times, had, strict=True)]
            lefts = [time - miss for time, miss in zip(times, misses, strict=True)]
            rights = [count + miss for count, miss in zip(had, misses, strict=True)]
        deal(start, middle, lefts)
        deal(middle, end, rights)

    deal(0, len(units), [0] * (steps + 1))
    return np.asarray(np.diff(extras_DK).T + np.array(wholes, dtype=np.int64))


def uniforms(seed: int, first: int, steps: int, n: int) -> Floats:
    """Numbers in [0, 1) for each step, of a generator of its own: numpy's Philox under the key (seed, step), modulo 2**64.

    Returns:
        [steps, n].
    """
    bits = np.random.Philox(key=np.array([seed % 2**64, 0], dtype=np.uint64))
    generator, state = np.random.Generator(bits), bits.state
    uniform_Kn = np.empty((steps, n))
    for number, row_n in enumerate(uniform_Kn):
        state["state"]["key"][1] = (first + number) % 2**64
        bits.state = state  # a fifth of the time that a new generator takes
        generator.random(out=row_n)
    return uniform_Kn
