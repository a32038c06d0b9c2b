"""Shearling: shear a pretrained language model to exactly the shape you can serve.

The commands of `shearling --help` are functions here with the same names and defaults. Nothing heavy is imported before it is used.

Once this package is imported, transformers' AutoConfig and AutoModelForCausalLM load models whose layers differ (model_type "sheared"),
whichever of the two was imported first.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shearling.api import evaluate, inspect_data, methods, pad, plan, prepare, prune, reference, report, run, train
    from shearling.compare import compare
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
    "shearling.api": ("evaluate", "inspect_data", "methods", "pad", "plan", "prepare", "prune", "reference", "report", "run", "train"),
    "shearling.compare": ("compare",),
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
    "compare",
    "evaluate",
    "inspect_data",
    "load_recipe",
    "methods",
    "pad",
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


class _Deferred(type):
    """Type of a class that is `ShearedConfig` to whoever asks anything of it, and imports that, with seconds of torch, only then."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module(_SHEARED).ShearedConfig(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(_SHEARED).ShearedConfig, name)


class _Sheared(metaclass=_Deferred):
    """Stands for `ShearedConfig` in transformers' table."""


def _announce(auto: Any) -> None:
    """Enter the model type "sheared"; `auto` is transformers' module of AutoConfig."""
    auto.AutoConfig.register("sheared", _Sheared, exist_ok=True)


def _register(sheared: Any) -> None:
    """Enter the classes themselves; `sheared` is our module of them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register("sheared", sheared.ShearedConfig, exist_ok=True)
    AutoModelForCausalLM.register(sheared.ShearedConfig, sheared.ShearedForCausalLM, exist_ok=True)


_SHEARED = "shearling.modeling_sheared"
_AUTO = "transformers.models.auto.configuration_auto"
_THEN = {_AUTO: _announce, _SHEARED: _register}
"""What is done right after a module was imported."""


class _AfterImport:
    """A finder of modules that finds none itself: it sees to it that what `_THEN` says is done after an import."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _THEN:
            return None
        others = sys.meta_path[sys.meta_path.index(cls) + 1 :]
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_then(module: ModuleType) -> None:
                execute(module)
                _THEN[name](module)

            spec.loader.exec_module = execute_then  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _AfterImport)
if _AUTO in sys.modules:
    _announce(importlib.import_module(_AUTO))
