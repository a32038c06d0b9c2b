"""Held-out losses: every sequence counted once, how sure they are, and a part of the text that stands in for all of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import tiny_model
from shearling.data.order import sample_indices
from shearling.evaluate.loss import HeldOut, heldout_losses, instead_of_all, packed, unpacked, update_subset
from shearling.objectives.lm import token_losses
from shearling.world import World

CPU = torch.device("cpu")


def text(rows: dict[str, int], length: int = 12) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {name: draw.integers(3, 48, (n, length)).astype(np.uint16) for name, n in rows.items()}


class OfSeveral(World):
    """One process of several; what all of them add up is given to each at the end, by `together`."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self.found: Tensor | None = None

    def sum_(self, *tensors: Tensor) -> None:
        (self.found,) = (tensor.clone() for tensor in tensors)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model: nn.Module = tiny_model("llama", layers=1, hidden=16, heads=2, groups=1, head_dim=8, neurons=12, vocab=48)
    return model


def test_losses_and_errors_are_those_of_the_sequences(model: nn.Module) -> None:
    heldout = text({"a": 7, "b": 3, "c": 1})
    found = heldout_losses(model, heldout, token_losses, batch_size=2, device=CPU)
    for name, rows in heldout.items():
        with torch.no_grad():
            alone = [float(token_losses(model, torch.from_numpy(row[None].astype(np.int64))).double().mean()) for row in rows]
        assert found.sequences[name] == pytest.approx(alone, rel=1e-6)
        assert found.losses[name] == pytest.approx(sum(alone) / len(alone), rel=1e-6)
        if len(alone) > 1:
            spread = math.sqrt(sum((loss - sum(alone) / len(alone)) ** 2 for loss in alone) / (len(alone) - 1))
            assert found.errors[name] == pytest.approx(spread / math.sqrt(len(alone)), rel=1e-5)
    assert found.errors["c"] is None and found.errors["mean"] is None, "one sequence has no error"
    assert found.losses["mean"] == pytest.approx(sum(found.losses[name] for name in heldout) / 3)
    two = heldout_losses(model, {name: heldout[name] for name in ("a", "b")}, token_losses, batch_size=2, device=CPU).errors
    assert two["mean"] == pytest.approx(math.hypot(two["a"] or 0, two["b"] or 0) / 2)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_several_processes_add_up_to_one(size: int, model: nn.Module) -> None:
    """To the bit: each sequence has a place of its own, which one process fills."""
    heldout = text({"a": 7, "b": 3})
    whole = heldout_losses(model, heldout, token_losses, batch_size=2, device=CPU)
    parts = []
    for rank in range(size):
        world = OfSeveral(rank, size)
        heldout_losses(model, heldout, token_losses, batch_size=2, device=CPU, world=world)
        assert world.found is not None
        parts.append(world.found.numpy())
    assert (np.count_nonzero(parts, axis=0) == 1).all()
    assert np.array_equal(sum(parts), np.concatenate(list(whole.sequences.values())))


def test_an_evaluation_leaves_the_model_as_it_was(model: nn.Module) -> None:
    model.train()
    seen: list[bool] = []

    def objective(model: nn.Module, ids: Tensor) -> Tensor:
        seen.append(model.training or torch.is_grad_enabled())
        return token_losses(model, ids)

    heldout_losses(model, text({"a": 2}), objective, batch_size=1, device=CPU)
    assert model.training and seen == [False, False]
    with pytest.raises(ZeroDivisionError):
        heldout_losses(model, text({"a": 2}), lambda model, ids: 1 / 0, batch_size=1, device=CPU)  # type: ignore[arg-type, return-value]
    assert model.training
    model.eval()


def test_the_subset_is_fixed_by_seed_and_domain() -> None:
    chosen = update_subset("web", 500, 20, seed=17)
    assert len(chosen) == len(set(chosen.tolist())) == 20 and (np.diff(chosen) > 0).all() and chosen.min() >= 0 and chosen.max() < 500
    assert np.array_equal(chosen, update_subset("web", 500, 20, seed=17))
    others = [update_subset("web", 500, 20, 18), update_subset("code", 500, 20, 17), np.sort(sample_indices(np.arange(20), 500, 17, "web"))]
    assert not any(np.array_equal(chosen, other) for other in others), "another seed, another domain, the order of the training text"
    assert set(update_subset("web", 500, 10, 17)) < set(chosen), "a smaller one is a part of it"
    assert update_subset("web", 5, 20, 17).tolist() == [0, 1, 2, 3, 4]
    used = np.concatenate([update_subset("web", 40, 10, seed) for seed in range(400)])
    assert np.bincount(used, minlength=40).min() > 60, "no sequence is left out by all seeds; 100 are expected of each"


def measured(losses: dict[str, np.ndarray]) -> HeldOut:
    """What an evaluation of these sequences' losses gives, but for the errors."""
    means = {name: float(values.mean()) for name, values in losses.items()}
    return HeldOut({**means, "mean": sum(means.values()) / len(means)}, {}, losses)


def test_a_subset_of_all_is_all() -> None:
    draw = np.random.default_rng(1)
    before, now = ({"a": draw.normal(3, 0.5, 50)} for _ in range(2))
    estimate = instead_of_all(measured(now), {"a": np.arange(50)}, before)
    assert estimate.losses["a"] == pytest.approx(now["a"].mean()) and estimate.losses["mean"] == pytest.approx(now["a"].mean())
    assert estimate.errors["a"] == pytest.approx(now["a"].std(ddof=1) / math.sqrt(50)) == pytest.approx(estimate.errors["mean"])


def test_what_a_subset_says_of_all_is_as_near_as_it_claims() -> None:
    """Another text and subset 2,000 times: the estimates scatter by the errors given, and by far less than the subset's own means."""
    draw, size, n = np.random.default_rng(2), 100, 10
    off, plain, errors = [], [], []
    for seed in range(2000):
        before = draw.normal(3.0, 0.5, size)
        now = before - 0.7 + draw.normal(0, 0.1, size)
        chosen = update_subset("web", size, n, seed)
        estimate = instead_of_all(measured({"web": now[chosen]}), {"web": chosen}, {"web": before})
        off.append(estimate.losses["web"] - 2.3)
        plain.append(now[chosen].mean() - 2.3)
        errors.append(estimate.errors["web"])
    expected = math.sqrt((0.5**2 + 0.1**2) / size + (1 / n - 1 / size) * 0.1**2)
    assert np.std(off) == pytest.approx(expected, rel=0.06) and abs(np.mean(off)) < 4 * expected / math.sqrt(2000)
    assert math.sqrt(np.square(np.array(errors, dtype=float)).mean()) == pytest.approx(np.std(off), rel=0.06)
    assert np.std(plain) > 2.5 * np.std(off)


def test_one_sequence_gives_a_loss_without_an_error() -> None:
    estimate = instead_of_all(measured({"a": np.array([2.0])}), {"a": np.array([1])}, {"a": np.array([3.0, 2.5, 3.5])})
    assert estimate.losses["a"] == pytest.approx(2.5) and estimate.errors == {"a": None, "mean": None}


def test_losses_of_sequences_go_through_a_ledger() -> None:
    losses = {"a": np.array([2.3456789, 11.0, float("nan")]), "b": np.array([1e-3])}
    again = unpacked(packed(losses))
    assert set(again) == {"a", "b"} and all(isinstance(value, str) for value in packed(losses).values())
    for name, values in losses.items():
        assert again[name] == pytest.approx(values, rel=1e-6, nan_ok=True)
