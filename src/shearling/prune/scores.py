"""Scores of every gate: larger means more important. Each is a small function of statistics, registered with its name and its paper.

`compute` takes one pass over the calibration sequences for all the scores that are asked for, whichever axes they are for.

    @score("magnitude-l2", paper="...", needs={"weights"}, axes=EVERY)
    def magnitude_l2(stats: Stats) -> Scores: ...

Between axes, scores are not comparable: each has the unit of its own formula. Of the axes that come in several vectors of gates (one a
layer, one a group) the numbers of all vectors are on one scale.

Shapes: L layers, G key/value heads, Q query heads in each, M neurons, D hidden channels.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from shearling.arch.axes import parse_pattern, sum_onto
from shearling.arch.families import Anatomy
from shearling.errors import ConfigError, NumericsError, Problem
from shearling.prune.gates import SPANNED, GateSpec
from shearling.prune.stats import Objective, Scores, Stats, Weight, collect, weights_of
from shearling.shapes import PRUNABLE
from shearling.world import World

EVERY = PRUNABLE
HEADS_AND_NEURONS = ("group", "query", "neuron")
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Score:
    """One way to score gates."""

    name: str
    paper: str
    about: str
    """What it measures, in a line."""
    needs: frozenset[str]
    """Names out of `stats.NEEDS`."""
    axes: frozenset[str]
    """On which it is defined."""
    of: Callable[[Stats], Scores]
    """Statistics -> {axis: scores of the gates' shape}, for at least those of its axes that have gates."""


SCORES: dict[str, Score] = {}
"""Every score by its name."""


def score(
    name: str, *, paper: str, needs: Collection[str], axes: Collection[str]
) -> Callable[[Callable[[Stats], Scores]], Callable[[Stats], Scores]]:
    """Register the function below under `name`; the first line of its docstring says what it measures."""

    def register(of: Callable[[Stats], Scores]) -> Callable[[Stats], Scores]:
        SCORES[name] = Score(name, paper, (of.__doc__ or "").partition("\n")[0], frozenset(needs), frozenset(axes), of)
        return of

    return register


def compute(
    names_by_axis: Mapping[str, str],
    model: nn.Module,
    anatomy: Anatomy,
    specs: Mapping[str, GateSpec],
    objective: Objective,
    batches_BT: Sequence[Tensor],
    world: World | None = None,
    between: Callable[[], None] = lambda: None,
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
) -> Scores:
    """Score the gates of each axis by the score named for it: {axis: fp32 on the CPU, of the gates' shape}, the same on all processes.

    One pass over the batches (token ids [B, T] on the model's device) serves all of them, and none is taken where no score needs one;
    see `stats.collect` for the other arguments. Raises `ConfigError` for a score that is not there, or not for that axis, or for an
    axis without gates; `NumericsError` where a score is not finite.
    """
    check(names_by_axis, specs)
    specs = {axis: specs[axis] for axis in names_by_axis}
    needs = {need for name in names_by_axis.values() for need in SCORES[name].needs}
    return of_stats(names_by_axis, collect(model, anatomy, specs, objective, batches_BT, needs, world, between, seed, masks))


def of_stats(names_by_axis: Mapping[str, str], stats: Stats) -> Scores:
    """The same from statistics that are there: {axis: fp32 on the CPU, of the gates' shape}."""
    specs, found = stats.specs, dict[str, Tensor]()
    for name in sorted(set(names_by_axis.values())):
        wanted = [axis for axis, other in names_by_axis.items() if other == name]
        scores = SCORES[name].of(replace(stats, specs={axis: specs[axis] for axis in wanted}))
        found |= {axis: scores[axis].reshape(specs[axis].shape).float() for axis in wanted}
    for axis, values in found.items():
        if not values.isfinite().all():
            raise NumericsError(
                f"the score {names_by_axis[axis]!r} of {int((~values.isfinite()).sum())} of {values.numel()} gates of the axis {axis!r} is "
                "not finite. Look for infinities in the source's weights or losses, or compute in another precision."
            )
    return {axis: found[axis] for axis in names_by_axis}


def check(names_by_axis: Mapping[str, str], specs: Mapping[str, GateSpec]) -> None:
    """Raise `ConfigError` with everything that is wrong about the scores asked for."""
    problems = []
    for axis, name in names_by_axis.items():
        fitting = [other for other, entry in SCORES.items() if axis in entry.axes]
        known = SCORES.get(name)
        if axis not in specs:
            remedy = f"Leave it out: the axes to score are {', '.join(specs) or 'none'}."
            problems.append(
                Problem(
                    f"prune.scores.{axis}", "an axis that is not there" if axis not in PRUNABLE else "an axis that keeps its size", remedy
                )
            )
        elif known is None:
            close = difflib.get_close_matches(name, SCORES, n=1)
            remedy = f"Did you mean {close[0]!r}?" if close else f"Scores of this axis: {', '.join(fitting)}."
            problems.append(Problem(f"prune.scores.{axis}", repr(name), remedy))
        elif axis not in known.axes:
            there = ", ".join(sorted(known.axes))
            problems.append(
                Problem(f"prune.scores.{axis}", repr(name), f"It is there for {there}. Scores of this axis: {', '.join(fitting)}.")
            )
    if problems:
        raise ConfigError("these scores cannot be computed", problems)


def ranks(scores: Tensor) -> Tensor:
    """The rank of each score inside its vector (last dimension), from 0 for the least to 1 for the most important."""
    order = scores.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return order.to(torch.float32) / max(scores.shape[-1] - 1, 1)


@score("taylor", paper="Molchanov et al. 2017, arXiv 1611.06440", needs={"gate_gradients"}, axes=EVERY)
def gate_taylor(stats: Stats) -> Scores:
    """First-order change of the loss when a gate closes: mean over batches of |dL/dz| at z = 1.

    The paper's |dC/dh h| summed over a feature map before the absolute value, with everything that a gate multiplies in the map's
    place: dL/dz is the sum of activation times gradient over it. In nats.
    """
    return {axis: moments.mean for axis, moments in stats.gates.items()}


@score("taylor-vector", paper="LLM-Pruner, Ma et al. 2023, arXiv 2305.11627", needs={"weights", "weight_gradients"}, axes=EVERY)
def taylor_vector(stats: Stats) -> Scores:
    """First-order Taylor, a sum for each channel: |sum of w g| of every row or column that goes, over all weights of a unit.

    The paper's vector-wise importance (section 3.2): a head's is the sum over its head_dim channels. A block's is ours, which the
    paper does not score: |sum of w g| of each of its weights. In nats.
    """
    return stats.sum_channels(lambda weight: weight.value * weight.gradient)


@score("taylor-element", paper="LLM-Pruner, Ma et al. 2023, arXiv 2305.11627", needs={"weights", "weight_gradients"}, axes=EVERY)
def taylor_element(stats: Stats) -> Scores:
    """First-order Taylor, element by element: sum of |w g| over all weights of a unit.

    The paper's element-wise importance (section 3.2) without its second-order term. Never less than `taylor-vector`. In nats.
    """
    return stats.sum_elements(lambda weight: (weight.value * weight.gradient).abs())


@score("taylor-element-second", paper="LLM-Pruner, Ma et al. 2023, arXiv 2305.11627", needs={"weights", "squared_gradients"}, axes=EVERY)
def taylor_element_second(stats: Stats) -> Scores:
    """Second-order Taylor, element by element: sum of F w^2 over all weights of a unit, F the diagonal of the empirical Fisher matrix.

    F is the mean over sequences of g^2, which stands for the Hessian. The factor 1/2 of the expansion is left out, as it orders nothing.
    """
    return stats.sum_elements(lambda weight: weight.squared_gradient * weight.value.square())


@score(
    "taylor-element-mixed",
    paper="LLM-Pruner, Ma et al. 2023, arXiv 2305.11627",
    needs={"weights", "weight_gradients", "squared_gradients"},
    axes=EVERY,
)
def taylor_element_mixed(stats: Stats) -> Scores:
    """First- and second-order Taylor, element by element: sum of |w g - F w^2 / 2| over all weights of a unit.

    The paper's element-wise importance with both terms (section 3.2); F as in `taylor-element-second`. In nats.
    """
    return stats.sum_elements(lambda w: ((value := w.value) * w.gradient - 0.5 * w.squared_gradient * value.square()).abs())


@score("fused", paper="after SAAP, arXiv 2412.15127", needs={"weights", "weight_gradients"}, axes=EVERY)
def fused(stats: Stats) -> Scores:
    """Vector and element Taylor fused: the mean of both, each divided by its own mean over the open gates of the axis.

    SAAP takes the two importances for Gaussian observations with noises s1 and s2 of their own, I_v / (2 s1^2) + I_e / (2 s2^2) +
    log(s1 s2). What is ours: s1 and s2 are not learned, but are where the sum over an axis is least, s^2 = mean of I, so the fusion
    does not change with the scale of either; the logarithm is then one constant for the axis, and is left out; and both importances
    are of first order. No unit; the mean over the open gates of the axis is 1.
    """
    vector, element = (
        {axis: values / _mean_of_open(stats, axis, values).clamp(min=_TINY) for axis, values in f(stats).items()}
        for f in (taylor_vector, taylor_element)
    )
    return {axis: (vector[axis] + element[axis]) / 2 for axis in stats.specs}


def _mean_of_open(stats: Stats, axis: str, values: Tensor) -> Tensor:
    """Mean over the gates of an axis that the masks leave open, and that are not in a block or group that they close."""
    open_ = torch.ones_like(values)
    for mask in (stats.masks[name].to(values) for name in SPANNED[axis] if name in stats.masks):
        open_ = open_ * mask.reshape(*mask.shape, *[1] * (values.dim() - mask.dim()))
    return (values * open_).sum() / open_.sum().clamp(min=1)


@score("magnitude-l1", paper="Li et al. 2017, arXiv 1608.08710", needs={"weights"}, axes=EVERY)
def magnitude_l1(stats: Stats) -> Scores:
    """Sum of |w| over all weights of a unit."""
    return stats.sum_elements(lambda weight: weight.value.abs())


@score("magnitude-l2", paper="LLM-Pruner's L2, Ma et al. 2023, arXiv 2305.11627", needs={"weights"}, axes=EVERY)
def magnitude_l2(stats: Stats) -> Scores:
    """Sum of w^2 over all weights of a unit."""
    return stats.sum_elements(lambda weight: weight.value.square())


@score(
    "activation", paper="Minitron, Muralidharan et al. 2024, arXiv 2407.14679", needs={"activations"}, axes=("hidden", *HEADS_AND_NEURONS)
)
def activation(stats: Stats) -> Scores:
    """Mean over tokens of the size of what a unit passes on.

    Section 2.2 of the paper: of a head the Euclidean norm of its output over head_dim, of a neuron |x| at the input of the down
    projection, of a hidden channel |x| after a norm, summed over all norms. Where the paper tries several aggregations over batch and
    sequence we take one, the plain mean over all tokens. A key/value head's score is ours: the sum over its query heads.
    """
    heads_LGQ = stats.sizes["heads"]
    return {
        "hidden": stats.sizes["hidden"],
        "group": heads_LGQ.sum(-1),
        "query": heads_LGQ,
        "neuron": stats.inputs["neurons"].absolute,
    }


@score("fluctuation", paper="FLAP, An et al. 2024, arXiv 2312.11983", needs={"weights", "activations"}, axes=HEADS_AND_NEURONS)
def fluctuation(stats: Stats) -> Scores:
    """How far the output moves when a unit's input is replaced by its mean: variance of the input times squared norm of its column.

    The paper's weighted input feature variance, of the columns of the attention's output and the MLP's down projection. Ours: the
    variance is over all calibration tokens about their overall mean, where the authors' code goes by sequences about a running mean;
    a head is the plain sum over its head_dim columns, which their code squares first; a key/value head is the sum over its query
    heads; and nothing is standardised by layer, which is for whoever compares layers. In squared units of the stream.
    """
    sizes, anchors = stats.anatomy.sizes, stats.anatomy.family.anchors
    heads_LI = stats.inputs["heads"].variance * squared_columns(stats, anchors.attention_output)
    heads_LGQ = heads_LI.view(-1, sizes["group"], sizes["query"], sizes["head_dim"]).sum(-1)
    neurons_LM = stats.inputs["neurons"].variance * squared_columns(stats, anchors.mlp_output)
    return {"group": heads_LGQ.sum(-1), "query": heads_LGQ, "neuron": neurons_LM}


def squared_columns(stats: Stats, projection: str) -> Tensor:
    """Squared Euclidean norm of every column of the blocks' `projection` (a name relative to a block): [L, inputs], on the CPU."""
    columns = []
    for name, pattern, layer in weights_of(stats.anatomy):
        if layer is not None and name.endswith(f".{projection}.weight"):
            reads = parse_pattern(pattern)[1]
            columns.append(sum_onto(Weight(name, pattern, layer, stats).value.square(), pattern, stats.anatomy.sizes, reads).flatten())
    return torch.stack(columns).cpu()


@score("block-influence", paper="ShortGPT, Men et al. 2024, arXiv 2403.03853", needs={"influence"}, axes=("layer",))
def block_influence(stats: Stats) -> Scores:
    """How much a block turns the stream: 1 - E[x y / (|x| |y|)] over tokens, x its input and y its output; from 0 to 2."""
    return {"layer": 1 - stats.cosines["layer"]}


@score("last-blocks", paper="Gromov et al. 2024, arXiv 2403.17887", needs=(), axes=("layer",))
def last_blocks(stats: Stats) -> Scores:
    """By place: the blocks right before the last go first, the last one at the very end.

    The paper's simple heuristic: drop the deepest blocks, but keep the last.
    """
    layers = stats.anatomy.sizes["layer"]
    return {"layer": torch.tensor([*range(layers - 1, 0, -1), layers])}


@score("every-nth", paper="LayerDrop, Fan et al. 2020, arXiv 1909.11556", needs=(), axes=("layer",))
def every_nth(stats: Stats) -> Scores:
    """By place: 1 for the blocks to keep, spread evenly from the first to the last, 0 for the others.

    The paper's "every other" for any number of blocks; the first and the last stay.
    """
    layers, target = stats.specs["layer"].shape[0], stats.specs["layer"].target
    scores = torch.zeros(layers)
    scores[[(2 * i * (layers - 1) // max(target - 1, 1) + 1) // 2 for i in range(target)]] = 1.0
    return {"layer": scores}


@score("first-channels", paper="SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024", needs=(), axes=("hidden",))
def first_channels(stats: Stats) -> Scores:
    """By place: the last channels go first. Of a stream that was turned to its principal axes, those that carry least."""
    channels = stats.anatomy.sizes["hidden"]
    return {"hidden": torch.arange(channels, 0, -1)}


@score("random", paper="none: the control that every other score has to beat", needs=(), axes=EVERY)
def by_chance(stats: Stats) -> Scores:
    """Uniform on [0, 1), from the seed and the axis alone."""
    scores = {}
    for axis, spec in stats.specs.items():
        state = np.random.SeedSequence([stats.seed, EVERY.index(axis)]).generate_state(1, np.uint64)[0]
        scores[axis] = torch.rand(spec.shape, generator=torch.Generator().manual_seed(int(state)))
    return scores
