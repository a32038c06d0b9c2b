"""Scores: first-order Taylor against gradients of activations, the model left as it was, and ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import FAMILIES, tiny_config, tiny_model
from shearling.arch.families import anatomy_of
from shearling.objectives.lm import token_losses
from shearling.prune import scores
from shearling.prune.attach import Attachment
from shearling.prune.gates import GateSpec, gate_specs

BATCHES = [torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def specs_of(family: str) -> tuple[Any, dict[str, GateSpec]]:
    source = anatomy_of(tiny_config(family).to_dict())
    return source, gate_specs(source, source.with_sizes(layer=1, hidden=24, group=2, query=1, neuron=20))


def taylor(model: Any, family: str, batches: list[torch.Tensor]) -> scores.Scores:
    source, specs = specs_of(family)
    with Attachment(model, source) as attachment:
        return scores.taylor(model, attachment, specs, token_losses, batches)


def by_activations(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """dL/dz at z = 1 from the chain rule: what a gate multiplies, times the loss' gradient on it, summed over where it acts."""
    kept: dict[str, list[torch.Tensor]] = {"heads": [], "neurons": [], "writes": []}

    def keep(what: str, value: torch.Tensor) -> None:
        value.retain_grad()
        kept[what].append(value)

    handles = [model.model.embed_tokens.register_forward_hook(lambda m, a, out: keep("writes", out))]
    for block in model.model.layers:
        for module, what in ((block.self_attn.o_proj, "heads"), (block.mlp.down_proj, "neurons")):
            handles.append(module.register_forward_pre_hook(lambda m, a, what=what: keep(what, a[0])))
            handles.append(module.register_forward_hook(lambda m, a, out: keep("writes", out)))
    token_losses(model, ids).mean().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    products = {what: [(v.detach() * v.grad).sum((0, 1)) for v in values] for what, values in kept.items()}
    embedding, *writes = products["writes"]
    heads = torch.stack(products["heads"]).view(3, 3, 2, 8).sum(-1)
    return {
        "layer": torch.stack([(writes[2 * i] + writes[2 * i + 1]).sum() for i in range(3)]),
        "hidden": embedding + sum(writes),
        "group": heads.sum(-1),
        "query": heads,
        "neuron": torch.stack(products["neurons"]),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_is_the_mean_of_absolute_gradients(family: str) -> None:
    model = tiny_model(family)
    found = taylor(model, family, BATCHES)
    expected = [by_activations(model, ids) for ids in BATCHES]
    assert set(found) == set(specs_of(family)[1])
    for axis, score in found.items():
        mean = torch.stack([batch[axis].abs() for batch in expected]).mean(0)
        torch.testing.assert_close(score, mean, rtol=1e-4, atol=1e-6, msg=lambda text, axis=axis: f"{axis}: {text}")
        assert not score.requires_grad and (score > 0).all()


def test_signs_cancel_inside_a_batch_not_between_batches() -> None:
    model = tiny_model("llama")
    apart, together = taylor(model, "llama", BATCHES[:2]), taylor(model, "llama", [torch.cat(BATCHES[:2])])
    assert (apart["neuron"] >= together["neuron"] - 1e-6).all() and (apart["neuron"] > together["neuron"] + 1e-4).any()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = tiny_model("llama").train(training)
    model.model.norm.weight.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    taylor(model, "llama", BATCHES)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert model.training is training


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = tiny_model("llama").train()
    source, specs = specs_of("llama")
    expected = model(BATCHES[0]).logits

    seen: list[None] = []

    def interrupted() -> None:
        seen.append(None)
        if len(seen) > 1:
            raise InterruptedError

    with Attachment(model, source) as attachment:
        with pytest.raises(InterruptedError):
            scores.taylor(model, attachment, specs, token_losses, BATCHES, between=interrupted)
        assert all(parameter.requires_grad for parameter in model.parameters()) and model.training
        assert torch.equal(model(BATCHES[0]).logits, expected)


def test_scoring_is_the_same_twice() -> None:
    model = tiny_model("qwen3")
    one, other = taylor(model, "qwen3", BATCHES), taylor(model, "qwen3", BATCHES)
    assert all(torch.equal(one[axis], other[axis]) for axis in one)


def test_random_scores_follow_from_the_generator() -> None:
    specs = specs_of("llama")[1]
    one, same, other = (scores.random(specs, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    for axis, spec in specs.items():
        assert one[axis].shape == spec.shape
        assert torch.equal(one[axis], same[axis]) and not torch.equal(one[axis], other[axis])


def test_ranks() -> None:
    found = scores.ranks(torch.tensor([[0.3, -2.0, 9.0], [5.0, 7.0, 6.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.0, 1.0], [0.0, 1.0, 0.5]]))
    torch.testing.assert_close(scores.ranks(torch.ones(4)), torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]))  # ties by place, none lost
    assert scores.ranks(torch.tensor([[3.0]])).tolist() == [[0.0]]
