"""What is reckoned and looked at before any work: memory, disk, and whether text and source are those the run was begun with."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shearling
from models import save_tiny_source
from runs import Notes, contents, recipe_values, unfinished
from shearling import planning
from shearling.arch.families import FAMILIES, Anatomy
from shearling.errors import ArtifactError, ConfigError, StorageError
from shearling.io.files import sha256_file
from shearling.planning import available_memory, disk_needed, memory_warning, stage_memory, training_memory
from shearling.prune.gates import gate_specs
from shearling.recipe import load_recipe
from shearling.run import check_artifacts
from shearling.sources import Source, open_source
from shearling.train.config import TrainConfig

SIZES = {"layer": 2, "hidden": 4, "group": 1, "query": 2, "head_dim": 2, "neuron": 6, "vocab": 10}
FLAGS = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
TINY = Anatomy(FAMILIES["llama"], SIZES, FLAGS)
"""A block of it has 48 + 72 + 8 = 128 parameters, and the whole 2 x 128 + 2 x 40 + 4 = 340."""
CUT = TINY.with_sizes(layer=1, neuron=3)
"""48 + 36 + 8 + 84 = 176 parameters."""
FIT = TrainConfig(batch_size=4, microbatches=2)
"""2 sequences of 8 are 16 tokens in a microbatch."""
VALUES: dict[str, Any] = {
    "source": "owner/model",
    "target": {"num_hidden_layers": 1, "intermediate_size": 3},
    "data": {"domains": {"a": "a.txt", "b": "b.txt"}, "sequence_length": 8, "heldout_sequences": 10},
}
SOURCE = Source("owner/model", {"dtype": "bfloat16"}, TINY, Path)
BOTH = ("prune", "train")


@pytest.fixture(scope="module")
def values(good_source: Path, domains: dict[str, str]) -> dict[str, Any]:
    return recipe_values(good_source, domains, runtime={"save_every": 4})


@pytest.fixture(scope="module")
def finished(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    shearling.run(values, out)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("shearling.sources.Source.load_model", load)
    monkeypatch.setattr("shearling.stages.load_stock", load)


# Memory


def memory(**options: Any) -> dict[str, int]:
    found = training_memory(TINY, FIT, 8, **options)
    assert found["total"] == sum(size for part, size in found.items() if part != "total")
    return found


def test_memory_on_one_process() -> None:
    """An activation of a token: 4 x 4 x 4 = 64 bytes of the stream and norms, and 8 + 12 + 8 + 24 = 52 numbers in low precision."""
    assert memory() == {
        "weights": 4 * 340,
        "gradients": 4 * 340,
        "moments": 8 * 340,
        "low_precision_copy": 2 * 340,
        "gathered": 0,
        "gates": 0,
        "gated_copies": 0,
        "activations": 16 * (2 * (64 + 2 * 52) + 10 * (2 + 8)),
        "total": 13096,
    }
    whole = memory(bfloat16=False)
    assert (whole["low_precision_copy"], whole["activations"]) == (0, 16 * (2 * (64 + 4 * 52) + 10 * (4 + 8)))


def test_memory_with_activation_checkpointing() -> None:
    """Of each block its input, 4 x 4 bytes a token; and one block's activations."""
    assert memory(activation_checkpointing=True)["activations"] == 16 * (2 * 16 + (64 + 2 * 52) + 10 * (2 + 8))
    assert memory(activation_checkpointing=True, bfloat16=False)["activations"] == 16 * (2 * 16 + (64 + 4 * 52) + 10 * (4 + 8))


def test_memory_over_processes() -> None:
    alone, four = memory(), memory(world_size=4)
    assert [four[part] for part in ("weights", "gradients", "moments")] == [340, 340, 680]
    assert four["gathered"] == (4 + 2) * 128 and memory(world_size=4, bfloat16=False)["gathered"] == 4 * 128
    assert memory(world_size=4, keeps_gathered=True)["gathered"] == 4 * 340
    assert all(four[part] == alone[part] for part in ("low_precision_copy", "activations"))
    assert memory(world_size=3)["weights"] == 454, "rounded up"


def test_memory_of_gates() -> None:
    """Gates of 2 layers and 2 x 6 neurons; the gated copies of a block are 4 x 4 and 4 x 6 numbers."""
    found = memory(target=CUT)
    assert (found["gates"], found["gated_copies"]) == (16 * 14, 4 * 40)
    assert memory(target=CUT, bfloat16=False)["gated_copies"] == 2 * 4 * 40
    assert memory(target=CUT, bfloat16=False, activation_checkpointing=True)["gated_copies"] == 4 * 40
    sharded = memory(target=CUT, bfloat16=False, world_size=4)
    assert (sharded["gates"], sharded["gated_copies"]) == (16 * 14, 2 * 4 * 40), "whole on every process"
    untouched = memory(target=TINY)
    assert (untouched["gates"], untouched["gated_copies"]) == (0, 0)


@pytest.mark.parametrize(
    "change", [{"layer": 1}, {"hidden": 2}, {"group": 1}, {"query": 1}, {"neuron": 3}, {"group": 1, "hidden": 2, "layer": 1}]
)
def test_gates_are_counted_as_they_are_made(change: dict[str, int]) -> None:
    source = TINY.with_sizes(group=3)
    target = source.with_sizes(**change)
    assert planning._gates(source, target) == sum(prod(spec.shape) for spec in gate_specs(source, target).values())


def test_what_a_machine_has(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       32000 kB\nMemFree:         1000 kB\nMemAvailable:   20001 kB\nBuffers: 5 kB\n")
    assert available_memory("cpu", meminfo=meminfo) == 20001 * 1024
    assert available_memory("cpu", 2, meminfo=meminfo) == 20001 * 512
    meminfo.write_text("MemTotal: 32000 kB\n")
    assert available_memory("cpu", meminfo=meminfo) is None
    assert available_memory("cpu", meminfo=tmp_path / "none") is None


def test_a_warning_names_both_numbers_and_the_remedies() -> None:
    assert memory_warning("train", 3 * 2**30, 3 * 2**30) is None and memory_warning("train", 2**60, None) is None
    text = memory_warning("train", 3 * 2**30, 2**30)
    assert text is not None
    for word in ("train takes about 3.0 GiB", "1.0 GiB are free", "train.microbatches", "activation_checkpointing", "more processes"):
        assert word in text


def test_too_little_memory_is_told_and_does_not_end_the_run(copy: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    show = Notes()
    monkeypatch.setattr("shearling.wiring.available_memory", lambda device, processes: 1000 if device == "cpu" else None)
    shearling.train(values, unfinished(copy, "train"), show=show)
    assert len(show.notes) == 1 and show.notes[0].startswith("train takes about 0.0 GiB")


# Disk


def test_disk_of_checkpoints() -> None:
    """Of 340 parameters 4,080 bytes, of 176 2,112; two are kept, and one is being saved; those of prune stay."""

    def checkpoints(stages: tuple[str, ...], saved: dict[str, int] | None = None, **changes: Any) -> int:
        return disk_needed(SOURCE, load_recipe(VALUES | changes), stages, saved)["checkpoints"]

    assert checkpoints(("prune",)) == 3 * 4080 and checkpoints(("train",)) == 3 * 2112 and checkpoints(()) == 0
    assert checkpoints(BOTH) == 2 * 4080 + 3 * 2112
    assert checkpoints(BOTH, runtime={"keep_checkpoints": 9, "save_every": 100}) == 9 * 4080 + 10 * 2112
    signalled = checkpoints(BOTH, runtime={"save_every": None})
    assert signalled == 4080 + 2112, "one of each, where a signal asks for it"
    assert checkpoints(("prune",), prune={"steps": 1000}) == 2 * 4080, "the last, and one where a signal asks for it"
    assert checkpoints(("prune",), prune={"steps": 1001}) == 3 * 4080
    assert checkpoints(BOTH, prune={"steps": 0}) == checkpoints(BOTH, target=None) - 3 * 12 * (340 - 176) == 3 * 2112
    assert checkpoints(BOTH, train={"steps": 0}) == 3 * 4080
    assert checkpoints(BOTH, {"prune": 4080}) == 4080 + 3 * 2112, "what is there is replaced"
    assert checkpoints(("train",), {"prune": 8160, "train": 5000}) == 3 * 2112 - 5000
    assert checkpoints(("train",), {"train": 10**9}) == 0


def test_disk_of_all_else() -> None:
    def parts(stages: tuple[str, ...], source: Source = SOURCE, **changes: Any) -> list[int]:
        found = disk_needed(source, load_recipe(VALUES | changes), stages)
        assert found["total"] == found["checkpoints"] + sum(found[part] for part in ("data", "pruned", "model"))
        return [found[part] for part in ("data", "pruned", "model")]

    bounded = {"data": VALUES["data"] | {"max_train_sequences": 100}}
    assert parts(("prepare", *BOTH)) == [0, 4 * 176, 2 * 176]
    assert parts(("prepare", *BOTH), **bounded) == [2 * 110 * 8 * 2, 4 * 176, 2 * 176]
    assert parts(BOTH, **bounded)[0] == 0
    assert disk_needed(SOURCE, load_recipe(VALUES | bounded), ("prepare",), {"prepare": 1000})["data"] == 2520
    assert parts(("train",)) == [0, 0, 2 * 176] and parts(("evaluate",)) == [0, 0, 0]
    assert parts(("train",), export={"dtype": "float32"})[2] == 4 * 176
    large = Source("owner/model", {"torch_dtype": "float32"}, TINY.with_sizes(vocab=70000), Path)
    assert parts(("prepare",), large, **bounded) == [2 * 110 * 8 * 4, 0, 0]
    assert parts(("train",), large)[2] == 4 * (176 + 2 * 4 * (70000 - 10))


def test_a_real_run_keeps_to_the_estimate(finished: Path, values: dict[str, Any]) -> None:
    recipe = load_recipe(values)
    needed = disk_needed(open_source(recipe.source), recipe, ("prepare", *BOTH))
    for part, least in (("checkpoints", 0.5), ("pruned", 0.9), ("model", 0.9)):
        found = sum(path.stat().st_size for path in (finished / part).rglob("*.safetensors"))
        assert least * needed[part] < found < 1.1 * needed[part], part


def test_a_disk_that_is_too_small(values: dict[str, Any], tmp_path: Path, no_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
    needed = shearling.plan(values["source"], recipe=values)["disk"]["total"]
    out = tmp_path / "run"
    with pytest.raises(StorageError, match=f"{needed} bytes are needed and 5000 are free") as refused:
        shearling.run(values, out)
    assert refused.value.exit_code == 6 and not (out / "data").exists()
    shearling.prepare(values, out)  # which needs little


def test_a_run_that_is_nearly_done_needs_only_the_rest(copy: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full but for one checkpoint and the model is enough to go on."""
    (weights,) = (copy / "model").glob("*.safetensors")
    latest = sorted((copy / "checkpoints" / "train").iterdir())[-1]
    free = sum(path.stat().st_size for path in latest.iterdir()) + 2 * weights.stat().st_size
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6, free))
    shearling.run(values, unfinished(copy, "evaluate"))
    shearling.train(values, unfinished(copy, "train"))


def test_the_plan_shows_memory_and_disk(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 10, "head_dim": 2, **config}))
    runtime = {"activation_checkpointing": True, "precision": "float32"}
    values = VALUES | {"source": str(tmp_path), "train": {"batch_size": 4, "microbatches": 2}, "runtime": runtime}
    found = shearling.plan(tmp_path, recipe=values)
    assert found["memory"]["train"] == training_memory(CUT, FIT, 8, False, activation_checkpointing=True)
    assert found["memory"]["prune"]["gates"] == 16 * 14 and found["memory"]["prune"]["gated_copies"] == 4 * 40
    assert found["disk"]["total"] == 2 * 4080 + 3 * 2112 + 4 * 176 + 4 * 176
    assert "disk, GiB" in planning.describe_text(found)
    assert shearling.plan(tmp_path, VALUES["target"])["disk"] == found["disk"], "with a recipe's defaults"
    found["disk"] = {"data": 2**29, "checkpoints": 2**31, "pruned": 0, "model": 2**30, "total": 2**29 + 2**31 + 2**30}
    assert planning.describe_text(found).splitlines()[-1].split(maxsplit=3)[2:] == ["3.50", "data 0.50, checkpoints 2.00, model 1.00"]


# Text and source


@pytest.mark.parametrize("domain", ["a", "b"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_other_shards_than_the_run_was_begun_with(domain: str, split: str, copy: Path, values: dict[str, Any], no_model: None) -> None:
    unfinished(copy, "train", "evaluate")
    shard, manifest = copy / "data" / f"{domain}.{split}.00000.bin", copy / "data" / "manifest.json"
    before = sha256_file(shard)
    shard.write_bytes(shard.read_bytes()[::-1])
    manifest.write_text(manifest.read_text().replace(before, sha256_file(shard)))
    with pytest.raises(ConfigError, match="--overwrite") as refused:
        shearling.run(values, copy)
    (problem,) = refused.value.problems
    assert problem.field == f"data.{domain}.{split}" and problem.found == f"sha256 {before} -> sha256 {sha256_file(shard)}"


def test_every_field_of_the_ledger_of_text(copy: Path) -> None:
    ledger = copy / "stages" / "prepare.json"
    sound = ledger.read_text()
    check_artifacts(copy)
    changes: list[tuple[Callable[[Any], Any], list[str]]] = [
        (lambda facts: facts.update(sequence_length=64), ["data.sequence_length"]),
        (lambda facts: facts.update(domains=dict(reversed(facts["domains"].items()))), ["data.domains"]),
        (lambda facts: facts["domains"].pop("a"), ["data.a.heldout", "data.a.train"]),
        (lambda facts: facts["domains"].update(c=facts["domains"]["a"]), ["data.c.heldout", "data.c.train"]),
        (lambda facts: facts["domains"]["b"]["shards"]["train"][0].update(sha256="0" * 64), ["data.b.train"]),
    ]
    for change, fields in changes:
        changed = json.loads(sound)
        change(changed)
        ledger.write_text(json.dumps(changed))
        with pytest.raises(ConfigError) as refused:
            check_artifacts(copy)
        assert [problem.field for problem in refused.value.problems] == fields and refused.value.exit_code == 2
        check_artifacts(copy, tokens=False)


@pytest.mark.parametrize(
    ("missing", "function"), [(("prune", "train", "evaluate"), "prune"), (("train", "evaluate"), "train"), (("evaluate",), "run")]
)
def test_another_source_than_the_run_was_begun_with(
    missing: tuple[str, ...], function: str, copy: Path, values: dict[str, Any], no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same path, but other files; a run with nothing left to do of them does not look."""
    before = json.loads((copy / "stages" / "source.json").read_text())["fingerprint"]
    monkeypatch.setattr(Source, "fingerprint", lambda self: "f" * 64)
    shearling.run(values, copy)
    unfinished(copy, *missing)
    with pytest.raises(ConfigError, match="--overwrite") as refused:
        getattr(shearling, function)(values, copy)
    (problem,) = refused.value.problems
    assert (problem.field, problem.found) == ("source", f"fingerprint {before} -> {'f' * 64}")
    if missing == ("evaluate",):
        shearling.run(values, copy, overrides=["evaluate.speed=false"], accept_changed=["evaluate.speed"])


def test_the_fingerprint_sees_another_source(values: dict[str, Any], tmp_path: Path) -> None:
    source = Path(shutil.copytree(values["source"], tmp_path / "source"))
    before = open_source(source).fingerprint()
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, source / "model.safetensors")
    assert open_source(source).fingerprint() != before


def test_preparing_again_mends_a_damaged_shard(copy: Path, values: dict[str, Any]) -> None:
    unfinished(copy, "train", "evaluate")
    shard = copy / "data" / "a.train.00000.bin"
    good = shard.read_bytes()
    shard.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(ArtifactError, match=r"a\.train\.00000\.bin"):
        shearling.run(values, copy)
    ledger = (copy / "stages" / "prepare.json").read_bytes()
    shearling.prepare(values, copy)
    assert shard.read_bytes() == good and (copy / "stages" / "prepare.json").read_bytes() == ledger
    shutil.rmtree(copy / "data")
    shearling.prepare(values, copy)
    assert shard.read_bytes() == good


def test_more_steps_of_training_are_taken_up(values: dict[str, Any], copy: Path) -> None:
    """A change that is accepted reaches the stages that are to come, and those that are finished stay."""
    before = contents(unfinished(copy, "train", "evaluate") / "pruned")
    shutil.rmtree(copy / "checkpoints" / "train")
    show, changed = Notes(), ["train.steps=12", "evaluate.speed=false"]
    report = shearling.run(values, copy, overrides=changed, accept_changed=["train.steps", "evaluate"], show=show)
    assert report["tokens"]["train"] == 12 * 8 * 32 and "speed" not in report
    assert contents(copy / "pruned") == before
    assert show.notes == ["accepted: evaluate.speed true -> false", "accepted: train.steps 10 -> 12"]
    assert load_recipe(copy / "recipe.yaml").train.steps == 12


def test_a_teacher_takes_its_weights_beside_the_model(tmp_path: Path) -> None:
    """In the precision of the run; on several processes a part of them, and the head."""
    save_tiny_source(tmp_path / "source", "llama")
    source = open_source(tmp_path / "source")
    plain = load_recipe(recipe_values(tmp_path / "source", {"web": "web.jsonl"}))
    taught = load_recipe(plain, ["train.distill={}"])
    parameters, head = source.anatomy.parameters(), 96 * 48
    for changes, size, expected in (([], 1, 2 * parameters), (["runtime.precision=float32"], 1, 4 * parameters)):
        before = stage_memory(source, load_recipe(plain, changes), "train", world_size=size)
        found = stage_memory(source, load_recipe(taught, changes), "train", world_size=size)
        assert found.pop("teacher") == expected and found == {**before, "total": before["total"] + expected}
    assert stage_memory(source, taught, "train", world_size=2)["teacher"] == 2 * (-(-parameters // 2) + head)
    assert "teacher" not in stage_memory(source, taught, "prune")
