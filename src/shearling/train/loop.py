"""`fit`: the one loop of pruning and of continued pretraining, with and without gates. It receives everything it uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shearling.data.loader import Loader
from shearling.errors import Stopped
from shearling.objectives.lm import Objective
from shearling.schedules import cosine_with_warmup
from shearling.train import checkpoint
from shearling.train.config import FitConfig, RuntimeConfig
from shearling.train.log import RunLog
from shearling.train.optim import build_optimizer
from shearling.train.step import GateTraining, StepResult, train_step
from shearling.train.stop import StopOnSignal

Losses = dict[str, float]


class LearnedGates(GateTraining, Protocol):
    """What `fit` needs of gates beyond a step (`shearling.prune.learn.GateLearner`)."""

    def settle(self, step: int) -> None:
        """Set the gates without noise on the model, for an evaluation."""
        ...

    def metrics(self, step: int) -> dict[str, Any]:
        """Sizes, multipliers and learning rate for the log."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint has to hold of the gates."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what `tensors` gave back."""
        ...


@dataclass
class Progress:
    """Where a stage stands: all that a checkpoint holds beside tensors. Order and noise follow from it and the seed."""

    weights: np.ndarray
    """Domain shares [D] of the next step."""
    cursors: np.ndarray
    """Sequences used so far of each domain [D]."""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Seconds spent in steps and evaluations, over all tries."""
    heldout: Losses = field(default_factory=dict)
    """The newest held-out losses."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "weights": self.weights.tolist(), "cursors": self.cursors.tolist()}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Progress:
        """The inverse of `to_json`."""
        arrays = {"weights": np.array(values["weights"], np.float64), "cursors": np.array(values["cursors"], np.int64)}
        return Progress(**{**values, **arrays})


@dataclass(frozen=True)
class Surroundings:
    """What a stage runs in."""

    stage: str
    run_dir: Path
    runtime: RuntimeConfig
    device: torch.device
    domains: list[str]
    loader: Loader
    objective: Objective
    evaluate: Callable[[nn.Module], Losses]
    """Held-out losses of the model as it stands, with their `mean`."""
    reweigh: Callable[[np.ndarray, Losses], np.ndarray]
    """(shares [D], held-out losses) -> shares from now on."""
    reference: Mapping[str, float]
    """Reference losses, for the log."""
    stop: StopOnSignal
    show: Callable[[int, int, Mapping[str, Any]], None] = lambda step, steps, line: None
    """Called after every step with what was logged."""
    step_offset: int = 0
    """Steps of the stages before, so that no stage repeats another's draws."""
    reweigh_first: bool = False
    """Move the shares by the start's held-out losses before the first step."""

    @property
    def checkpoints(self) -> Path:
        """Folder of this stage's checkpoints."""
        return self.run_dir / "checkpoints" / self.stage


def fit(model: nn.Module, config: FitConfig, around: Surroundings, start: Progress, gates: LearnedGates | None = None) -> Progress:
    """Train `model` in place for `config.steps` steps, from the newest checkpoint if there is one, and return where it stands.

    `start.heldout` are the model's held-out losses before the first step, measured by the stage before.
    Raises `Stopped` after saving where a signal asked for it, `NumericsError` where a loss is not finite.
    """
    optimizer = build_optimizer(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    restored = _restore(model, optimizer, names, around, gates)
    progress = restored or start

    def save() -> None:
        moments, scalars = checkpoint.pack_optimizer(optimizer, names)
        tensors = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
        tensors |= {f"optimizer/{name}": moment for name, moment in moments.items()}
        tensors |= {f"gates/{name}": tensor for name, tensor in (gates.tensors() if gates else {}).items()}
        state = {"progress": progress.to_json(), "optimizer": scalars}
        checkpoint.save(around.checkpoints, progress.step, tensors, state, around.runtime.keep_checkpoints)

    with RunLog(around.run_dir, around.stage, after_step=progress.step, offset=around.step_offset) as log:
        if progress.step == 0:
            if around.reweigh_first and restored is None:
                progress.weights = around.reweigh(progress.weights, progress.heldout)
            log.step({"step": 0, "heldout": progress.heldout, "weights": _named(around, progress.weights), "reference": around.reference})
        while progress.step < config.steps:
            if around.stop.requested:
                save()
                raise Stopped(
                    f"stopped by {around.stop.requested} after step {progress.step} of {config.steps} of {around.stage}; "
                    "everything is saved. Run the same command to go on."
                )
            began = time.perf_counter()
            weights = _named(around, progress.weights)
            result, rate = _step(model, optimizer, config, around, progress, gates)
            progress.seconds += (spent := time.perf_counter() - began)
            line = _line(result, rate, spent, around, progress, gates) | {"weights": weights}
            if progress.step % config.evaluate_every == 0 or progress.step == config.steps:
                _evaluate(model, around, progress, gates)
                line |= {"heldout": progress.heldout, "reference": around.reference}
            log.step(line)
            around.show(progress.step, config.steps, line)
            every = around.runtime.save_every
            if every and progress.step % every == 0 and progress.step < config.steps:
                save()
        if around.runtime.save_every and config.steps:
            save()
    return progress


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: FitConfig,
    around: Surroundings,
    progress: Progress,
    gates: LearnedGates | None,
) -> tuple[StepResult, float]:
    step = progress.step + 1
    batch = around.loader.batch(around.step_offset + step, progress.weights, progress.cursors)
    factor = cosine_with_warmup(step, config.steps, round(config.warmup * config.steps), config.final_learning_rate)
    result = train_step(
        model,
        torch.from_numpy(batch.ids).to(around.device),
        batch.domains,
        around.objective,
        optimizer,
        step=step,
        microbatches=config.microbatches,
        clip=config.clip,
        rate=config.learning_rate * factor,
        gates=gates,
    )
    progress.step, progress.cursors = step, batch.cursors
    progress.tokens += result.tokens
    return result, config.learning_rate * factor


def _evaluate(model: nn.Module, around: Surroundings, progress: Progress, gates: LearnedGates | None) -> None:
    """Held-out losses, and the shares that follow from them."""
    began = time.perf_counter()
    if gates is not None:
        gates.settle(progress.step)
    progress.heldout = around.evaluate(model)
    progress.weights = around.reweigh(progress.weights, progress.heldout)
    progress.seconds += time.perf_counter() - began


def _line(
    result: StepResult, rate: float, seconds: float, around: Surroundings, progress: Progress, gates: LearnedGates | None
) -> dict[str, Any]:
    """What is logged of a step."""
    line: dict[str, Any] = {
        "step": progress.step,
        "loss": result.loss,
        "domain_loss": {around.domains[number]: loss for number, loss in result.domain_losses.items()},
        "gradient_norm": result.gradient_norm,
        "learning_rate": {"weights": rate},
        "tokens": progress.tokens,
        "tokens_per_second": result.tokens / seconds,
        "seconds": progress.seconds,
    }
    if gates is not None:
        found = gates.metrics(progress.step)
        line["learning_rate"] |= found.pop("learning_rate")
        line |= found
    return line


def _restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: Mapping[int, str], around: Surroundings, gates: LearnedGates | None
) -> Progress | None:
    found = checkpoint.load(around.checkpoints)
    if found is None:
        return None
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "gates": {}}
    for path, tensor in found.tensors.items():
        part, _, name = path.partition("/")
        parts[part][name] = tensor
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parts["model"][name])
    checkpoint.unpack_optimizer(optimizer, names, parts["optimizer"], found.state["optimizer"])
    if gates is not None:
        gates.load(parts["gates"])
    return Progress.from_json(found.state["progress"])


def _named(around: Surroundings, values: np.ndarray) -> dict[str, float]:
    return dict(zip(around.domains, values.tolist(), strict=True))
