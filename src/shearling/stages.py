"""The stages of a run. Each takes the run's context and returns what goes into the ledger; each can be done again after a kill."""

from __future__ import annotations

import gc
import re
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

from shearling.board import alike, told
from shearling.data import mixture
from shearling.data.elsewhere import fetch_heldout
from shearling.data.loader import Loader
from shearling.data.pack import Progress as Preparing
from shearling.data.prepare import prepare
from shearling.data.remote import shown_place
from shearling.data.rows import Rows
from shearling.data.tokens import TokenSet
from shearling.errors import ConfigError, Problem, Stopped
from shearling.evaluate.loss import HeldOut, heldout_losses, instead_of_all, packed, unpacked, update_subset
from shearling.evaluate.speed import measure_speed
from shearling.io.loading import load_stock
from shearling.objectives.lm import TokenLosses, in_training, token_losses
from shearling.recipe import Recipe
from shearling.show import Show, duration
from shearling.sources import Source, open_source
from shearling.steering import evaluation_cost, expected_note, measured_note, reference_losses, shares_of_run
from shearling.texts import described, open_text, place_of_run
from shearling.train.config import FitConfig
from shearling.train.loop import Errors, Losses, Progress, Surroundings
from shearling.train.optim import choose_device, in_precision
from shearling.train.parallel import make_mesh, parallelize
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
    manifest: Mapping[str, Any] | None = None
    """Of the text that was prepared before, where the recipe names it."""

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
        """The prepared text; process 0 compares its hashes. Of text at a URL every machine fetches the held-out shards."""
        place = place_of_run(self.recipe, self.path)

        def fetched() -> TokenSet:
            tokens = open_text(place, self.manifest, verify=False)
            fetch_heldout(tokens, lambda done, total: self.show.count("held-out text", done, f"of {total} shards"))
            return tokens

        self.world.rank0_decides(lambda: bool(open_text(place, self.manifest)))
        return self.world.everywhere(fetched)

    @cached_property
    def teacher_source(self) -> Source:
        """The model that stages with `distill` learn from."""
        teacher = self.recipe.teacher
        if teacher is None or not (teacher.steps or teacher.model):
            return self.source
        path = str(self.path / "teacher" / "model") if teacher.steps else str(teacher.model)
        return self.world.everywhere(lambda: open_source(path))

    @cached_property
    def document_end(self) -> int | None:
        """Id of the mark at a document's end, where a token attends to its own document alone (`data.attend`); else None."""
        return self.tokens.document_end if self.recipe.data.attend == "document" else None

    @cached_property
    def losses(self) -> TokenLosses:
        """Cross-entropy in the recipe's precision."""
        return in_precision(partial(token_losses, document_end=self.document_end), self.device, self.recipe.runtime)

    def place(self, load: Callable[[], nn.Module]) -> nn.Module:
        """The model that `load` gives on the CPU, set up on this run's device and processes; the processes of a machine load in turns."""
        gc.collect()  # the model of the stage before lies in cycles
        runtime, blocks, device, mesh = self.recipe.runtime, self.source.anatomy.family.anchors.layers, self.device, self.mesh
        return self.world.in_turns(lambda: parallelize(load(), blocks, runtime, device, mesh))

    def load_pruned(self, fitted_out: Callable[[nn.Module], nn.Module] = lambda model: model) -> nn.Module:
        """The cut model; what is to be put on it, before it is set up, `fitted_out` does."""
        return self.place(lambda: fitted_out(load_stock(self.path / "pruned", torch.float32, "pruned")))

    @cached_property
    def heldout(self) -> dict[str, Rows]:
        """Held-out sequences [N, T] of every domain."""
        return {domain: self.tokens.sequences(domain, "heldout") for domain in self.tokens.domains}

    def evaluate(self, model: nn.Module, heldout: Mapping[str, Any] | None = None) -> HeldOut:
        """Held-out losses of a model as it stands, on all held-out text or some. Raises `Stopped` where a signal asks for it on the way."""
        heldout = self.heldout if heldout is None else heldout
        size, between = self.recipe.evaluate.batch_size, self.check_stop
        return heldout_losses(model, heldout, self.losses, batch_size=size, device=self.device, world=self.world, between=between)

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


def how_far(now: Preparing) -> str:
    """How far preparing a domain is, in words: documents, speed and, where it can be told, the time left."""
    text = f"{now.domain}: {now.documents:,} documents, {now.documents_per_second:,.0f} documents/s"
    return text if now.seconds_left is None else f"{text}, {duration(now.seconds_left)} left"


def prepare_data(context: Context) -> dict[str, Any]:
    """Text to token shards in `data/`, or what is known of text that was prepared before."""

    def progress(now: Preparing) -> None:
        context.check_stop_alone()
        context.show.count(how_far(now), now.tokens, "tokens")

    def work() -> dict[str, Any]:
        recipe, vocab = context.recipe, context.source.anatomy.sizes["vocab"]
        manifest = context.manifest
        if manifest is None:
            tokenizer = context.source.tokenizer()
            manifest = prepare(recipe.data, tokenizer, vocab, context.path / "data", seed=recipe.seed, progress=progress)
        place = {"prepared": shown_place(recipe.data.prepared)} if recipe.data.prepared else {}
        return {"domains": manifest["domains"], "sequence_length": manifest["sequence_length"], **place}

    found = context.world.rank0_decides(work)
    tokens = {name: facts["train_sequences"] * found["sequence_length"] for name, facts in found["domains"].items()}
    found["starting_shares"] = dict(zip(tokens, starting_shares(context, tokens).tolist(), strict=True))
    for note in described(context.recipe, found)["notes"]:
        context.show.note(note)
    if context.manifest is not None:  # what is damaged or cannot be fetched is told before a model is loaded
        _ = context.tokens
    return found


def measure_source(context: Context) -> dict[str, Any]:
    """Held-out losses of the source, which are also the reference losses where the recipe says so."""
    found = context.evaluate(context.place(context.source.load_model))
    fingerprint = context.world.rank0_decides(context.source.fingerprint)
    return {"loss": found.losses, "loss_error": found.errors, "sequence_losses": packed(found.sequences), "fingerprint": fingerprint}


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


def starting_shares(context: Context, tokens: Mapping[str, int] | None = None) -> np.ndarray:
    """Shares [D] before the first step: the domains' weights, or equal ones. `tokens`: training tokens by domain; left out, of the text."""
    rule, tokens = context.recipe.mixture, tokens or _training_tokens(context)
    domains = list(tokens)
    given: dict[str, float | None] = {name: domain.weight for name, domain in context.recipe.data.domains.items()}
    if rule.start is not None:
        path = Path(rule.start)
        given = context.world.everywhere(lambda: dict(shares_of_run(path, domains)))
    weights = mixture.starting_weights([given[name] for name in domains])
    floor, cap = rule.bounds(domains)
    return mixture.start(rule.update, weights, _knobs(context, tokens), floor=floor, cap=cap)


def _training_tokens(context: Context) -> dict[str, int]:
    tokens = context.tokens
    return {domain: len(tokens.sequences(domain, "train")) * tokens.sequence_length for domain in tokens.domains}


def _knobs(context: Context, tokens: Mapping[str, int]) -> mixture.Knobs:
    rule = context.recipe.mixture
    return mixture.Knobs(rule.smoothing, rule.step_size, rule.temperature, np.array(list(tokens.values()), np.float64))


def surroundings(
    context: Context, stage: str, config: FitConfig, source_losses: Mapping[str, float], before: Mapping[str, str], offset: int = 0
) -> Surroundings:
    """What `fit` needs around a model in a stage.

    Args:
        context: of the run.
        stage: `prune` or `train`.
        config: of the stage.
        source_losses: the source's held-out losses.
        before: what the stage's first model loses on every held-out sequence, as `packed` wrote it.
        offset: steps of the stages before.
    """
    rule, domains = context.recipe.mixture, context.tokens.domains
    reference = context.world.everywhere(lambda: reference_losses(context.recipe, context.source, source_losses, domains))
    (floor, cap), knobs = rule.bounds(domains), _knobs(context, _training_tokens(context))
    if note := expected_note(stage, config, rule, [len(rows) for rows in context.heldout.values()]):
        context.show.note(note)

    def reweigh(weights: np.ndarray, losses: Losses) -> np.ndarray:
        found, wanted = (np.array([values[domain] for domain in domains]) for values in (losses, reference or losses))
        with alike():
            return mixture.update(rule.update, weights, found, wanted, knobs, floor=floor, cap=cap, domains=domains)

    return Surroundings(
        stage=stage,
        run_dir=context.path,
        runtime=context.recipe.runtime,
        device=context.device,
        domains=list(domains),
        loader=Loader(
            context.tokens,
            config.batch_size,
            context.recipe.seed,
            draw=rule.draw,
            prefetch=context.recipe.runtime.prefetch,
            workers=context.recipe.runtime.loader_workers,
        ),
        objective=in_training(context.losses),
        evaluate=_evaluator(context, config, before),
        reweigh=reweigh,
        reference=reference or {},
        world=context.world,
        show=lambda step, steps, line: context.show.step(stage, step, steps, line),
        note=context.show.note,
        step_offset=offset,
        reweigh_first=stage == "train",
    )


def _evaluator(context: Context, config: FitConfig, before: Mapping[str, str]) -> Callable[[nn.Module, bool], tuple[Losses, Errors]]:
    """Held-out losses on all text, or what the recipe's budget allows for inside a stage; see `surroundings`."""
    sizes = {domain: len(rows) for domain, rows in context.heldout.items()}
    count, seed = _update_sequences(context, config), context.recipe.seed
    subset = {} if count is None else {domain: update_subset(domain, size, count, seed) for domain, size in sizes.items()}
    rows = {domain: context.heldout[domain][chosen] for domain, chosen in subset.items()}
    known = unpacked(before) if subset else {}

    def evaluate(model: nn.Module, whole: bool) -> tuple[Losses, Errors]:
        if whole or not subset:
            found = context.evaluate(model)
        else:
            found = instead_of_all(context.evaluate(model, rows), subset, known)
        return found.losses, found.errors

    return evaluate


def _update_sequences(context: Context, config: FitConfig) -> int | None:
    """Held-out sequences of each domain in the evaluations inside a stage; None for all."""
    domains = context.tokens.domains
    count = context.recipe.mixture.update_sequences(config.steps, config.batch_size, config.evaluate_every, len(domains))
    return None if count is None or count >= max(map(len, context.heldout.values())) else count


def steered(context: Context, around: Surroundings, progress: Progress, config: FitConfig) -> dict[str, Any]:
    """What the ledger says of the mixture of a stage that is done: its last shares, its reference losses, and what evaluations took."""
    if note := measured_note(around.stage, progress.seconds, progress.evaluation_seconds):
        context.show.note(note)
    return {
        "shares": dict(zip(around.domains, progress.weights.tolist(), strict=True)),
        "reference": dict(around.reference) or None,
        "evaluation": evaluation_cost(progress.seconds, progress.evaluation_seconds, _update_sequences(context, config)),
    }


def sample_ids(context: Context) -> Tensor:
    """Token ids [B, T] on which models that must be the same are compared."""
    domain = context.tokens.domains[0]
    ids = np.asarray(context.tokens.sequences(domain, "heldout")[:VERIFY_SEQUENCES, :512], dtype=np.int64)
    return torch.from_numpy(ids).to(context.device)
