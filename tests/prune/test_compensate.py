"""What is kept stands in for what is gone: exactly where it can, and on the calibration text never worse than the plain cut."""

from __future__ import annotations

import copy
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor

from models import FAMILIES, hooks, tiny_config, tiny_model
from shearling.arch.families import Anatomy, anatomy_of
from shearling.errors import NumericsError
from shearling.io.tensors import MemoryReader
from shearling.prune.attach import Attachment
from shearling.prune.compensate import Aim, _best_penalty, compensate, fold
from shearling.prune.gates import Gates, gate_specs
from shearling.prune.plan import plan_from_masks
from shearling.prune.transform import transform
from shearling.prune.verify import compare_logits, masked_logits
from shearling.shapes import target_config
from test_masked_equals_cut import model_of, wholly_double
from test_rotate import source as biased_source

GENERATOR = torch.Generator().manual_seed(11)
BATCHES = [torch.randint(0, 96, (2, 23), generator=GENERATOR) for _ in range(6)]
SIZES = {"layer": 2, "hidden": 36, "group": 2, "query": 1, "neuron": 24}
LINEARS = ("self_attn.o_proj", "mlp.down_proj")
AIMS: tuple[Aim, ...] = ("own", "source")
Masks = dict[str, Tensor]


def source(family: str, **sizes: Any) -> tuple[Any, Anatomy]:
    """A tiny model in fp64, norms included, and its anatomy."""
    return wholly_double(tiny_model(family, **sizes).double()), anatomy_of(tiny_config(family, **sizes).to_dict())


def some_masks(anatomy: Anatomy, sizes: dict[str, int], seed: int = 0) -> Masks:
    """Random masks that leave these sizes."""
    gates = Gates(gate_specs(anatomy, anatomy.with_sizes(**sizes)))
    with torch.no_grad():
        for log_alpha in gates.log_alpha.values():
            log_alpha.copy_(torch.randn(log_alpha.shape, generator=torch.Generator().manual_seed(seed)))
    return gates.hardened()


def with_weights(model: Any, weights: dict[str, Tensor]) -> Any:
    """A copy of the model with these weights in place."""
    other = copy.deepcopy(model)
    _, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    return wholly_double(other)


def gated(model: Any, anatomy: Anatomy, masks: Masks, batches: list[Tensor] = BATCHES) -> Tensor:
    """Logits [N, V] over all batches, with these gates."""
    masks = {axis: mask.double() for axis, mask in masks.items()}
    return torch.cat([masked_logits(model, anatomy, masks, ids).flatten(0, 1) for ids in batches])


def passing(model: Any, anatomy: Anatomy, masks: Masks) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every output projection: its inputs [N, I] and outputs [N, D] over all batches, with these gates."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = []
    with Attachment(model, anatomy) as attachment, torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(LINEARS):

                def keep(module: Any, args: Any, out: Tensor, name: str = name) -> None:
                    found.setdefault(name, []).append((args[0].flatten(0, 1), out.flatten(0, 1)))

                handles.append(module.register_forward_hook(keep))
        attachment.set({axis: mask.double() for axis, mask in masks.items()})
        for ids in BATCHES:
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return {name: (torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])) for name, pairs in found.items()}


def kept_inputs(anatomy: Anatomy, masks: Masks, name: str) -> Tensor:
    """Which inputs of a projection are open [I], as numbers, from the masks one by one."""
    layer = int(name.split(".")[2])
    sizes = anatomy.sizes
    if name.endswith("down_proj"):
        return masks["neuron"][layer].double() if "neuron" in masks else torch.ones(sizes["neuron"], dtype=torch.float64)
    kept = []
    for group in range(sizes["group"]):
        for query in range(sizes["query"]):
            one = masks["group"][layer][group] if "group" in masks else torch.tensor(1.0)
            other = masks["query"][layer][group][query] if "query" in masks else torch.tensor(1.0)
            kept += [float(one * other)] * sizes["head_dim"]
    return torch.tensor(kept, dtype=torch.float64)


def aimed_at(model: Any, anatomy: Anatomy, name: str, x: Tensor, aim: Aim) -> Tensor:
    """What a projection of inputs x [N, I] is to come near [N, D], its bias left out."""
    projection = model.get_submodule(name)
    if aim == "own":
        return x @ projection.weight.detach().T
    y = passing(model, anatomy, {})[name][1]
    return y if projection.bias is None else y - projection.bias.detach()


def expected_names(anatomy: Anatomy, masks: Masks, aim: Aim) -> set[str]:
    """The weights that compensation is to give."""
    layers = [layer for layer in range(3) if "layer" not in masks or masks["layer"][layer] > 0]
    names = {f"model.layers.{layer}.{linear}" for layer in layers for linear in LINEARS}
    return {f"{name}.weight" for name in names if aim == "source" or not kept_inputs(anatomy, masks, name).all()}


def duplicate(model: Any, pairs: int = 8) -> Masks:
    """Make the last neurons linear in the first ones, and the second query head of each group equal to its first; masks of the rest."""
    with torch.no_grad():
        for block in model.model.layers:
            gate, up = block.mlp.gate_proj.weight, block.mlp.up_proj.weight
            mixing = torch.randn(pairs, pairs, generator=GENERATOR, dtype=torch.float64)
            gate[:] = gate[:1]  # one nonlinearity for all, so that neurons are as linear as `up` is
            up[-pairs:] = mixing @ up[:pairs]
            queries = block.self_attn.q_proj.weight.view(3, 2, 8, -1)
            queries[:, 1] = queries[:, 0]
            if block.self_attn.q_proj.bias is not None:
                bias = block.self_attn.q_proj.bias.view(3, 2, 8)
                bias[:, 1] = bias[:, 0]
    neuron, query = torch.ones(3, 40), torch.ones(3, 3, 2)
    neuron[:, -pairs:] = 0
    query[0, :, 0], query[1:, :, 1] = 0, 0
    return {"neuron": neuron, "query": query}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("aim", AIMS)
def test_what_is_linear_in_the_rest_is_made_up_for_exactly(family: str, aim: Aim) -> None:
    model, anatomy = source(family)
    masks = duplicate(model)
    before = gated(model, anatomy, {})
    found = compensate(model, anatomy, masks, BATCHES, ridge=1e-13, aim=aim)
    plain = gated(model, anatomy, masks)
    after = gated(with_weights(model, found), anatomy, masks)
    spread = before.max() - before.min()
    assert (plain - before).abs().max() > 0.05 * spread
    assert (after - before).abs().max() < 1e-6 * spread


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("axes", [("neuron",), ("group", "query"), ("query", "neuron", "layer"), tuple(SIZES)])
@pytest.mark.parametrize("aim", AIMS)
def test_no_output_is_further_off_than_without(family: str, axes: tuple[str, ...], aim: Aim) -> None:
    """Of every projection, on the text that was fitted, whatever the ridge; and all in all the logits are nearer to the source's."""
    model, anatomy = source(family)
    masks = some_masks(anatomy, {axis: SIZES[axis] for axis in axes})
    before, plain = gated(model, anatomy, {}), gated(model, anatomy, masks)
    rows = masks.get("hidden", torch.ones(48)) > 0
    for ridge in (1e-8, 1e-4, 1.0, None):
        found = compensate(model, anatomy, masks, BATCHES, ridge=ridge, aim=aim)
        assert found.keys() == expected_names(anatomy, masks, aim)
        other, gains = with_weights(model, found), []
        for name, (x, _) in passing(other, anatomy, masks).items():
            if f"{name}.weight" in found:
                kept = kept_inputs(anatomy, masks, name)
                own, fitted = model.get_parameter(f"{name}.weight").detach(), found[f"{name}.weight"]
                assert fitted.shape == own.shape and fitted.dtype == own.dtype
                assert not fitted[:, kept == 0].any() and torch.equal(fitted[~rows], own[~rows] * kept)
                y = aimed_at(model, anatomy, name, x, aim)
                errors = [(y - x @ weight.T)[:, rows].square().sum() for weight in (fitted, own * kept)]
                gains.append(float(errors[0] / errors[1].clamp(min=1e-20)))
        assert max(gains) <= 1 + 1e-9
        assert min(gains) < 0.999
        if ridge != 1.0:
            assert (gated(other, anatomy, masks) - before).square().mean() < (plain - before).square().mean()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("axes", [("query",), tuple(SIZES)])
@pytest.mark.parametrize("aim", AIMS)
def test_it_is_the_least_squares_solution(axes: tuple[str, ...], biased: bool, aim: Aim) -> None:
    """Of every projection, in stacked form, from what enters it where all before it is cut and compensated."""
    model, anatomy = biased_source("llama", biased=biased)
    wholly_double(model)
    masks, ridge = some_masks(anatomy, {axis: SIZES[axis] for axis in axes}), 1e-2
    found = compensate(model, anatomy, masks, BATCHES, ridge=ridge, aim=aim)
    entering = passing(with_weights(model, found), anatomy, masks)
    rows = masks.get("hidden", torch.ones(48)) > 0
    assert found.keys() == expected_names(anatomy, masks, aim)
    for full_name, weight in found.items():
        name = full_name.removesuffix(".weight")
        projection, x = model.get_submodule(name), entering[name][0]
        assert (projection.bias is not None) == biased
        y, kept = aimed_at(model, anatomy, name, x, aim), kept_inputs(anatomy, masks, name) > 0
        x, own = x[:, kept], projection.weight.detach()[:, kept]
        root = (ridge * x.square().sum(0).mean()).sqrt()
        stacked, targets = torch.cat([x, root * torch.eye(int(kept.sum()), dtype=x.dtype)]), torch.cat([y, root * own.T])
        expected = torch.linalg.lstsq(stacked, targets).solution.T
        torch.testing.assert_close(weight[rows][:, kept], expected[rows], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_gated_equals_cut_with_the_new_weights(family: str) -> None:
    model, anatomy = source(family, tied=family in ("llama", "qwen3"))
    masks = some_masks(anatomy, SIZES, seed=3)
    target = anatomy.with_sizes(**SIZES)
    other = with_weights(model, compensate(model, anatomy, masks, BATCHES))
    plan = plan_from_masks(anatomy, target, masks)

    state = dict(transform(plan, anatomy, target, MemoryReader(other.state_dict())))
    cut = wholly_double(model_of(state, target_config(model.config.to_dict(), anatomy, target, plan.layers), torch.float64))
    masks = {axis: mask.double() for axis, mask in masks.items()}
    assert compare_logits(cut, masked_logits(other, anatomy, masks, BATCHES[0]), BATCHES[0]).relative_difference < 1e-10
    assert compare_logits(cut, masked_logits(model, anatomy, masks, BATCHES[0]), BATCHES[0]).relative_difference > 1e-3


def test_later_blocks_make_up_for_earlier_ones_where_the_source_is_the_aim() -> None:
    model, anatomy = source("llama")
    masks = {"neuron": torch.ones(3, 40)}
    masks["neuron"][0, :30] = 0
    found = compensate(model, anatomy, masks, BATCHES, ridge=1e-10, aim="source")
    same, new = (model.get_parameter("model.layers.0.self_attn.o_proj.weight"), found["model.layers.0.self_attn.o_proj.weight"])
    torch.testing.assert_close(new, same.detach(), rtol=1e-6, atol=1e-8)
    untouched = "model.layers.2.mlp.down_proj.weight"  # nothing of it is cut, but what it reads is
    assert (found[untouched] - model.get_parameter(untouched)).abs().max() > 1e-3
    assert compensate(model, anatomy, masks, BATCHES).keys() == {"model.layers.0.mlp.down_proj.weight"}
    assert not compensate(model, anatomy, {"hidden": torch.arange(48).lt(36).float()}, BATCHES)


@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_inputs(tokens: int) -> None:
    model, anatomy = source("mistral")
    masks = some_masks(anatomy, {"neuron": 30, "query": 1})
    found = compensate(model, anatomy, masks, [BATCHES[0][:1, :tokens]], ridge=1e-4)
    for name, weight in found.items():
        kept = kept_inputs(anatomy, masks, name.removesuffix(".weight")) > 0
        own = model.get_parameter(name).detach()
        assert torch.isfinite(weight).all()
        changed = torch.linalg.matrix_rank(weight[:, kept] - own[:, kept], atol=1e-9)
        assert 0 < changed <= tokens  # where the text shows nothing, the weight is the source's
        assert weight.abs().max() < 10 * own.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ridge_is_chosen_by_text_that_was_not_fitted(family: str) -> None:
    """With about as many tokens as inputs a weak ridge ruins other text; the chosen one does not, and with more tokens it helps there."""
    model, anatomy = source(family)
    masks = some_masks(anatomy, {"neuron": 32, "query": 1})
    fresh = [torch.randint(0, 96, (4, 23), generator=torch.Generator().manual_seed(99))]
    more = [torch.randint(0, 96, (4, 23), generator=torch.Generator().manual_seed(seed)) for seed in range(12)]

    def error(weights: dict[str, Tensor]) -> float:
        other = with_weights(model, weights)
        return float((gated(other, anatomy, masks, fresh) - gated(model, anatomy, {}, fresh)).square().mean())

    few = [BATCHES[0][:1], BATCHES[1][:1]]
    plain = error({})
    assert error(compensate(model, anatomy, masks, few, ridge=1e-6)) > 1.1 * plain
    assert error(compensate(model, anatomy, masks, few)) < 1.02 * plain
    assert error(compensate(model, anatomy, masks, more)) < 0.97 * plain


def test_the_chosen_ridge_is_the_best_of_two_halves() -> None:
    """Against the errors themselves, at every lambda of the range."""
    generator = torch.Generator().manual_seed(4)
    x_2NK = torch.randn(2, 30, 12, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 12, dtype=torch.float64)
    truth = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    found = []
    for noise in (0.0, 3.0, 1000.0):
        y_2ND = x_2NK @ truth.T * (noise < 1000) + noise * torch.randn(2, 30, 5, generator=generator, dtype=torch.float64)
        inputs, missing = x_2NK.mT @ x_2NK, y_2ND.mT @ x_2NK
        scale = float(inputs.sum(0).diagonal().mean())
        errors = {inf: float(y_2ND.square().sum())}
        for step in range(41):
            penalty = scale * 10 ** (-6 + step / 4)
            fitted = [torch.linalg.solve(inputs[half] + penalty * torch.eye(12), missing[half].T) for half in (0, 1)]
            errors[penalty] = sum(float((y_2ND[1 - half] - x_2NK[1 - half] @ fitted[half]).square().sum()) for half in (0, 1))
        found.append(_best_penalty(inputs, missing, scale) / scale)
        assert found[-1] == pytest.approx(min(errors, key=lambda penalty: errors[penalty]) / scale)
    assert found[0] == pytest.approx(1e-6) and 1e-3 < found[1] < 1e3 and found[2] == inf


def test_halves_are_of_the_batches_in_turn() -> None:
    """A projection's weight is the one at the ridge that does best when even batches are fitted and odd ones judged, and the reverse."""
    model, anatomy = source("qwen2")
    masks, name = some_masks(anatomy, {"query": 1}), "model.layers.0.self_attn.o_proj"
    found, kept = compensate(model, anatomy, masks, BATCHES)[f"{name}.weight"], kept_inputs(anatomy, masks, name) > 0
    x, y = passing(model, anatomy, {})[name]
    own = model.get_parameter(f"{name}.weight").detach()[:, kept]
    scale = float(x[:, kept].square().sum(0).mean())

    def fitted(x: Tensor, y: Tensor, penalty: float) -> Tensor:
        return own + torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ (y - x @ own.T)).T

    x_even, x_odd = (torch.cat(x[:, kept].split(46)[half::2]) for half in (0, 1))  # 46 tokens a batch
    y_even, y_odd = (torch.cat(y.split(46)[half::2]) for half in (0, 1))
    errors = {}
    for step in range(41):
        penalty = scale * 10 ** (-6 + step / 4)
        off = (y_odd - x_odd @ fitted(x_even, y_even, penalty).T, y_even - x_even @ fitted(x_odd, y_odd, penalty).T)
        errors[penalty] = float(sum(one.square().sum() for one in off))
    best = min(errors, key=lambda penalty: errors[penalty])
    assert 1e-5 < best / scale < 1e3
    torch.testing.assert_close(found[:, kept], fitted(x[:, kept], y, best), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("aim", AIMS)
def test_the_same_bits_twice_and_the_model_as_it_was(aim: Aim) -> None:
    model, anatomy = source("qwen3", tied=True)
    model = model.float().train()
    masks, calls = some_masks(anatomy, SIZES), []
    before = {name: (weight, weight.clone()) for name, weight in model.named_parameters()}
    first = compensate(model, anatomy, masks, BATCHES, stop=lambda: calls.append(1), aim=aim)
    second = compensate(model, anatomy, masks, BATCHES, aim=aim)
    assert first.keys() == second.keys() and all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert all(weight.dtype == torch.float32 and not weight.requires_grad for weight in first.values())
    assert len(calls) == len(BATCHES) * (1 + 3 * (aim == "source") + 2 * 3)  # begin, the source's blocks, each kept one thrice
    after = dict(model.named_parameters())
    assert all(after[name] is weight and torch.equal(weight, copied) for name, (weight, copied) in before.items())
    assert model.training and all(weight.requires_grad and weight.grad is None for weight in after.values())
    assert hooks(model) == 0


def test_a_stop_on_the_way_leaves_the_model_as_it_was() -> None:
    model, anatomy = source("llama")
    masks, left = some_masks(anatomy, {"neuron": 20}), iter(range(22))
    before = {name: weight.clone() for name, weight in model.named_parameters()}

    def stop() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compensate(model, anatomy, masks, BATCHES, stop=stop)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert hooks(model) == 0


def test_inputs_that_are_all_zero_leave_the_weight() -> None:
    model, anatomy = source("llama")
    torch.nn.init.zeros_(model.model.layers[1].mlp.up_proj.weight)
    masks = some_masks(anatomy, {"neuron": 20})
    found = compensate(model, anatomy, masks, BATCHES)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(found, model.model.layers[1].mlp.down_proj.weight.detach() * masks["neuron"][1])


def test_what_is_wrong_is_refused() -> None:
    model, anatomy = source("llama")
    with pytest.raises(ValueError, match="at least one"):
        compensate(model, anatomy, {}, [])
    with pytest.raises(ValueError, match="more than 0"):
        compensate(model, anatomy, {}, BATCHES, ridge=0.0)
    with pytest.raises(NumericsError, match="use a larger one"):
        compensate(model, anatomy, some_masks(anatomy, {"neuron": 20}), [BATCHES[0][:1, :3]], ridge=1e-300)
    with pytest.raises(ValueError, match="two or more"):
        compensate(model, anatomy, {}, BATCHES[:1])
    torch.nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, float("nan"))
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.down_proj.*not finite"):
        compensate(model, anatomy, some_masks(anatomy, {"neuron": 20}), BATCHES)
    with pytest.raises(ValueError, match="unknown aim"):
        compensate(model, anatomy, {}, BATCHES, aim="sauce")  # type: ignore[arg-type]


def test_folded_gates_are_the_gated_model() -> None:
    """Output projections multiplied by the gates of heads and neurons, and no gates on those, give what the gated model gives."""
    model, anatomy = source("llama")
    gates = {axis: torch.rand(spec.shape, generator=GENERATOR) for axis, spec in gate_specs(anatomy, anatomy.with_sizes(**SIZES)).items()}
    outer = {axis: gate for axis, gate in gates.items() if axis in ("layer", "hidden")}
    placed = {axis: gate.double() for axis, gate in gates.items()}
    expected = masked_logits(model, anatomy, placed, BATCHES[0])
    apart = masked_logits(model, anatomy, {axis: placed[axis] for axis in outer}, BATCHES[0])
    fold(model, anatomy, gates)
    found = masked_logits(model, anatomy, {axis: placed[axis] for axis in outer}, BATCHES[0])
    assert (apart - expected).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_second_cut_makes_up_for_what_it_closes_and_no_more() -> None:
    """The first cut's columns are zero and stay so; with nothing closed anew nothing is fitted, though the weights changed since."""
    model, anatomy = source("llama")
    first = some_masks(anatomy, {"neuron": 24})
    for name, weight in compensate(model, anatomy, first, BATCHES).items():
        model.get_parameter(name).copy_(weight)
    for parameter in model.parameters():
        parameter.mul_(1.01)
    assert compensate(model, anatomy, first, BATCHES) == {}
    second = {"neuron": first["neuron"].clone()}
    for row in second["neuron"]:
        row[int(row.nonzero()[0])] = 0
    before = model.get_parameter("model.layers.1.mlp.down_proj.weight").clone()
    found = compensate(model, anatomy, second, BATCHES)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal((found != 0).any(0), second["neuron"][1].gt(0)) and not torch.equal(found, before)
