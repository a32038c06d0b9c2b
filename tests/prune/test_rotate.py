"""A turned model computes what it did; its last channels are the ones to go; norms keep their scale; a head that stays tied is fitted."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models import FAMILIES, hooks, tiny_config, tiny_model
from shearling.arch.families import Anatomy, anatomy_of
from shearling.errors import NumericsError
from shearling.io.tensors import MemoryReader
from shearling.prune.rotate import (
    ROWS,
    TiedNorm,
    fit_norms,
    fit_tied_norm,
    norms_of,
    principal_rotation,
    rotate,
    stream_covariance,
    tied_rotation,
)
from shearling.prune.verify import in_float64, logits_of, masked_logits

GENERATOR = torch.Generator().manual_seed(7)
BATCHES = [torch.randint(0, 96, (2, 17), generator=GENERATOR) for _ in range(3)]
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BIASED: dict[str, dict[str, Any]] = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}


def source(family: str, *, biased: bool = False, **sizes: Any) -> tuple[Any, Anatomy]:
    """A tiny model in fp64 and its anatomy; with every bias that the family can have."""
    model = tiny_model(family, **sizes)
    config = {**tiny_config(family, **sizes).to_dict(), **(BIASED.get(family, {}) if biased else {})}
    if biased and family in BIASED:
        plain, model = model.state_dict(), AutoModelForCausalLM.from_config(type(model.config)(**config))
        model.load_state_dict(plain, strict=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.double().eval(), anatomy_of(config)


def any_rotation(size: int = 48, seed: int = 0) -> Tensor:
    """An orthogonal matrix without any structure, in fp64."""
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def logits(model: Any) -> Tensor:
    """Logits [N, V] over all batches, wholly in fp64."""
    weights = MemoryReader({name: tensor.clone() for name, tensor in model.state_dict().items()})
    with torch.no_grad(), in_float64(model, weights):
        return torch.cat([logits_of(model, ids).flatten(0, 1) for ids in BATCHES])


def masked(model: Any, anatomy: Anatomy, hidden_D: Tensor) -> Tensor:
    """The same with channels of the stream closed."""
    return torch.cat([masked_logits(model, anatomy, {"hidden": hidden_D}, ids).flatten(0, 1) for ids in BATCHES])


def off(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the range."""
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


def low_rank(family: str, rank: int, noise: float = 0.01, **sizes: Any) -> tuple[Any, Anatomy]:
    """A model whose stream lies in `rank` directions, but for a little noise; none of them along a channel."""
    model, anatomy = source(family, **sizes)
    basis_DR = any_rotation(seed=5)[:, :rank]
    map_DD = (1 - noise) * basis_DR @ basis_DR.T + noise * torch.eye(48, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.copy_(parameter @ map_DD)
            elif "o_proj" in name or "down_proj" in name:
                parameter.copy_(map_DD @ parameter)
    return model, anatomy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_function_is_the_same(family: str, tied: bool, biased: bool) -> None:
    model, anatomy = source(family, tied=tied, biased=biased)
    before, weights = logits(model), {name: weight.clone() for name, weight in model.named_parameters()}
    turned = rotate(model, anatomy, any_rotation(), untie=tied)
    assert off(logits(model), before) < 1e-10
    assert not turned.flags["tie_word_embeddings"] and not model.config.tie_word_embeddings
    assert turned.parameters() == anatomy.parameters() + tied * 96 * 48
    assert turned.shapes() == {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    moved = {name for name, weight in model.named_parameters() if name in weights and not torch.equal(weight, weights[name])}
    still = {name for name in weights if re.search(r"[qkv]_norm|(q|k|v|gate|up)_proj\.bias", name)}
    assert moved == weights.keys() - still
    for name in norms_of(turned):
        assert model.get_parameter(f"{name}.weight").unique().numel() == 1


def test_matrices_of_many_rows_are_turned_whole() -> None:
    model, anatomy = source("llama", vocab=ROWS + 5, layers=1)
    before = model.model.embed_tokens.weight.detach().clone()
    rotate(model, anatomy, any_rotation())
    torch.testing.assert_close(model.model.embed_tokens.weight.detach(), before @ any_rotation(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e-6, 1.0, 300.0, -1.0])
def test_norms_and_matrices_keep_their_scale(size: float) -> None:
    model, anatomy = source("llama")
    with torch.no_grad():
        for name in norms_of(anatomy):
            model.get_parameter(f"{name}.weight").mul_(size)
    before, weights = logits(model), {name: weight.clone() for name, weight in model.named_parameters()}
    rotate(model, anatomy, any_rotation())
    assert off(logits(model), before) < 1e-10
    for name, weight in model.named_parameters():
        change = float(weight.detach().norm() / weights[name].detach().norm())
        assert 0.9 < change < 1.1, name


def test_a_norm_that_closes_everything_stays_closed() -> None:
    model, anatomy = source("llama")
    torch.nn.init.zeros_(model.model.layers[1].input_layernorm.weight)
    before = logits(model)
    rotate(model, anatomy, any_rotation())
    assert off(logits(model), before) < 1e-10
    assert model.model.layers[1].self_attn.q_proj.weight.abs().mean() > 0.05


def test_a_turned_model_that_was_tied_is_saved_and_loaded_untied(tmp_path: Path) -> None:
    model, anatomy = source("qwen3", tied=True)
    rotate(model, anatomy, any_rotation(), untie=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert {name: tuple(weight.shape) for name, weight in again.named_parameters()}.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in model.named_parameters())


def test_what_is_wrong_is_refused() -> None:
    model, anatomy = source("llama")
    tied, tied_anatomy = source("llama", tied=True)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match="not orthogonal"):
        rotate(model, anatomy, any_rotation() * 1.001)
    with pytest.raises(ValueError, match=r"shape \(47, 47\)"):
        rotate(model, anatomy, any_rotation(47))
    with pytest.raises(ValueError, match="final_norm_D"):
        rotate(model, anatomy, any_rotation(), final_norm_D=torch.ones(48))
    with pytest.raises(ValueError, match="final_norm_D"):
        rotate(tied, tied_anatomy, any_rotation())
    with pytest.raises(ValueError, match="final_norm_D"):
        rotate(tied, tied_anatomy, any_rotation(), untie=True, final_norm_D=torch.ones(48))
    with pytest.raises(ValueError, match="at least one"):
        stream_covariance(model, anatomy, [])
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    torch.nn.init.constant_(model.model.layers[1].mlp.down_proj.weight, float("inf"))
    with pytest.raises(NumericsError, match="not finite"):
        stream_covariance(model, anatomy, BATCHES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_covariance_is_that_of_what_norms_read(family: str) -> None:
    model, anatomy = source(family)
    model.train()
    calls = []
    found = stream_covariance(model, anatomy, BATCHES, between=lambda: calls.append(1))
    assert model.training and len(calls) == 3
    assert hooks(model) == 0
    model.eval()
    expected, count = torch.zeros(48, 48, dtype=torch.float64), 0
    with torch.no_grad():
        for ids in BATCHES:
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]  # what enters each block
            for layer, x in enumerate(states):
                block = model.model.layers[layer]
                rotary = model.model.rotary_emb(x, torch.arange(17)[None])
                middle = x + block.self_attn(block.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]
                out = middle + block.mlp(block.post_attention_layernorm(middle))
                for stream in (x, middle, *([out] if layer == 2 else [])):
                    flat = stream.flatten(0, 1)
                    unit = flat / (flat.square().mean(1, keepdim=True) + block.input_layernorm.variance_epsilon).sqrt()
                    expected += unit.T @ unit
                    count += len(unit)
    assert off(found, expected / count) < 1e-6  # the stock norms round to fp32
    assert torch.equal(found, stream_covariance(model, anatomy, BATCHES))
    last = stream_covariance(model, anatomy, BATCHES, norms=[anatomy.family.anchors.final_norm])
    assert abs(float(last.trace()) - 48) < 1e-3 and not torch.allclose(last, found)


def test_the_principal_rotation() -> None:
    basis = any_rotation(12, seed=3)
    values = torch.linspace(9, 0.5, 12, dtype=torch.float64)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    covariance = basis @ torch.diag(values) @ basis.T
    found = principal_rotation(covariance)
    torch.testing.assert_close(found.T @ found, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(found.T @ covariance @ found, torch.diag(values.sort(descending=True).values))
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.equal(found, principal_rotation(covariance)) and found.dtype == torch.float64


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_last_channels_are_the_ones_to_go(family: str, tied: bool) -> None:
    """Of a stream of 24 directions the turned model loses 24 channels at little cost, where 24 channels of the source are dear."""
    model, anatomy = low_rank(family, 24, tied=tied)
    before = logits(model)
    covariance = stream_covariance(model, anatomy, BATCHES)
    plain = torch.zeros(48, dtype=torch.float64)
    plain[covariance.diagonal().topk(24).indices] = 1
    turned = copy.deepcopy(model)
    turned_anatomy = rotate(turned, anatomy, principal_rotation(covariance), untie=tied)
    errors = {}
    for what, one, shape, hidden in (
        ("plain", model, anatomy, plain),
        ("turned", turned, turned_anatomy, torch.arange(48).lt(24).double()),
    ):
        errors[what] = float((masked(one, shape, hidden) - before).square().mean() / before.square().mean())
        fitted = fit_norms(one, shape, hidden, BATCHES)
        one.load_state_dict(fitted, strict=False)
        errors[f"{what} fitted"] = float((masked(one, shape, hidden) - before).square().mean() / before.square().mean())
    assert errors["turned fitted"] < 0.05 * errors["plain fitted"]
    assert errors["turned fitted"] < 0.1 * errors["turned"]  # without the norms' factor the stream is read at sqrt(1/2) of its scale
    assert errors["turned"] < errors["plain"]


def test_fitted_norms_are_the_least_squares_factor() -> None:
    model, anatomy = source("qwen2")
    hidden = torch.arange(48).lt(30).double()
    fitted = fit_norms(model, anatomy, hidden, BATCHES)
    assert fitted.keys() == {f"{name}.weight" for name in norms_of(anatomy)}
    name, norm = "model.norm", model.model.norm
    streams = []
    handle = norm.register_forward_pre_hook(lambda module, args: streams.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in BATCHES:
            model(input_ids=ids)
    handle.remove()
    x = torch.cat(streams)
    full = (x / (x.square().mean(1, keepdim=True) + norm.variance_epsilon).sqrt())[:, :30]
    cut = x[:, :30] / (x[:, :30].square().mean(1, keepdim=True) + norm.variance_epsilon).sqrt()
    factor = torch.linalg.lstsq(cut.flatten()[:, None], full.flatten()[:, None]).solution.item()
    torch.testing.assert_close(fitted[f"{name}.weight"], norm.weight.detach() * factor, rtol=1e-9, atol=0)
    every = fit_norms(model, anatomy, torch.ones(48), BATCHES)
    assert all(torch.allclose(weight, model.get_parameter(name), rtol=1e-12) for name, weight in every.items())


def tied_error(found_NV: Tensor, expected_NV: Tensor) -> float:
    """Of logits up to a constant for each token: the size of the difference relative to what was expected."""
    found_NV, expected_NV = (values_NV - values_NV.mean(1, keepdim=True) for values_NV in (found_NV, expected_NV))
    return float((found_NV - expected_NV).norm() / expected_NV.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_stays_tied_is_off_by_what_is_told(family: str) -> None:
    model, anatomy = source(family, tied=True)
    before = logits(model)
    covariance = stream_covariance(model, anatomy, BATCHES, norms=["model.norm"])
    rotation = any_rotation()

    def turned(weight: Tensor) -> float:
        other = copy.deepcopy(model)
        assert rotate(other, anatomy, rotation, final_norm_D=weight) is anatomy
        assert other.lm_head.weight is other.model.embed_tokens.weight
        return tied_error(logits(other), before)

    fitted = fit_tied_norm(model, anatomy, rotation, covariance)
    assert turned(fitted.weight_D) == pytest.approx(fitted.error, rel=1e-5)
    assert 0.01 < fitted.error < 0.3
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        nudge = 0.01 * torch.randn(48, generator=generator, dtype=torch.float64)
        assert turned(fitted.weight_D + nudge) > fitted.error
    constant = model.model.norm.weight.mean().detach().expand(48)
    assert turned(constant) > fitted.error


def test_a_tied_head_is_exact_where_it_can_be() -> None:
    model, anatomy = source("llama", tied=True)
    covariance = stream_covariance(model, anatomy, BATCHES, norms=["model.norm"])
    same = fit_tied_norm(model, anatomy, torch.eye(48), covariance)
    assert same.error < 1e-6
    torch.testing.assert_close(same.weight_D, model.model.norm.weight.detach(), rtol=1e-5, atol=1e-5)
    torch.nn.init.constant_(model.model.norm.weight, 0.3)
    constant = fit_tied_norm(model, anatomy, any_rotation(), covariance)
    assert constant.error < 1e-6
    torch.testing.assert_close(constant.weight_D, torch.full((48,), 0.3, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    torch.nn.init.zeros_(model.model.norm.weight)
    nothing = fit_tied_norm(model, anatomy, any_rotation(), covariance)
    assert isinstance(nothing, TiedNorm) and nothing.error == 0 and not nothing.weight_D.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_aside_make_a_tied_head_nearly_exact(family: str) -> None:
    """Of a last norm that is alike but for three channels, four are left aside and the rest is turned."""
    model, anatomy = source(family, tied=True)
    odd = [3, 17, 40]
    with torch.no_grad():
        model.model.norm.weight.copy_(1.5 + 1e-4 * torch.randn(48, generator=torch.Generator().manual_seed(1)))
        model.model.norm.weight[odd] = torch.tensor([-1.0, 6.0, 0.1], dtype=torch.float64)
    before = logits(model)
    covariance = stream_covariance(model, anatomy, BATCHES)
    last = stream_covariance(model, anatomy, BATCHES, norms=["model.norm"])
    rotation, fitted = tied_rotation(model, anatomy, covariance, last, error=0.01)
    whole = fit_tied_norm(model, anatomy, principal_rotation(covariance), last)
    assert fitted.error <= 0.01 < 0.1 < whole.error
    alone = [channel for channel in range(48) if rotation[channel].abs().max() == 1]
    assert set(odd) <= set(alone) and len(alone) == 4
    carried = (rotation.T @ covariance @ rotation).diagonal()
    assert torch.equal(carried, carried.sort(descending=True).values)
    rotate(model, anatomy, rotation, final_norm_D=fitted.weight_D)
    assert tied_error(logits(model), before) == pytest.approx(fitted.error, rel=1e-3)


def test_where_no_error_is_allowed_nothing_is_mixed() -> None:
    model, anatomy = source("llama", tied=True)
    covariance = stream_covariance(model, anatomy, BATCHES)
    rotation, fitted = tied_rotation(model, anatomy, covariance, covariance, error=0.0)
    assert (rotation.abs().max(0).values == 1).all() and fitted.error < 1e-6
