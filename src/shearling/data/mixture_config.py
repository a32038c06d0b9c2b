"""What the mixture section of a recipe may say. Imports no torch, no numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from shearling.config import Config

MOVING = frozenset({"paper", "unclipped"})
"""Updates that follow the held-out losses; the others never change the shares."""
SETTING = frozenset({"stratified", "temperature"})
"""Updates that set the shares by themselves, whatever the domains' weights."""
TOLERANCE = 1e-9
"""What sums of shares may be off by, since 0.1 is not a tenth."""
LEAST_SEQUENCES = 2
"""Held-out sequences of a domain below which its loss has no standard error."""


class PowerLawConfig(Config):
    """Reference losses by the power law of the source's family (arXiv 2310.06694, section 2.2 and appendix B)."""

    power_law: str = Field(min_length=1)
    """CSV file with the columns domain, parameters, loss: held-out losses of three sizes of one family or more, for every domain."""
    parameters: float | None = Field(default=None, gt=0)
    """Parameters, embeddings included, of the model whose losses are asked for; left out, the target's."""


class MixtureConfig(Config):
    """The shares of the domains: how they begin and how they follow the losses (dynamic batch loading, arXiv 2310.06694, section 2.2)."""

    update: Literal["paper", "unclipped", "static", "stratified", "temperature"] = "paper"
    """paper: a domain above its reference loss gains. unclipped: one below also loses, as in the reference code. Without change: static,
    the given weights; stratified, equal shares; temperature, shares by the domains' training tokens."""
    reference: Literal["source"] | dict[str, float] | PowerLawConfig | None = "source"
    """Reference loss of each domain, in nats per token; source: the source model's own held-out loss; {power_law: POINTS.csv}: that of a
    model of the target's size, by its family's. None only where the shares never change."""
    smoothing: float = Field(default=1e-4, ge=0, lt=1)
    """Part of the mixture that is always shared out evenly, so that no domain dies out."""
    step_size: float = Field(default=1.0, gt=0)
    """Factor on the loss difference in the exponent (eta)."""
    temperature: float = Field(default=1.0, ge=1)
    """T in shares by (training tokens)^(1 / T), for update: temperature. 1: by size; the larger, the more even; XLM-R's is 1 / 0.3."""
    floor: float | dict[str, float] = 0.0
    """Least share, of every domain or by domain."""
    cap: float | dict[str, float] = 1.0
    """Largest share, of every domain or by domain."""
    start: str | None = Field(default=None, min_length=1)
    """A run directory, whose last shares this run begins with in the place of the domains' weights."""
    draw: Literal["multinomial", "low-discrepancy"] = "multinomial"
    """How the sequences of a step are dealt out by the shares: each drawn apart, or as evenly as can be."""
    evaluation_share: float | None = Field(default=None, gt=0, le=0.9)
    """Budget of the evaluations inside a stage that move the shares, as a part of all tokens that go forward through the model: they use as
    many held-out sequences as it allows, always the same. Left out, all, as in the paper. A stage's first and last use all."""

    @field_validator("reference", mode="before")
    @classmethod
    def _sound_reference(cls, value: Any, info: ValidationInfo) -> Any:
        # Before pydantic tries the union, which would report one problem for each of its members.
        if value is None and info.data.get("update", "static") in MOVING:
            raise ValueError(f"The {info.data['update']} update compares with reference losses: give them, or 'source'.")
        if value is None or value == "source" or isinstance(value, PowerLawConfig):
            return value
        if isinstance(value, dict) and not isinstance(value.get("power_law", 0.0), int | float):
            return _power_law(value)
        remedy = "Give 'source', {power_law: POINTS.csv}, or a loss in nats per token, above 0, for every domain."
        if not isinstance(value, dict) or not value:
            raise ValueError(remedy)
        for loss in value.values():
            if not _is_number(loss) or loss <= 0:
                raise ValueError(remedy)
        return {str(name): float(loss) for name, loss in value.items()}

    @field_validator("floor", "cap", mode="before")
    @classmethod
    def _sound_bound(cls, value: Any, info: ValidationInfo) -> Any:
        given = list(value.values()) if isinstance(value, dict) else [value]
        least = 0 if info.field_name == "floor" else TOLERANCE  # a cap of 0 would take a domain away
        if not given or not all(_is_number(share) and least <= share <= 1 for share in given):
            between = "from 0 to 1" if info.field_name == "floor" else "above 0 and at most 1"
            raise ValueError(f"Give a share {between}, or one by domain.")
        return {str(name): float(share) for name, share in value.items()} if isinstance(value, dict) else float(value)

    @model_validator(mode="after")
    def _one_beginning(self) -> MixtureConfig:
        if self.start is not None and self.update in SETTING:
            raise ValueError(f"the {self.update} update sets the shares itself: leave start ({self.start}) out")
        return self

    def resolved(self, base: Callable[[str], Path]) -> MixtureConfig:
        """A copy in which every path is absolute; `base`: a field -> the folder that its path starts from where it is relative."""
        changes: dict[str, Any] = {}
        if self.start is not None:
            changes["start"] = _absolute(base("start"), self.start)
        if isinstance(self.reference, PowerLawConfig):
            path = _absolute(base("reference.power_law"), self.reference.power_law)
            changes["reference"] = self.reference.model_copy(update={"power_law": path})
        return self.model_copy(update=changes)

    def bounds(self, domains: Sequence[str]) -> tuple[list[float], list[float]]:
        """Least and largest share of each of the domains, in their order.

        Raises `ValueError` that says why no shares are within them, or which domain there is not.
        """
        floors, caps = (_by_domain(bound, domains, default) for bound, default in ((self.floor, 0.0), (self.cap, 1.0)))
        wrong = []
        for what, bound in (("floor", self.floor), ("cap", self.cap)):
            if isinstance(bound, dict) and (unknown := sorted(set(bound) - set(domains))):
                wrong.append(f"mixture.{what} names {', '.join(unknown)} where the domains are {', '.join(sorted(domains))}")
        for name, floor, cap in zip(domains, floors, caps, strict=True):
            if floor > cap:
                wrong.append(f"mixture.floor of {name} ({floor:g}) is above its cap ({cap:g})")
        if (least := math.fsum(floors)) > 1 + TOLERANCE:
            wrong.append(f"mixture.floor: the least shares of {len(domains)} domains sum to {least:g}, and shares sum to 1")
        if (most := math.fsum(caps)) < 1 - TOLERANCE:
            wrong.append(f"mixture.cap: the largest shares of {len(domains)} domains sum to {most:g}, and shares sum to 1")
        if wrong:
            raise ValueError("; ".join(wrong))
        return floors, caps

    def update_sequences(self, steps: int, batch_size: int, evaluate_every: int, domains: int) -> int | None:
        """Held-out sequences of each domain that an evaluation inside a stage may use; None without a budget or such an evaluation.

        Of k evaluations with n sequences of each of D domains, n is the largest with k n D <= share (k n D + steps batch_size).

        Args:
            steps: of the stage.
            batch_size: sequences of a step.
            evaluate_every: steps between evaluations; that after the last step is not counted, as it uses all.
            domains: D.

        Raises `ValueError` where the budget does not allow for two.
        """
        evaluations = max(steps - 1, 0) // evaluate_every
        if self.evaluation_share is None or not evaluations:
            return None
        allowed = self.evaluation_share / (1 - self.evaluation_share) * steps * batch_size
        found = math.floor(allowed / (evaluations * domains) * (1 + TOLERANCE))
        if found < LEAST_SEQUENCES:
            raise ValueError(
                f"mixture.evaluation_share ({self.evaluation_share:g}) allows for {found} held-out sequences of each of {domains} domains "
                f"at each of {evaluations} evaluations, and {LEAST_SEQUENCES} are the least: evaluate less often, or allow for more"
            )
        return found


def _power_law(value: Mapping[str, Any]) -> PowerLawConfig:
    try:
        return PowerLawConfig.model_validate(value)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors())
        remedy = "Give {power_law: POINTS.csv}, and parameters where they are not the target's."
        raise ValueError(f"the power law, {found}. {remedy}") from None


def _absolute(base: Path, path: str) -> str:
    return str((base / Path(path).expanduser()).absolute())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _by_domain(bound: float | dict[str, float], domains: Sequence[str], default: float) -> list[float]:
    return [bound.get(name, default) if isinstance(bound, dict) else bound for name in domains]
