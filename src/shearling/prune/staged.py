"""Pruning in cuts by scores: once, several times, or all along training, with the same masks, plan and cut in the end.

`StagedPruner` stands where learned gates stand in `fit`: between two cuts the weights train under 0/1 masks. A closed unit writes
nothing and gets no gradient, so weights, losses and the optimizer's moments of what is left are those of a model that was
sliced at each cut, moments included; it is sliced once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shearling.arch.families import Anatomy
from shearling.prune import scores
from shearling.prune.allocate import Masks, left
from shearling.prune.attach import Attachment
from shearling.prune.gates import GateSpec
from shearling.prune.stats import Scores, Stats, weights_of

Measure = Callable[[Masks, int], Scores]
"""(masks, number of the measurement from 0) -> scores of every axis that is asked for."""
Cut = Callable[[Masks, Scores, float, Tensor], tuple[Masks, bool]]
"""(masks, scores, share of the way from source to target in (0, 1], state [L] that it may change) -> masks, and whether it is there."""


class StagedPruner:
    """Masks that close more units at given steps, until the target is reached.

    `at`: after which steps a cut is made, ascending; 0 is before the first. Cut number i of n goes (i + 1) / n of the way, and is
    made of as many measurements as its rule takes. Where `running` is given, it is what training itself measured since
    the last cut that decides, and nothing is measured apart.
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
    ) -> None:
        self.source, self.attachment, self.masks = source, attachment, masks
        self.measurements = 0
        """How often scores were measured apart from training."""
        self._cut, self._measure, self._at, self._running = cut, measure, list(at), running
        self._device = device or torch.device("cpu")
        self._done = 0
        self._state_L = torch.zeros(source.sizes["layer"], dtype=torch.float64)

    def draw(self, step: int, microbatch: int) -> None:
        """Set the masks; nothing is random."""
        self.settle(step)

    def settle(self, step: int) -> None:
        """Set the masks."""
        self.attachment.set({axis: mask.to(self._device) for axis, mask in self.masks.items()})

    def parameters(self) -> list[nn.Parameter]:
        """None: masks do not learn."""
        return []

    def update(self, step: int) -> None:
        """See what training measured in this step, and make the cuts that are due after it."""
        if self._running is not None:
            self._running.observe()
        self.catch_up(step)

    def catch_up(self, step: int) -> None:
        """Make every cut that is due after `step` and has not been made: those of a skipped step, too. A collective."""
        while self._done < len(self._at) and self._at[self._done] <= step:
            share = (self._done + 1) / len(self._at)
            there = False
            while not there:
                self.masks, there = self._cut(self.masks, self._found(), share, self._state_L)
            self._done += 1
            if self._running is not None:
                self._running.forget()

    def metrics(self, step: int) -> dict[str, Any]:
        """Sizes for the log: of each axis the mean over its vectors, which is the scheduled size too; and what is left in parameters."""
        sizes = {}
        for axis, mask in self.masks.items():
            counts = mask.sum(-1)
            sizes[axis] = {"expected": float(counts.mean()), "target": float(counts.mean()), "worst": 0.0}
        return {"sizes": sizes, "parameters": left(self.source, self.masks).parameters(), "learning_rate": {}, "multipliers": {}}

    def tensors(self) -> dict[str, Tensor]:
        """Masks, what the rule keeps, and the counts, by name."""
        own = {f"mask/{axis}": mask for axis, mask in self.masks.items()}
        own |= {"state": self._state_L, "counts": torch.tensor([self._done, self.measurements])}
        return own | (self._running.tensors() if self._running is not None else {})

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what `tensors` gave back."""
        self.masks = {axis: tensors[f"mask/{axis}"].clone() for axis in self.masks}
        self._state_L = tensors["state"].clone()
        self._done, self.measurements = tensors["counts"].tolist()
        if self._running is not None:
            self._running.load(tensors)

    def _found(self) -> Scores:
        if self._running is not None:
            return self._running.means()
        self.attachment.set({})
        self.measurements += 1
        return self._measure(self.masks, self.measurements - 1)


class RunningScores:
    """Scores from training's own gradients, as means over the steps since the last cut (EfficientLLM, arXiv 2502.06663).

    Only scores that need weights and their gradients. The gradient is the step's, after clipping, and the weight the one after the
    step: both are there when the step is done, and the paper does not say which it takes.
    """

    def __init__(self, names_by_axis: Mapping[str, str], model: nn.Module, source: Anatomy, specs: Mapping[str, GateSpec]) -> None:
        self._names, self._source, self._specs = dict(names_by_axis), source, {axis: specs[axis] for axis in names_by_axis}
        self._model = model
        self._sums = {axis: torch.zeros(spec.shape) for axis, spec in self._specs.items()}
        self._steps = torch.zeros(())  # in the sums; below 0 once a cut was made by them

    def observe(self) -> None:
        """Add this step's scores, or begin anew with them after a cut. A collective where the model is sharded."""
        if self._steps < 0:
            for total in (*self._sums.values(), self._steps):
                total.zero_()
        weights = {name: self._model.get_parameter(name) for name, _, _ in weights_of(self._source)}
        gradients = {name: weight.grad if weight.grad is not None else torch.zeros_like(weight) for name, weight in weights.items()}
        found = scores.of_stats(self._names, Stats(self._source, self._specs, weights, gradients=gradients))
        for axis, values in found.items():
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
