"""The stages of a run. Each takes the run's context and returns what goes into the ledger; each can be done again after a kill."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shearling.board import alike, told
from shearling.data import mixture
from shearling.data.loader import Loader
from shearling.data.prepare import prepare
from shearling.data.tokens import TokenSet, open_tokens
from shearling.errors import ArtifactError, ConfigError, Problem, Stopped
from shearling.evaluate.loss import heldout_losses
from shearling.evaluate.speed import measure_speed
from shearling.export import save_padded, save_weights
from shearling.io.files import read_json
from shearling.io.loading import load_stock
from shearling.objectives.lm import token_losses
from shearling.prune.verify import logits_of
from shearling.recipe import Recipe
from shearling.show import Show
from shearling.sources import Source, open_source
from shearling.train.config import FitConfig, LoraConfig
from shearling.train.loop import Losses, Progress, Surroundings, fit
from shearling.train.lora import add_adapters, merge
from shearling.train.optim import choose_device, in_precision
from shearling.train.parallel import make_mesh, parallelize, whole_weights
from shearling.train.stop import signal_name
from shearling.world import World

VERIFY_SEQUENCES = 2
"""Sequences on which masked and cut model are compared."""


@dataclass(frozen=True)
class Context:
    """What every stage works with. Stages run on all processes of a run; what they return is the same on each."""

    recipe: Recipe
    source: Source
    path: Path
    """The run directory."""
    world: World
    """The processes of the run, and the signal that asks them to stop."""
    show: Show

    @cached_property
    def device(self) -> torch.device:
        """Where to compute."""
        return choose_device(self.recipe.runtime, self.world.local_rank, self.world.local_size)

    @cached_property
    def mesh(self) -> DeviceMesh | None:
        """Over what a model is sharded; None on one process."""
        return make_mesh(self.device, self.world)

    @cached_property
    def tokens(self) -> TokenSet:
        """The prepared text; process 0 compares its hashes."""
        self.world.rank0_decides(lambda: bool(open_tokens(self.path / "data")))
        return self.world.everywhere(lambda: open_tokens(self.path / "data", verify=False))

    @cached_property
    def objective(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """Cross-entropy in the recipe's precision."""
        return in_precision(token_losses, self.device, self.recipe.runtime)

    def place(self, load: Callable[[], nn.Module]) -> nn.Module:
        """The model that `load` gives on the CPU, set up on this run's device and processes; the processes of a machine load in turns."""
        gc.collect()  # the model of the stage before lies in cycles
        runtime, blocks, device, mesh = self.recipe.runtime, self.source.anatomy.family.anchors.layers, self.device, self.mesh
        return self.world.in_turns(lambda: parallelize(load(), blocks, runtime, device, mesh))

    def load_pruned(self, adapters: LoraConfig | None = None) -> nn.Module:
        """The cut model; frozen and with `adapters`, where those are trained in its place."""

        def load() -> nn.Module:
            model = load_stock(self.path / "pruned", torch.float32, "pruned")
            return add_adapters(model, adapters, self.recipe.seed) if adapters else model

        return self.place(load)

    def evaluate(self, model: nn.Module) -> Losses:
        """Held-out losses of a model as it stands. Raises `Stopped` where a signal asks for it on the way."""
        heldout = {domain: self.tokens.sequences(domain, "heldout") for domain in self.tokens.domains}
        size, between = self.recipe.evaluate.batch_size, self.check_stop
        return heldout_losses(model, heldout, self.objective, batch_size=size, device=self.device, world=self.world, between=between)

    def check_stop(self) -> None:
        """Raise `Stopped` on all processes where a signal asked any to stop; for work that has nothing to save. A collective."""
        self._stop(self.world.largest(self.world.signal()))

    def check_stop_alone(self) -> None:
        """The same in work that process 0 does alone."""
        self._stop(self.world.stop_asked())

    def _stop(self, number: int) -> None:
        if number:
            raise told(Stopped(f"stopped by {signal_name(number)}; finished stages are kept. Run the same command to go on."))


@contextmanager
def memory_errors(stage: str) -> Iterator[None]:
    """Turn "out of memory" of a stage into a `ConfigError` with the remedies."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(r"out of memory|can't allocate memory|not enough memory", str(error)):
            raise
        found = " ".join(str(error).split())[:200] or "no memory left"
        remedy = (
            "Use more microbatches, activation_checkpointing, shorter sequences or more processes; `shearling plan` estimates the need."
        )
        raise ConfigError(f"out of memory in the stage {stage}", [Problem("memory", found, remedy)]) from error


def prepare_data(context: Context) -> dict[str, Any]:
    """Text to token shards in `data/`."""

    def progress(domain: str, documents: int, tokens: int) -> None:
        context.check_stop_alone()
        context.show.count(f"{domain}: {documents:,} documents", tokens, "tokens")

    def work() -> dict[str, Any]:
        recipe, vocab = context.recipe, context.source.anatomy.sizes["vocab"]
        tokenizer = context.source.tokenizer()
        manifest = prepare(recipe.data, tokenizer, vocab, context.path / "data", seed=recipe.seed, progress=progress)
        return {"domains": manifest["domains"], "sequence_length": manifest["sequence_length"]}

    found = context.world.rank0_decides(work)
    for facts in found["domains"].values():
        for note in facts["notes"]:
            context.show.note(note)
    return found


def measure_source(context: Context) -> dict[str, Any]:
    """Held-out losses of the source, which are also the reference losses where the recipe says so."""
    model = context.place(context.source.load_model)
    return {"loss": context.evaluate(model), "fingerprint": context.world.rank0_decides(context.source.fingerprint)}


def train(context: Context, pruned: Mapping[str, Any], source_result: Mapping[str, Any]) -> dict[str, Any]:
    """Continue pretraining the cut model and publish `model/`."""
    config = context.recipe.train
    model = context.load_pruned(adapters=config.lora)
    around = surroundings(context, "train", config, source_result["loss"], offset=pruned["steps"])
    start = Progress(np.array(pruned["weights"], np.float64), np.array(pruned["cursors"], np.int64), heldout=dict(pruned["loss"]["pruned"]))
    model.train()
    progress = fit(model, config, around, start)
    model.eval()
    if config.lora:
        merge(model)
    ids = sample_ids(context)
    expected, weights = logits_of(model, ids), whole_weights(model, context.world)

    def publish() -> None:
        values = read_json(context.path / "pruned" / "config.json")
        companions, final = context.source.save_companions, context.path / "model"
        save_weights(weights, expected, ids, values, companions, final, _export_dtype(context), replace=final.exists())

    context.world.rank0_decides(publish)
    padded = context.world.rank0_decides(lambda: _pad(context)) if context.recipe.export.pad_to_uniform else None
    epochs = around.loader.epochs(progress.cursors)
    return {
        "loss": {"final": progress.heldout},
        "tokens": progress.tokens,
        "steps": progress.step,
        "epochs": dict(zip(context.tokens.domains, epochs.round(3).tolist(), strict=True)),
        "training_seconds": round(progress.seconds, 3),
        **({"padded": padded} if padded else {}),
    }


def _pad(context: Context) -> dict[str, float] | None:
    """Write `padded/` and what it costs; None, and a note, where `model/` is a stock checkpoint already."""
    model = open_source(str(context.path / "model"))
    if not model.anatomy.blocks:
        context.show.note("all blocks are alike, so model/ is a stock checkpoint already: nothing to pad")
        return None
    found = save_padded(model, context.path / "padded")
    context.show.note(f"padded/ has {found['after']:,} parameters, {found['ratio']:.2f} times those of model/")
    return found


def measure_result(context: Context) -> dict[str, Any]:
    """Speed of source and result, side by side, on process 0. Where it cannot be measured, the run is done all the same."""
    if not context.recipe.evaluate.speed:
        return {}
    config = context.recipe.evaluate
    dtype = torch.float32 if context.device.type == "cpu" else torch.bfloat16

    def work() -> dict[str, Any]:
        gc.collect()
        models = {
            "source": context.source.load_model(dtype).to(context.device),
            "model": load_stock(context.path / "model", dtype, "model").to(context.device),
        }
        return measure_speed(models, prompt_tokens=config.prompt_tokens, generate_tokens=config.generate_tokens, seed=context.recipe.seed)

    try:
        speed = context.world.rank0_decides(work)
    except Exception as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        context.show.note(f"the speed could not be measured ({found}); everything else is done")
        return {"speed_error": found}
    return {"speed": speed, "speed_dtype": str(dtype).removeprefix("torch."), "speed_device": str(context.device)}


def starting_shares(context: Context) -> np.ndarray:
    """Shares [D] before the first step: the domains' weights, or equal ones."""
    given = {name: domain.weight for name, domain in context.recipe.data.domains.items()}
    return mixture.starting_weights([given[name] for name in context.tokens.domains])


def reference_losses(context: Context, source_losses: Mapping[str, float]) -> dict[str, float] | None:
    """Reference loss of every domain, in nats/token; None where the mixture is static without one."""
    given = context.recipe.mixture.reference
    if given is None:
        return None
    return {domain: source_losses[domain] if given == "source" else given[domain] for domain in context.tokens.domains}


def surroundings(context: Context, stage: str, config: FitConfig, source_losses: Mapping[str, float], offset: int = 0) -> Surroundings:
    """What `fit` needs around a model in a stage; `offset`: steps of the stages before."""
    rule, domains = context.recipe.mixture, context.tokens.domains
    reference = reference_losses(context, source_losses)

    def reweigh(weights: np.ndarray, losses: Losses) -> np.ndarray:
        if reference is None:
            return weights
        found, wanted = (np.array([values[domain] for domain in domains]) for values in (losses, reference))
        with alike():
            return mixture.update(rule.update, weights, found, wanted, smoothing=rule.smoothing, step_size=rule.step_size, domains=domains)

    return Surroundings(
        stage=stage,
        run_dir=context.path,
        runtime=context.recipe.runtime,
        device=context.device,
        domains=list(domains),
        loader=Loader(context.tokens, config.batch_size, context.recipe.seed),
        objective=context.objective,
        evaluate=context.evaluate,
        reweigh=reweigh,
        reference=reference or {},
        world=context.world,
        show=lambda step, steps, line: context.show.step(stage, step, steps, line),
        note=context.show.note,
        step_offset=offset,
        reweigh_first=stage == "train",
    )


def sample_ids(context: Context) -> Tensor:
    """Token ids [B, T] on which models that must be the same are compared."""
    domain = context.tokens.domains[0]
    ids = np.asarray(context.tokens.sequences(domain, "heldout")[:VERIFY_SEQUENCES, :512], dtype=np.int64)
    return torch.from_numpy(ids).to(context.device)


def _export_dtype(context: Context) -> torch.dtype:
    asked = context.recipe.export.dtype
    config = context.source.config
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32") if asked == "source" else asked
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = dtypes.get(name.removeprefix("torch."))
    if dtype is None:
        remedy = "Set export.dtype to float32, bfloat16 or float16."
        raise ArtifactError("the source's dtype is not known", [Problem("dtype", name, remedy)])
    return dtype
