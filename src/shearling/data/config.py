"""What the data section and the mixture section of a recipe may say. Imports no torch, no datasets, no numpy."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from shearling.config import Config

_DOMAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
RESERVED_NAMES = frozenset({"mean"})
"""Names that reports use beside the domains' own."""


def domain_name_problem(name: str) -> str | None:
    """Why `name` cannot be the name of a domain, or None if it can: it becomes part of file names and metric names."""
    if not _DOMAIN_NAME.fullmatch(name):
        return "A domain's name has 1 to 100 letters, digits, '_', '-' and '.', and begins with a letter, a digit or '_'."
    return "Reports use this name; choose another." if name in RESERVED_NAMES else None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_as_list)]
"""A path or a list of paths; a recipe may write one as a plain string. Each is a file, a folder or a glob."""


class DomainConfig(Config):
    """Where the text of one domain comes from. In a recipe a path, or a list of paths, is short for `train:`."""

    train: Paths | None = None
    """Files, folders, globs: .jsonl, .json (an object a line), .txt, .md, .rst, .py (a document a file); also .gz, .zst; .parquet."""
    dataset: str | None = None
    """Name of a dataset on the Hugging Face hub, instead of `train`."""
    subset: str | None = None
    """Configuration of the hub dataset."""
    split: str = "train"
    """Split of the hub dataset."""
    revision: str | None = None
    """Commit or tag of the hub dataset; left out, the newest."""
    heldout: Paths | None = None
    """Held-out files of the domain's own; left out, a part of the training text is split off."""
    weight: float | None = Field(default=None, gt=0)
    """Starting share of the mixture, relative to the other domains; give it to all domains or to none (equal shares)."""
    text_field: str = Field(default="text", min_length=1)
    """Field or column that holds the text, in JSON lines, parquet and hub datasets."""

    @model_validator(mode="before")
    @classmethod
    def _from_paths(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str | list) else value

    @field_validator("train", "heldout")
    @classmethod
    def _no_empty_paths(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not (value and all(value)):
            raise ValueError("Give at least one path, and no empty one.")
        return value

    @field_validator("dataset")
    @classmethod
    def _one_origin(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value == "":
            raise ValueError("Give the name of a dataset on the hub.")
        if "train" in info.data and (info.data["train"] is None) == (value is None):
            raise ValueError("Give exactly one of train (local files) and dataset (on the hub).")
        return value

    @field_validator("subset", "split", "revision")
    @classmethod
    def _only_with_dataset(cls, value: str | None, info: ValidationInfo) -> str | None:
        name = str(info.field_name)
        if value != cls.model_fields[name].default and "dataset" in info.data and info.data["dataset"] is None:
            raise ValueError(f"{name} belongs to a hub dataset; leave it out where train names local files.")
        return value


class DataConfig(Config):
    """The text of every domain, and how it is cut into sequences."""

    domains: dict[str, DomainConfig] = Field(min_length=1)
    """Domain name -> where its text comes from."""
    sequence_length: int = Field(default=4096, ge=8)
    """Tokens in one sequence."""
    heldout_sequences: int = Field(default=500, ge=1)
    """Held-out sequences of each domain, at most; they give the losses that steer the mixture."""
    max_train_sequences: int | None = Field(default=None, ge=1)
    """Training sequences of each domain, at most: reading stops there. Left out, all of the text is used."""
    root: str | None = None
    """Folder that relative paths start from; left out, the folder of the recipe."""

    @field_validator("domains")
    @classmethod
    def _sound_domains(cls, domains: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
        problems = [f"{name!r}: {problem}" for name in domains if (problem := domain_name_problem(name))]
        folded: dict[str, str] = {}
        for name in domains:
            if (other := folded.setdefault(name.casefold(), name)) != name:
                problems.append(f"{name!r} and {other!r} differ only in case, which some file systems do not tell apart.")
        bare = [name for name, domain in domains.items() if domain.weight is None]
        if 0 < len(bare) < len(domains):
            problems.append(f"Give every domain a weight, or none of them: {', '.join(map(repr, bare))} has none.")
        if problems:
            raise ValueError(" ".join(problems))
        return domains

    def resolved(self, base: Path) -> DataConfig:
        """A copy in which `root` and every path are absolute; `base` is the folder that a relative `root` starts from."""
        root = (base / Path(self.root or ".").expanduser()).absolute()

        def absolute(paths: list[str] | None) -> list[str] | None:
            return None if paths is None else [str(root / Path(path).expanduser()) for path in paths]

        domains = {
            name: domain.model_copy(update={"train": absolute(domain.train), "heldout": absolute(domain.heldout)})
            for name, domain in self.domains.items()
        }
        return self.model_copy(update={"domains": domains, "root": str(root)})


class MixtureConfig(Config):
    """How the shares of the domains follow their losses (dynamic batch loading, arXiv 2310.06694, section 2.2)."""

    update: Literal["paper", "unclipped", "static"] = "paper"
    """paper: a domain above its reference loss gains. unclipped: one below also loses, as in the reference code. static: no change."""
    reference: Literal["source"] | dict[str, float] | None = "source"
    """Reference loss of each domain, in nats per token; source: the source model's own held-out loss. None only where static."""
    smoothing: float = Field(default=1e-4, ge=0, lt=1)
    """Part of the mixture that is always shared out evenly, so that no domain dies out."""
    step_size: float = Field(default=1.0, gt=0)
    """Factor on the loss difference in the exponent (eta)."""

    @field_validator("reference", mode="before")
    @classmethod
    def _sound_reference(cls, value: Any, info: ValidationInfo) -> Any:
        # Before pydantic tries the union, which would report one problem for each of its members.
        if value is None and info.data.get("update", "static") != "static":
            raise ValueError(f"The {info.data['update']} update compares with reference losses: give them, or 'source'.")
        if value is None or value == "source":
            return value
        remedy = "Give 'source', or a loss in nats per token, above 0, for every domain."
        if not isinstance(value, dict) or not value:
            raise ValueError(remedy)
        for loss in value.values():
            if isinstance(loss, bool) or not isinstance(loss, int | float) or not 0 < loss < math.inf:
                raise ValueError(remedy)
        return {str(name): float(loss) for name, loss in value.items()}
