"""Strict configuration: unknown keys refused with a suggestion, every problem reported at once. Imports no torch."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from shearling.errors import ConfigError, Problem


class Config(BaseModel):
    """Base of every configuration class: frozen, unknown keys refused, no NaN, field docstrings kept for `--help`.

    `strict` is on, so "3" is no number and 1 is no boolean; an integer where a float is asked is fine.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )


ConfigT = TypeVar("ConfigT", bound=Config)


def parse(cls: type[ConfigT], values: Mapping[str, Any], where: str = "recipe") -> ConfigT:
    """Make a `cls` of plain `values`; raise one `ConfigError` that names every problem."""
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        problems = [_problem(cls, e) for e in error.errors(include_url=False)]
        plural = "problem" if len(problems) == 1 else "problems"
        raise ConfigError(f"{where}: {len(problems)} {plural}", problems) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; errors name the file and the line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such recipe", [Problem("RECIPE", str(path), "Give the path of a YAML file.")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read", [Problem("RECIPE", str(error), "Give a readable YAML file in UTF-8.")]) from None
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, RecursionError) as error:
        found = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path}: not valid YAML", [Problem("RECIPE", found, "Mend the YAML at the place named.")]) from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        remedy = "A recipe is a mapping from field names to values."
        raise ConfigError(f"{path}: not a recipe", [Problem("RECIPE", type(values).__name__, remedy)])
    return values


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `--set a.b=c` assignments to nested plain values; the right side is read as YAML."""
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError("--set cannot be read", [Problem("--set", repr(assignment), "Write it as --set field.inner=value.")])
        node = result
        for key in keys[:-1]:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
            if not isinstance(node, dict):
                remedy = f"{key!r} holds a value, not fields; set it whole."
                raise ConfigError("--set cannot be applied", [Problem("--set", repr(assignment), remedy)])
        try:
            node[keys[-1]] = yaml.load(text, Loader=_UniqueKeyLoader)
        except yaml.YAMLError:
            remedy = "The right side must be a YAML value; quote it if it holds special characters."
            raise ConfigError("--set cannot be read", [Problem("--set", repr(assignment), remedy)]) from None
    return result


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without silent surprises: a repeated key is an error, and 1e-4 is a number (YAML 1.1 reads a string)."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
        if key in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)  # type: ignore[no-untyped-call]
    return mapping


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_FLOAT = r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"
_UniqueKeyLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789"))


def _problem(cls: type[Config], error: Mapping[str, Any]) -> Problem:
    location = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        known = _fields_at(cls, error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        remedy = f"Did you mean {close[0]!r}?" if close else f"Known fields here: {', '.join(known) or 'none'}."
        return Problem(location, "an unknown key", remedy)
    if error["type"] == "missing":
        return Problem(location, "nothing", "This field is required.")
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return Problem(location, _shown(error.get("input")), message[:1].upper() + message[1:] + ("" if message.endswith(".") else "."))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(cls: Any, location: Sequence[Any]) -> list[str]:
    """Field names of the configuration class that lies at `location` below `cls`."""
    for part in location:
        field = cls.model_fields.get(part) if isinstance(part, str) else None
        inner = [c for c in _classes(field.annotation) if hasattr(c, "model_fields")] if field else []
        if field and not inner:
            return []
        cls = inner[0] if inner else cls
    return list(cls.model_fields)


def _classes(annotation: Any) -> list[Any]:
    return [annotation, *(c for arg in get_args(annotation) for c in _classes(arg))]
