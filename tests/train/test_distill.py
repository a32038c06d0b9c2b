"""Learning from the source: divergences and their gradients, a head that is never whole, states through projectors."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import tiny_model
from shearling.errors import ArtifactError
from shearling.objectives import lm, teacher
from shearling.objectives.cache import CachedTeacher
from shearling.objectives.config import DistillConfig
from shearling.objectives.distill import DIVERGENCES, Distillation, Prediction, divergence, likeliest
from shearling.objectives.lm import token_losses
from shearling.objectives.states import (
    PROJECTORS,
    States,
    add_projectors,
    remove_projectors,
    stands_for,
    start_projectors,
    state_distance,
)
from shearling.objectives.teacher import Teacher, take_off_head
from shearling.world import World

IDS = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(0))


def logits(seed: int, classes: int = 11) -> Tensor:
    return torch.randn(7, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def by_torch(kind: str, q: Tensor, p: Tensor) -> Tensor:
    """The divergences [n] as torch has them, of probabilities."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b.log(), a, reduction="none").sum(-1)

    if kind == "jsd":
        return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    return kl(p, q) if kind == "forward_kl" else kl(q, p)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 3, 10])
def test_divergences_and_their_gradients_are_torchs(kind: str, top_k: int | None) -> None:
    mine, theirs = logits(0).requires_grad_(), logits(1)
    source = Prediction(theirs.log_softmax(-1)) if top_k is None else likeliest(theirs.log_softmax(-1), top_k)

    def classes(of: Tensor) -> Tensor:
        if top_k is None:
            return of
        top = theirs.topk(top_k).indices
        return torch.cat([of.gather(1, top), 1 - of.gather(1, top).sum(-1, keepdim=True)], -1)

    expected = by_torch(kind, classes(mine.softmax(-1)), classes(theirs.softmax(-1)))
    weights = torch.arange(1.0, 8, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), mine)
    found, ours = divergence(mine.detach().log_softmax(-1), source, DIVERGENCES[kind])
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(ours * weights[:, None], gradient)
    assert (found > 0.05).all()
    same, none = divergence(theirs.log_softmax(-1), source, DIVERGENCES[kind])
    assert same.abs().max() < 1e-12 and none.abs().max() < 1e-12


def test_a_coarser_prediction_is_at_most_as_far_away() -> None:
    mine, theirs = logits(2).log_softmax(-1), logits(3).log_softmax(-1)
    far = [divergence(mine, likeliest(theirs, k), DIVERGENCES["forward_kl"])[0] for k in (1, 3, 8)]
    far.append(divergence(mine, Prediction(theirs), DIVERGENCES["forward_kl"])[0])
    assert all((less <= more + 1e-12).all() for less, more in pairwise(far))
    assert (far[0] < far[-1] - 0.05).all()


def test_jsd_is_symmetric() -> None:
    p, q = logits(4).log_softmax(-1), logits(5).log_softmax(-1)
    torch.testing.assert_close(DIVERGENCES["jsd"](p, q)[0], DIVERGENCES["jsd"](q, p)[0])


def a_teacher(config: DistillConfig, blocks: Any = (), **sizes: Any) -> Teacher:
    model = tiny_model("llama", seed=1, **sizes)
    head = take_off_head(model)
    states = States(model, "model.layers", "hidden" in config.states, blocks) if config.states else None
    return Teacher(model, head, temperature=config.temperature, top_k=config.top_k, states=states)


def plainly(model: nn.Module, config: DistillConfig, share: float = 1.0) -> Tensor:
    """The loss [B, T - 1] of text and logits by autograd, from whole logits."""
    theirs = tiny_model("llama", seed=1)(input_ids=IDS).logits[:, :-1].detach()
    mine = model(input_ids=IDS).logits[:, :-1]
    text = F.cross_entropy(mine.flatten(0, 1), IDS[:, 1:].flatten(), reduction="none").view(3, -1)
    heat = config.temperature
    apart = by_torch(config.divergence, (mine / heat).softmax(-1), (theirs / heat).softmax(-1))
    return config.text * text + share * config.logits * heat**2 * apart


@pytest.mark.parametrize("elements", [1, 96 * 5, 2**23])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_and_gradients_are_those_of_whole_logits(kind: Any, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rows are worked on together; with a temperature, weights, and half-way through the warm-up."""
    monkeypatch.setattr(lm, "_ELEMENTS", elements)
    monkeypatch.setattr(teacher, "_ELEMENTS", 96 * 7)
    config = DistillConfig(text=0.3, logits=2.0, divergence=kind, temperature=1.7, warmup=0.5)
    model, weights = tiny_model("llama", tied=True), torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    distillation = Distillation(config, a_teacher(config), None, steps=8)
    assert [distillation.share(step) for step in (1, 2, 4, 8)] == [0.25, 0.5, 1.0, 1.0]
    found = distillation(model, IDS, 2)
    (found["loss"] * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = plainly(model, config, share=0.5)
    (expected * weights).sum().backward()
    torch.testing.assert_close(found["loss"], expected)
    torch.testing.assert_close(found["text"], token_losses(model, IDS))
    torch.testing.assert_close(0.3 * found["text"] + found["logits"], found["loss"])
    assert not found["text"].requires_grad and not found["logits"].requires_grad
    for name, parameter in model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_vocabulary_by_tokens_is_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While loss and gradient are computed no other tensor is as large as the logits, neither the source's nor a gradient."""
    monkeypatch.setattr(lm, "_ELEMENTS", 96 * 4)
    monkeypatch.setattr(teacher, "_ELEMENTS", 96 * 4)
    config, model = DistillConfig(), tiny_model("llama")
    distillation, seen = Distillation(config, a_teacher(config), None, 1), set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, Tensor) and tensor.shape[-1:] == (96,) and tensor.numel() >= IDS.numel() * 96:
                    seen.add(tensor.untyped_storage().data_ptr())
            return out

    with Watch():
        distillation(model, IDS, 1)["loss"].sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("distance", ["relative", "cosine"])
def test_states_are_compared_block_by_block(distance: Any) -> None:
    """Of a model with blocks 0 and 2 of four: their outputs with those of blocks 1 and 3; and the gradients are autograd's."""
    config = DistillConfig(logits=0, hidden=0.5, blocks=2.0, state_distance=distance)
    assert stands_for([0, 2], 4) == [1, 3]
    source = a_teacher(config, stands_for([0, 2], 4), layers=4)
    model = add_projectors(tiny_model("llama", layers=2), config.states, 48)
    start_projectors(model, source.model, World())
    distillation = Distillation(config, source, States(model, "model.layers", True, [0, 1]), steps=1)
    found = distillation(model, IDS, 1)
    found["loss"].mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    theirs = tiny_model("llama", seed=1, layers=4)(input_ids=IDS, output_hidden_states=True).hidden_states
    kept: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda module, args, out: kept.append(out)) for layer in model.model.layers]
    out = model(input_ids=IDS, output_hidden_states=True)
    projectors = getattr(model, PROJECTORS)
    text = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none").view(3, -1)
    hidden = state_distance(projectors["hidden"](out.hidden_states[-1]), theirs[-1].detach(), distance)[:, :-1]
    states: list[Tensor] = []
    source.model.model.layers[3].register_forward_hook(lambda module, args, out: states.append(out))
    source(IDS)
    pairs = ((kept[0], theirs[2].detach()), (kept[1], states[0]))
    blocks = sum(state_distance(projectors["blocks"](mine), wanted, distance) for mine, wanted in pairs)[:, :-1] / 2
    expected = text + 0.5 * hidden + 2.0 * blocks
    torch.testing.assert_close(found["loss"], expected)
    assert found["hidden"].mean() > 0.05 and found["blocks"].mean() > 0.05
    expected.mean().backward()
    for name, parameter in model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
    for handle in handles:
        handle.remove()


def test_projectors_begin_as_the_cut() -> None:
    """Of a model whose stream is a part of the source's: those channels go through as they are."""
    source, kept = tiny_model("llama", seed=1), torch.arange(0, 48, 2)
    model = add_projectors(tiny_model("llama", hidden=24), ["hidden"], 48)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(source.get_input_embeddings().weight[:, kept])
    start_projectors(model, source, World())
    weight = getattr(model, PROJECTORS)["hidden"].weight
    torch.testing.assert_close(weight[kept], torch.eye(24), atol=1e-4, rtol=0)
    assert weight[1::2].abs().max() > 0.01
    state = torch.randn(1, 1, 24) @ weight.detach().T
    assert state_distance(state, state, "relative").max() == 0 and state_distance(2 * state, state, "cosine").max() < 1e-6
    remove_projectors(model)
    assert not any(PROJECTORS in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"logits": 0}, "nothing is learnt"),
        ({"cache": "x"}, "top_k"),
        ({"cache": "x", "top_k": 4, "hidden": 1}, "states are not cached"),
        ({"temperature": 0}, "greater than 0"),
        ({"divergence": "kl"}, "forward_kl"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**values)


def cached(folder: Path, k: int = 4) -> CachedTeacher:
    return CachedTeacher(a_teacher(DistillConfig(top_k=k)), folder, 17, k)


def test_a_cached_sequence_does_not_go_through_the_source_again(tmp_path: Path) -> None:
    """Whatever order it comes in and whoever cached it; and it is what the source says, as fp16."""
    first = cached(tmp_path / "cache")
    said = [first(ids)[0](slice(0, 34)) for ids in (IDS[[0, 1]], IDS[[0, 0]])]
    assert first.computed == 2
    second = cached(tmp_path / "cache")
    again, states = second(IDS[[1, 2]])
    assert second.computed == 1 and states == {}
    ids, log_p = again(slice(0, 17)).ids_nk, again(slice(0, 17)).log_p_nC
    assert ids is not None and said[0].ids_nk is not None
    assert torch.equal(ids, said[0].ids_nk[17:]) and torch.equal(log_p, said[0].log_p_nC[17:])
    exact = a_teacher(DistillConfig(top_k=4))(IDS[[1]])[0](slice(0, 17))
    assert exact.ids_nk is not None and torch.equal(ids, exact.ids_nk)
    torch.testing.assert_close(log_p, exact.log_p_nC, rtol=1e-3, atol=1e-3)
    assert cached(tmp_path / "cache")(IDS)[1] == {} and len(list((tmp_path / "cache").iterdir())) == 2


def test_what_a_kill_left_torn_is_computed_again_and_what_is_damaged_is_named(tmp_path: Path) -> None:
    whole = cached(tmp_path)
    expected = whole(IDS)[0](slice(0, 51)).log_p_nC
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    torn = cached(tmp_path)
    assert torch.equal(torn(IDS)[0](slice(0, 51)).log_p_nC, expected) and torn.computed == 1
    file.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(ArtifactError, match=f"{file.name}.*damaged"):
        cached(tmp_path)(IDS)
