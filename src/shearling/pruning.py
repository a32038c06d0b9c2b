"""The pruning stage: scores or learned gates, masks, the plan, the cut, and the proof that masked and cut model compute the same."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shearling.arch.families import Anatomy
from shearling.board import alike
from shearling.distilling import objective_of, with_projectors
from shearling.evaluate.loss import packed
from shearling.export import publish_model, save_weights
from shearling.io.tensors import MemoryReader, ShardWriter
from shearling.objectives.states import remove_projectors
from shearling.planning import expected_target
from shearling.prune.allocate import Masks, adapted, all_open, left, ranked, to_shape
from shearling.prune.attach import Attachment
from shearling.prune.compensate import fold
from shearling.prune.gates import Gates
from shearling.prune.learn import GateLearner
from shearling.prune.methods import Choice, choose
from shearling.prune.plan import PrunePlan, plan_from_masks
from shearling.prune.scratch import drawn
from shearling.prune.staged import Kept, RunningScores, StagedPruner, cut_steps, kept_by
from shearling.prune.stats import Scores
from shearling.prune.transform import transform
from shearling.prune.verify import (
    Difference,
    blame,
    compare_in_float64,
    compare_logits,
    logits_of,
    masked_logits,
    require_same_function,
)
from shearling.shapes import shape_of, target_config
from shearling.stages import VERIFY_SEQUENCES, Context, sample_ids, steered, surroundings
from shearling.subject import Subject, make_up, of_shape, turn
from shearling.train import checkpoint
from shearling.train.loop import Progress, Surroundings, fit, newest
from shearling.train.parallel import whole_weights
from shearling.train.state import rewritten


def prune(context: Context, source_result: Mapping[str, Any], shares: np.ndarray) -> dict[str, Any]:
    """Decide what goes, cut, verify, and publish `plan.json` and `pruned/`; or, of a method that draws weights, `pruned/` alone."""
    config, began = context.recipe.prune, time.perf_counter()
    choice = choose(config, context.source.anatomy, context.recipe.target)
    around = surroundings(context, "prune", config, source_result["loss"], source_result["sequence_losses"])
    losses, errors = dict(source_result["loss"]), dict(source_result["loss_error"])
    progress = Progress(shares, around.loader.start(), heldout=losses, heldout_errors=errors)
    if choice.method.draws:
        target, verified, used = *_draw(context), 0
    else:
        progress, target, verified, used = _choose_and_cut(context, choice, around, shares, progress, source_result["fingerprint"])
    measured, learned = context.evaluate(context.load_pruned()), config.steps and choice.specs
    return {
        "loss": {"before_hardening": progress.heldout if learned else None, "pruned": measured.losses},
        "loss_error": {"before_hardening": progress.heldout_errors if learned else None, "pruned": measured.errors},
        "sequence_losses": packed(measured.sequences),
        **steered(context, around, progress, config),
        "tokens": progress.tokens + used,
        "steps": progress.step,
        "weights": progress.weights.tolist(),
        "cursors": progress.cursors.tolist(),
        "training_seconds": round(progress.seconds, 3),
        "seconds": round(time.perf_counter() - began, 3),
        "verify": {**verified, "sequences": VERIFY_SEQUENCES},
        "shape": shape_of(target),
    }


def _choose_and_cut(
    context: Context, choice: Choice, around: Surroundings, shares: np.ndarray, progress: Progress, fingerprint: str
) -> tuple[Progress, Anatomy, dict[str, Any], int]:
    """Where training stands, what is left, how far masked and cut model are apart, and the tokens used for anything but steps."""
    config, anatomy = context.recipe.prune, choice.source
    begun = context.world.rank0_decides(lambda: bool(checkpoint.steps(around.checkpoints)))
    model = context.place(lambda: with_projectors(context, context.source.load_model(), config))
    subject = Subject(context, choice, model, around, shares)
    del model  # which is the subject's alone to give up
    rotation_error = turn(context, subject) if config.rotate != "no" and choice.specs else None
    if choice.specs:
        every = range(anatomy.sizes["layer"])
        around = replace(around, objective=objective_of(context, config, subject.model, every, around.objective))
    if begun and not choice.method.learns:
        subject.become(_kept_by_newest(anatomy, around))
    pruner, progress = _train(context, choice, subject, around, progress, begun)
    while isinstance(pruner, StagedPruner) and progress.step < config.steps and pruner.due():
        kept = _slice(context, pruner, around, progress.step)
        del pruner  # and with it the model
        subject.become(kept)
        pruner, progress = _train(context, choice, subject, around, progress, True)
    subject.model.eval()
    remove_projectors(subject.model)
    masks = pruner.gates.hardened() if isinstance(pruner, GateLearner) else pruner.masks
    target = left(anatomy, masks)
    if isinstance(pruner, GateLearner) and config.compensate and choice.specs:
        fold(subject.model, anatomy, {axis: pruner.kind.value(logits) for axis, logits in pruner.logits(progress.step).items()})
        make_up(context, subject, masks, 0, norms=False)  # norms were trained with the stream as it is left
    made_by = _made_by(context, choice, rotation_error)
    plan = plan_from_masks(anatomy, target, masks, fingerprint, made_by)
    difference = _cut(context, subject, masks, plan, target)
    subject.measurements = pruner.measurements if isinstance(pruner, StagedPruner) else 1  # those of earlier tries, too
    subject.compensations = config.cuts if config.compensate and choice.specs else 0
    return progress, target, difference, subject.sequences * context.tokens.sequence_length


def _draw(context: Context) -> tuple[Anatomy, dict[str, Any]]:
    """Publish `pruned/` with random weights in the target's shape, and nothing that says what of the source is kept: none of it is."""
    target = expected_target(context.source, context.recipe)

    def publish() -> None:
        final, blocks = context.path / "pruned", list(range(target.sizes["layer"]))
        values = target_config(context.source.config, context.source.anatomy, target, blocks)
        model, ids, end = drawn(values, context.recipe.seed).to(context.device), sample_ids(context), context.document_end
        expected, companions, there = logits_of(model, ids, end), context.source.save_companions, final.exists()
        save_weights(model.state_dict(), expected, ids, values, companions, final, torch.float32, there, end)
        (context.path / "plan.json").unlink(missing_ok=True)  # of a try with another method

    context.world.rank0_decides(publish)
    return target, {"weights": "as drawn"}


def _made_by(context: Context, choice: Choice, rotation_error: float | None) -> dict[str, Any]:
    """What a plan says of how it was made."""
    config = context.recipe.prune
    found = {"method": choice.method.name, "scores": dict(choice.scores), "seed": context.recipe.seed, "steps": config.steps}
    if choice.method.learns and config.steps:
        found |= {"gates": config.gates.model_dump(mode="json")}
    elif choice.specs:
        found |= {"cuts": config.cuts} | ({"allocation": choice.allocation.model_dump(mode="json")} if choice.finds_shape else {})
    if not config.keep_moments:
        found |= {"keep_moments": False}
    if config.compensate and choice.specs:
        found |= {"compensated_on": config.compensate}
    return found if rotation_error is None else found | {"rotated": config.rotate, "rotation_error": rotation_error}


def _train(
    context: Context, choice: Choice, subject: Subject, around: Surroundings, progress: Progress, begun: bool
) -> tuple[GateLearner | StagedPruner, Progress]:
    """Train under gates or masks for all steps, or until the model is due to be sliced. `begun`: there is a checkpoint to go on from."""
    config, model = context.recipe.prune, subject.model
    with Attachment(model, subject.kept.anatomy) as attachment:
        if choice.method.learns and config.steps:
            learner = _learner(context, choice, attachment, subject, begun)
            model.train()
            return learner, fit(model, config, around, progress, learner) if choice.specs else progress
        pruner = _stager(context, choice, attachment, subject, begun)
        if choice.specs:
            model.train()
            drop_moments = (lambda: False) if config.keep_moments else (lambda: pruner.made_cut)
            progress = fit(model, config, around, progress, pruner, until=pruner.due, drop_moments=drop_moments)
            if progress.step == config.steps:
                pruner.catch_up(config.steps)  # where the last step was skipped
        return pruner, progress


def _kept_by_newest(source: Anatomy, around: Surroundings) -> Kept:
    """What of the source is in the checkpoint from which `fit` goes on. A collective."""
    found = newest(around)
    paths = [path for path in found.shapes if path.startswith("gates/")] if found else []
    return kept_by(source, {path.removeprefix("gates/"): found.whole(path) for path in paths} if found else {})


def _slice(context: Context, pruner: StagedPruner, around: Surroundings, step: int) -> Kept:
    """Cut what is closed out of the newest checkpoint, of this step: weights and moments. Returns what is then left of the source.

    It is replaced at once and whole, so after a kill the newest checkpoint is the one or the other, and either leads on to here.
    """
    plan, target = pruner.kept.plan(pruner.masks)

    def work() -> None:
        found = checkpoint.load(around.checkpoints, step)
        assert found is not None
        tensors, counts = rewritten(
            found,
            found.state["optimizer"],
            pruner.tensors_once_sliced(),
            lambda kind: transform(plan, pruner.kept.anatomy, target, kind),
            lambda name: target.moved(name, plan.layers)[0],
        )
        checkpoint.rewrite(found, tensors, {**found.state, "optimizer": counts}, around.runtime.keep_checkpoints)

    context.world.rank0_decides(work)
    context.show.note(f"the model is sliced after step {step}: {target.parameters():,} parameters train on")
    return Kept(pruner.source, pruner.masks)


def _learner(context: Context, choice: Choice, attachment: Attachment, subject: Subject, begun: bool) -> GateLearner:
    config, seed = context.recipe.prune, context.recipe.seed
    gates = Gates(choice.specs).to(context.device)
    learner = GateLearner(gates, attachment, config.gates, steps=config.steps, warmup=round(config.warmup * config.steps), seed=seed)
    if choice.specs and not begun and config.gates.start != "constant":
        learner.start_from(subject.measure({}, 0))
    return learner


def _stager(context: Context, choice: Choice, attachment: Attachment, subject: Subject, begun: bool) -> StagedPruner:
    config, source, rule = context.recipe.prune, choice.source, choice.allocation
    full = source.parameters()

    def cut(masks: Masks, found: Scores, share: float, state_L: Tensor) -> tuple[Masks, bool]:
        budget = round(full - (full - choice.budget) * share)
        with alike():
            if choice.method.rule == "rank":
                return ranked(source, masks, found, budget, rule, uniform=choice.uniform), True
            if choice.method.rule == "adapted":
                return adapted(source, masks, found, budget, rule, state_L)
            return to_shape(masks, found, choice.specs, share), True

    from_training = choice.method.from_training and choice.specs
    running = RunningScores(choice.scores, subject.model, source, choice.specs, subject.kept) if from_training else None
    at = cut_steps(config.steps, config.cuts, config.share, at_start=running is None) if choice.specs else []
    only = config.cuts - 1 if not config.steps else 0  # the cut after which norms are fitted, unless training came before

    def after_cut(masks: Masks, number: int) -> None:
        if config.compensate:
            make_up(context, subject, masks, number, norms=number == only and at[number] == 0)

    pruner = StagedPruner(
        source,
        attachment,
        all_open(source, choice.specs),
        cut=cut,
        measure=subject.measure,
        at=at,
        running=running,
        device=context.device,
        kept=subject.kept,
        slice_every=config.slice_every,
        after_cut=after_cut,
    )
    if not begun:
        pruner.catch_up(0)
    return pruner


def _cut(context: Context, subject: Subject, masks: Mapping[str, Tensor], plan: PrunePlan, target: Anatomy) -> dict[str, float]:
    """Write `pruned/` and `plan.json` from the trained weights, and publish only what computes what the gated model does.

    `masks` and `plan` are of the source's units; what is cut is what slicing has left in the model.
    """
    ids, end, kept, model = sample_ids(context), context.document_end, subject.kept, subject.model
    anatomy, (rest, _) = kept.anatomy, kept.plan(masks)
    masks = {axis: mask.to(context.device) for axis, mask in kept.narrow(masks).items()}
    expected = masked_logits(model, anatomy, masks, ids, end)
    reader = MemoryReader(whole_weights(model, context.world))
    found: dict[str, float] = {}

    def write(writer: ShardWriter) -> None:
        for name, tensor in transform(rest, anatomy, target, reader):
            writer.add(name, tensor)

    def verify(cut: nn.Module) -> None:
        difference = compare_logits(cut.to(context.device), expected, ids, end)
        found.update(vars(difference))
        detail = partial(blame, masks, anatomy, target, reader, cut.state_dict())

        def exact() -> Difference:
            context.show.note(f"logits differ by {difference.relative_difference:.1g} of their range in fp32: comparing in fp64")
            whole = context.world.size == 1
            gated = model if whole else of_shape(context, kept, torch.bfloat16).to(context.device)
            closer = compare_in_float64(gated, anatomy, masks, reader, cut, ids, end)
            found["relative_difference_float64"] = closer.relative_difference
            return closer

        require_same_function(difference, exact, "the gated model and the cut model", detail)

    def publish() -> dict[str, float]:
        final = context.path / "pruned"
        values = target_config(context.source.config, kept.source, target, plan.layers)
        publish_model(write, values, context.source.save_companions, final, torch.float32, verify, replace=final.exists())
        plan.save(context.path / "plan.json")
        return found

    return context.world.rank0_decides(publish)
