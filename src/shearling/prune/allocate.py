"""From scores to masks: which units go, to a given shape or under a budget of parameters, and so how many of each block.

Three rules:

`to_shape`  every vector of units loses its lowest until it has the size that the target gives
`ranked`    all units of all axes and blocks stand in one line, and the lowest go until the budget is met (LLM-Pruner's global pruning,
            Ma et al. 2023, arXiv 2305.11627; EfficientLLM, arXiv 2502.06663; SAAP, arXiv 2412.15127)
`adapted`   every block loses a share of its width by how little it turns the stream (Adapt-Pruner, arXiv 2502.03460, section 3)

Masks are {axis: 0/1 tensor of the gates' shape} over the source, closed units stay closed, and what they leave is an anatomy: with the
same sizes in every block (`uniform`, a stock checkpoint), or with sizes of each block's own.

Shapes: L layers, G key/value heads, Q query heads in each, M neurons, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from shearling.arch.axes import PER_LAYER, count
from shearling.arch.families import Anatomy
from shearling.errors import Problem, ShapeError
from shearling.prune.config import AllocationConfig
from shearling.prune.gates import GateSpec, unit_specs
from shearling.prune.scores import ranks

Masks = dict[str, Tensor]


def all_open(source: Anatomy, axes: Collection[str]) -> Masks:
    """Masks that close nothing."""
    return {axis: torch.ones(spec.shape) for axis, spec in unit_specs(source, axes).items()}


def left(source: Anatomy, masks: Mapping[str, Tensor]) -> Anatomy:
    """The anatomy that masks leave of a source, whose blocks must be alike where there are any."""
    if not masks:
        return source
    sizes = source.sizes
    kept = {axis: mask.gt(0).cpu() for axis, mask in masks.items()}
    layers = kept["layer"].nonzero().flatten().tolist() if "layer" in kept else list(range(sizes["layer"]))
    counts = {axis: kept[axis].sum(-1).tolist() for axis in ("group", "neuron") if axis in kept}
    blocks = []
    for layer in layers:
        block = {axis: int(counts[axis][layer]) if axis in counts else sizes[axis] for axis in ("group", "neuron")}
        block["query"] = sizes["query"]
        if "query" in kept:
            of_kept = kept["query"][layer][kept["group"][layer]] if "group" in kept else kept["query"][layer]
            block["query"] = int(of_kept.sum(-1).max())
        blocks.append(block)
    hidden = int(kept["hidden"].sum()) if "hidden" in kept else sizes["hidden"]
    return source.with_sizes(hidden=hidden).with_blocks(blocks)


@dataclass(frozen=True)
class _Removals:
    """Units that may go, each with the step of the line at which it does, for one axis."""

    axis: str
    units_N: Tensor
    """Flat numbers of the units in the axis' mask."""
    steps_N: Tensor
    """At which place of this axis' own line each goes, from 0; several units may share a place."""
    scores_S: Tensor
    """Score of every place."""


def to_shape(masks: Masks, scores: Mapping[str, Tensor], specs: Mapping[str, GateSpec], fraction: float) -> Masks:
    """Keep the best of every vector, as many as the target has: or, at `fraction` < 1 of the way to it, as many as lie there."""
    found = {}
    for axis, mask in masks.items():
        size, order = mask.shape[-1], ranks(scores[axis]).reshape(-1, mask.shape[-1])
        keep = size - int((size - specs[axis].target) * fraction + 1e-9)
        rows = zip(order, mask.reshape(-1, size), strict=True)
        found[axis] = torch.stack([_best(values, open_, keep) for values, open_ in rows]).reshape(mask.shape)
    return found


def ranked(source: Anatomy, masks: Masks, scores: Mapping[str, Tensor], budget: int, rule: AllocationConfig, *, uniform: bool) -> Masks:
    """Close the units of lowest score, over all axes of `masks`, until no more than `budget` parameters are left.

    Between axes and blocks scores are compared as `rule.compare` says. `uniform`: what goes is one unit of every block at once, each
    block's own least, scored by their sum, so that blocks stay alike.
    Raises `ShapeError` where the blocks that are protected, the cap, or the axes leave more than the budget.
    """
    if rule.compare == "z":
        scores = {axis: _standardised(scores[axis].float(), mask > 0) for axis, mask in masks.items()}
    lines = _lines(source, masks, scores, rule, uniform)
    everything = torch.cat([line.scores_S for line in lines]) if lines else torch.zeros(0)
    places_P = torch.empty(len(everything), dtype=torch.long)
    places_P[everything.argsort(stable=True)] = torch.arange(len(everything))
    of_line = dict(zip([line.axis for line in lines], places_P.split([len(line.scores_S) for line in lines]), strict=True))  # type: ignore[no-untyped-call]

    def after(removals: int) -> Masks:
        found = {axis: mask.clone() for axis, mask in masks.items()}
        for line in lines:
            gone = line.units_N[of_line[line.axis][line.steps_N] < removals]
            found[line.axis].view(-1)[gone] = 0.0
        return found

    def fits(removals: int) -> bool:
        return left(source, after(removals)).parameters() <= budget

    if not fits(len(everything)):
        least = left(source, after(len(everything))).parameters()
        remedy = f"These axes, cap and protected blocks leave {least:,} at least: ask for more, prune more axes, or allow more."
        raise ShapeError("this budget cannot be met", [Problem("target.parameters", f"{budget:,}", remedy)])
    low, high = 0, len(everything)  # high always fits
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    found = after(high)
    last = next((line.axis for line in lines if bool((of_line[line.axis] == high - 1).any())), "neuron")
    if last != "neuron":  # a large unit that overshoots is passed over for a few neurons
        found = _trimmed(source, after(high - 1), scores, budget, rule, uniform=uniform) or found
    return _refilled(source, masks, _divisible(source, found, scores), scores, budget) if uniform else found


def adapted(
    source: Anatomy, masks: Masks, scores: Mapping[str, Tensor], budget: int, rule: AllocationConfig, sparsity_L: Tensor
) -> tuple[Masks, bool]:
    """One inner step of Adapt-Pruner: s <- clip(s + 1/K - A I, 0, 0.99) for every block, `sparsity_L` (fp64) being changed in place.

    I is the blocks' importance `scores["layer"]` (block influence, which orders them as -cos(input, output) does), centred and divided by
    its largest absolute value: larger turns the stream more. Each block keeps int(M (1 - s)) of its neurons and as many key/value heads
    as (1 - s) does not cover whole. Returns the masks, and whether the budget is met; the last inner step is shortened to meet
    it as nearly as can be (ours: the original stops at the first step that is below it). Raises `ShapeError` where
    every block is at its limit.
    """
    if left(source, masks).parameters() <= budget:
        return masks, True
    importance_L = centred(scores["layer"])
    free_L = _free(source, rule)
    wanted_L = (sparsity_L + (1 / rule.inner_steps - rule.adaptation * importance_L)).clamp(0.0, 0.99) * free_L
    if bool((wanted_L <= sparsity_L).all()):
        remedy = "Every block that may be pruned is at its limit: ask for more parameters, or protect fewer blocks."
        raise ShapeError("this budget cannot be met", [Problem("target.parameters", f"{budget:,}", remedy)])

    def after(fraction: float) -> Masks:
        share_L = torch.lerp(sparsity_L, wanted_L, fraction)
        found = {axis: mask.clone() for axis, mask in masks.items()}
        for axis in ("group", "neuron"):
            if axis not in masks:
                continue
            for layer, share in enumerate(share_L.tolist()):
                size = masks[axis].shape[-1]
                keep = ceil(size * (1 - share) - 1e-6) if axis == "group" else int(size * (1 - share) + 1e-6)
                found[axis][layer] = _best(scores[axis][layer], masks[axis][layer], max(keep, 1))
        return found

    def fits(fraction: float) -> bool:
        return left(source, after(fraction)).parameters() <= budget

    if not fits(1.0):
        sparsity_L.copy_(wanted_L)
        return after(1.0), False
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    above, below = after(low), after(high)  # between them, heads of one block or of several go: one block after the other, then neurons
    sparsity_L.lerp_(wanted_L, high)
    for layer in importance_L.argsort(stable=True).tolist():
        step = {axis: mask.clone() for axis, mask in above.items()}
        for axis in {"group", "neuron"} & set(masks):
            step[axis][layer] = below[axis][layer]
        now = left(source, step)
        if now.parameters() <= budget:
            near = budget - now.parameters() < _neuron(source, now)
            return (step if near else _trimmed(source, above, scores, budget, rule, uniform=False) or step), True
        above = step
    return below, True


def check_budget(
    source: Anatomy, specs: Mapping[str, GateSpec], budget: int, rule: AllocationConfig, *, adapts: bool, uniform: bool
) -> None:
    """Raise `ShapeError`, before any score is measured, where `ranked` or `adapted` could not meet the budget."""
    masks = all_open(source, specs)
    zeros = {axis: torch.zeros(mask.shape) for axis, mask in masks.items()}
    if adapts:
        zeros["layer"] = torch.zeros(source.sizes["layer"], dtype=torch.float64)
        found, met = adapted(source, masks, zeros, budget, rule.model_copy(update={"inner_steps": 1}), zeros["layer"].clone())
        if not met:
            remedy = f"These axes and protected blocks leave {left(source, found).parameters():,} at least: ask for more, or allow more."
            raise ShapeError("this budget cannot be met", [Problem("target.parameters", f"{budget:,}", remedy)])
    else:
        ranked(source, masks, zeros, budget, rule, uniform=uniform)


def steadied(batches: Sequence[Mapping[str, Tensor]], weight: float, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores that count fluctuation against a unit: z(I) - weight * z(F), from the scores of every calibration batch by itself.

    I is the mean over batches, F = variance / (mean^2 + eps) over them, and z standardises over the open units of a block. After SAAP
    (arXiv 2412.15127), of which it is known that unstable structures go first; the formula is ours.
    """
    found = {}
    for axis in batches[0]:
        stacked = torch.stack([batch[axis].double() for batch in batches])
        mean, variance = stacked.mean(0), stacked.var(0, correction=0)
        there = masks[axis] > 0 if axis in masks else torch.ones(mean.shape, dtype=torch.bool)
        fluctuation = variance / (mean.square() + torch.finfo(torch.float32).tiny)
        found[axis] = (_standardised(mean, there) - weight * _standardised(fluctuation, there)).float()
    return found


def centred(importance_L: Tensor) -> Tensor:
    """Importance of the blocks with mean 0 and largest absolute value 1 (Adapt-Pruner), in fp64; all 0 where they are alike."""
    apart = importance_L.double() - importance_L.double().mean()
    return apart / apart.abs().max().clamp(min=1e-12)


def _best(scores_N: Tensor, open_N: Tensor, keep: int) -> Tensor:
    """A mask of the `keep` best of what is open."""
    keep = min(keep, int(open_N.sum()))
    best = scores_N.masked_fill(open_N == 0, float("-inf")).topk(keep).indices
    return torch.zeros_like(open_N).scatter_(0, best, 1.0)


def _free(source: Anatomy, rule: AllocationConfig) -> Tensor:
    """1 for the blocks that may be pruned, 0 for those that are protected: [L]."""
    first, last = rule.protect
    free_L = torch.ones(source.sizes["layer"])
    free_L[:first] = 0.0
    free_L[max(0, len(free_L) - last) :] = 0.0
    return free_L


def _lines(source: Anatomy, masks: Masks, scores: Mapping[str, Tensor], rule: AllocationConfig, uniform: bool) -> list[_Removals]:
    """For each axis what may go, in order."""
    lines, sizes = [], left(source, masks)
    free_L = _free(source, rule).bool()
    for axis in masks:
        values, open_ = scores[axis].float(), masks[axis] > 0
        vectors, rows = values.reshape(-1, values.shape[-1]), open_.reshape(-1, values.shape[-1])
        numbers = torch.arange(values.numel()).reshape(vectors.shape)
        if axis == "layer":
            may = rows & free_L
        elif axis in PER_LAYER:
            of_vector = torch.arange(len(rows)) // (len(rows) // source.sizes["layer"])
            may = rows & (free_L & _there(source, masks))[of_vector][:, None]
        else:
            may = rows
        keep = max(1, ceil((1 - rule.cap) * values.shape[-1] - 1e-9))
        each = _parameters_of_one(source, sizes, axis) if rule.compare == "parameters" else 1.0
        ordered = vectors.masked_fill(~may, float("inf")).sort(dim=-1, stable=True)
        units = numbers.gather(1, ordered.indices)
        allowed = (may.sum(-1) - (keep - (rows & ~may).sum(-1)).clamp(min=0)).clamp(min=0)
        if uniform and axis in PER_LAYER:
            there_V = may.any(-1)
            deep = int(allowed[there_V].min()) if bool(there_V.any()) else 0
            chosen, costs = units[there_V, :deep], ordered.values[there_V, :deep]
            places = torch.arange(deep).expand(chosen.shape)
            together = costs.sum(0) if rule.compare == "raw" else costs.mean(0)
            lines.append(_Removals(axis, chosen.flatten(), places.flatten(), together / each))
        else:
            taken = torch.arange(values.shape[-1]) < allowed[:, None]
            places = torch.arange(int(taken.sum()))
            lines.append(_Removals(axis, units[taken], places, ordered.values[taken] / each))
    return lines


def _standardised(values: Tensor, open_: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over what is open of each vector (of each block, where a block has several)."""
    flat, there = (x.reshape(x.shape[0], -1) if x.dim() > 1 else x[None] for x in (values, open_.to(values.dtype)))
    number = there.sum(-1, keepdim=True).clamp(min=1)
    mean = (flat * there).sum(-1, keepdim=True) / number
    deviation = (((flat - mean) * there).square().sum(-1, keepdim=True) / number).sqrt().clamp(min=1e-12)
    return ((flat - mean) / deviation).reshape(values.shape)


def _parameters_of_one(source: Anatomy, now: Anatomy, axis: str) -> float:
    """How many parameters one unit of an axis has in a model of the sizes that are `now`, as a mean over blocks."""
    rows = list(source.rows(source.family.block))
    sizes = [now.sizes_in(layer) for layer in range(now.sizes["layer"])]
    if axis == "layer":
        return sum(count(row.pattern, block) for block in sizes for row in rows) / len(sizes)
    if axis == "hidden":
        return float(now.parameters()) - replace(now, sizes={**now.sizes, "hidden": now.sizes["hidden"] - 1}).parameters()
    less = [{**block, axis: block[axis] - 1} for block in sizes]
    gone = sum(count(row.pattern, full) - count(row.pattern, one) for full, one in zip(sizes, less, strict=True) for row in rows)
    return gone / len(sizes) / (now.sizes["group"] if axis == "query" else 1)


def _divisible(source: Anatomy, found: Masks, scores: Mapping[str, Tensor]) -> Masks:
    """Masks whose shape the family's stock class loads: `hidden` goes down to a multiple of the heads."""
    now = left(source, found)
    heads = now.sizes["group"] * now.sizes["query"]
    if not source.family.hidden_divisible_by_heads or now.sizes["hidden"] % heads == 0:
        return found
    hidden = now.sizes["hidden"] // heads * heads
    if "hidden" not in found or hidden < heads:
        remedy = f"Transformers loads {source.family.model_type} only so: prune hidden too, or ask for prune.shape per_layer."
        found_shape = f"{now.sizes['hidden']} channels on {heads} heads"
        raise ShapeError("the shape that the scores lead to does not load", [Problem("prune.axes", found_shape, remedy)])
    return {**found, "hidden": _best(scores["hidden"], found["hidden"], hidden)}


def _neuron(source: Anatomy, now: Anatomy) -> int:
    """Parameters of one neuron of one block."""
    rows = list(source.rows(source.family.block))
    return sum(count(row.pattern, {**now.sizes, "neuron": 1}) - count(row.pattern, {**now.sizes, "neuron": 0}) for row in rows)


def _trimmed(
    source: Anatomy, masks: Masks, scores: Mapping[str, Tensor], budget: int, rule: AllocationConfig, *, uniform: bool
) -> Masks | None:
    """Close the lowest neurons of masks that leave a little too much, as few as meet the budget; None where there are not enough."""
    if "neuron" not in masks:
        return None
    now = left(source, masks)
    there_L = _there(source, masks)
    open_LM = (masks["neuron"] > 0) & there_L[:, None]
    keep = max(1, ceil((1 - rule.cap) * open_LM.shape[1] - 1e-9))
    worth_LM = scores["neuron"].masked_fill(~open_LM, float("inf"))
    order_LM = worth_LM.argsort(dim=-1, stable=True)
    free_LM = torch.arange(open_LM.shape[1]) < (open_LM.sum(-1, keepdim=True) - keep)
    free_LM &= (_free(source, rule).bool() & there_L)[:, None]
    number = -(-(now.parameters() - budget) // (_neuron(source, now) * (now.sizes["layer"] if uniform else 1)))
    neuron_LM = masks["neuron"].clone()
    if uniform:
        if int(free_LM[there_L].sum(-1).min()) < number:
            return None
        neuron_LM.scatter_(1, order_LM[:, :number], 0.0)
        neuron_LM[~there_L] = masks["neuron"][~there_L]
    else:
        may_LM = torch.zeros_like(open_LM).scatter_(1, order_LM, free_LM)
        if int(may_LM.sum()) < number:
            return None
        neuron_LM.view(-1)[worth_LM.masked_fill(~may_LM, float("inf")).flatten().argsort(stable=True)[:number]] = 0.0
    return {**masks, "neuron": neuron_LM}


def _refilled(source: Anatomy, before: Masks, found: Masks, scores: Mapping[str, Tensor], budget: int) -> Masks:
    """Open again, in every block, the best of the neurons that went, as many as the budget has room for."""
    now = left(source, found)
    number = (budget - now.parameters()) // (_neuron(source, now) * now.sizes["layer"])
    if "neuron" not in found or number < 1:
        return found
    there_L = _there(source, found)
    gone_LM = (before["neuron"] > 0) & (found["neuron"] == 0) & there_L[:, None]
    best = scores["neuron"].masked_fill(~gone_LM, float("-inf")).topk(min(number, int(gone_LM[there_L].sum(-1).min())), dim=-1)
    neuron_LM = found["neuron"].scatter(1, best.indices, 1.0)
    neuron_LM[~there_L] = found["neuron"][~there_L]
    return {**found, "neuron": neuron_LM}


def _there(source: Anatomy, masks: Masks) -> Tensor:
    """Which blocks are left: booleans [L]."""
    return masks["layer"] > 0 if "layer" in masks else torch.ones(source.sizes["layer"], dtype=torch.bool)
