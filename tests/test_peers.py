"""benchmarks/peers.py: rivals are cut as near to the budget as their knobs go, checked, published whole, and not made twice."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import parameters_of, save_tiny_source, tiny_config, tiny_model
from prepared import write_prepared
from shearling.arch.families import Anatomy, anatomy_of
from shearling.errors import ArtifactError, ConfigError, OutputError, ShapeError, ShearlingError
from shearling.sources import open_source

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LIMIT = 50_000
"""Parameters asked for; the source has 85,872."""
OPTIPFAIR = """
import torch

looked = []


def analyze_layer_importance(model, dataloader, show_progress):
    assert all(batch["input_ids"].shape == batch["attention_mask"].shape for batch in dataloader)
    looked.append(dataloader)
    return {layer: -layer for layer in range(model.config.num_hidden_layers)}


def prune_model(model, pruning_type, show_progress, layer_indices=None, num_layers_to_remove=None, layer_selection_method=None,
                neuron_selection_method=None, pruning_percentage=None, dataloader=None):
    if pruning_type == "DEPTH":
        model.model.layers = torch.nn.ModuleList(layer for at, layer in enumerate(model.model.layers) if at not in layer_indices)
        model.config.num_hidden_layers = len(model.model.layers)
        return model
    assert neuron_selection_method == "MAW" and [dataloader] == looked
    neurons = model.config.intermediate_size
    model.config.intermediate_size = kept = neurons - int(pruning_percentage / 100 * neurons)
    for layer in model.model.layers:
        for name, rows in (("gate_proj", True), ("up_proj", True), ("down_proj", False)):
            weight = getattr(layer.mlp, name).weight
            weight.data = (weight[:kept] if rows else weight[:, :kept]).detach().clone()
    return model
"""
"""Stands in for the tool: the two functions that are called of it, with its names of arguments and its rounding."""
MERGEKIT = """
import json, re, sys
from pathlib import Path
import yaml
from safetensors.numpy import load_file, save_file

asked, out = yaml.safe_load(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
assert asked["merge_method"] == "passthrough"
sources = [one["sources"][0] for one in asked["slices"]]
kept = [layer for one in sources for layer in range(*one["layer_range"])]
tensors = load_file(Path(sources[0]["model"]) / "model.safetensors")
numbers = {name: int(found[1]) for name in tensors if (found := re.match(r"model\\.layers\\.(\\d+)\\.", name))}
moved = {name: name if name not in numbers else name.replace(f".{numbers[name]}.", f".{kept.index(numbers[name])}.", 1)
         for name in tensors if name not in numbers or numbers[name] in kept}
save_file({new: tensors[name] for name, new in moved.items()}, out / "model.safetensors", {"format": "pt"})
config = json.loads((Path(sources[0]["model"]) / "config.json").read_text())
(out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(kept)}))
"""
"""Stands in for the tool's command."""


def script(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


peers, peers_cut = script("peers"), script("peers_cut")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of six blocks."""
    path = tmp_path_factory.mktemp("deep") / "source"
    save_tiny_source(path, "llama", layers=6)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, deep: Path) -> Path:
    path = tmp_path_factory.mktemp("text") / "data"
    write_prepared(path, {"a": (40, 4), "b": (12, 4)}, AutoTokenizer.from_pretrained(deep))
    return path


@pytest.fixture(scope="module")
def envs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Environments whose Python is this one, with what stands in for the tools."""
    root = tmp_path_factory.mktemp("envs")
    constraints = (BENCHMARKS.parent / "constraints.txt").read_text().splitlines()
    for peer, code in (("optipfair", OPTIPFAIR), ("mergekit", MERGEKIT)):
        requirement = peers.PEERS[peer].requirement
        installed = root / peer / "site"
        module = installed / "mergekit" / "scripts" / "run_yaml.py" if peer == "mergekit" else installed / "optipfair.py"
        module.parent.mkdir(parents=True)
        module.write_text(code)
        about = installed / f"{requirement.replace('==', '-')}.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text(f"Metadata-Version: 2.1\nName: {peer}\nVersion: {requirement.split('==')[1]}\n")
        python = root / peer / "bin" / "python"
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nPYTHONPATH="{installed}" exec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        wanted = [next(line for line in constraints if line.startswith("torch==")), requirement]
        (root / peer / peers.DONE).write_text(json.dumps(wanted))
    return root


def make(
    source: Path, out: Path, envs: Path, names: str, data: Path | None = None, limit: int = LIMIT
) -> tuple[dict[str, dict[str, Any]], list[ShearlingError]]:
    rows, failures = peers.make(argparse.Namespace(source=str(source), out=out, parameters=limit, peers=names, envs=envs, data=data))
    return {row["peer"]: row for row in rows}, failures


def anatomy(**sizes: Any) -> Anatomy:
    return anatomy_of(tiny_config("llama", **sizes).to_dict())


@pytest.mark.parametrize("neurons", [1, 2, 40, 97, 1536, 11008])
def test_a_percentage_keeps_exactly_the_neurons_that_were_meant(neurons: int) -> None:
    for kept in range(1, neurons):
        assert int(peers_cut.percentage(neurons, kept) / 100 * neurons) == neurons - kept


@pytest.mark.parametrize("tied", [False, True])
def test_what_fits_is_the_most_that_fits(tied: bool) -> None:
    whole = anatomy(tied=tied, layers=3, neurons=8)
    sizes = {
        (layers, neurons): whole.with_sizes(layer=layers, neuron=neurons).parameters() for layers in range(1, 4) for neurons in range(1, 9)
    }
    for limit in [size + by for size in sizes.values() for by in (-1, 0, 1)]:
        for layers in range(1, 4):
            most = max((n for n in range(1, 9) if sizes[layers, n] <= limit), default=0)
            assert max(0, peers.neurons_that_fit(whole, layers, limit)) == most
        most = max((n for n in range(1, 4) if sizes[n, 8] <= limit), default=0)
        assert max(0, peers.layers_that_fit(whole, limit)) == most


@pytest.mark.parametrize("name", list(peers.PEERS))
@pytest.mark.parametrize("share", [0.35, 0.5, 0.8, 0.99])
def test_every_choice_is_as_near_as_the_tool_gets_from_below(name: str, share: float) -> None:
    whole = anatomy(layers=24, neurons=80)
    limit = int(whole.parameters() * share)
    choices = peers.choices_of(peers.PEERS[name], whole, limit)
    for dropped, kept in choices:
        assert parameters_of(tiny_config("llama", layers=24 - dropped, neurons=kept).to_dict()) <= limit
        larger = whole.with_sizes(layer=24 - dropped, neuron=kept + 1) if kept < 80 else whole.with_sizes(layer=24 - dropped + 1)
        assert larger.parameters() > limit
    assert len(choices) == 1 if name != "optipfair-text" else 1 < len(choices) <= peers.CHOICES
    if name == "optipfair-text":
        assert choices[0] == peers.choices_of(peers.PEERS["optipfair"], whole, limit)[0] and choices[-1][1] == 80
    if name.startswith("mergekit"):
        assert choices[0][1] == 80


@pytest.mark.parametrize("name", list(peers.PEERS))
def test_a_size_that_cannot_be_reached_is_refused(name: str) -> None:
    whole = anatomy(layers=4)
    with pytest.raises(ShapeError, match="cannot reach this size"):
        peers.choices_of(peers.PEERS[name], whole, whole.with_sizes(layer=1, neuron=1).parameters() - 1)
    with pytest.raises(ShapeError, match="nothing is to be cut"):
        peers.choices_of(peers.PEERS[name], whole, whole.parameters())


def test_slices_leave_out_one_run_of_blocks() -> None:
    ranges = [[one["sources"][0]["layer_range"] for one in peers_cut.slices_of("m", 30, 19, start)["slices"]] for start in (0, 10, 11)]
    assert ranges == [[[19, 30]], [[0, 10], [29, 30]], [[0, 11]]]


def test_the_distance_is_that_between_what_goes_in_and_what_comes_out() -> None:
    model = tiny_model("llama", layers=4)
    with torch.no_grad():  # what these blocks do to the stream is nothing
        for layer in model.model.layers[1:3]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    ids = torch.arange(3, 23).reshape(2, 10)
    states = model(ids, output_hidden_states=True).hidden_states
    batches = peers_cut.batches_of(ids.numpy())
    one, two = peers_cut.distances(model, batches, 1), peers_cut.distances(model, batches, 2)
    angles = torch.cosine_similarity(states[0][:, -1].double(), states[1][:, -1].double(), dim=-1).arccos() / torch.pi
    assert one[0] == pytest.approx(angles.mean().item()) and one[1:3] == pytest.approx([0, 0], abs=1e-7) and one[3] > 0.01
    assert len(two) == 3 and two[1] == pytest.approx(0, abs=1e-7) and min(two[0], two[2]) > 0.01
    assert peers_cut.distances(model, batches, 1) == one  # no hook is left


def test_rows_come_from_all_domains_alike(text: Path) -> None:
    tokens = peers.open_text(peers.find_text(text))
    rows = peers.calibration_rows(tokens)
    assert rows.shape == (28, 16)  # all 12 of b, and 16 of a
    of_a = {row.tobytes() for row in np.asarray(tokens.sequences("a", "train"))}
    assert [row.tobytes() in of_a for row in rows[:4]] == [True, False, True, False]
    assert sum(row.tobytes() in of_a for row in rows) == 16


def test_cuts_are_checked_published_and_not_made_twice(deep: Path, text: Path, envs: Path, tmp_path: Path) -> None:
    """The whole way of both tools, with text and without."""
    out = tmp_path / "out"
    found, failures = make(deep, out, envs, "optipfair-text,mergekit", text)
    assert set(found) == {"optipfair-text", "mergekit"} and not failures
    for name, row in found.items():
        model = AutoModelForCausalLM.from_pretrained(out / name)
        assert sum(weight.numel() for weight in model.parameters()) == row["parameters"] <= LIMIT
        assert (model.config.num_hidden_layers, model.config.intermediate_size) == (row["layers"], row["neurons"])
        assert AutoTokenizer.from_pretrained(out / name).encode("w5 w9") == AutoTokenizer.from_pretrained(deep).encode("w5 w9")
        assert row == json.loads((out / name / "peer.json").read_text())
        assert row["requirement"] == "==".join((peers.PEERS[name].tool, row["versions"][peers.PEERS[name].tool]))
        assert row["heldout"]["loss"]["mean"] == pytest.approx((row["heldout"]["loss"]["a"] + row["heldout"]["loss"]["b"]) / 2)
    best = min(found["optipfair-text"]["tried"], key=lambda one: one["loss"])
    assert len(found["optipfair-text"]["tried"]) > 1
    assert (6 - best["dropped"], best["neurons"]) == (found["optipfair-text"]["layers"], found["optipfair-text"]["neurons"])
    assert found["optipfair-text"]["tokens"]["analysis"] == 28 * 16
    weights, kept = load_file(deep / "model.safetensors"), load_file(out / "mergekit" / "model.safetensors")
    last = f"model.layers.{found['mergekit']['layers'] - 1}.mlp.up_proj.weight"
    assert kept["model.layers.0.mlp.up_proj.weight"].equal(weights["model.layers.0.mlp.up_proj.weight"])
    assert kept[last].equal(weights["model.layers.5.mlp.up_proj.weight"])
    assert {path.name for path in out.iterdir()} == {"optipfair-text", "mergekit", ".lock"}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert make(deep, out, tmp_path / "none", "optipfair-text,mergekit", text) == (found, [])
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    rows, (failure,) = make(deep, out, envs, "mergekit", limit=LIMIT - 1)
    assert not rows and isinstance(failure, OutputError) and "another parameters_at_most" in str(failure)


def test_what_a_tool_breaks_off_is_not_published_and_others_go_on(deep: Path, envs: Path, tmp_path: Path) -> None:
    python = tmp_path / "envs" / "mergekit" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    shutil.copy(envs / "mergekit" / peers.DONE, python.parents[1] / peers.DONE)
    there = tmp_path / "out" / "optipfair" / "peer.json"
    there.parent.mkdir(parents=True)
    there.write_text(json.dumps({**peers.asked_of("optipfair", open_source(deep), LIMIT, None), "parameters": 49_000}))
    rows, (failure,) = make(deep, tmp_path / "out", tmp_path / "envs", "mergekit,optipfair")
    assert "mergekit: the tool ended with code 3" in str(failure)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "optipfair"} == {".lock", *rows}


def test_a_checkpoint_of_another_shape_is_refused(deep: Path) -> None:
    source = open_source(deep)
    limit = source.anatomy.parameters()
    assert peers.checked("mergekit", deep, source, [(0, 40)], limit) == {"parameters": limit, "layers": 6, "neurons": 40}
    for choices, most in (([(1, 40), (0, 39)], limit), ([(0, 40)], limit - 1)):
        with pytest.raises(ArtifactError, match="not what was asked of it"):
            peers.checked("mergekit", deep, source, choices, most)


def test_wrong_options_and_foreign_folders_are_refused(deep: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'?wanda'?[\s\S]*--data: found none"):
        make(deep, tmp_path / "out", tmp_path, "wanda,optipfair-text")
    (tmp_path / "mergekit").mkdir()
    (tmp_path / "mergekit" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an environment of Python"):
        peers.environment(peers.PEERS["mergekit"], tmp_path)
    assert (tmp_path / "mergekit" / "thesis.txt").read_text() == "mine"
