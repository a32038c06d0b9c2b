"""Gates in training: drawn for every microbatch, held to the ramp, moved after every step, settled for evaluations.

Two ways to hold the gates to their targets:

`lagrangian`   the paper's: multipliers ascend on the constraint while gates descend on loss plus constraint.
`projected`    the multipliers' limit, ours: at every step each vector's logits are shifted by the one number that makes its size
               exactly the scheduled one, so the target is met at any length of schedule; the loss alone moves the logits
               against one another. A falling temperature divides the shifted logits, so that the gates end at 0 or 1.

Either holds either kind of gates (`gates.KINDS`). Deterministic ones take the falling temperature under multipliers, too, and are
pushed apart towards the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shearling.prune.attach import Attachment
from shearling.prune.config import GateConfig
from shearling.prune.constraints import lagrangian, push_apart, scheduled_sizes, shift_for, shifted
from shearling.prune.gates import KINDS, LIMIT, Gates
from shearling.prune.scores import ranks
from shearling.schedules import cosine_with_warmup, geometric, ramp


class GateLearner:
    """Gates of a model in training for `steps` steps. Everything random follows from (seed, step, microbatch)."""

    def __init__(self, gates: Gates, attachment: Attachment, config: GateConfig, *, steps: int, warmup: int, seed: int) -> None:
        self.gates, self.attachment, self.config, self.kind = gates, attachment, config, KINDS[config.kind]
        self.steps, self.warmup, self.seed = steps, warmup, seed
        self.learning_rate = 2 * LIMIT / max(steps, 1) if config.learning_rate is None else config.learning_rate
        self._generator = torch.Generator()
        self._optimizer = GateOptimizer(gates, self.learning_rate, config)
        self._shifts: tuple[int, dict[str, Tensor]] | None = None  # (step, shift of every vector), until the logits move

    def start_from(self, scores: Mapping[str, Tensor]) -> None:
        """Starting logits by rank of the score inside each vector, all of them open; axes without scores stay as they are."""
        with torch.no_grad():
            for axis in scores:
                log_alpha, low = self.gates.log_alpha[axis], self.config.start_low
                log_alpha.copy_(low + (LIMIT - low) * ranks(scores[axis]))
        self._shifts = None

    def draw(self, step: int, microbatch: int) -> None:
        """Set fresh gates for this microbatch."""
        config, masks = self.config, {}
        noise = geometric(step, self.steps, config.noise, config.final_noise)
        self._generator.manual_seed(int(np.random.SeedSequence([self.seed, step, microbatch]).generate_state(1, np.uint64)[0]))
        for axis, logits in self.logits(step).items():
            masks[axis] = self.kind.value(logits, self.gates.uniform(axis, self._generator) if noise > 0 else None, noise)
        self.attachment.set(masks)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The logits, which get gradients from the backward passes; every process holds all of them."""
        return list(self.gates.log_alpha.values())

    def settle(self, step: int) -> None:
        """Set the gates without noise."""
        with torch.no_grad():
            self.attachment.set({axis: self.kind.value(logits) for axis, logits in self.logits(step).items()})

    def update(self, step: int) -> None:
        """Add the constraint's gradient and move gates and multipliers once."""
        if self.kind.binarization:
            weight = self.kind.binarization * (step / self.steps) ** 2
            for axis, logits in self.logits(step).items():
                push_apart(self.gates.log_alpha[axis], self.kind.value(logits).detach(), weight)
        if self.config.constraint == "lagrangian":
            lagrangian(self.gates, self._progress(step), self.kind, self._temperature(step)).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step(self._factor(step))
        self._shifts = None
        if self.config.constraint == "lagrangian":
            self.gates.clamp_()

    def logits(self, step: int) -> dict[str, Tensor]:
        """{axis: logits in [-LIMIT, LIMIT] that the gates of this step are drawn from}; their gradient reaches `log_alpha`."""
        if self.config.constraint == "lagrangian":
            return {axis: shifted(x, 0.0, self._temperature(step)) for axis, x in self.gates.log_alpha.items()}
        if self._shifts is None or self._shifts[0] != step:
            wanted, how = scheduled_sizes(self.gates, self._progress(step)), (self._temperature(step), self._settled(step), self.kind)
            self._shifts = (step, {axis: shift_for(x, wanted[axis], *how) for axis, x in self.gates.log_alpha.items()})
        return {axis: shifted(x, self._shifts[1][axis], self._temperature(step)) for axis, x in self.gates.log_alpha.items()}

    @torch.no_grad()
    def metrics(self, step: int) -> dict[str, Any]:
        """Sizes, multipliers and learning rate for the log.

        Of each axis the scheduled size, the mean expected size of its vectors by what the constraint counts, and how far the worst
        vector is from the schedule.
        """
        scheduled, sizes = scheduled_sizes(self.gates, self._progress(step)), {}
        for axis, logits in self.logits(step).items():
            expected = self.kind.count(logits, self._settled(step)).sum(-1)
            worst = (expected - scheduled[axis]).abs().max()
            sizes[axis] = {"expected": float(expected.mean()), "target": scheduled[axis], "worst": float(worst)}
        found: dict[str, Any] = {"sizes": sizes, "learning_rate": {"gates": self.learning_rate * self._factor(max(step, 1))}}
        return found | {"multipliers": {axis: self._multipliers(axis) for axis in self.gates.specs}}

    def tensors(self) -> dict[str, Tensor]:
        """Gates, multipliers and their optimizer's moments, by name."""
        own = {name: parameter.detach() for name, parameter in self.gates.named_parameters()}
        return own | self._optimizer.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what `tensors` gave back."""
        with torch.no_grad():
            for name, parameter in self.gates.named_parameters():
                parameter.copy_(tensors[name])
        self._optimizer.load(tensors)
        self._shifts = None

    def _multipliers(self, axis: str) -> dict[str, float]:
        """What holds an axis to the ramp, mean over its vectors: the two multipliers, or the shift that stands for them."""
        if self.config.constraint == "lagrangian":
            return {"lambda_1": float(self.gates.lambda_1[axis].mean()), "lambda_2": float(self.gates.lambda_2[axis].mean())}
        return {"shift": float(self._shifts[1][axis].mean())} if self._shifts else {}

    def _factor(self, step: int) -> float:
        """Of the learning rates. It falls with the temperature, by which a step on the logits is divided when gates are drawn:
        else the last steps would leap over the window in which a gate is neither open nor closed, and none would settle."""
        factor = cosine_with_warmup(step, self.steps, self.warmup, self.config.final_learning_rate)
        return factor * (self._temperature(step) if self.config.constraint == "projected" else 1.0)

    def _settled(self, step: int) -> float:
        """How far the size that is held has gone over to the gates' own sum: 0 until the last fifth of the steps, 1 at the end.
        Multipliers hold the expected count all along."""
        return min(1.0, max(0.0, 5.0 * step / self.steps - 4.0)) if self.config.constraint == "projected" else 0.0

    def _temperature(self, step: int) -> float:
        """What logits are divided by; 1 under multipliers, unless the kind of gates is sharpened by it."""
        falls = self.config.constraint == "projected" or self.kind.sharpened
        return geometric(step, self.steps, self.config.temperature, self.config.final_temperature) if falls else 1.0

    def _progress(self, step: int) -> float:
        return ramp(step, round(self.config.ramp * self.steps))


class GateOptimizer:
    """Adam (Kingma & Ba 2015) for gates, which descend, and multipliers, which ascend.

    The second moment of a logit is shared by its vector, so that the gradients of a vector's gates keep their proportions: with
    one for each logit, as the original has, every gate moves by the full learning rate however little it matters.
    """

    def __init__(self, gates: Gates, learning_rate: float, config: GateConfig, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        self.learning_rate, self.config, self.betas = learning_rate, config, betas
        self._parameters = dict(gates.named_parameters())
        self._first = {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}
        self._second = {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}
        self._steps = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Move everything that has a gradient by its learning rate times `factor`, and drop the gradients."""
        self._steps += 1
        count = int(self._steps)
        for name, parameter in self._parameters.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            is_gate = name.startswith("log_alpha")
            square = gradient.square()
            if is_gate and self.config.shared_second_moment:
                square = square.mean(-1, keepdim=True).expand_as(square)
            first, second = self._first[name], self._second[name]
            first.lerp_(gradient, 1 - self.betas[0])
            second.lerp_(square, 1 - self.betas[1])
            update = first / (1 - self.betas[0] ** count)
            update /= (second / (1 - self.betas[1] ** count)).sqrt() + 1e-12
            rate = -self.learning_rate if is_gate else self.config.multiplier_learning_rate
            parameter.add_(update, alpha=rate * factor)

    def tensors(self) -> dict[str, Tensor]:
        """The moments and the step count, by name."""
        moments = {f"first/{name}": moment for name, moment in self._first.items()}
        return moments | {f"second/{name}": moment for name, moment in self._second.items()} | {"steps": self._steps}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what `tensors` gave back."""
        for name in self._parameters:
            self._first[name].copy_(tensors[f"first/{name}"])
            self._second[name].copy_(tensors[f"second/{name}"])
        self._steps.copy_(tensors["steps"])
