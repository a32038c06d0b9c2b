"""Gates of tiny models for tests: their specs, masks drawn at random, and gates in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models import tiny_config, tiny_model
from shearling.arch.families import Anatomy, anatomy_of
from shearling.objectives.lm import token_losses
from shearling.prune.attach import Attachment
from shearling.prune.config import GateConfig
from shearling.prune.gates import Gates, GateSpec, gate_specs
from shearling.prune.learn import GateLearner

SOURCE = anatomy_of(tiny_config("llama").to_dict())
TARGETS = {
    "all but groups": SOURCE.with_sizes(layer=2, hidden=36, query=1, neuron=24),
    "groups and neurons": SOURCE.with_sizes(group=2, neuron=7),
}
LAGRANGIAN = GateConfig(constraint="lagrangian", learning_rate=0.2, multiplier_learning_rate=0.2, noise=1.0, final_noise=1.0, ramp=0.2)
PROJECTED = GateConfig(kind="deterministic")
MULTIPLIED = GateConfig(
    kind="deterministic", constraint="lagrangian", learning_rate=0.2, multiplier_learning_rate=0.2, ramp=0.2, temperature=0.3
)


def specs_of(family: str, **sizes: Any) -> tuple[Anatomy, dict[str, GateSpec]]:
    """A tiny source, and gates on every axis of it."""
    source = anatomy_of(tiny_config(family, **sizes).to_dict())
    return source, gate_specs(source, source.with_sizes(layer=1, hidden=24, group=2, query=1, neuron=20))


def random_masks(source: Anatomy, target: Anatomy, seed: int) -> dict[str, Tensor]:
    """Masks of 0 and 1 that leave the target's sizes."""
    generator = torch.Generator().manual_seed(seed)
    gates = Gates(gate_specs(source, target))
    with torch.no_grad():
        for log_alpha in gates.log_alpha.values():
            log_alpha.copy_(torch.randn(log_alpha.shape, generator=generator))
    return gates.hardened()


class Recorder(Attachment):
    """An attachment that remembers what was set."""

    masks: dict[str, Tensor]

    def set(self, masks: Any) -> None:
        self.masks = dict(masks)
        super().set(masks)


class Training:
    """A learner on a tiny model with frozen weights, and the loss of a step's batch."""

    def __init__(self, config: GateConfig, *, steps: int, target: str = "all but groups", seed: int = 5) -> None:
        self.model = tiny_model("llama").requires_grad_(False)
        self.attachment = Recorder(self.model, SOURCE)
        self.gates = Gates(gate_specs(SOURCE, TARGETS[target]))
        self.learner = GateLearner(self.gates, self.attachment, config, steps=steps, warmup=steps // 10, seed=seed)

    def start(self) -> None:
        generator = torch.Generator().manual_seed(9)
        self.learner.start_from({axis: torch.rand(spec.shape, generator=generator) for axis, spec in self.gates.specs.items()})

    def run(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            generator = torch.Generator().manual_seed(step)
            for microbatch in range(2):
                self.learner.draw(step, microbatch)
                ids = torch.randint(0, 96, (2, 12), generator=generator)
                (token_losses(self.model, ids).mean() / 2).backward()
            self.learner.update(step)

    def drawn(self, step: int, microbatch: int) -> dict[str, Tensor]:
        self.learner.draw(step, microbatch)
        return {axis: mask.detach().clone() for axis, mask in self.attachment.masks.items()}

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.learner.tensors().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
