"""Methods by name: what decides on each axis, what is refused, and the documented example of one's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models import tiny_config
from runs import recipe_values
from shearling.arch.families import anatomy_of
from shearling.errors import ConfigError
from shearling.prune.gates import GateSpec, gate_specs
from shearling.prune.methods import METHODS, choose_scores, find, listing
from shearling.prune.scores import SCORES
from shearling.shapes import PRUNABLE, Target, target_anatomy

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.fixture
def specs() -> dict[str, GateSpec]:
    anatomy = anatomy_of(tiny_config("llama").to_dict())
    return gate_specs(anatomy, target_anatomy(anatomy, Target(hidden_size=36, num_hidden_layers=2, intermediate_size=24)))


def test_every_method_names_scores_that_are_there() -> None:
    for method in METHODS.values():
        for axis, name in method.scores.items():
            assert name in SCORES and (axis == "*" or axis in SCORES[name].axes), (method.name, axis)
        assert method.paper and method.about and method.learns is (method.name == "sheared-llama")


def test_what_decides_on_each_axis(specs: dict[str, GateSpec]) -> None:
    axes = set(specs)
    assert axes == {"hidden", "layer", "neuron"}
    assert choose_scores(find("sheared-llama"), None, specs) == dict.fromkeys(axes, "taylor")
    assert choose_scores(find("minitron"), None, specs) == dict.fromkeys(axes, "activation") | {"layer": "block-influence"}
    assert choose_scores(find("minitron"), "random", specs) == dict.fromkeys(axes, "random")
    mixed = choose_scores(find("flap"), {"hidden": "activation", "layer": "every-nth"}, specs)
    assert mixed == {"hidden": "activation", "layer": "every-nth", "neuron": "fluctuation"}


def test_what_is_refused(specs: dict[str, GateSpec]) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'minitron'"):
        find("minitrom")
    with pytest.raises(ConfigError) as refused:
        choose_scores(find("shortgpt"), None, specs)
    assert {problem.field for problem in refused.value.problems} == {"prune.scores.hidden", "prune.scores.neuron"}
    with pytest.raises(ConfigError) as refused:
        choose_scores(find("flap"), None, specs)
    assert {problem.field for problem in refused.value.problems} == {"prune.scores.hidden", "prune.scores.layer"}
    with pytest.raises(ConfigError, match=r"prune\.scores\.query"):  # an axis that the target leaves alone
        choose_scores(find("taylor"), {"query": "taylor"}, specs)
    with pytest.raises(ConfigError, match="Did you mean 'taylor-element'"):
        choose_scores(find("taylor"), "taylor-elements", specs)


def test_the_listing_has_everything() -> None:
    found = listing()
    assert [entry["name"] for entry in found["methods"]] == list(METHODS)
    assert all(set(entry["axes"]) <= set(PRUNABLE) and entry["axes"] for entry in found["scores"])
    documented = DOCS.read_text()
    assert all(f"`{name}`" in documented or f"**{name}**" in documented for name in ("sheared-llama", "shortgpt", "flap", "every-nth"))


def test_the_documented_example(source: Path, domains: dict[str, str], tmp_path: Path) -> None:
    """Word for word, on a recipe of a few seconds; and by the command line, through an entry point."""
    changes = {"prune": {"steps": 0, "gates": {"calibration_sequences": 4}}, "train": {"steps": 2}}
    values = recipe_values(source, domains, target={"num_hidden_layers": 2, "intermediate_size": 24}, **changes)
    values["evaluate"]["speed"] = False
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    example = re.search(r"<!-- example -->\n```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert example is not None and len(example[1].splitlines()) <= 30
    (tmp_path / "lean.py").write_text(example[1])
    done = subprocess.run([sys.executable, "lean.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and float(done.stdout) > 0, done.stderr
    made_by = json.loads((tmp_path / "lean" / "plan.json").read_text())["made_by"]
    assert made_by["method"] == "lean" and made_by["scores"] == {"neuron": "leaned-on", "layer": "block-influence"}
    info = tmp_path / "lean-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lean\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[shearling.methods]\nlean = lean\n")
    command = [sys.executable, "-m", "shearling", "methods", "--json"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    assert "lean" in [entry["name"] for entry in json.loads(told.stdout)["methods"]]
