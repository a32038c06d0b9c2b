"""Recipes: read, checked within a second without torch, written and read again, and compared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from runs import WHOLE_VALUES
from shearling.data.config import DomainConfig
from shearling.errors import ConfigError
from shearling.recipe import FIXED, Recipe, covers, differences, dump_recipe, is_free, load_recipe
from shearling.run import accepted_changes
from shearling.train.config import RuntimeConfig

VALUES: dict[str, Any] = {
    "source": "owner/model",
    "target": {"hidden_size": 36},
    "data": {"domains": {"web": "web.jsonl", "code": ["a.py", "b.py"]}, "sequence_length": 64},
}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_least_recipe_has_the_papers_defaults() -> None:
    recipe = load_recipe(VALUES)
    assert (recipe.prune.steps, recipe.prune.batch_size, recipe.prune.learning_rate, recipe.prune.clip) == (3200, 32, 1e-4, 1.0)
    assert (recipe.train.steps, recipe.train.batch_size, recipe.train.warmup) == (48000, 256, 0.03)
    assert recipe.prune.betas == (0.9, 0.95) and recipe.prune.weight_decay == 0
    assert (recipe.mixture.update, recipe.mixture.reference, recipe.mixture.smoothing) == ("paper", "source", 1e-4)
    assert recipe.target is not None and recipe.target.hidden_size == 36 and recipe.target.num_hidden_layers is None


def test_every_default_is_sound() -> None:
    """pydantic checks them, since `validate_default` is on; so a changed default that breaks its own rule is seen."""
    assert load_recipe(load_recipe(VALUES).model_dump(mode="json")) == load_recipe(VALUES)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"sead": 3}, "sead", ("'seed'",)),
        ({"prune": {"gates": {"learning_rat": 1.0}}}, "prune.gates.learning_rat", ("'learning_rate'",)),
        ({"prune": {"steps": 10.5}}, "prune.steps", ("10.5",)),
        ({"prune": {"learning_rate": "1e-4"}}, "prune.learning_rate", ("'1e-4'",)),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate", ("nan", "finite")),
        ({"train": {"warmup": 1.5}}, "train.warmup", ("1.5",)),
        ({"train": {"batch_size": 10, "microbatches": 4}}, "train", ("10", "4", "multiple")),
        ({"mixture": {"update": "static?"}}, "mixture.update", ("'static?'",)),
        ({"runtime": {"precision": "fp16"}}, "runtime.precision", ("'fp16'",)),
        ({"runtime": {"keep_checkpoints": 1}}, "runtime.keep_checkpoints", ("1",)),
        ({"seed": -1}, "seed", ("-1",)),
        ({"seed": 2**32}, "seed", (str(2**32),)),
        ({"source": ""}, "source", ("''",)),
        ({"target": {"hidden_size": "36"}}, "target.hidden_size", ("'36'",)),
        ({"target": {"head_dim": 8}}, "target.head_dim", ("unknown key",)),
        ({"data": {"domains": {}}}, "data.domains", ("{}",)),
        ({"mixture": {"reference": {"web": 2.0}}}, "recipe", ("web", "code")),
    ],
)
def test_what_is_refused(change: dict[str, Any], field: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_recipe(VALUES | change)
    (problem,) = refused.value.problems
    assert problem.field == field
    for word in words:
        assert word in str(refused.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        load_recipe({"target": {"hidden": 3}, "data": {"domains": {"a": ""}}, "prune": {"steps": "x"}, "train": {"clip": 0}, "sed": 1})
    fields = {problem.field for problem in refused.value.problems}
    assert fields >= {"source", "target.hidden", "prune.steps", "train.clip", "sed"} and any(f.startswith("data.domains.a") for f in fields)


def test_yaml_overrides_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths start from the recipe's folder, overridden ones from the current; a hub id stays one; 1e-4 is a number."""
    text = "source: owner/model\ndata: {domains: {web: web.jsonl}}\nprune: {learning_rate: 1e-4}\n"
    recipe = load_recipe(write(tmp_path / "r.yaml", text), ["train.steps=7", "target.hidden_size=24", "mixture.update=static"])
    assert recipe.source == "owner/model" and recipe.prune.learning_rate == 1e-4
    assert recipe.data.domains["web"].train == [str(tmp_path / "web.jsonl")]
    assert recipe.train.steps == 7 and recipe.target is not None and recipe.target.hidden_size == 24
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert load_recipe(tmp_path / "r.yaml").source == str(tmp_path / "owner" / "model")
    write(tmp_path / "other.yaml", text.replace("owner/model", "./elsewhere"))
    assert load_recipe(tmp_path / "other.yaml").source == str(tmp_path / "elsewhere")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = load_recipe(tmp_path / "r.yaml", ["source=./elsewhere", "data.root=text"])
    assert found.source == str(tmp_path / "here" / "elsewhere")
    assert found.data.domains["web"].train == [str(tmp_path / "here" / "text" / "web.jsonl")]
    with pytest.raises(ConfigError, match=r"train\.stepz.*steps"):
        load_recipe(tmp_path / "r.yaml", ["train.stepz=7"])


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'steps' appears twice"):
        load_recipe(write(tmp_path / "r.yaml", "source: a\nprune: {steps: 3, steps: 4}\n"))


def test_written_and_read_again(tmp_path: Path) -> None:
    recipe = load_recipe(VALUES, ["prune.betas=[0.8, 0.9]", "mixture.reference={web: 2, code: 3.5}", "seed=4294967295"])
    assert load_recipe(write(tmp_path / "r.yaml", dump_recipe(recipe))) == recipe
    assert load_recipe(recipe) == recipe
    assert not differences(recipe, load_recipe(tmp_path / "r.yaml"))
    for field in Recipe.model_fields:
        assert f"\n{field}:" in "\n" + dump_recipe(recipe)


def test_every_field_is_documented() -> None:
    def check(model: Any) -> int:
        fields = 0
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            inner = field.annotation
            fields += 1 + (check(inner) if isinstance(inner, type) and hasattr(inner, "model_fields") else 0)
        return fields

    assert check(Recipe) > 40


def test_differences() -> None:
    before = load_recipe(VALUES)
    after = load_recipe(VALUES, ["seed=3", "prune.gates.start=constant", "target=null"])
    assert differences(before, after) == [
        ("prune.gates.start", '"scores"', '"constant"'),
        ("seed", "17", "3"),
        ("target.hidden_size", "36", "nothing"),
    ]
    free = ["runtime.threads=2", "runtime.save_every=5", "runtime.keep_checkpoints=4"]
    assert differences(before, load_recipe(VALUES, free)) == []
    assert [field for field, _, _ in differences(before, load_recipe(VALUES, ["runtime.precision=float32"]))] == ["runtime.precision"]
    grown = load_recipe({**VALUES, "data": {**VALUES["data"], "domains": {**VALUES["data"]["domains"], "new": "n.txt"}}})
    assert {field.split(".")[2] for field, _, _ in differences(before, grown)} == {"new"}


WHOLE = load_recipe(WHOLE_VALUES)
"""A recipe of which every field can have another value."""


def leaves(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """(field, annotation) of every field of a configuration that holds a value; `*` stands for a domain's name."""
    for name, field in model.model_fields.items():
        inner = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type) and issubclass(part, BaseModel)]
        if inner:
            within = f"{path}{name}.*." if inner == [DomainConfig] else f"{path}{name}."
            yield from leaves(inner[0], within)
        elif get_origin(field.annotation) is dict:  # whose keys are the user's: in the base recipe there is one
            yield f"{path}{name}.key", get_args(field.annotation)[1]
        else:
            yield f"{path}{name}", field.annotation


def options(annotation: Any) -> Iterator[Any]:
    for argument in get_args(annotation):
        yield from [argument] if isinstance(argument, str) else options(argument)


def others(value: Any) -> Iterator[Any]:
    """Values near to `value`, of which some will be valid in its place."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, value * 2, value / 2, value - 1)
    elif isinstance(value, str):
        yield from (f"{value}2", None)
    elif isinstance(value, list):
        yield from (value[::-1], [*value, "/text/more.txt"], [item + 1 for item in value if isinstance(item, int)])
    elif value is None:
        yield from (True, 16, 0.5, "more", ["/text/more.txt"])


def mutated(field: str, annotation: Any) -> Iterator[tuple[str, Recipe]]:
    """(field, recipe) for every place of the base recipe where the field can have another valid value alone."""
    for domain in ("web", "hub") if "*" in field else ("",):
        *parents, last = field.replace("*", domain).split(".")
        values = WHOLE.model_dump(mode="json")
        node = values
        for parent in parents:
            node = node[parent]
        before = node[last]
        for value in (*options(annotation), *([option] for option in options(annotation)), *others(before)):
            if value == before:
                continue
            node[last] = value
            try:
                recipe = load_recipe(values)
            except ConfigError:
                continue
            yield ".".join((*parents, last)), recipe
            break


def test_every_field_that_changes_is_named_and_accepted_only_if_asked(tmp_path: Path) -> None:
    freed, fixed = set(), set()
    for pattern, annotation in leaves(Recipe):
        if pattern in ("prune.method", "prune.cuts", "data.prepared"):  # never change alone: see the tests below
            continue
        changes = list(mutated(pattern, annotation))
        assert changes, f"{pattern}: no other value was found"
        for field, recipe in changes:
            assert recipe != WHOLE
            section = field.split(".")[0]
            if is_free(field):
                freed.add(field)
                assert accepted_changes(WHOLE, recipe, (), tmp_path) == []
                continue
            ((name, before, after),) = differences(WHOLE, recipe)
            assert name == field
            refused_for = [(), ("nothing", field[:-1])]
            if covers(FIXED, field):
                fixed.add(section)
                refused_for.append((field, section))
            for accept in refused_for:
                with pytest.raises(ConfigError, match="--overwrite") as refused:
                    accepted_changes(WHOLE, recipe, accept, tmp_path)
                assert refused.value.exit_code == 2 and [problem.field for problem in refused.value.problems] == [field]
                assert f"{field}: found {before} -> {after}." in str(refused.value)
                assert (f"--accept-changed {field}." in str(refused.value)) is (section not in FIXED)
            for accept in ((field,), (section, "nothing")) if section not in FIXED else ():
                assert accepted_changes(WHOLE, recipe, accept, tmp_path) == [(field, before, after)]
    free = {f"runtime.{name}" for name in RuntimeConfig.model_fields} - {"runtime.device", "runtime.precision"}
    assert freed == free | {"data.cache", "data.cache_gib", "prune.distill.cache", "train.distill.cache"}
    assert fixed == set(FIXED)


def test_prepared_text_may_move_but_not_take_the_place_of_text_to_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds is compared apart, when the run goes on."""
    domains = {"web": {"weight": 1.0}, "hub": {"weight": 2.0}}
    values = {**VALUES, "data": {"prepared": "s3://bucket/data", "domains": domains}}
    before, moved = load_recipe(values), load_recipe(values, ["data.prepared=/there"])
    assert before != moved and accepted_changes(before, moved, (), tmp_path) == []
    assert {field for field, _, _ in differences(before, load_recipe(VALUES))} > {"data.domains.web.train"}
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.yaml", dump_recipe(before))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = load_recipe(tmp_path / "r.yaml", ["data.prepared=text", "data.cache=~/cache"]).data
    assert found.prepared == str(tmp_path / "here" / "text") and found.cache == str(Path("~/cache").expanduser())
    assert load_recipe(tmp_path / "r.yaml").data.prepared == "s3://bucket/data"


BAD = (None, True, -1, 0, 1.5, 10**400, float("nan"), float("inf"), -float("inf"), "", "x", "\0", [], ["x"], [1], {}, {"x": 1}, [[]])


def test_whatever_stands_in_a_field_is_taken_or_refused_by_name() -> None:
    for pattern, _ in leaves(Recipe):
        *parents, last = pattern.replace("*", "web").split(".")
        refused = 0
        for value in BAD:
            values = WHOLE.model_dump(mode="json")
            node = values
            for parent in parents:
                node = node[parent]
            node[last] = value
            try:
                load_recipe(load_recipe(values))
            except ConfigError as error:
                refused += 1
                where = {".".join(problem.field.split(".")[:1]) for problem in error.problems}
                assert error.exit_code == 2 and where <= {parents[0] if parents else last, "recipe"}, (pattern, value, str(error))
        assert refused, pattern


CHECK = """
import json, sys, time
from shearling.errors import ConfigError, ShapeError
began = time.perf_counter()
import shearling
try:
    shearling.run(json.loads(sys.argv[1]), sys.argv[2])
except (ConfigError, ShapeError) as error:
    print(json.dumps([type(error).__name__, time.perf_counter() - began, sorted({"torch", "transformers", "numpy"} & set(sys.modules))]))
"""


@pytest.mark.parametrize(
    ("change", "error"),
    [({"prune": {"steps": "x"}}, "ConfigError"), ({"target": {"hidden_size": 10**6}}, "ShapeError")],
)
def test_a_mistake_is_found_within_a_second_and_without_torch(change: dict[str, Any], error: str, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 40, "vocab_size": 96}
    write(tmp_path / "config.json", json.dumps({"model_type": "llama", **sizes}))
    values = VALUES | {"source": str(tmp_path)} | change
    runs = []
    for _ in range(3):  # the machine may be busy with something else
        arguments = [sys.executable, "-c", CHECK, json.dumps(values), str(tmp_path / "out")]
        runs.append(json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout))
    assert all(kind == error and not heavy for kind, _, heavy in runs), runs
    assert min(seconds for _, seconds, _ in runs) < 1, runs
    assert not (tmp_path / "out").exists()


def test_a_method_that_does_not_learn_takes_steps_and_cuts_where_they_are_given() -> None:
    whole = WHOLE.model_dump(mode="json")
    recipe = load_recipe({**whole, "prune": {"method": "minitron"}})
    assert recipe.prune.steps == 0 and load_recipe(recipe).prune == recipe.prune
    assert [field for field, _, _ in differences(WHOLE, recipe) if field.startswith("prune.method")] == ["prune.method"]
    staged = load_recipe({**whole, "prune": {"method": "minitron", "steps": 5, "cuts": 5}})
    assert ("prune.cuts", "1", "5") in differences(recipe, staged) and load_recipe(staged).prune == staged.prune
    with pytest.raises(ConfigError, match=r"Cuts \(6\) must not be more than steps \(5\)"):
        load_recipe({**whole, "prune": {"method": "minitron", "steps": 5, "cuts": 6}})
    with pytest.raises(ConfigError, match="narrows at every step"):
        load_recipe({**whole, "prune": {"cuts": 2}})
