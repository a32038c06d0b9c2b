"""What the data section of a recipe may say. Imports no torch, no datasets, no numpy."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from shearling.config import Config
from shearling.data.remote import is_url

_DOMAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
RESERVED_NAMES = frozenset({"mean"})
"""Names that reports use beside the domains' own."""


def domain_name_problem(name: str) -> str | None:
    """Why `name` cannot be the name of a domain, or None if it can: it becomes part of file names and metric names."""
    if not _DOMAIN_NAME.fullmatch(name):
        return "A domain's name has 1 to 100 letters, digits, '_', '-' and '.', and begins with a letter, a digit or '_'."
    return "Reports use this name; choose another." if name in RESERVED_NAMES else None


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_as_list)]
"""A path or a list of paths; a recipe may write one as a plain string. Each is a file, a folder or a glob."""


Attend = Literal["sequence", "document"]


ONE_ORIGIN = "Give exactly one of train (files) and dataset (a Hugging Face dataset)."
CACHE = "~/.cache/shearling"


class DomainConfig(Config):
    """Where the text of one domain comes from. In a recipe a path, or a list of paths, is short for `train:`."""

    train: Paths | None = None
    """Files, folders, globs: .jsonl, .json (an object a line), .txt, .md, .rst, .py (a document a file); also .gz, .zst; .parquet. Local,
    or URLs: https://, and s3://, gs://, hf:// and whatever else fsspec reads."""
    dataset: str | None = None
    """A Hugging Face dataset, instead of `train`: its name on the hub, or a folder (of `save_to_disk`, or that `load_dataset` reads)."""
    subset: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Split of the dataset."""
    revision: str | None = None
    """Commit or tag of the hub dataset; left out, the newest, which may be another when a killed preparation goes on."""
    heldout: Paths | None = None
    """Held-out files of the domain's own, as for `train`; left out, a part of the training text is split off."""
    heldout_split: str | None = None
    """Split of the dataset that is held out, instead of `heldout`."""
    weight: float | None = Field(default=None, gt=0)
    """Starting share of the mixture, relative to the other domains; give it to all domains or to none (equal shares)."""
    text_field: str = Field(default="text", min_length=1)
    """Field or column that holds the text, in JSON lines, parquet and datasets; `meta.text` is the field `text` of the field `meta`."""
    where: dict[str, list[str | bool | int | float]] = Field(default_factory=dict)
    """Field -> the value, or values, of which a document must have one there: {meta.redpajama_set_name: RedPajamaC4}. Others are filtered
    out and counted."""

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
            raise ValueError("Give the name of a dataset on the hub, or a folder.")
        if value is not None and is_url(value):
            raise ValueError("Give the name of a dataset on the hub, or a folder; files behind a URL are given as train.")
        if value is not None and info.data.get("train") is not None:
            raise ValueError(ONE_ORIGIN)
        return value

    @field_validator("subset", "split", "revision", "heldout_split")
    @classmethod
    def _only_with_dataset(cls, value: str | None, info: ValidationInfo) -> str | None:
        name = str(info.field_name)
        if value != cls.model_fields[name].default and "dataset" in info.data and info.data["dataset"] is None:
            raise ValueError(f"{name} belongs to a dataset; leave it out where train names files.")
        if name == "heldout_split" and value is not None:
            if info.data.get("heldout") is not None:
                raise ValueError("Give one of heldout (files) and heldout_split (of the dataset).")
            if value == info.data.get("split"):
                raise ValueError("This split is trained on; hold out another.")
        return value

    @field_validator("where", mode="before")
    @classmethod
    def _lists_of_values(cls, value: Any) -> Any:
        # Before pydantic tries the union, which would report one problem for each of its members.
        lists = {k: v if isinstance(v, list) else [v] for k, v in value.items()} if isinstance(value, dict) else None
        if lists is None or not all(isinstance(k, str) and k and v and all(map(_is_plain, v)) for k, v in lists.items()):
            raise ValueError("Give for each field a value or a list of values: texts, numbers, true or false.")
        return lists


class DataConfig(Config):
    """The text of every domain, and how it is cut into sequences."""

    prepared: str | None = Field(default=None, min_length=1)
    """Text that was prepared before, in the place of preparing: a folder (`data/` of a run), which is read where it is, or a URL that
    fsspec knows, whose shards are fetched into `cache`. Its sequence_length must be the recipe's, its domains have weights at most."""
    domains: dict[str, DomainConfig] = Field(default_factory=dict)
    """Domain name -> where its text comes from. Of prepared text all domains, with their weights, or none: then all have equal ones."""
    sequence_length: int = Field(default=4096, ge=8)
    """Tokens in one sequence."""
    attend: Attend = "sequence"
    """What a token attends to, in training and measuring alike: sequence: all that stands before it in its sequence, other documents
    included. document: its own document, whose first token has position 0."""
    heldout_sequences: int = Field(default=500, ge=1)
    """Held-out sequences of each domain, at most; they give the losses that steer the mixture."""
    max_train_sequences: int | None = Field(default=None, ge=1)
    """Training sequences of each domain, at most: reading stops there. Left out, all of the text is used."""
    bad_documents: Literal["stop", "skip"] = "stop"
    """What to do about a line that is no JSON object or not UTF-8, a missing field, a text that is none: stop: an error that names file
    and line. skip: leave it out, count it, and name the first. A file that cannot be read on is an error in both cases."""
    root: str | None = None
    """Folder that relative paths start from; left out, the folder of the recipe."""
    cache: str = Field(default=CACHE, min_length=1)
    """Folder for shards of prepared text that lies at a URL; processes and runs share it."""
    cache_gib: float = Field(default=100.0, gt=0)
    """What the cache may hold, in GiB; those used least recently are removed."""

    @field_validator("domains")
    @classmethod
    def _sound_domains(cls, domains: dict[str, DomainConfig], info: ValidationInfo) -> dict[str, DomainConfig]:
        problems = [f"{name!r}: {problem}" for name in domains if (problem := domain_name_problem(name))]
        prepared = info.data.get("prepared")
        if "prepared" in info.data and prepared is None:
            if not domains:
                problems.append("Give at least 1 domain, or prepared text.")
            without = [name for name, domain in domains.items() if domain.train is None and domain.dataset is None]
            problems += [f"{name!r}: {ONE_ORIGIN}" for name in without]
        elif prepared is not None:
            more = [name for name, domain in domains.items() if domain != DomainConfig(weight=domain.weight)]
            problems += [f"{name!r}: the text is prepared already; give a weight and nothing else." for name in more]
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

    @model_validator(mode="after")
    def _nothing_of_no_account(self) -> DataConfig:
        if self.prepared is not None:
            fields = (name for name in type(self).model_fields if name not in OF_PREPARED)
            moot = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
            if moot:
                raise ValueError(f"the text is prepared already, so {', '.join(moot)} would be of no account: leave it out")
        return self

    def resolved(self, base: Path) -> DataConfig:
        """A copy in which `root` and every path, but no URL, are absolute; `base` is the folder that a relative `root` starts from."""
        root = (base / Path(self.root or ".").expanduser()).absolute()

        def place(path: str) -> str:
            return path if is_url(path) else str(root / Path(path).expanduser())

        def absolute(paths: list[str] | None) -> list[str] | None:
            return None if paths is None else [place(path) for path in paths]

        def folder(dataset: str | None) -> str | None:
            path = root / Path(dataset or "").expanduser()
            return str(path) if dataset is not None and (dataset.startswith((".", "/", "~")) or os.path.isdir(path)) else dataset

        domains = {
            name: domain.model_copy(
                update={"train": absolute(domain.train), "heldout": absolute(domain.heldout), "dataset": folder(domain.dataset)}
            )
            for name, domain in self.domains.items()
        }
        prepared = None if self.prepared is None else place(self.prepared)
        return self.model_copy(update={"domains": domains, "root": str(root), "prepared": prepared, "cache": place(self.cache)})


OF_PREPARED = frozenset({"prepared", "domains", "sequence_length", "attend", "root", "cache", "cache_gib"})
"""Fields of the data section that count where the text is prepared already."""
