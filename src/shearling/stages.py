"""The stages of a run. Each takes the run's context and returns what goes into the ledger; each can be done again after a kill."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shearling.arch.families import Anatomy
from shearling.board import alike, told
from shearling.data import mixture
from shearling.data.loader import Loader
from shearling.data.prepare import prepare
from shearling.data.tokens import TokenSet, open_tokens
from shearling.errors import ArtifactError, ConfigError, Problem, Stopped
from shearling.evaluate.loss import heldout_losses
from shearling.evaluate.speed import measure_speed
from shearling.export import publish_model, save_weights
from shearling.io.files import read_json
from shearling.io.loading import load_stock
from shearling.io.tensors import MemoryReader, ShardWriter
from shearling.objectives.lm import token_losses
from shearling.prune import scores
from shearling.prune.attach import Attachment
from shearling.prune.gates import Gates, GateSpec, gate_specs
from shearling.prune.learn import GateLearner
from shearling.prune.methods import choose_scores, find
from shearling.prune.plan import PrunePlan, plan_from_masks
from shearling.prune.transform import transform
from shearling.prune.verify import (
    ROUNDING,
    TOLERANCE,
    TOLERANCE_FLOAT64,
    blame,
    compare_in_float64,
    compare_logits,
    logits_of,
    masked_logits,
    require_equal,
)
from shearling.recipe import Recipe
from shearling.shapes import target_anatomy, target_config
from shearling.show import Show
from shearling.sources import Source
from shearling.train import checkpoint
from shearling.train.config import FitConfig
from shearling.train.loop import Losses, Progress, Surroundings, fit
from shearling.train.optim import choose_device, in_precision
from shearling.train.parallel import make_mesh, parallelize, whole_weights
from shearling.train.stop import signal_name
from shearling.world import World

_VERIFY_SEQUENCES = 2
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
    def target(self) -> Anatomy:
        """What comes out; the source's own anatomy where nothing is pruned."""
        return target_anatomy(self.source.anatomy, self.recipe.target) if self.recipe.target else self.source.anatomy

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

    def load_pruned(self) -> nn.Module:
        """The cut model."""
        return self.place(lambda: load_stock(self.path / "pruned", torch.float32, "pruned"))

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


def prune(context: Context, source_result: Mapping[str, Any], shares: np.ndarray) -> dict[str, Any]:
    """Learn the gates, harden them, cut, verify, and publish `plan.json` and `pruned/`."""
    config, anatomy = context.recipe.prune, context.source.anatomy
    began = time.perf_counter()
    model = context.place(context.source.load_model)
    specs = gate_specs(anatomy, context.target)
    around = _surroundings(context, "prune", config, source_result["loss"])
    gates = Gates(specs).to(context.device)
    seed, warmup = context.recipe.seed, round(config.warmup * config.steps)
    progress = Progress(shares, around.loader.start(), heldout=dict(source_result["loss"]))
    chosen = {} if config.gates.start == "constant" else choose_scores(find(config.method), config.scores, specs)
    begun = context.world.rank0_decides(lambda: bool(checkpoint.steps(around.checkpoints)))
    found = _scores(context, model, specs, chosen, around.loader, shares) if specs and not begun else {}
    with Attachment(model, anatomy) as attachment:
        learner = GateLearner(gates, attachment, config.gates, steps=config.steps, warmup=warmup, seed=seed)
        learner.start_from(found)
        if specs:
            model.train()
            progress = fit(model, config, around, progress, learner)
    model.eval()
    masks = gates.hardened()
    made_by = {"method": config.method, "scores": chosen, "seed": seed, "steps": config.steps}
    made_by |= {"gates": config.gates.model_dump(mode="json")} if config.steps else {}
    plan = plan_from_masks(anatomy, context.target, masks, source_result["fingerprint"], made_by)
    difference = _cut(context, model, masks, plan)
    del model, attachment, learner  # before the cut model is loaded
    return {
        "loss": {
            "before_hardening": progress.heldout if config.steps and specs else None,
            "pruned": context.evaluate(context.load_pruned()),
        },
        "tokens": progress.tokens + _calibration_tokens(context, chosen),
        "steps": progress.step,
        "weights": progress.weights.tolist(),
        "cursors": progress.cursors.tolist(),
        "training_seconds": round(progress.seconds, 3),
        "seconds": round(time.perf_counter() - began, 3),
        "verify": {**difference, "sequences": _VERIFY_SEQUENCES},
    }


def train(context: Context, pruned: Mapping[str, Any], source_result: Mapping[str, Any]) -> dict[str, Any]:
    """Continue pretraining the cut model and publish `model/`."""
    config = context.recipe.train
    model = context.load_pruned()
    around = _surroundings(context, "train", config, source_result["loss"], offset=pruned["steps"])
    start = Progress(np.array(pruned["weights"], np.float64), np.array(pruned["cursors"], np.int64), heldout=dict(pruned["loss"]["pruned"]))
    model.train()
    progress = fit(model, config, around, start)
    model.eval()
    ids = _sample_ids(context)
    expected, weights = logits_of(model, ids), whole_weights(model, context.world)

    def publish() -> None:
        values = read_json(context.path / "pruned" / "config.json")
        companions, final = context.source.save_companions, context.path / "model"
        save_weights(weights, expected, ids, values, companions, final, _export_dtype(context), replace=final.exists())

    context.world.rank0_decides(publish)
    epochs = around.loader.epochs(progress.cursors)
    return {
        "loss": {"final": progress.heldout},
        "tokens": progress.tokens,
        "steps": progress.step,
        "epochs": dict(zip(context.tokens.domains, epochs.round(3).tolist(), strict=True)),
        "training_seconds": round(progress.seconds, 3),
    }


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


def _surroundings(context: Context, stage: str, config: FitConfig, source_losses: Mapping[str, float], offset: int = 0) -> Surroundings:
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


def _scores(
    context: Context,
    model: nn.Module,
    specs: Mapping[str, GateSpec],
    chosen: Mapping[str, str],
    loader: Loader,
    shares: np.ndarray,
) -> dict[str, Tensor]:
    """The scores of every gate, by axis, on training sequences where a score needs any."""
    sequences = _calibration_tokens(context, chosen) // context.tokens.sequence_length
    batches: list[Tensor] = []
    if sequences:
        context.show.note(f"scoring every gate on {sequences} sequences")
        calibration = Loader(context.tokens, sequences, context.recipe.seed)
        ids_BT = torch.from_numpy(calibration.batch(0, shares, loader.start()).ids).to(context.device)
        batches = [ids_BT[start : start + 2] for start in range(0, len(ids_BT), 2)]
    world, stop, seed = context.world, context.check_stop, context.recipe.seed
    with alike():
        return scores.compute(chosen, model, context.source.anatomy, specs, context.objective, batches, world, stop, seed)


def _calibration_tokens(context: Context, chosen: Mapping[str, str]) -> int:
    """Tokens that scores are measured on; none where they look at the weights alone, or at nothing."""
    needs = {need for name in chosen.values() for need in scores.SCORES[name].needs}
    return context.recipe.prune.gates.calibration_sequences * context.tokens.sequence_length if needs - {"weights"} else 0


def _cut(context: Context, model: nn.Module, masks: Mapping[str, Tensor], plan: PrunePlan) -> dict[str, float]:
    """Write `pruned/` and `plan.json` from the trained weights, and publish only what computes what the gated model does."""
    anatomy, ids = context.source.anatomy, _sample_ids(context)
    expected = masked_logits(model, anatomy, masks, ids)
    reader = MemoryReader(whole_weights(model, context.world))
    found: dict[str, float] = {}

    def write(writer: ShardWriter) -> None:
        for name, tensor in transform(plan, anatomy, context.target, reader):
            writer.add(name, tensor)

    def verify(cut: nn.Module) -> None:
        difference = compare_logits(cut.to(context.device), expected, ids)
        found.update(vars(difference))
        detail = partial(blame, masks, anatomy, context.target, reader, cut.state_dict())
        if TOLERANCE < difference.relative_difference <= ROUNDING:
            context.show.note(f"logits differ by {difference.relative_difference:.1g} of their range in fp32: comparing in fp64")
            gated = context.source.load_model(torch.bfloat16).to(context.device)
            exact = compare_in_float64(gated, anatomy, masks, reader, cut, ids)
            found["relative_difference_float64"] = exact.relative_difference
            require_equal(exact, TOLERANCE_FLOAT64, "in fp64, the gated model and the cut model", detail)
        else:
            require_equal(difference, detail=detail)

    def publish() -> dict[str, float]:
        final = context.path / "pruned"
        values = target_config(context.source.config, anatomy, context.target, plan.layers)
        publish_model(write, values, context.source.save_companions, final, torch.float32, verify, replace=final.exists())
        plan.save(context.path / "plan.json")
        return found

    return context.world.rank0_decides(publish)


def _sample_ids(context: Context) -> Tensor:
    domain = context.tokens.domains[0]
    ids = np.asarray(context.tokens.sequences(domain, "heldout")[:_VERIFY_SEQUENCES, :512], dtype=np.int64)
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
