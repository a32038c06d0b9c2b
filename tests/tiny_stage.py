"""One stage of training for tests: a tiny model, with gates or without, on text in memory, by `shearling.train.loop.fit`.

As a command, `python tests/tiny_stage.py FOLDER` fits every kind once, and writes FOLDER/losses.json, of which tests/golden has one.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import tiny_config, tiny_model
from runs import CLOCK, metrics
from shearling.arch.families import anatomy_of
from shearling.data import mixture
from shearling.data.loader import Batch, Loader
from shearling.errors import Stopped
from shearling.evaluate.loss import heldout_losses
from shearling.objectives.lm import token_losses
from shearling.prune.attach import Attachment
from shearling.prune.config import GateConfig
from shearling.prune.gates import Gates, gate_specs
from shearling.prune.learn import GateLearner
from shearling.train import checkpoint
from shearling.train.config import FitConfig, RuntimeConfig
from shearling.train.loop import Errors, Losses, Progress, Surroundings, fit
from shearling.train.optim import choose_device
from shearling.world import World

DOMAINS = ("a", "b")
STEPS = 5
MICROBATCHES = 2
KINDS = ("plain", "projected", "lagrangian")
SIZES: dict[str, int] = {"hidden": 16, "heads": 2, "groups": 1, "head_dim": 8, "neurons": 12, "vocab": 48}
REFERENCE = {"a": 3.9, "b": 4.3}
GOLDEN_STEPS = 12


class Tokens:
    """Two domains of random words, each gone through more than once in a stage."""

    domains = DOMAINS
    sequence_length = 12

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self._ids: dict[tuple[str, str], np.ndarray] = {}
        for number, domain in enumerate(DOMAINS):
            for split, rows in (("train", 7 + 2 * number), ("heldout", 3)):
                words = draw.integers(3 + 10 * number, 30 + 10 * number, (rows, self.sequence_length))
                self._ids[domain, split] = words.astype(np.uint16)

    def sequences(self, domain: str, split: str) -> np.ndarray:
        """Token ids [n, T]."""
        return self._ids[domain, split]


class Stage:
    """What `fit` needs, made anew and always the same. Fit it once; to go on, or again, take a new one (or another fork of it)."""

    def __init__(self, kind: str = "plain", runtime: Mapping[str, Any] | None = None, *, layers: int = 1, **config: Any) -> None:
        self.kind = kind
        self.name = "train" if kind == "plain" else "prune"
        values = {"steps": STEPS, "batch_size": 6, "microbatches": MICROBATCHES, "learning_rate": 1e-2, "warmup": 0.2, "evaluate_every": 3}
        self.config = FitConfig(**{**values, **config})
        self.runtime = RuntimeConfig(**{"device": "cpu", "precision": "float32", "save_every": 2, **(runtime or {})})
        self.world = World()
        self.model = tiny_model("llama", layers=layers, **SIZES).train()
        self.gates = self._gates(layers) if kind != "plain" else None
        self.at = (0, 0)
        """Step and microbatch that were computed last."""
        self.steps: list[int] = []
        """Steps that were begun."""
        self.after_forward: Callable[[tuple[int, int], Tensor], Tensor] = lambda at, found: found
        """(step and microbatch, its losses) -> what becomes of them."""
        self.before_evaluation: Callable[[int], None] = lambda step: None
        self.after_step: Callable[[int], None] = lambda step: None
        self.notes: list[str] = []
        self.note: Callable[[str], None] = self.notes.append

    def fit(self, run: Path) -> Progress:
        """Train in the directory `run`, from its newest checkpoint if there is one."""
        tokens = Tokens()
        around = Surroundings(
            stage=self.name,
            run_dir=run,
            runtime=self.runtime,
            device=choose_device(self.runtime),
            domains=list(DOMAINS),
            loader=self._loader(tokens),
            objective=self._objective,
            evaluate=lambda model, whole: self._evaluate(model, tokens),
            reweigh=_reweigh,
            reference=REFERENCE,
            world=self.world,
            show=lambda step, steps, line: self.after_step(step),
            note=lambda text: self.note(text),
            step_offset=0 if self.gates else 40,
            reweigh_first=self.gates is None,
        )
        start = Progress(np.array([0.6, 0.4]), around.loader.start(), heldout={"a": 4.5, "b": 4.4, "mean": 4.45})
        return fit(self.model, self.config, around, start, self.gates)

    def checkpoints(self, run: Path) -> Path:
        """Where the stage's checkpoints lie."""
        return run / "checkpoints" / self.name

    def _gates(self, layers: int) -> GateLearner:
        anatomy, target = _anatomies(layers)
        gates = Gates(gate_specs(anatomy, target))
        config = GateConfig(
            constraint=self.kind, noise=1.0, final_noise=0.5, final_temperature=0.15, learning_rate=0.3, multiplier_learning_rate=0.3
        )
        learner = GateLearner(gates, Attachment(self.model, anatomy), config, steps=self.config.steps, warmup=1, seed=3)
        draw = torch.Generator().manual_seed(1)
        learner.start_from({axis: torch.rand(spec.shape, generator=draw) for axis, spec in gates.specs.items()})
        return learner

    def _loader(self, tokens: Tokens) -> Loader:
        stage = self

        class Watched(Loader):
            def batch(self, step: int, *args: Any) -> Batch:
                stage.at = (step if stage.gates else step - 40, -1)
                stage.steps.append(stage.at[0])
                return super().batch(step, *args)

        how = {"prefetch": self.runtime.prefetch, "workers": self.runtime.loader_workers}
        return Watched(tokens, self.config.batch_size, 17, **how)  # type: ignore[arg-type]

    def _objective(self, model: nn.Module, ids_BT: Tensor, step: int) -> dict[str, Tensor]:
        self.at = (self.at[0], self.at[1] + 1)
        return {"loss": self.after_forward(self.at, token_losses(model, ids_BT))}

    def _evaluate(self, model: nn.Module, tokens: Tokens) -> tuple[Losses, Errors]:
        def between() -> None:  # as in `stages.Context.check_stop`
            self.before_evaluation(self.at[0])
            if self.world.largest(self.world.signal()):
                raise Stopped("stopped on the way")

        heldout = {domain: tokens.sequences(domain, "heldout") for domain in DOMAINS}
        found = heldout_losses(model, heldout, token_losses, batch_size=3, device=torch.device("cpu"), world=self.world, between=between)
        return found.losses, found.errors


def poisoned(bad: Mapping[int, float], microbatch: int = 1) -> Callable[[tuple[int, int], Tensor], Tensor]:
    """For `after_forward`: multiplies the losses of one microbatch of the steps in `bad`."""

    def look(at: tuple[int, int], found: Tensor) -> Tensor:
        return found * bad[at[0]] if at[0] in bad and at[1] == microbatch else found

    return look


class Place(World):
    """One process of several that are not there: it talks to nobody."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


class AskedToStop(World):
    """A world whose signal comes when told."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.signal = lambda: self.number

    def ask(self) -> None:
        """SIGTERM, from now on."""
        self.number = int(signal.SIGTERM)


def saved(folder: Path, step: int | None = None) -> dict[str, Any]:
    """A checkpoint (the newest, if no step is given) without what depends on the clock; equal means bitwise equal."""
    found = checkpoint.load(folder, step)
    assert found is not None
    state = json.loads(json.dumps(found.state))
    for values in filter(None, [state["progress"], state["progress"]["unlogged"]]):
        for key in CLOCK:
            values.pop(key, None)
    return {"step": found.step, "state": state, "tensors": {name: bits(found.whole(name)) for name in sorted(found.shapes)}}


def result_of(stage: Stage, run: Path) -> dict[str, Any]:
    """All that a finished stage leaves behind that hangs on what it computed."""
    assert not list(run.rglob(".tmp-*")) and not list(run.rglob(".aside-*"))
    return {"saved": saved(stage.checkpoints(run)), "log": metrics(run)}


@cache
def finished(kind: str, steps: int = STEPS) -> dict[str, Any]:
    """What an uninterrupted stage of a kind leaves behind."""
    stage = Stage(kind, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        stage.fit(Path(folder))
        return result_of(stage, Path(folder))


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """Equal of two tensors only where they are bitwise equal, NaN and the sign of 0 included."""
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@cache
def _anatomies(layers: int) -> Any:
    anatomy = anatomy_of(tiny_config("llama", layers=layers, **SIZES).to_dict())
    return anatomy, anatomy.with_sizes(hidden=12, neuron=7)


def _reweigh(weights: np.ndarray, losses: Losses) -> np.ndarray:
    found, wanted = (np.array([values[domain] for domain in DOMAINS]) for values in (losses, REFERENCE))
    return mixture.update("unclipped", weights, found, wanted)


def main(folder: Path) -> None:
    """Fit every kind in FOLDER/KIND, and write the losses of its steps."""
    torch.set_num_threads(1)
    losses = {}
    for kind in KINDS:
        Stage(kind, layers=2, steps=GOLDEN_STEPS, microbatches=3, learning_rate=2e-3).fit(folder / kind)
        losses[kind] = [line["loss"] for line in metrics(folder / kind) if line["step"]]
    (folder / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
