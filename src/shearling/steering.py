"""What the shares of the domains begin with and steer towards, and what held-out evaluations cost; read before any expensive work."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearling.data.mixture_config import MixtureConfig, PowerLawConfig
from shearling.errors import ArtifactError, DataError, Problem
from shearling.planning import STAGES_THAT_TRAIN, expected_target
from shearling.recipe import Recipe
from shearling.run import stage_result
from shearling.sources import Source
from shearling.train.config import FitConfig

if TYPE_CHECKING:
    from shearling.data.reference import Estimate

MUCH = 1 / 3
"""Part of a stage's time above which its evaluations are worth a word."""
FORWARD = 1 / 3
"""Time of a token that is evaluated, as a part of that of one that is trained on: a forward pass, of a forward and a backward of twice."""
WORTH_TELLING = 60.0
"""Seconds that a stage takes at least for its measured times to be worth a word."""


def check_steering(recipe: Recipe, source: Source, stages: Collection[str]) -> list[str]:
    """Read what the mixture needs from elsewhere in the stages to come; returns what the user should know of it.

    Raises `DataError` where no power law can be had, `ArtifactError` where another run's shares cannot.
    """
    mixture, domains, notes = recipe.mixture, list(recipe.data.domains), []
    if not {"prepare", "prune"}.isdisjoint(stages) and mixture.start is not None:  # preparing shows how far the text will go
        shares = shares_of_run(Path(mixture.start), domains)
        notes.append(f"beginning with the last shares of {mixture.start}: {_listed(shares, '.4f')}")
    if not {*STAGES_THAT_TRAIN}.isdisjoint(stages) and (found := power_law(recipe, source, domains)):
        notes.append("reference losses by the power law: " + ", ".join(f"{name} {estimate}" for name, estimate in found.items()))
    return notes


def reference_losses(recipe: Recipe, source: Source, source_losses: Mapping[str, float], domains: Sequence[str]) -> dict[str, float] | None:
    """Reference loss of every domain, in nats/token; None where the shares never change and none was given."""
    given = recipe.mixture.reference
    if given is None:
        return None
    if found := power_law(recipe, source, domains):
        return {domain: found[domain].loss for domain in domains}
    return {domain: given[domain] if isinstance(given, dict) else source_losses[domain] for domain in domains}


def power_law(recipe: Recipe, source: Source, domains: Sequence[str]) -> dict[str, Estimate] | None:
    """What the recipe's power law gives each of the domains, if it has one.

    For a model of the parameters that the recipe names, or of the target's (under a budget, those of the uniform shape that meets it).
    Raises `DataError` where its table cannot be read or fitted, or lacks a domain.
    """
    given = recipe.mixture.reference
    if not isinstance(given, PowerLawConfig):
        return None
    from shearling.data.reference import fit_reference, read_points

    points = [point for point in read_points(given.power_law) if not domains or point[0] in domains]
    if missing := sorted(set(domains) - {domain for domain, _, _ in points}):
        remedy = "Give the losses of three model sizes or more for every domain of the recipe."
        raise DataError(f"{given.power_law}: no reference losses", [Problem("domain", f"no {name}", remedy) for name in missing])
    found = fit_reference(points, given.parameters or expected_target(source, recipe).parameters())
    return {domain: found[domain] for domain in domains or found}


def shares_of_run(path: Path, domains: Sequence[str]) -> dict[str, float]:
    """The shares {domain: share} with which the last finished stage of the run at `path` ended.

    Raises `ArtifactError` where it is no run, has not finished a stage that trains, or has other domains than `domains` (if any).
    """
    for stage in reversed(STAGES_THAT_TRAIN):
        if shares := (stage_result(path, stage) or {}).get("shares"):
            break
    else:
        remedy = "Give the directory of a run that has pruned or trained, or leave mixture.start out."
        found = "a run that has finished neither prune nor train" if (path / "recipe.yaml").exists() else "no run"
        raise ArtifactError(f"{path}: no shares to begin with", [Problem("mixture.start", found, remedy)])
    if domains and set(shares) != set(domains):
        remedy = "Begin with a run of the same domains, or give the domains weights and leave mixture.start out."
        found = f"shares of {', '.join(sorted(shares))} where the domains are {', '.join(sorted(domains))}"
        raise ArtifactError(f"{path}: shares of other domains", [Problem("mixture.start", found, remedy)])
    return {name: float(shares[name]) for name in domains or shares}


def reported_losses(recipe: Recipe, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a report says of losses and mixture, from the ledgers of the stages that are done, by name.

    Returns:
        `loss` and `loss_error`: by model, {domain: x}; `shares`: by stage, those it ended with; `evaluation`: by stage, what it cost.
    """
    values: dict[str, Any] = {"loss": {}, "loss_error": {}, "shares": {}, "evaluation": {}}
    if "source" in found:
        losses, given = found["source"]["loss"], recipe.mixture.reference
        reference = {name: loss for name, loss in losses.items() if name != "mean"} if given == "source" else given
        values["loss"] |= {"source": losses, "reference": None if isinstance(reference, PowerLawConfig) else reference}
        values["loss_error"] |= {"source": found["source"]["loss_error"]}
    for stage in (stage for stage in STAGES_THAT_TRAIN if stage in found):
        for kind in ("loss", "loss_error"):
            values[kind] |= {name: value for name, value in found[stage][kind].items() if value is not None}
        values["loss"]["reference"] = found[stage]["reference"]
        for kind in ("shares", "evaluation"):
            values[kind][stage] = found[stage][kind]
    return values


def expected_note(stage: str, config: FitConfig, mixture: MixtureConfig, heldout: Sequence[int]) -> str | None:
    """A sentence for the user where a stage is bound to spend much of its time on evaluations, by its tokens.

    `heldout`: held-out sequences of each domain. Sheared LLaMA's own settings of the prune stage (3,200 steps of 32, and 64 evaluations
    of 7 x 500) evaluate 2.2 tokens for each that is trained on.
    """
    trained = config.steps * config.batch_size
    if not trained:
        return None
    count = mixture.update_sequences(config.steps, config.batch_size, config.evaluate_every, len(heldout))
    inside = sum(heldout if count is None else (min(count, rows) for rows in heldout))
    evaluated = (config.steps - 1) // config.evaluate_every * inside + sum(heldout)
    share = FORWARD * evaluated / (FORWARD * evaluated + trained)
    if share <= MUCH:
        return None
    return (
        f"{stage} evaluates {evaluated / trained:.1f} tokens for each that it trains on, which takes about {share:.0%} of its time; "
        f"{stage}.evaluate_every and mixture.evaluation_share make it less"
    )


def measured_note(stage: str, seconds: float, evaluation_seconds: float) -> str | None:
    """The same when the stage is done, by the clock."""
    if seconds < WORTH_TELLING or evaluation_seconds <= MUCH * seconds:
        return None
    return f"{stage} spent {evaluation_seconds / seconds:.0%} of its {seconds:,.0f} s on evaluations; mixture.evaluation_share bounds it"


def evaluation_cost(seconds: float, evaluation_seconds: float, sequences: int | None) -> dict[str, Any]:
    """What a ledger says of a stage's evaluations; `sequences`: of each domain in those inside the stage, None for all."""
    share = evaluation_seconds / seconds if seconds else 0.0
    return {"seconds": round(evaluation_seconds, 3), "share": round(share, 4), "sequences": sequences}


def _listed(values: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())
