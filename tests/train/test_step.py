"""One step: gradients in an order that one and two processes share, losses put where they belong, and the update by hand."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shearling.errors import PeerError
from shearling.objectives.lm import in_training, token_losses
from shearling.train.config import FitConfig
from shearling.train.optim import build_optimizer
from shearling.train.step import StepResult, own_microbatches, own_rows, squared_norm, train_step
from shearling.world import World
from tiny_stage import SIZES, Place, Stage

HUGE = 1e9
"""A norm to which nothing is clipped."""


@pytest.mark.parametrize("microbatches", range(1, 13))
def test_every_row_is_computed_once(microbatches: int) -> None:
    for each in (1, 3, 4):
        batch = microbatches * each
        for size in (size for size in range(1, microbatches + 1) if microbatches % size == 0):
            worlds = [Place(rank, size) for rank in range(size)]
            numbers = [list(own_microbatches(microbatches, world)) for world in worlds]
            rows = [own_rows(batch, microbatches, world) for world in worlds]
            assert sorted(itertools.chain(*numbers)) == list(range(microbatches))
            assert {len(own) for own in numbers} == {microbatches // size}
            assert sorted(np.concatenate(rows).tolist()) == list(range(batch))
            for world, own, found in zip(worlds, numbers, rows, strict=True):
                assert own == [number for number in range(microbatches) if number % size == world.rank]
                assert found.tolist() == [number * each + row for number in own for row in range(each)]


# The order of sums.


class Capture(torch.optim.SGD):
    """An optimizer that moves nothing and keeps the gradients that it was given."""

    gradients: list[Tensor]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def a_batch(rows: int) -> tuple[Tensor, np.ndarray]:
    ids = torch.randint(0, SIZES["vocab"], (rows, 10), generator=torch.Generator().manual_seed(7))
    return ids, np.arange(rows) % 3


def taken(stage: Stage, microbatches: int, world: World | None = None, clip: float = HUGE) -> tuple[StepResult, list[Tensor]]:
    """What a step on the batch measures, and the gradients it gives to the optimizer."""
    optimizer = Capture(stage.model.parameters(), lr=0.1)
    ids, domains = a_batch(12)
    mine = ids[own_rows(12, microbatches, world or World())]
    options: dict[str, Any] = {"step": 1, "microbatches": microbatches, "clip": clip, "rate": 0.1, "gates": stage.gates, "world": world}
    return train_step(stage.model, mine, domains, in_training(token_losses), optimizer, **options), optimizer.gradients


def alone(stage: Stage, microbatches: int) -> list[list[Tensor]]:
    """The gradients of every microbatch by itself."""
    ids, _ = a_batch(12)
    found = []
    for chunk in ids.chunk(microbatches):
        loss = token_losses(stage.model, chunk).sum() / (12 * 9)
        found.append([gradient.clone() for gradient in torch.autograd.grad(loss, list(stage.model.parameters()))])
    return found


def summed(terms: list[Tensor]) -> Tensor:
    """From the left to the right."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 6, 12])
def test_gradients_are_summed_in_pairs_first(microbatches: int) -> None:
    stage = Stage("plain")
    parts = alone(stage, microbatches)
    _, found = taken(stage, microbatches)
    differs = False
    for index, gradient in enumerate(found):
        terms = [part[index] for part in parts]
        in_pairs = summed([summed(terms[start : start + 2]) for start in range(0, microbatches, 2)])
        plainly = summed(terms)
        assert torch.equal(gradient, in_pairs)
        torch.testing.assert_close(gradient, plainly, rtol=1e-5, atol=1e-6)
        differs |= not torch.equal(in_pairs, plainly)
    assert differs == (microbatches > 3), "the two orders are the same, so this test shows nothing"


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 5, 6])
def test_every_number_of_microbatches_is_the_same_step(microbatches: int) -> None:
    """Odd ones, too; the batch is as large as it takes. To rounding, it is the gradient of the mean loss of all tokens."""
    model = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 20)).double()
    ids = torch.randint(0, 20, (microbatches * 2, 9), generator=torch.Generator().manual_seed(1))

    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)

    optimizer = Capture(model.parameters(), lr=0.1)
    domains = np.zeros(len(ids), np.int64)
    found = train_step(model, ids, domains, in_training(losses), optimizer, step=1, microbatches=microbatches, clip=HUGE, rate=0.1)
    mean = losses(model, ids).mean()
    assert found.loss == pytest.approx(mean.item(), rel=1e-12) and found.tokens == ids.numel()
    for gradient, expected in zip(optimizer.gradients, torch.autograd.grad(mean, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


# Several processes, here threads with a model each. What FSDP2 does with the weights' gradients is no part of this.


class Meeting:
    """Where `size` threads exchange tensors, in the order in which each comes by."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=20)
        self.brought: list[Tensor] = [torch.empty(0)] * size

    def worlds(self) -> list[World]:
        meeting = self

        class One(Place):
            def sum_(self, tensor: Tensor) -> Tensor:
                meeting.brought[self.rank] = tensor.clone()
                meeting.barrier.wait()
                total = summed(meeting.brought)
                meeting.barrier.wait()
                return tensor.copy_(total)

        return [One(rank, self.size) for rank in range(self.size)]


def together(size: int, work: Callable[[World], Any]) -> list[Any]:
    found: list[Any] = [None] * size

    def one(world: World) -> None:
        found[world.rank] = work(world)

    threads = [threading.Thread(target=one, args=(world,)) for world in Meeting(size).worlds()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
def test_losses_by_domain_are_right_when_rows_are_dealt(size: int) -> None:
    stages = [Stage("plain") for _ in range(size)]
    ids, domains = a_batch(12)
    with torch.no_grad():
        expected = token_losses(stages[0].model, ids).mean(1).double().numpy()
    for found, _ in together(size, lambda world: taken(stages[world.rank], 6, world)):
        assert found.loss == pytest.approx(expected.mean(), rel=1e-6) and found.tokens == 120
        assert found.domain_losses == {d: pytest.approx(expected[domains == d].mean(), rel=1e-6) for d in (0, 1, 2)}


@pytest.mark.parametrize("kind", ["projected", "lagrangian"])
def test_two_processes_move_gates_to_the_bits_of_one(kind: str) -> None:
    """Their gradients are added over the processes after each backward pass, which is the order of pairs; losses are the same bits, too."""

    def moved(stage: Stage, world: World | None) -> tuple[Any, dict[str, Tensor]]:
        found, _ = taken(stage, 4, world)
        return (found.loss, found.domain_losses), stage.gates.tensors()  # type: ignore[union-attr]

    before = Stage(kind).gates.tensors()  # type: ignore[union-attr]
    measured, expected = moved(Stage(kind), None)
    assert not torch.equal(expected["log_alpha.hidden"], before["log_alpha.hidden"]) and int(expected["steps"]) == 1
    stages = [Stage(kind), Stage(kind)]
    for other, tensors in together(2, lambda world: moved(stages[world.rank], world)):
        assert other == measured
        assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


# Clipping and the update.


def test_clipping_scales_by_the_norm_rounded_to_fp32() -> None:
    result, whole = taken(Stage("plain"), 2)
    exact = torch.stack([gradient.double().square().sum() for gradient in whole]).sum().sqrt()
    assert result.gradient_norm == float(exact.float()) > 1.0
    clipped_result, clipped = taken(Stage("plain"), 2, clip=0.5)
    assert clipped_result.gradient_norm == result.gradient_norm, "the norm is that of before"
    for gradient, before in zip(clipped, whole, strict=True):
        assert torch.equal(gradient, before * (0.5 / result.gradient_norm))
    _, untouched = taken(Stage("plain"), 2, clip=result.gradient_norm)
    assert all(torch.equal(gradient, before) for gradient, before in zip(untouched, whole, strict=True))


def test_the_norm_does_not_hang_on_how_gradients_are_cut() -> None:
    parameter = nn.Parameter(torch.zeros(1000, 7))
    parameter.grad = torch.randn(1000, 7, generator=torch.Generator().manual_seed(2)) * 10.0 ** torch.arange(-3, 4)
    rows = []
    for part in parameter.grad.chunk(3):
        piece = nn.Parameter(torch.zeros_like(part))
        piece.grad = part
        rows.append(piece)
    assert float(squared_norm([parameter]).sqrt().float()) == float(squared_norm(rows).sqrt().float())
    assert float(squared_norm([parameter]).sqrt()) == pytest.approx(float(parameter.grad.double().norm()), rel=1e-12)
    assert float(squared_norm([nn.Parameter(torch.zeros(3))])) == 0.0


def test_a_step_is_adam_by_hand() -> None:
    """One step of the stage's optimizer at the rate it is given: Adam's first step moves each weight by rate * g / (|g| + eps)."""
    stage = Stage("plain", weight_decay=0.1)
    _, gradients = taken(Stage("plain"), 2, clip=0.5)
    before = [parameter.detach().clone() for parameter in stage.model.parameters()]
    optimizer = build_optimizer(stage.model, FitConfig(**{**stage.config.model_dump(), "weight_decay": 0.1}))
    ids, domains = a_batch(12)
    train_step(stage.model, ids, domains, in_training(token_losses), optimizer, step=1, microbatches=2, clip=0.5, rate=0.03)
    for parameter, old, gradient in zip(stage.model.parameters(), before, gradients, strict=True):
        expected = old * (1 - 0.03 * 0.1) - 0.03 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_asks_before_it_touches_anything() -> None:
    stage = Stage("lagrangian")
    optimizer = build_optimizer(stage.model, stage.config)
    asked = []

    def refuse(loss: float, norm: float) -> str:
        asked.append((loss, norm))
        return "as asked"

    ids, domains = a_batch(12)
    weights = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    gates = {name: tensor.clone() for name, tensor in stage.gates.tensors().items()}  # type: ignore[union-attr]
    options: dict[str, Any] = {"step": 1, "microbatches": 3, "clip": 1e-3, "rate": 0.5, "gates": stage.gates, "object_to": refuse}
    found = train_step(stage.model, ids, domains, in_training(token_losses), optimizer, **options)
    assert found.skipped == "as asked" and asked == [(found.loss, found.gradient_norm)] and found.tokens == 120
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in stage.model.named_parameters())
    assert all(torch.equal(tensor, gates[name]) for name, tensor in stage.gates.tensors().items())  # type: ignore[union-attr]
    assert all(p.grad is None for p in stage.gates.parameters()) and not optimizer.state  # type: ignore[union-attr]


def test_a_process_that_is_gone_ends_the_step() -> None:
    """The error of the exchange comes out of the step before anything moved."""
    stage = Stage("plain")

    class Lost(Place):
        def sum_(self, tensor: Tensor) -> Tensor:
            raise PeerError("gone")

    before = [parameter.detach().clone() for parameter in stage.model.parameters()]
    with pytest.raises(PeerError, match="gone"):
        taken(stage, 2, Lost(0, 2))
    assert all(torch.equal(p, old) for p, old in zip(stage.model.parameters(), before, strict=True))
