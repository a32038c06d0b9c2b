"""The data section of a recipe: short forms, and every problem with its field and remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shearling.config import parse
from shearling.data.config import DataConfig
from shearling.data.mixture_config import MixtureConfig
from shearling.errors import ConfigError


def test_short_forms() -> None:
    config = parse(DataConfig, {"domains": {"a": "x.txt", "b": ["y", "z"], "c": {"dataset": "org/name", "split": "validation"}}})
    assert config.domains["a"].train == ["x.txt"]
    assert config.domains["b"].train == ["y", "z"]
    assert config.domains["c"].split == "validation"
    assert parse(DataConfig, config.model_dump()) == config


def test_where_keeps_the_kinds_of_its_values() -> None:
    where = {"meta.set": "C4", "year": [2019, 2020.5], "flag": True, "one": 1}
    config = parse(DataConfig, {"domains": {"a": {"train": "x", "where": where}}})
    found = config.domains["a"].where
    assert found == {"meta.set": ["C4"], "year": [2019, 2020.5], "flag": [True], "one": [1]}
    assert (type(found["flag"][0]), type(found["one"][0])) == (bool, int)
    assert parse(DataConfig, config.model_dump(mode="json")) == config


def test_resolved(tmp_path: Path) -> None:
    values = {"domains": {"a": {"train": ["x", "/abs/y"], "heldout": "h"}, "c": {"dataset": "org/name"}}}
    config = parse(DataConfig, values).resolved(tmp_path)
    assert config.root == str(tmp_path)
    assert config.domains["a"].train == [str(tmp_path / "x"), "/abs/y"]
    assert config.domains["a"].heldout == [str(tmp_path / "h")]
    assert config.domains["c"].dataset == "org/name"
    assert config.resolved(Path("/elsewhere")) == config
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse(DataConfig, values).resolved(tmp_path).domains["c"].dataset == str(tmp_path / "org" / "name")
    dotted = parse(DataConfig, {"domains": {"c": {"dataset": "./saved"}}}).resolved(tmp_path)
    assert dotted.domains["c"].dataset == str(tmp_path / "saved")
    assert parse(DataConfig, {**values, "root": "texts"}).resolved(tmp_path).domains["a"].heldout == [str(tmp_path / "texts/h")]


@pytest.mark.parametrize(
    ("values", "field", "remedy"),
    [
        ({"domains": {}}, "domains", "at least 1 domain, or prepared text"),
        ({"domains": {"a": {}}}, "domains", "'a': Give exactly one of train"),
        ({}, "domains", "at least 1 domain, or prepared text"),
        ({"domains": {"a": {"train": "x", "dataset": "q"}}}, "domains.a.dataset", "exactly one of train"),
        ({"domains": {"a": {"train": []}}}, "domains.a.train", "at least one path"),
        ({"domains": {"a": {"train": "x", "heldout": ""}}}, "domains.a.heldout", "at least one path"),
        ({"domains": {"a": {"train": "x", "split": "test"}}}, "domains.a.split", "belongs to a dataset"),
        ({"domains": {"a": {"train": "x", "heldout_split": "test"}}}, "domains.a.heldout_split", "belongs to a dataset"),
        ({"domains": {"a": {"dataset": "q", "heldout_split": "train"}}}, "domains.a.heldout_split", "trained on"),
        ({"domains": {"a": {"dataset": "q", "heldout": "x", "heldout_split": "test"}}}, "domains.a.heldout_split", "one of heldout"),
        ({"domains": {"a": {"dataset": "s3://bucket/x"}}}, "domains.a.dataset", "given as train"),
        ({"domains": {"a": {"train": "x", "where": "lang"}}}, "domains.a.where", "for each field a value"),
        ({"domains": {"a": {"train": "x", "where": {"lang": []}}}}, "domains.a.where", "for each field a value"),
        ({"domains": {"a": {"train": "x", "where": {"": "en"}}}}, "domains.a.where", "for each field a value"),
        ({"domains": {"a": {"train": "x", "where": {"lang": None}}}}, "domains.a.where", "for each field a value"),
        ({"domains": {"a": {"train": "x", "where": {"meta": {"lang": "en"}}}}}, "domains.a.where", "for each field a value"),
        ({"domains": {"a": "x"}, "bad_documents": "drop"}, "bad_documents", "'stop' or 'skip'"),
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


def test_prepared_text_needs_no_domains_or_their_weights_alone(tmp_path: Path) -> None:
    assert parse(DataConfig, {"prepared": "s3://bucket/data"}).domains == {}
    weights = {"a": {"weight": 3.0}, "b": {"weight": 1.0}}
    config = parse(DataConfig, {"prepared": "there", "domains": weights, "sequence_length": 64, "cache": "c"}).resolved(tmp_path)
    assert config.prepared == str(tmp_path / "there") and config.cache == str(tmp_path / "c") and config.domains["a"].weight == 3.0
    assert parse(DataConfig, config.model_dump()) == config == config.resolved(Path("/elsewhere"))
    assert parse(DataConfig, {"prepared": "s3://bucket/data"}).resolved(tmp_path).prepared == "s3://bucket/data"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"domains": {"a": "x.txt"}}, "'a': the text is prepared already; give a weight and nothing else"),
        ({"domains": {"a": {"weight": 1.0, "text_field": "body"}}}, "give a weight and nothing else"),
        ({"max_train_sequences": 7, "heldout_sequences": 8}, "heldout_sequences, max_train_sequences would be of no account"),
        ({"cache_gib": 0.0}, "greater than 0"),
        ({"cache": ""}, "at least 1 character"),
        ({"domains": {"a": {}, "b": {"weight": 1.0}}}, "'a' has none"),
    ],
)
def test_what_is_of_no_account_for_prepared_text_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(DataConfig, {"prepared": "/there", **values})


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
