"""Strict configuration: what is refused, with which words, and how YAML is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from shearling.config import Config, override, parse, read_yaml
from shearling.errors import ConfigError


class Inner(Config):
    """A nested one."""

    rate: float = Field(default=0.1, gt=0)
    name: str = "a"
    flag: bool = False
    many: list[int] = Field(default_factory=list)


class Outer(Config):
    """The whole."""

    steps: int
    inner: Inner = Inner()
    other: Inner | None = None


def refused(values: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        parse(Outer, values, "r.yaml")
    assert error.value.exit_code == 2 and isinstance(error.value, ValueError)
    return error.value


def test_sound_values() -> None:
    found = parse(Outer, {"steps": 3, "inner": {"rate": 1, "many": [1, 2]}})
    assert found.steps == 3 and found.inner.rate == 1.0 and found.inner.many == [1, 2] and found.other is None
    with pytest.raises(Exception, match="frozen"):
        found.steps = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "field", "remedy"),
    [
        ({"stesp": 3, "steps": 3}, "stesp", "'steps'"),
        ({"steps": 3, "inner": {"rte": 1}}, "inner.rte", "'rate'"),
        ({"steps": 3, "other": {"nmae": "b"}}, "other.nmae", "'name'"),
        ({"steps": 3, "xyz": 1}, "xyz", "Known fields here: steps, inner, other."),
        ({"steps": 3, "inner": {"many": [1, "x"]}}, "inner.many.1", "integer"),
    ],
)
def test_an_unknown_key_or_value_gets_a_remedy(values: dict[str, Any], field: str, remedy: str) -> None:
    (problem,) = refused(values).problems
    assert problem.field == field and remedy in problem.remedy


@pytest.mark.parametrize(
    ("values", "field", "found"),
    [
        ({"steps": "3"}, "steps", "'3'"),
        ({"steps": 3.5}, "steps", "3.5"),
        ({"steps": True}, "steps", "True"),
        ({"steps": None}, "steps", "None"),
        ({"steps": [3]}, "steps", "[3]"),
        ({}, "steps", "nothing"),
        ({"steps": 3, "inner": {"rate": float("nan")}}, "inner.rate", "nan"),
        ({"steps": 3, "inner": {"rate": float("inf")}}, "inner.rate", "inf"),
        ({"steps": 3, "inner": {"rate": "0.1"}}, "inner.rate", "'0.1'"),
        ({"steps": 3, "inner": {"rate": 0}}, "inner.rate", "0"),
        ({"steps": 3, "inner": {"flag": 1}}, "inner.flag", "1"),
        ({"steps": 3, "inner": {"flag": "yes"}}, "inner.flag", "'yes'"),
        ({"steps": 3, "inner": {"name": 5}}, "inner.name", "5"),
        ({"steps": 3, "inner": None}, "inner", "None"),
        ({"steps": 3, "inner": [1]}, "inner", "[1]"),
    ],
)
def test_a_wrong_type_or_range_names_field_and_value(values: dict[str, Any], field: str, found: str) -> None:
    (problem,) = refused(values).problems
    assert problem.field == field and problem.found == found
    assert problem.remedy[0].isupper() and problem.remedy.endswith(".")


def test_all_problems_at_once() -> None:
    error = refused({"stepps": 1, "inner": {"rate": -1, "flag": 3, "x": 0}})
    assert {p.field for p in error.problems} == {"steps", "stepps", "inner.rate", "inner.flag", "inner.x"}
    assert str(error).startswith("r.yaml: 5 problems") and len(str(error).splitlines()) == 6


def test_a_long_value_is_shortened() -> None:
    (problem,) = refused({"steps": "x" * 5000}).problems
    assert len(problem.found) <= 80


def read(tmp_path: Path, text: str | bytes) -> dict[str, Any]:
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-4", 1e-4), ("1E-4", 1e-4), ("-1e4", -1e4), ("1e+4", 1e4), ("1.e-4", 1e-4), ("2.5e-3", 2.5e-3), (".5", 0.5)],
        *[("3", 3), ("'1e-4'", "1e-4"), ("e4", "e4"), ("1e", "1e"), ("null", None), ("~", None), ("true", True)],
    ],
)
def test_how_values_are_read(tmp_path: Path, text: str, value: Any) -> None:
    found = read(tmp_path, f"a: {text}\n")["a"]
    assert found == value and type(found) is type(value)
    assert override({}, [f"a={text}"])["a"] == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ("'a' appears twice", "line 3")),
        ("x:\n  a: 1\n  a: 2\n", ("'a' appears twice",)),
        ("a: [1, 2\n", ("not valid YAML",)),
        ("- a\n- b\n", ("not a recipe", "list")),
        ("just words\n", ("not a recipe", "str")),
        ("", ("not a recipe", "NoneType")),
        ("1: a\n", ("not a recipe",)),
        ("? [a, b]\n: 1\n", ("plain value",)),
        ("a: !!python/object/apply:os.system [echo]\n", ("not valid YAML",)),
        (b"a: \xff\xfe\n", ("cannot be read",)),
        ("[" * 5000, ("not valid YAML",)),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, text: str | bytes, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    for word in ("r.yaml", *words):
        assert word in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml.*no such recipe"):
        read_yaml(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)


def test_overrides() -> None:
    values = {"a": {"b": 1, "c": [1]}, "d": None}
    found = override(values, ["a.b=2", "a.e.f=x", "d.g=1e-3", "h=[1, 2]", "i=", "j=a=b"])
    assert found == {"a": {"b": 2, "c": [1], "e": {"f": "x"}}, "d": {"g": 1e-3}, "h": [1, 2], "i": None, "j": "a=b"}
    assert values == {"a": {"b": 1, "c": [1]}, "d": None}


@pytest.mark.parametrize("assignment", ["a", "=3", "a..b=1", ".a=1", "a.b.c=1", "a=[1", "a={x: 1, x: 2}"])
def test_overrides_that_cannot_be_applied(assignment: str) -> None:
    with pytest.raises(ConfigError) as error:
        override({"a": {"b": 1}}, [assignment])
    assert assignment in str(error.value) and "--set" in str(error.value)
