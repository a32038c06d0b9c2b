"""The data section of a recipe: short forms, and every problem with its field and remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shearling.config import parse
from shearling.data.config import DataConfig, MixtureConfig
from shearling.errors import ConfigError


def test_short_forms() -> None:
    config = parse(DataConfig, {"domains": {"a": "x.txt", "b": ["y", "z"], "c": {"dataset": "org/name", "split": "validation"}}})
    assert config.domains["a"].train == ["x.txt"]
    assert config.domains["b"].train == ["y", "z"]
    assert config.domains["c"].split == "validation"
    assert parse(DataConfig, config.model_dump()) == config


def test_resolved(tmp_path: Path) -> None:
    values = {"domains": {"a": {"train": ["x", "/abs/y"], "heldout": "h"}, "c": {"dataset": "org/name"}}}
    config = parse(DataConfig, values).resolved(tmp_path)
    assert config.root == str(tmp_path)
    assert config.domains["a"].train == [str(tmp_path / "x"), "/abs/y"]
    assert config.domains["a"].heldout == [str(tmp_path / "h")]
    assert config.domains["c"].dataset == "org/name"
    assert config.resolved(Path("/elsewhere")) == config
    assert parse(DataConfig, {**values, "root": "texts"}).resolved(tmp_path).domains["a"].heldout == [str(tmp_path / "texts/h")]


@pytest.mark.parametrize(
    ("values", "field", "remedy"),
    [
        ({"domains": {}}, "domains", "at least 1"),
        ({"domains": {"a": {}}}, "domains.a.dataset", "exactly one of train"),
        ({"domains": {"a": {"train": "x", "dataset": "q"}}}, "domains.a.dataset", "exactly one of train"),
        ({"domains": {"a": {"train": []}}}, "domains.a.train", "at least one path"),
        ({"domains": {"a": {"train": "x", "heldout": ""}}}, "domains.a.heldout", "at least one path"),
        ({"domains": {"a": {"train": "x", "split": "test"}}}, "domains.a.split", "belongs to a hub dataset"),
        ({"domains": {"a": {"train": "x", "weight": 0.0}}}, "domains.a.weight", "greater than 0"),
        ({"domains": {"a": {"train": "x", "trian": "y"}}}, "domains.a.trian", "Did you mean 'train'?"),
        ({"domains": {"a": {"train": "x", "weight": 1.0}, "b": "y"}}, "domains", "'b' has none"),
        ({"domains": {"a": "x", "A": "y"}}, "domains", "differ only in case"),
        ({"domains": {"mean": "x"}}, "domains", "Reports use this name"),
        ({"domains": {"../up": "x"}}, "domains", "letters, digits"),
        ({"domains": {"a\n": "x"}}, "domains", "letters, digits"),
        ({"domains": {"a": "x"}, "sequence_length": 4}, "sequence_length", "greater than or equal to 8"),
        ({"domains": {"a": "x"}, "heldout_sequences": 0}, "heldout_sequences", "greater than or equal to 1"),
    ],
)
def test_problems(values: dict[str, Any], field: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(DataConfig, values)
    (problem,) = caught.value.problems
    assert problem.field == field
    assert remedy in problem.remedy


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"update": "papre"}, "update"),
        ({"reference": None}, "reference"),
        ({"reference": "target"}, "reference"),
        ({"reference": {}}, "reference"),
        ({"reference": {"web": -1.0}}, "reference"),
        ({"reference": {"web": True}}, "reference"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"step_size": 0.0}, "step_size"),
    ],
)
def test_mixture_problems(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(MixtureConfig, values)
    assert [problem.field for problem in caught.value.problems] == [field]


def test_mixture() -> None:
    assert parse(MixtureConfig, {}).reference == "source"
    assert parse(MixtureConfig, {"update": "static", "reference": None}).reference is None
    assert parse(MixtureConfig, {"reference": {"web": 2, "code": 0.7}}).reference == {"web": 2.0, "code": 0.7}


def test_config_imports_little() -> None:
    code = "import sys, shearling.data.config; print([m for m in ('torch', 'datasets', 'numpy', 'transformers') if m in sys.modules])"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True).stdout == "[]\n"
