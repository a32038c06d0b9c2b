"""A model that is sliced while it trains: losses, weights and moments in fp64 are those of masks all along, however often it is sliced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import shearling
import tiny_stage
from models import FAMILIES, tiny_config, tiny_model
from runs import metrics, recipe_values
from shearling import pruning, stages
from shearling.arch.families import Anatomy, anatomy_of
from shearling.data.loader import Loader
from shearling.errors import ConfigError
from shearling.objectives.lm import in_training, token_losses
from shearling.prune.allocate import Masks, all_open, left
from shearling.prune.attach import Attachment
from shearling.prune.methods import choose
from shearling.prune.staged import Kept, StagedPruner, kept_by
from shearling.prune.stats import Scores
from shearling.prune.transform import transform
from shearling.recipe import load_recipe
from shearling.schedules import cosine_with_warmup
from shearling.shapes import PRUNABLE
from shearling.sources import open_source
from shearling.train import checkpoint
from shearling.train.loop import fit
from shearling.train.optim import build_optimizer
from shearling.train.state import SavedKind
from shearling.train.step import train_step
from test_masked_equals_cut import wholly_double
from test_staged import exact_losses
from tiny_gates import random_masks
from tiny_stage import STEPS, Stage, Tokens, bits, finished, result_of, saved

SOURCES: dict[str, dict[str, Any]] = {
    "llama": {"tied": True, "layers": 4},
    "qwen2": {"tied": True, "layers": 4},
    "qwen3": {"tied": False, "layers": 4},
    "mistral": {"tied": False, "layers": 4},
}
SHAPE = {"num_hidden_layers": 2, "hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
IN_TRAINING = {"method": "efficientllm", "cuts": 4}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name -> family, target, what the recipe says of pruning
    "in training": ("llama", {"parameters": 0.6}, IN_TRAINING),
    "in training, by magnitude": ("qwen2", {"parameters": 0.6}, {**IN_TRAINING, "scores": "magnitude-l1", "allocation": {"compare": "z"}}),
    "all axes": ("mistral", SHAPE, {"method": "taylor", "cuts": 4}),
    "depth by place": ("qwen3", {"num_hidden_layers": 1}, {"method": "last-blocks", "cuts": 3}),
    "chance, on a turned stream": ("llama", {"parameters": 0.6}, {"method": "random", "cuts": 4, "rotate": "untied"}),
}
FIT_STEPS = 8


def values_of(source: Path, domains: dict[str, str], target: dict[str, Any], **prune: Any) -> dict[str, Any]:
    fit = {"steps": FIT_STEPS, "gates": {"calibration_sequences": 4}, "evaluate_every": 3, "weight_decay": 0.1}
    runtime = {"precision": "float32", "save_every": 3}
    return recipe_values(source, domains, target=target, prune={**fit, **prune}, runtime=runtime)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning stages compute in fp64, masks included."""
    place = stages.Context.place

    def doubled(self: stages.Context, load: Callable[[], Any]) -> Any:
        return place(self, lambda: wholly_double(load().double()))

    def open_(source: Anatomy, axes: Any) -> Masks:
        return {axis: mask.double() for axis, mask in all_open(source, axes).items()}

    monkeypatch.setattr(stages.Context, "place", doubled)
    monkeypatch.setattr(stages, "in_precision", lambda objective, device, runtime: exact_losses)
    monkeypatch.setattr(pruning, "all_open", open_)


def end_of(out: Path, source: Anatomy) -> tuple[Kept, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Of a finished pruning stage what its model was sliced to, weights and moments of what its masks leave, and the counts."""
    found = checkpoint.load(out / "checkpoints" / "prune")
    assert found is not None and found.step == FIT_STEPS
    gates = {path.removeprefix("gates/"): found.whole(path) for path in found.shapes if path.startswith("gates/")}
    kept = kept_by(source, gates)
    plan, target = kept.plan({name.removeprefix("mask/"): tensor for name, tensor in gates.items() if name.startswith("mask/")})
    kinds = ("model/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/")
    tensors = {kind: dict(transform(plan, kept.anatomy, target, SavedKind(found, kind))) for kind in kinds}
    counts = {target.moved(name, plan.layers)[0]: name for name in target.tensors()}
    steps = found.state["optimizer"]["step"]
    return kept, tensors, {name: steps[before] for before, name in counts.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("in_float64")
def test_sliced_or_masked_is_the_same(case: str, sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    """With weight decay and clipping; the same cuts, at every step the same losses, and in the end the same weights and moments."""
    family, target, prune = CASES[case]
    source = open_source(sources(family)).anatomy
    if prune.get("rotate") == "untied":
        source = replace(source, flags={**source.flags, "tie_word_embeddings": False})
    logs, ends, plans, sizes = {}, {}, {}, {}
    for every in (0, 1, 3):
        out = tmp_path / str(every)
        shearling.prune(values_of(sources(family), domains, target, **prune, slice_every=every), out)
        logs[every], ends[every], plans[every] = metrics(out), end_of(out, source), (out / "plan.json").read_bytes()
        sizes[every] = [line["model_parameters"] for line in logs[every] if "model_parameters" in line]
    assert plans[0] == plans[1] == plans[3]
    # the model that trains is smaller itself after a slicing, and only then
    left_after = [line["parameters"] for line in logs[0] if line["step"]]
    assert sizes[0] == [] and sizes[1][0] >= sizes[1][-1] == left_after[-2] < source.parameters()
    assert ends[0][0].whole and not ends[1][0].whole and ends[1][0].anatomy.parameters() == sizes[1][-1]
    assert len(set(sizes[1])) > len(set(sizes[3])) >= 1 and all(one <= three for one, three in zip(sizes[1], sizes[3], strict=True))
    for every in (1, 3):
        for found, expected in zip(logs[every], logs[0], strict=True):
            assert found["step"] == expected["step"]
            for key in ("loss", "gradient_norm", "heldout", "domain_loss"):
                assert found.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), rel=1e-6 if key == "gradient_norm" else 1e-10)
            assert all(found.get(key) == expected.get(key) for key in ("sizes", "parameters", "tokens"))
        for kind, tensors in ends[0][1].items():
            assert tensors.keys() == ends[every][1][kind].keys()
            for name, tensor in tensors.items():
                torch.testing.assert_close(ends[every][1][kind][name], tensor, rtol=1e-10, atol=1e-12, msg=lambda m: f"{kind}{name}: {m}")  # noqa: B023
        assert set(ends[every][2].values()) == set(ends[0][2].values()) == {float(FIT_STEPS)}


@pytest.mark.parametrize("axes", [PRUNABLE, ("hidden", "group", "neuron"), ("layer",)], ids=["all", "width", "depth"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_what_the_plan_keeps(family: str, axes: tuple[str, ...]) -> None:
    """Twice in a row, as slicing does: units by their numbers in the source, and back."""
    source = anatomy_of(tiny_config(family).to_dict())
    numbers = {axis: 1.0 + torch.arange(mask.numel()).view(mask.shape) for axis, mask in all_open(source, PRUNABLE).items()}
    first = source.with_sizes(
        **{axis: size for axis, size in {"layer": 2, "hidden": 36, "group": 2, "query": 1, "neuron": 24}.items() if axis in axes}
    )
    second = first.with_sizes(**{axis: size for axis, size in {"layer": 1, "hidden": 24, "group": 1, "neuron": 7}.items() if axis in axes})
    assert Kept(source, {}).whole and all(torch.equal(Kept(source, {}).narrow(numbers)[axis], tensor) for axis, tensor in numbers.items())
    masks = random_masks(source, first, 1)
    kept = Kept(source, masks)
    assert kept.anatomy == first and not kept.whole and kept.closed(masks) == {}
    # of what is left, less again: by masks over the source's units
    more = kept.widen(random_masks(first, second, 2))
    masks = {axis: more.get(axis, mask) for axis, mask in masks.items()}
    plan, target = kept.plan(masks)
    again = Kept(source, masks)
    assert again.anatomy == target == left(first, kept.narrow(masks)) and kept.closed(masks).keys() == more.keys() != set()
    for axis, tensor in again.narrow(numbers).items():
        assert torch.equal(again.narrow(again.widen({axis: tensor}))[axis], tensor)
        back = again.widen({axis: tensor})[axis]
        assert torch.equal(back[back > 0], numbers[axis][back > 0]) and int((back > 0).sum()) == tensor.numel()
        inner = kept.narrow(numbers)[axis]
        own = [plan.layers, plan.keep["hidden"]] if axis in ("layer", "hidden") else []
        if own:
            assert torch.equal(tensor, inner[own[axis == "hidden"]])
        for place, layer in enumerate(plan.layers if axis in ("group", "neuron") else []):
            assert torch.equal(tensor[place], inner[layer][plan.keep[axis][layer]])
        for place, layer in enumerate(plan.layers if axis == "query" else []):
            for head, (group, chosen) in enumerate(zip(plan.keep["group"][layer], plan.keep["query"][layer], strict=True)):
                assert torch.equal(tensor[place, head], inner[layer, group, chosen])
    assert again.layers == [kept.layers[layer] for layer in plan.layers]


def test_blocks_that_differ_are_not_sliced_on_the_way() -> None:
    source = anatomy_of(tiny_config("llama").to_dict())
    masks = all_open(source, ["neuron"])
    masks["neuron"][0, 0] = 0.0
    with pytest.raises(ValueError, match="blocks that differ"):
        Kept(source, masks)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_shape_that_does_not_load_waits_for_the_next_cut(family: str) -> None:
    """Transformers loads llama only where the channels are a multiple of the heads, mistral always."""
    model = tiny_model(family)
    source, left_over = anatomy_of(model.config.to_dict()), iter([46, 40, 36])

    def cut(masks: Masks, scores: Scores, share: float, state_L: Tensor) -> tuple[Masks, bool]:
        return {"hidden": (torch.arange(48) < next(left_over)).float()}, True

    def measure(masks: Masks, number: int) -> Scores:
        return {}

    start, attachment = all_open(source, ["hidden"]), Attachment(model, source)
    pruner = StagedPruner(source, attachment, start, cut=cut, measure=measure, at=[1, 2, 3], slice_every=1)
    due = []
    for step in (1, 2, 3):
        pruner.update(step)
        due.append(pruner.due())
    assert due == ([False, False, True] if family == "llama" else [True, True, True])


@pytest.mark.parametrize("every", [1, 2, 3])
def test_slicing_is_due_after_every_so_many_cuts(every: int) -> None:
    """Also where two cuts were made at once; once sliced, it is not, and what goes on from there knows."""
    model = tiny_model("qwen3")
    source = anatomy_of(model.config.to_dict())

    def cut(masks: Masks, scores: Scores, share: float, state_L: Tensor) -> tuple[Masks, bool]:
        return {"neuron": (torch.arange(40) < 40 - round(20 * share)).float().expand(3, 40)}, True

    def pruner_of(kept: Kept) -> StagedPruner:
        rule: dict[str, Any] = {"cut": cut, "measure": lambda masks, number: {}, "at": [0, 1, 3, 3, 4], "kept": kept, "slice_every": every}
        return StagedPruner(source, Attachment(model, source), all_open(source, ["neuron"]), **rule)

    pruner, seen = pruner_of(Kept(source, {})), []
    for step in range(6):
        pruner.update(step)
        if pruner.due():
            seen.append(step)
            after = pruner_of(kept := Kept(source, pruner.masks))
            after.load(pruner.tensors_once_sliced())
            assert not after.due() and not pruner.kept.masks.keys() & after.tensors().keys()
            assert kept_by(source, after.tensors()).anatomy == kept.anatomy == left(source, pruner.masks)
            pruner = after
    assert seen == {1: [0, 1, 3, 4], 2: [1, 3], 3: [3]}[every]


def test_fit_returns_when_asked_and_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, between two, and twice at one: the same bits, and each step once in the log; always saved."""
    for save_every in (2, None):
        run = tmp_path / str(save_every)
        for last in (0, 0, 3, 4):
            stage = Stage(runtime={"save_every": save_every})
            monkeypatch.setattr(tiny_stage, "fit", partial(fit, until=lambda stage=stage, last=last: max([0, *stage.steps]) >= last))
            assert stage.fit(run).step == last and saved(stage.checkpoints(run))["step"] == last
            stage.at = (0, 0)
            last_steps = stage.steps
        assert last_steps == [4]
        monkeypatch.setattr(tiny_stage, "fit", fit)
        stage = Stage(runtime={"save_every": 2})
        stage.fit(run)
        assert stage.steps == [5] and result_of(stage, run) == finished("plain")


@pytest.mark.parametrize("broken", [False, True])
def test_dropped_moments_are_those_of_a_new_optimizer(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After steps 2 and 3, in a plain loop; also of one that goes on from what was saved right then."""
    config = {"evaluate_every": STEPS, "weight_decay": 0.1}

    def run(stage: Stage) -> Any:
        monkeypatch.setattr(tiny_stage, "fit", partial(fit, drop_moments=lambda: stage.at[0] in (2, 3)))
        return stage.fit(tmp_path)

    if broken:
        stage = Stage(**config)

        def stop(step: int) -> None:
            if step == 3:
                raise KeyboardInterrupt

        stage.after_step = stop
        with pytest.raises(KeyboardInterrupt):
            run(stage)
        assert saved(stage.checkpoints(tmp_path))["step"] == 2
        assert not any(name.startswith("optimizer") for name in saved(stage.checkpoints(tmp_path))["tensors"])
    run(stage := Stage(**config))
    found = saved(stage.checkpoints(tmp_path))
    plain = Stage(**config)
    loader, shares, losses = Loader(Tokens(), 6, 17), tiny_stage._reweigh(np.array([0.6, 0.4]), {"a": 4.5, "b": 4.4}), []  # type: ignore[arg-type]
    cursors, fit_config = loader.start(), plain.config
    optimizer = build_optimizer(plain.model, fit_config)
    for step in range(1, STEPS + 1):
        batch = loader.batch(40 + step, shares, cursors, np.arange(6))
        rate = fit_config.learning_rate * cosine_with_warmup(step, STEPS, 1, fit_config.final_learning_rate)
        ids_BT, how = torch.from_numpy(batch.ids), {"step": step, "microbatches": 2, "clip": fit_config.clip, "rate": rate}
        losses.append(train_step(plain.model, ids_BT, batch.domains, in_training(token_losses), optimizer, **how).loss)  # type: ignore[arg-type]
        cursors = batch.cursors
        if step in (2, 3):
            optimizer = build_optimizer(plain.model, fit_config)
    assert losses == [line["loss"] for line in metrics(tmp_path) if line["step"]]
    for name, parameter in plain.model.named_parameters():
        assert found["tensors"][f"model/{name}"] == bits(parameter)
        assert found["tensors"][f"optimizer/exp_avg/{name}"] == bits(optimizer.state[parameter]["exp_avg"])
    assert set(found["state"]["optimizer"]["step"].values()) == {float(STEPS - 3)}


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "learned gates": ({"method": "sheared-llama", "slice_every": 1}, "prune.slice_every", "leave it out"),
    "learned gates, moments": ({"method": "sheared-llama", "keep_moments": False}, "prune.keep_moments", "leave it out"),
    "blocks by themselves": (
        {"method": "llm-pruner-global", "slice_every": 2},
        "prune.slice_every",
        "prune.shape uniform, or leave it out",
    ),
    "adapted blocks": ({"method": "adapt-pruner", "slice_every": 2}, "prune.slice_every", "stay alike is sliced on the way: leave it out"),
    "no training": ({"method": "taylor", "slice_every": 2, "steps": 0}, "prune.slice_every", "give prune.steps"),
}
RIGHT: dict[str, dict[str, Any]] = {
    "blocks alike": {"method": "llm-pruner-global", "shape": "uniform", "axes": ["neuron"], "slice_every": 2},
    "moments of blocks that differ": {"method": "adapt-pruner", "keep_moments": False},
    "both": {"method": "efficientllm", "slice_every": 1, "keep_moments": False},
}


@pytest.mark.parametrize("case", [*WRONG, *RIGHT])
def test_what_can_be_asked_for(case: str, sources: Callable[[str], Path], domains: dict[str, str], tmp_path: Path) -> None:
    prune, field, words = WRONG.get(case) or (RIGHT[case], "", "")
    recipe = load_recipe(values_of(sources("qwen3"), domains, {"parameters": 0.8}, **prune))
    source = open_source(sources("qwen3")).anatomy
    if case in RIGHT:
        choose(recipe.prune, source, recipe.target)
        return
    with pytest.raises(ConfigError, match=words) as refused:
        shearling.run(recipe, tmp_path / "run")
    assert [problem.field for problem in refused.value.problems] == [field] and not (tmp_path / "run").exists()
    choose(recipe.prune, source, None)  # where nothing is pruned it says nothing
