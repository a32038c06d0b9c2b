"""Shearling: shear a pretrained language model to exactly the shape you can serve.

The commands of `shearling --help` are functions here with the same names and defaults. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shearling.api import evaluate, methods, plan, prepare, prune, reference, report, run, train
    from shearling.errors import (
        ArtifactError,
        ConfigError,
        DataError,
        NumericsError,
        OutputError,
        ShapeError,
        ShearlingError,
        Stopped,
        StorageError,
    )
    from shearling.recipe import Recipe, load_recipe
    from shearling.shapes import Target

_HOMES = {
    "shearling.api": ("evaluate", "methods", "plan", "prepare", "prune", "reference", "report", "run", "train"),
    "shearling.errors": (
        "ArtifactError",
        "ConfigError",
        "DataError",
        "NumericsError",
        "OutputError",
        "ShapeError",
        "ShearlingError",
        "Stopped",
        "StorageError",
    ),
    "shearling.recipe": ("Recipe", "load_recipe"),
    "shearling.shapes": ("Target",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ArtifactError",
    "ConfigError",
    "DataError",
    "NumericsError",
    "OutputError",
    "Recipe",
    "ShapeError",
    "ShearlingError",
    "Stopped",
    "StorageError",
    "Target",
    "evaluate",
    "load_recipe",
    "methods",
    "plan",
    "prepare",
    "prune",
    "reference",
    "report",
    "run",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'shearling' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package: `shearling.prune` is the command even after the folder of that name was imported, which would take its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
