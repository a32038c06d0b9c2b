"""`fit`: the one loop of pruning and of continued pretraining, with and without gates. It receives everything it uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shearling.board import told
from shearling.data.loader import Batch, Loader
from shearling.errors import NumericsError, Stopped
from shearling.io.files import sweep_temporary
from shearling.objectives.lm import Objective
from shearling.schedules import cosine_with_warmup
from shearling.train import checkpoint
from shearling.train.checkpoint import Checkpoint
from shearling.train.config import FitConfig, RuntimeConfig
from shearling.train.guard import objection, remember
from shearling.train.log import NoLog, RunLog
from shearling.train.optim import build_optimizer
from shearling.train.parallel import frees_after_forward
from shearling.train.saver import Saver
from shearling.train.state import pack, unpack
from shearling.train.step import GateTraining, StepResult, own_rows, train_step
from shearling.train.stop import signal_name
from shearling.world import World, forget_gathered

Losses = dict[str, float]
Errors = dict[str, float | None]


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
    heldout_errors: Errors = field(default_factory=dict)
    """Their standard errors."""
    evaluation_seconds: float = 0.0
    """Of `seconds`, those spent in evaluations."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last steps that were not skipped, by which spikes are known."""
    bad_steps: int = 0
    """Steps skipped in a row until now."""
    unlogged: dict[str, Any] | None = None
    """What the log will say of the step that is done, while its held-out evaluation is not."""

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
    evaluate: Callable[[nn.Module, bool], tuple[Losses, Errors]]
    """(model, whether on all held-out text) -> held-out losses of the model as it stands, with their `mean`, and standard errors. Those
    inside a stage may be estimates from a part of the text. Raises `Stopped` where a signal asks for it on the way."""
    reweigh: Callable[[np.ndarray, Losses], np.ndarray]
    """(shares [D], held-out losses) -> shares from now on."""
    reference: Mapping[str, float]
    """Reference losses, for the log."""
    world: World
    """The processes that train together, and the signal that asks them to stop."""
    show: Callable[[int, int, Mapping[str, Any]], None] = lambda step, steps, line: None
    """Called after every step with what was logged."""
    note: Callable[[str], None] = lambda text: None
    """Called with what the user should read."""
    step_offset: int = 0
    """Steps of the stages before, so that no stage repeats another's draws."""
    reweigh_first: bool = False
    """Move the shares by the start's held-out losses before the first step."""

    @property
    def checkpoints(self) -> Path:
        """Folder of this stage's checkpoints."""
        return self.run_dir / "checkpoints" / self.stage

    @cached_property
    def saver(self) -> Saver:
        """What saves them, of every `fit` of the stage: by the number of its saves go the notes that processes leave one another."""
        return Saver(self.checkpoints, self.runtime.keep_checkpoints, self.world, self.note)


_SAVE_FAILED, _LOG_FAILED = 1000, 2000
"""What one process may have met since the last step; they stand beside the numbers of signals, which are smaller."""


def fit(
    model: nn.Module,
    config: FitConfig,
    around: Surroundings,
    start: Progress,
    gates: LearnedGates | None = None,
    *,
    until: Callable[[], bool] = lambda: False,
    drop_moments: Callable[[], bool] = lambda: False,
) -> Progress:
    """Train `model` in place for `config.steps` steps, from the newest checkpoint if there is one, and return where it stands.

    `start.heldout` are the model's losses on all held-out text before the first step, measured by the stage before. On several processes
    each calls it with its part of the model; what is decided is the same on all. `until`: asked before every step whether to return
    already; what was done is then saved, and another call goes on from there. `drop_moments`: asked after every step that was not
    skipped whether the optimizer begins anew, with moments of 0.
    Raises `Stopped` after saving where a signal asked for it, `NumericsError` where too many steps in a row were bad.
    """
    forget_gathered(model)  # of forward passes before, which would stand in the place of the parameters
    optimizer = build_optimizer(model, config)
    restored = _restore(model, optimizer, around, gates)
    progress = restored or start
    world, runtime = around.world, around.runtime
    found_at, logged = progress.step, progress.step - (progress.unlogged is not None)

    with (
        around.saver as saver,
        world.everywhere(lambda: _log(around, logged)) as log,
        around.loader,  # its threads end with the stage
    ):

        def save(**how: bool) -> None:
            forget_gathered(model)  # an evaluation may have been broken off
            tensors, scalars = pack(model, optimizer, gates)
            saver.save(progress.step, tensors, {"progress": progress.to_json(), "optimizer": scalars}, **how)

        if logged == 0:
            if around.reweigh_first and restored is None:
                progress.weights = around.reweigh(progress.weights, progress.heldout)
            log.step({"step": 0, "weights": _named(around, progress.weights), **_heldout(around, progress)})
        while (progress.step < config.steps and not until()) or progress.unlogged is not None:
            asked = world.largest(max(_LOG_FAILED * log.failed, _SAVE_FAILED * saver.failed, world.signal()))
            if asked >= _LOG_FAILED:
                world.rank0_decides(log.check)
            elif asked >= _SAVE_FAILED:
                saver.settle()
            elif asked:
                save()
                raise told(
                    Stopped(
                        f"stopped by {signal_name(asked)} after step {progress.step} of {config.steps} of {around.stage}; "
                        "everything is saved. Run the same command to go on."
                    )
                )
            if progress.unlogged is None:
                with world.watched():
                    progress.unlogged = _step(model, optimizer, config, around, progress, gates, drop_moments)
            line = dict(progress.unlogged)
            if progress.step % config.evaluate_every == 0 or progress.step == config.steps:
                try:
                    _evaluate(model, around, progress, gates, whole=progress.step == config.steps)
                except Stopped:
                    continue  # the evaluation is done anew by the next run
                line |= _heldout(around, progress)
            progress.unlogged = None
            log.step(line)
            around.show(progress.step, config.steps, line)
            if "skipped" in line:
                saver.settle()  # so that the newest checkpoint is there to be named
                _refuse_bad_steps(progress, config, around, line)
            if runtime.save_every and progress.step % runtime.save_every == 0 and progress.step < config.steps and not until():
                save(background=runtime.async_save, may_fail=True)
        world.rank0_decides(log.check)
        if progress.step < config.steps or (runtime.save_every and found_at < config.steps):
            save()
    return progress


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: FitConfig,
    around: Surroundings,
    progress: Progress,
    gates: LearnedGates | None,
    drop_moments: Callable[[], bool],
) -> dict[str, Any]:
    """Take the next step; returns what is logged of it."""
    began = time.perf_counter()
    step, weights = progress.step + 1, _named(around, progress.weights)
    rows = own_rows(config.batch_size, config.microbatches, around.world)
    batch = around.loader.batch(around.step_offset + step, progress.weights, progress.cursors, rows)
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
        world=around.world,
        object_to=lambda loss, norm: objection(loss, norm, progress.recent, config.skip_spikes),
        frees=frees_after_forward(around.runtime, around.device),
    )
    progress.step, progress.cursors = step, batch.cursors
    progress.tokens += result.tokens
    if result.skipped is None:
        if drop_moments():
            optimizer.state.clear()
        progress.bad_steps = 0
        if config.skip_spikes is not None:
            progress.recent = remember(progress.recent, result.loss, config.spike_window)
    else:
        progress.bad_steps += 1
    progress.seconds += (spent := time.perf_counter() - began)
    line = _line(result, config.learning_rate * factor, spent, around, progress, gates) | {"weights": weights}
    if result.skipped is not None:
        line |= {"skipped": result.skipped, "samples": _samples(batch, around.domains)}
    return line


def _evaluate(model: nn.Module, around: Surroundings, progress: Progress, gates: LearnedGates | None, *, whole: bool) -> None:
    """Held-out losses, and the shares that follow from them."""
    began = time.perf_counter()
    if gates is not None:
        gates.settle(progress.step)
    progress.heldout, progress.heldout_errors = around.evaluate(model, whole)
    forget_gathered(model)
    progress.weights = around.reweigh(progress.weights, progress.heldout)
    progress.seconds += (spent := time.perf_counter() - began)
    progress.evaluation_seconds += spent


def _heldout(around: Surroundings, progress: Progress) -> dict[str, Any]:
    """What is logged of an evaluation."""
    found = {"heldout": progress.heldout, "heldout_error": progress.heldout_errors, "reference": around.reference}
    return found | {"seconds": progress.seconds, "evaluation_seconds": progress.evaluation_seconds}


def _refuse_bad_steps(progress: Progress, config: FitConfig, around: Surroundings, line: Mapping[str, Any]) -> None:
    around.note(f"step {progress.step} of {around.stage} was skipped: {line['skipped']}; its samples are in metrics.jsonl")
    if progress.bad_steps >= config.max_bad_steps:
        found = list(checkpoint.steps(around.checkpoints).values())
        kept = f"The last good checkpoint is {found[-1]}" if found else "There is no checkpoint of this stage"
        raise told(
            NumericsError(
                f"{progress.bad_steps} steps in a row up to step {progress.step} of {around.stage} were bad ({line['skipped']}); none "
                f"of them changed the model. {kept}; metrics.jsonl names their samples. Lower the learning rate, or look at these samples."
            )
        )


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
    if result.terms:
        line["terms"] = result.terms
    if gates is not None:
        found = gates.metrics(progress.step)
        line["learning_rate"] |= found.pop("learning_rate")
        line |= found
    return line


def _samples(batch: Batch, domains: list[str]) -> dict[str, str]:
    """Which training sequences a step was made of: {domain: their numbers in its shard}."""
    return {domains[d]: " ".join(map(str, batch.samples[batch.domains == d])) for d in np.unique(batch.domains)}


def newest(around: Surroundings) -> Checkpoint | None:
    """The checkpoint from which `fit` goes on, None where there is none; brings back what a kill left aside. A collective."""
    around.world.rank0_decides(lambda: len(sweep_temporary(around.checkpoints)))
    return checkpoint.load(around.checkpoints, world=around.world)


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, around: Surroundings, gates: LearnedGates | None) -> Progress | None:
    found = newest(around)
    if found is None:
        return None
    around.world.everywhere(lambda: unpack(found, found.state["optimizer"], model, optimizer, gates, around.world))
    return Progress.from_json(found.state["progress"])


def _log(around: Surroundings, step: int) -> RunLog | NoLog:
    """The log of the stage, which process 0 keeps."""
    if not around.world.first:
        return NoLog()
    return RunLog(around.run_dir, around.stage, after_step=step, offset=around.step_offset, warn=around.note)


def _named(around: Surroundings, values: np.ndarray) -> dict[str, float]:
    return dict(zip(around.domains, values.tolist(), strict=True))
