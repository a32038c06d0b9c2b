"""Pruning in cuts by scores: once, several times, or all along training, with the same masks, plan and cut in the end.

`StagedPruner` stands where learned gates stand in `fit`: between two cuts the weights train under 0/1 masks. A closed unit writes
nothing and gets no gradient, so weights, losses and the optimizer's moments of what is left are those of a model that was
sliced at each cut, moments included. So it is sliced at the end alone, or now and then on the way, for speed: masks, scores and budgets
are the source's all along, and `Kept` leads from the source's units to those of the model that trains, and back.

Shapes: L layers, G key/value heads, Q query heads in each, M neurons, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from shearling.arch.families import Anatomy
from shearling.prune import scores
from shearling.prune.allocate import Masks, all_open, left
from shearling.prune.attach import Attachment
from shearling.prune.gates import SPANNED, GateSpec
from shearling.prune.plan import PrunePlan, plan_from_masks
from shearling.prune.stats import Scores, Stats, weights_of
from shearling.shapes import PRUNABLE

Measure = Callable[[Masks, int], Scores]
"""(masks, number of the measurement from 0) -> scores of every axis that is asked for."""
Cut = Callable[[Masks, Scores, float, Tensor], tuple[Masks, bool]]
"""(masks, scores, share of the way from source to target in (0, 1], state [L] that it may change) -> masks, and whether it is there."""


_KEPT = "kept/"
"""Names of the masks by which a model was sliced begin so among a pruner's tensors."""


class Kept:
    """What of a source is in the model that trains: all of it, or what slicing has left.

    `masks`: those by which it was sliced, {axis: 0/1 tensor of the source's gates' shape}; an axis left out is whole. What they leave must
    be alike in all blocks; else `ValueError`.
    """

    def __init__(self, source: Anatomy, masks: Mapping[str, Tensor]) -> None:
        self.source, self.anatomy, self.masks = source, left(source, masks), dict(masks)
        if masks and self.anatomy.blocks:
            raise ValueError("blocks that differ cannot be sliced on the way")
        layer_L, hidden_D, group_LG, query_LGQ, neuron_LM = (
            ({**all_open(source, PRUNABLE), **masks})[axis].gt(0).cpu() for axis in PRUNABLE
        )
        there_LG = layer_L[:, None] & group_LG
        there = (layer_L, hidden_D, there_LG, there_LG[..., None] & query_LGQ, layer_L[:, None] & neuron_LM)
        self._numbers = {axis: open_.flatten().nonzero().flatten() for axis, open_ in zip(PRUNABLE, there, strict=True)}

    @property
    def whole(self) -> bool:
        """Whether nothing is gone."""
        return self.anatomy == self.source

    @property
    def layers(self) -> list[int]:
        """Numbers of the source's blocks that are left."""
        return list(map(int, self._numbers["layer"]))

    def narrow(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of values of the source's units, {axis: of the source's gates' shape}, those of the model's."""
        return {axis: tensor.flatten()[self._numbers[axis].to(tensor.device)].view(self._shape(axis)) for axis, tensor in values.items()}

    def widen(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse: values of the model's units as values of the source's, 0 for what is gone."""
        found = {}
        for axis, tensor in values.items():
            shape = [self.source.sizes[a] for a in SPANNED[axis]]
            flat_N = tensor.new_zeros(prod(shape)).index_copy_(0, self._numbers[axis].to(tensor.device), tensor.flatten())
            found[axis] = flat_N.view(shape)
        return found

    def closed(self, masks: Mapping[str, Tensor]) -> Masks:
        """Of masks over the source's units those of the model's, without axes on which nothing is closed."""
        return {axis: mask for axis, mask in self.narrow(masks).items() if not bool((mask > 0).all())}

    def plan(self, masks: Mapping[str, Tensor]) -> tuple[PrunePlan, Anatomy]:
        """From the model to what masks over the source's units leave of it."""
        narrowed = self.narrow(masks)
        target = left(self.anatomy, narrowed)
        return plan_from_masks(self.anatomy, target, narrowed), target

    def score(self, names_by_axis: Mapping[str, str], specs: Mapping[str, GateSpec], of: Callable[..., Scores], seed: int = 0) -> Scores:
        """Scores of the source's units, 0 for what is gone. `of`: (names by axis, specs) -> scores of the model's units.

        Scores that need no statistics go by place or by chance: they are the source's own, whatever is left. `specs`: the source's.
        """
        apart = {axis: name for axis, name in names_by_axis.items() if not scores.SCORES[name].needs}
        found = scores.of_stats(apart, Stats(self.source, {axis: specs[axis] for axis in apart}, {}, seed))
        rest = {axis: name for axis, name in names_by_axis.items() if axis not in apart}
        if rest:
            found |= self.widen(of(rest, {axis: replace(specs[axis], shape=self._shape(axis)) for axis in rest}))
        return {axis: found[axis] for axis in names_by_axis}

    def _shape(self, axis: str) -> tuple[int, ...]:
        return tuple(self.anatomy.sizes[a] for a in SPANNED[axis])


class StagedPruner:
    """Masks that close more units at given steps, until the target is reached.

    `at`: after which steps a cut is made, ascending; 0 is before the first. Cut number i of n goes (i + 1) / n of the way, and is
    made of as many measurements as its rule takes. Where `running` is given, it is what training itself measured since
    the last cut that decides, and nothing is measured apart. `after_cut`: called with the masks and the number of every cut that is made,
    counted from 0, with no masks on the model. `kept`: what of the source is in the model, all of it if left out; of it are
    `attachment` and what `running` looks at. `slice_every`: in how many cuts the model becomes `due` to be sliced; 0: never.
    """

    def __init__(
        self,
        source: Anatomy,
        attachment: Attachment,
        masks: Masks,
        *,
        cut: Cut,
        measure: Measure,
        at: Sequence[int],
        running: RunningScores | None = None,
        device: torch.device | None = None,
        kept: Kept | None = None,
        slice_every: int = 0,
        after_cut: Callable[[Masks, int], None] = lambda masks, number: None,
    ) -> None:
        self.source, self.attachment, self.masks = source, attachment, masks
        self.kept = kept or Kept(source, {})
        self.measurements = 0
        """How often scores were measured apart from training."""
        self.made_cut = False
        """Whether the last update made a cut."""
        self._slice_every, self._after_cut = slice_every, after_cut
        self._sliced = 0  # cuts that were made when the model was sliced last
        self._closed: tuple[Masks, Masks] | None = None  # masks, and what of them is set on the model
        self._cut, self._measure, self._at, self._running = cut, measure, list(at), running
        self._device = device or torch.device("cpu")
        self._done = 0
        self._state_L = torch.zeros(source.sizes["layer"], dtype=torch.float64)

    def draw(self, step: int, microbatch: int) -> None:
        """Set the masks; nothing is random."""
        self.settle(step)

    def settle(self, step: int) -> None:
        """Set the masks."""
        self.attachment.set({axis: mask.to(self._device) for axis, mask in self._own_masks().items()})

    def parameters(self) -> list[nn.Parameter]:
        """None: masks do not learn."""
        return []

    def update(self, step: int) -> None:
        """See what training measured in this step, and make the cuts that are due after it."""
        if self._running is not None:
            self._running.observe(self._own_masks())
        done = self._done
        self.catch_up(step)
        self.made_cut = self._done > done

    def catch_up(self, step: int) -> None:
        """Make every cut that is due after `step` and has not been made: those of a skipped step, too. A collective."""
        while self._done < len(self._at) and self._at[self._done] <= step:
            share = (self._done + 1) / len(self._at)
            there = False
            while not there:
                self.masks, there = self._cut(self.masks, self._found(), share, self._state_L)
            self.attachment.set({})
            self._after_cut(self.masks, self._done)
            self._done += 1
            if self._running is not None:
                self._running.forget()

    def due(self) -> bool:
        """Whether the model is to be sliced now: `slice_every` more cuts were made, and stock transformers loads the shape they leave."""
        if not self._slice_every or self._done // self._slice_every <= self._sliced // self._slice_every:
            return False
        now = left(self.source, self.masks)
        return not now.family.hidden_divisible_by_heads or now.sizes["hidden"] % (now.sizes["group"] * now.sizes["query"]) == 0

    def metrics(self, step: int) -> dict[str, Any]:
        """Sizes for the log: of each axis the mean over its vectors, which is the scheduled size too; and what is left in parameters.

        Where the model is sliced now and then, its own parameters, too: those that masks close and nothing has cut out yet included.
        """
        sizes = {}
        for axis, mask in self.masks.items():
            counts = mask.sum(-1)
            sizes[axis] = {"expected": float(counts.mean()), "target": float(counts.mean()), "worst": 0.0}
        found = {"sizes": sizes, "parameters": left(self.source, self.masks).parameters(), "learning_rate": {}, "multipliers": {}}
        return found | ({"model_parameters": self.kept.anatomy.parameters()} if self._slice_every else {})

    def tensors(self) -> dict[str, Tensor]:
        """Masks, what the rule keeps, the counts, and of a model that was sliced by which masks and after how many cuts, by name."""
        own = {f"mask/{axis}": mask for axis, mask in self.masks.items()}
        own |= {"state": self._state_L, "counts": torch.tensor([self._done, self.measurements])}
        own |= {f"{_KEPT}{axis}": mask for axis, mask in self.kept.masks.items()}
        own |= {"sliced": torch.tensor(self._sliced)} if self.kept.masks else {}
        return own | (self._running.tensors() if self._running is not None else {})

    def tensors_once_sliced(self) -> dict[str, Tensor]:
        """The same of a model from which all is gone that the masks close."""
        again = {f"{_KEPT}{axis}": mask for axis, mask in self.masks.items()} | {"sliced": torch.tensor(self._done)}
        return self.tensors() | again

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what `tensors` gave back."""
        self.masks = {axis: tensors[f"mask/{axis}"].clone() for axis in self.masks}
        self._state_L = tensors["state"].clone()
        self._done, self.measurements = tensors["counts"].tolist()
        self._sliced = int(tensors["sliced"]) if self.kept.masks else 0
        if self._running is not None:
            self._running.load(tensors)

    def _own_masks(self) -> Masks:
        """Of the model's units, of the axes on which any is closed."""
        if self._closed is None or self._closed[0] is not self.masks:
            self._closed = self.masks, self.kept.closed(self.masks)
        return self._closed[1]

    def _found(self) -> Scores:
        if self._running is not None:
            return self._running.means()
        self.attachment.set({})
        self.measurements += 1
        return self._measure(self.masks, self.measurements - 1)


def kept_by(source: Anatomy, tensors: Mapping[str, Tensor]) -> Kept:
    """What of a source is in the model of which `StagedPruner.tensors` gave `tensors`."""
    return Kept(source, {name.removeprefix(_KEPT): tensor.clone() for name, tensor in tensors.items() if name.startswith(_KEPT)})


class RunningScores:
    """Scores from training's own gradients, as means over the steps since the last cut (EfficientLLM, arXiv 2502.06663).

    Only scores that need weights and their gradients. The gradient is the step's, after clipping, and the weight the one after the
    step: both are there when the step is done, and the paper does not say which it takes. They are of the source's units, by `specs`;
    `kept`: what of it is in the model, all of it if left out.
    """

    def __init__(
        self, names_by_axis: Mapping[str, str], model: nn.Module, source: Anatomy, specs: Mapping[str, GateSpec], kept: Kept | None = None
    ) -> None:
        self._names, self._specs = dict(names_by_axis), {axis: specs[axis] for axis in names_by_axis}
        self._model, self._kept = model, kept or Kept(source, {})
        self._sums = {axis: torch.zeros(spec.shape) for axis, spec in self._specs.items()}
        self._steps = torch.zeros(())  # in the sums; below 0 once a cut was made by them

    def observe(self, masks: Mapping[str, Tensor]) -> None:
        """Add this step's scores under these masks of the model's units, or begin anew with them after a cut. A collective where the model
        is sharded."""
        if self._steps < 0:
            for total in (*self._sums.values(), self._steps):
                total.zero_()
        anatomy = self._kept.anatomy
        weights = {name: self._model.get_parameter(name) for name, _, _ in weights_of(anatomy)}
        gradients = {name: weight.grad if weight.grad is not None else torch.zeros_like(weight) for name, weight in weights.items()}

        def of_model(names: Mapping[str, str], specs: Mapping[str, GateSpec]) -> Scores:
            return scores.of_stats(names, Stats(anatomy, specs, weights, gradients=gradients, masks=masks))

        for axis, values in self._kept.score(self._names, self._specs, of_model).items():
            self._sums[axis] += values
        self._steps += 1

    def means(self) -> Scores:
        """Means over the steps that were seen; zeros before the first."""
        return {axis: total / self._steps.abs().clamp(min=1) for axis, total in self._sums.items()}

    def forget(self) -> None:
        """After a cut, begin anew with the next step: until then these means stay, for a cut that is due while steps are skipped."""
        self._steps.abs_().neg_()

    def tensors(self) -> dict[str, Tensor]:
        """The sums and the number of steps, by name."""
        return {f"running/{axis}": total for axis, total in self._sums.items()} | {"running_steps": self._steps}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what `tensors` gave back."""
        self._sums = {axis: tensors[f"running/{axis}"].clone() for axis in self._sums}
        self._steps = tensors["running_steps"].clone()


def cut_steps(steps: int, cuts: int, share: str, *, at_start: bool) -> list[int]:
    """After which steps `cuts` cuts are made. `share` of the steps that follow each: `constant`, or `linear`: 2t / (T (T + 1)) after
    the t-th of T (Adapt-Pruner, section 4). `at_start`: the first is made before the first step, else after its own share."""
    weights = [float(t) for t in range(1, cuts + 1)] if share == "linear" else [1.0] * cuts
    total, ends, seen = sum(weights), [], 0.0
    for weight in weights:
        ends.append(round(steps * (seen if at_start else seen + weight) / total))
        seen += weight
    return ends
