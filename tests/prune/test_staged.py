"""Cuts along training: training under masks is training of what is sliced, moments included; no cut is lost; scores under masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from models import FAMILIES, tiny_config, tiny_model
from shearling.arch.families import Anatomy, anatomy_of
from shearling.io.tensors import MemoryReader
from shearling.objectives.lm import in_training, token_losses
from shearling.prune.allocate import Masks, adapted, all_open, left, ranked, to_shape
from shearling.prune.attach import Attachment
from shearling.prune.config import AllocationConfig
from shearling.prune.gates import gate_specs, unit_specs
from shearling.prune.plan import plan_from_masks
from shearling.prune.scores import SCORES, compute
from shearling.prune.staged import RunningScores, StagedPruner, cut_steps
from shearling.prune.stats import Scores
from shearling.prune.transform import transform
from shearling.shapes import PRUNABLE, target_config
from shearling.train.config import FitConfig
from shearling.train.optim import build_optimizer
from shearling.train.step import train_step
from test_masked_equals_cut import cut_model, wholly_double
from tiny_gates import random_masks

SIZES: dict[str, Any] = {"layers": 3, "hidden": 24, "heads": 6, "groups": 3, "head_dim": 4, "neurons": 16, "vocab": 32}
HEADS_AND_NEURONS = ("group", "neuron")
STEPS, RATE, CLIP, DECAY, BETAS = 9, 3e-3, 1.0, 0.1, (0.9, 0.95)
DATA = torch.randint(0, 32, (STEPS + 1, 4, 11), generator=torch.Generator().manual_seed(5))


def exact_losses(model: Any, ids_BT: Tensor) -> Tensor:
    """Cross-entropy of every predicted token in the model's own precision; the house's is in fp32."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none").view(len(ids_BT), -1)


def doubled(family: str, **sizes: Any) -> Any:
    return wholly_double(tiny_model(family, **{**SIZES, **sizes}).double().train())


def close(found: Tensor, expected: Tensor, name: str, rtol: float, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def optimizer_of(model: Any) -> torch.optim.AdamW:
    config = FitConfig(
        steps=STEPS, batch_size=4, learning_rate=RATE, warmup=0, evaluate_every=1, weight_decay=DECAY, betas=BETAS, clip=CLIP
    )
    return build_optimizer(model, config)


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    steps: Any,
    gates: StagedPruner | None = None,
    *,
    rate: float = RATE,
    skip: tuple[int, ...] = (),
    clip: float = CLIP,
) -> list[float]:
    """Take these steps by the house's own; `skip` those. Returns their losses."""
    found = []
    for step in steps:
        result = train_step(
            model,
            DATA[step],
            np.zeros(4, int),
            in_training(exact_losses),
            optimizer,
            **{"step": step, "microbatches": 2, "clip": clip, "rate": rate, "gates": gates},
            object_to=lambda loss, norm, step=step: "a spike" if step in skip else None,
        )
        found.append(result.loss)
    return found


Rule = Callable[[Anatomy, Masks, Scores, float, Tensor], tuple[Masks, bool]]


def by_rank(uniform: bool) -> Rule:
    def cut(source: Anatomy, masks: Masks, scores: Scores, share: float, state_L: Tensor) -> tuple[Masks, bool]:
        budget = round(source.parameters() * (1 - 0.45 * share))
        return ranked(source, masks, scores, budget, AllocationConfig(compare="parameters"), uniform=uniform), True

    return cut


def by_share(source: Anatomy, masks: Masks, scores: Scores, share: float, state_L: Tensor) -> tuple[Masks, bool]:
    return adapted(source, masks, scores, round(source.parameters() * (1 - 0.3 * share)), AllocationConfig(inner_steps=10), state_L)


def by_shape(source: Anatomy, masks: Masks, scores: Scores, share: float, state_L: Tensor) -> tuple[Masks, bool]:
    target = source.with_sizes(layer=2, hidden=18, group=2, query=1, neuron=10)
    return to_shape(masks, scores, gate_specs(source, target), share), True


class Run:
    """A model that trains under masks, which are cut after the steps `at` by the model's own scores."""

    def __init__(self, family: str, axes: Any, rule: Rule, at: list[int], running: bool, **sizes: Any) -> None:
        self.config = tiny_config(family, **{**SIZES, **sizes}).to_dict()
        self.source = anatomy_of(self.config)
        self.model = doubled(family, **sizes)
        self.optimizer = optimizer_of(self.model)
        self.seen: list[Masks] = []
        """The masks after every cut."""
        names = dict.fromkeys(axes, "taylor-element")
        specs = unit_specs(self.source, axes)
        weighed = {**names, "layer": "block-influence"} if rule is by_share else names

        def measure(masks: Masks, number: int) -> Scores:
            every = {**specs, **unit_specs(self.source, weighed)}
            return compute(weighed, self.model, self.source, every, exact_losses, [DATA[0]], masks=masks)

        def cut(masks: Masks, scores: Scores, share: float, state_L: Tensor) -> tuple[Masks, bool]:
            masks, there = rule(self.source, masks, scores, share, state_L)
            self.seen += [masks] if there else []
            return masks, there

        self.pruner = StagedPruner(
            self.source,
            Attachment(self.model, self.source),
            {axis: mask.double() for axis, mask in all_open(self.source, axes).items()},
            cut=cut,
            measure=measure,
            at=at,
            running=RunningScores(names, self.model, self.source, specs) if running else None,
        )

    def state(self) -> dict[str, dict[str, Tensor]]:
        return state_of(self.model, self.optimizer)

    def scores(self, step: int) -> Scores:
        """Of a step's batch, under the masks as they are."""
        axes = self.pruner.masks
        self.pruner.attachment.set({})
        specs, names = unit_specs(self.source, axes), dict.fromkeys(axes, "taylor-element")
        return compute(names, self.model, self.source, specs, exact_losses, [DATA[step]], masks=axes)


def state_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Weights and both moments by name, copied."""
    found: dict[str, dict[str, Tensor]] = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name, weight in model.named_parameters():
        found["weights"][name] = weight.detach().clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            found[moment][name] = (
                optimizer.state[weight][moment].clone() if weight in optimizer.state else torch.zeros_like(weight.detach())
            )
    return found


def sliced(run: Run, masks: Masks, state: dict[str, dict[str, Tensor]], step: int) -> tuple[Any, torch.optim.Optimizer]:
    """A model of what the masks leave, its own class, and its optimizer after `step` steps, cut from weights and moments of the source."""
    target = left(run.source, masks)
    plan = plan_from_masks(run.source, target, masks)
    values = target_config(run.config, run.source, target, plan.layers)
    model = wholly_double(AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).double().train())
    cut = {kind: dict(transform(plan, run.source, target, MemoryReader(tensors))) for kind, tensors in state.items()}
    model.load_state_dict(cut["weights"], strict=False)
    model.tie_weights()
    optimizer = optimizer_of(model)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, cut["weights"][name])
        moments = {kind: cut[kind][name] for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
    return model, optimizer


CASES: dict[str, tuple[str, Any, Rule, bool, dict[str, Any]]] = {
    "llama, blocks apart": ("llama", HEADS_AND_NEURONS, by_rank(uniform=False), False, {}),
    "llama, in training, tied": ("llama", ("hidden", "group", "neuron"), by_rank(uniform=True), True, {"tied": True}),
    "mistral, in training, all axes": ("mistral", PRUNABLE, by_shape, True, {}),
    "qwen2, all axes, tied": ("qwen2", PRUNABLE, by_shape, False, {"tied": True}),
    "qwen3, adapted": ("qwen3", HEADS_AND_NEURONS, by_share, False, {}),
}


def positions(run: Run, masks: Masks) -> dict[str, tuple[str, list[int]]]:
    """Name in the cut model -> the source's, and which of its elements the masks leave, as flat numbers, in the cut model's order."""
    target, shapes = left(run.source, masks), run.source.shapes()
    ends = np.cumsum([prod(shape) for shape in shapes.values()])
    starts = dict(zip(shapes, [0, *ends[:-1].tolist()], strict=True))
    numbers = {name: (starts[name] + torch.arange(prod(shape))).view(shape) for name, shape in shapes.items()}
    found = {}
    for name, kept in transform(plan_from_masks(run.source, target, masks), run.source, target, MemoryReader(numbers)):
        original = list(shapes)[int(np.searchsorted(ends, int(kept.flatten()[0]), side="right"))]
        found[name] = original, (kept.flatten() - starts[original]).tolist()
    return found


@pytest.mark.parametrize("case", CASES)
def test_training_under_masks_is_training_of_the_sliced_model(case: str) -> None:
    """With weight decay and clipping: after three cuts weights and moments are those of models that were sliced at each cut."""
    family, axes, rule, running, sizes = CASES[case]
    run = Run(family, axes, rule, [2, 4, 6], running, **sizes)
    losses, before = train(run.model, run.optimizer, range(1, 7), run.pruner), run.state()
    losses += train(run.model, run.optimizer, range(7, STEPS + 1), run.pruner)
    after, anatomies = run.state(), [run.source, *(left(run.source, masks) for masks in run.seen)]
    assert all(one.parameters() > other.parameters() for one, other in pairwise(anatomies)) and len(anatomies) == 4
    # the other way: slice at each cut, train what is left, and put it back between zeros, to be sliced again
    model = doubled(family, **sizes)
    optimizer = optimizer_of(model)
    assert train(model, optimizer, (1, 2)) == losses[:2]
    state = state_of(model, optimizer)
    for masks, steps in zip(run.seen, ((3, 4), (5, 6), (7, 8, 9)), strict=True):
        model, optimizer = sliced(run, masks, state, steps[0] - 1)
        assert train(model, optimizer, steps) == pytest.approx([losses[step - 1] for step in steps], rel=1e-11)
        state = {kind: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()} for kind, tensors in after.items()}
        for kind, tensors in state_of(model, optimizer).items():
            for name, (original, kept) in positions(run, masks).items():
                state[kind][original].view(-1)[kept] = tensors[name].flatten()
    gone = 0
    for name in after["weights"]:
        open_ = torch.zeros(after["weights"][name].numel(), dtype=torch.bool)
        for original, kept in positions(run, masks).values():
            open_[kept if original == name else []] = True
        gone += int((~open_).sum())
        for kind in after:
            found, expected = after[kind][name].flatten()[open_], state[kind][name].flatten()[open_]
            close(found, expected, f"{kind} {name}", rtol=1e-9, atol=1e-12)
        for kind, beta in zip(("exp_avg", "exp_avg_sq"), BETAS, strict=True):  # what is closed gets no gradient: its moments decay
            decayed = before[kind][name].flatten()[~open_] * beta**3
            torch.testing.assert_close(after[kind][name].flatten()[~open_], decayed, rtol=1e-12, atol=0)
    assert gone == run.source.parameters() - anatomies[-1].parameters()


@pytest.mark.parametrize("running", [False, True])
def test_no_cut_is_lost_with_a_step(running: bool) -> None:
    """One that was due after a skipped step is made after the next, or when all steps are done; two at once by the same scores."""
    run = Run("llama", HEADS_AND_NEURONS, by_rank(uniform=False), [2, 4, 6, 9], running)
    run.pruner.catch_up(0)
    counts = []
    for step in range(1, 10):
        train(run.model, run.optimizer, [step], run.pruner, skip=(2, 4, 5, 6, 9))
        counts.append(len(run.seen))
    assert counts == [0, 0, 1, 1, 1, 1, 3, 3, 3]
    run.pruner.catch_up(9)
    run.pruner.catch_up(9)
    assert len(run.seen) == 4
    sizes = [left(run.source, masks).parameters() for masks in run.seen]
    for share, parameters in zip((0.25, 0.5, 0.75, 1.0), sizes, strict=True):
        budget = round(run.source.parameters() * (1 - 0.45 * share))
        assert budget - 3 * 24 < parameters <= budget
    assert run.pruner.measurements == (0 if running else 4)


def test_a_cut_after_steps_that_measured_nothing_goes_by_the_scores_before() -> None:
    run = Run("llama", HEADS_AND_NEURONS, by_rank(uniform=False), [2, 3], running=True)
    train(run.model, run.optimizer, (1, 2), run.pruner)
    scores = run.pruner._running.means()  # type: ignore[union-attr]
    assert all((values > 0).all() for values in scores.values())
    train(run.model, run.optimizer, [3], run.pruner, skip=(3,))
    run.pruner.catch_up(3)
    expected = by_rank(uniform=False)(run.source, run.seen[0], scores, 1.0, torch.zeros(3))[0]
    assert all(torch.equal(mask, expected[axis]) for axis, mask in run.pruner.masks.items())
    # and what is measured from then on is measured anew
    train(run.model, run.optimizer, [4], run.pruner, rate=0.0, clip=1e9)
    again = run.scores(4)
    for axis, values in run.pruner._running.means().items():  # type: ignore[union-attr]
        torch.testing.assert_close(values, again[axis], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_training_are_scores_of_its_batches(family: str, masked: bool) -> None:
    """At a learning rate of 0 and without clipping, of two steps the mean; where masks are closed, the scores under masks."""
    run = Run(family, PRUNABLE, by_shape, [1] if masked else [], running=True)
    train(run.model, run.optimizer, [1] if masked else [], run.pruner)
    train(run.model, run.optimizer, (2, 3), run.pruner, rate=0.0, clip=1e9)
    each = [run.scores(step) for step in (2, 3)]
    found = run.pruner._running.means()  # type: ignore[union-attr]
    for axis in PRUNABLE:
        torch.testing.assert_close(found[axis], (each[0][axis] + each[1][axis]) / 2, rtol=1e-4, atol=1e-9)
        assert (found[axis] > 0).all() != masked


@pytest.mark.parametrize("case", ["llama, in training, tied", "qwen3, adapted"])
def test_a_checkpoint_has_all_of_it(case: str) -> None:
    """Between two cuts, or on the way to one: what goes on from it goes on to the bit."""
    family, axes, rule, running, sizes = CASES[case]
    whole = Run(family, axes, rule, [2, 4, 6], running, **sizes)
    for step in range(1, STEPS + 1):
        saved = {name: tensor.clone() for name, tensor in whole.pruner.tensors().items()}
        broken = Run(family, axes, rule, [2, 4, 6], running, **sizes)
        broken.model.load_state_dict(whole.model.state_dict())
        broken.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
        broken.pruner.load(saved)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in broken.pruner.tensors().items())
        losses = [train(run.model, run.optimizer, [step], run.pruner) for run in (whole, broken)]
        assert losses[0] == losses[1]
        found, expected = broken.pruner.tensors(), whole.pruner.tensors()
        assert found.keys() == expected.keys() and all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        assert any(not torch.equal(tensor, saved[name]) for name, tensor in found.items()) or not (running or step in (2, 4, 6))
        assert broken.pruner.metrics(step) == whole.pruner.metrics(step)


def test_inner_steps_are_counted() -> None:
    """Each measures anew: 0.1 of every block a step, without adaptation, and the first cut of two is half of the way."""
    source = anatomy_of(tiny_config("llama", **{**SIZES, "neurons": 100}).to_dict())
    end, how = source.with_sizes(neuron=35).parameters(), AllocationConfig(adaptation=0.0, inner_steps=10)
    numbers = []

    def measure(masks: Masks, number: int) -> Scores:
        numbers.append((number, int(masks["neuron"].sum()) // 3))
        return {"neuron": torch.rand(3, 100), "layer": torch.rand(3)}

    def cut(masks: Masks, scores: Scores, share: float, state_L: Tensor) -> tuple[Masks, bool]:
        return adapted(source, masks, scores, round(source.parameters() - (source.parameters() - end) * share), how, state_L)

    model = tiny_model("llama", **{**SIZES, "neurons": 100})
    pruner = StagedPruner(source, Attachment(model, source), all_open(source, ["neuron"]), cut=cut, measure=measure, at=[0, 5])
    pruner.catch_up(0)
    assert numbers == [(0, 100), (1, 90), (2, 80), (3, 70)] and left(source, pruner.masks).sizes["neuron"] in (67, 68)
    pruner.catch_up(5)
    assert [number for number, _ in numbers] == list(range(8)) and left(source, pruner.masks).parameters() == end
    assert pruner.measurements == 8 and pruner.parameters() == []


@given(steps=st.integers(0, 500), cuts=st.integers(1, 40), share=st.sampled_from(("constant", "linear")), at_start=st.booleans())
def test_when_cuts_are_made(steps: int, cuts: int, share: str, at_start: bool) -> None:
    found = cut_steps(steps, cuts, share, at_start=at_start)
    assert len(found) == cuts and found == sorted(found) and found[0] >= 0 and found[-1] <= steps
    ends = [*found, steps] if at_start else [0, *found]
    assert ends[0] == 0 and ends[-1] == steps
    for t, (one, other) in enumerate(pairwise(ends), start=1):  # Adapt-Pruner, section 4: 2t / (T (T + 1)) of the steps
        assert abs((other - one) - steps * (2 * t / (cuts * (cuts + 1)) if share == "linear" else 1 / cuts)) <= 1 + 1e-9


def open_of(values: Tensor, axis: str, masks: Masks) -> Tensor:
    """The scores of what the masks leave, in order."""
    if axis in ("layer", "hidden"):
        return values[masks[axis] > 0]
    there = [number for number, open_ in enumerate(masks["layer"].tolist()) if open_]
    if axis != "query":
        return torch.stack([values[layer][masks[axis][layer] > 0] for layer in there])
    of_group = [(layer, group) for layer in there for group in masks["group"][layer].nonzero().flatten().tolist()]
    return torch.stack([values[at][masks[axis][at] > 0] for at in of_group])


@pytest.mark.parametrize("axes", [PRUNABLE, ("hidden", "group", "query", "neuron"), ("layer",)], ids=["all", "width", "depth"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_under_masks_are_those_of_the_cut_model(family: str, axes: tuple[str, ...]) -> None:
    """For what is left, of scores by gradients, activations and weights."""
    config = tiny_config(family, **SIZES).to_dict()
    source, model = anatomy_of(config), tiny_model(family, **SIZES)
    sizes = {"layer": 2, "hidden": 18, "group": 2, "query": 1, "neuron": 10}
    target = source.with_sizes(**{axis: sizes[axis] for axis in axes})
    closed = random_masks(source, target, 3)
    masks = all_open(source, PRUNABLE) | closed
    cut = cut_model(model, config, source, target, closed)
    gradients = ("taylor", "taylor-element", "taylor-vector", "taylor-element-second")
    for name in (*gradients, "activation", "block-influence", "fluctuation", "magnitude-l2"):
        names = {axis: name for axis in PRUNABLE if axis in SCORES[name].axes}
        found = compute(names, model, source, unit_specs(source, names), token_losses, list(DATA[:3]), masks=closed)
        expected = compute(names, cut, target, unit_specs(target, names), token_losses, list(DATA[:3]))
        for axis in names:
            of_left = open_of(found[axis], axis, masks).reshape(expected[axis].shape)
            close(of_left, expected[axis], f"{name} {axis}", rtol=1e-3, atol=1e-5 * float(expected[axis].abs().max()))
