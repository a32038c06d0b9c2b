"""Gates on a stock model: open ones change nothing, removing them restores it, and the loss' gradient reaches every gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import AutoModelForCausalLM

from models import FAMILIES, hooks, tiny_config, tiny_model
from shearling.arch.families import anatomy_of
from shearling.objectives.lm import token_losses
from shearling.prune.attach import Attachment
from test_masked_equals_cut import wholly_double
from tiny_gates import specs_of

IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))


def anatomy(family: str, **sizes: Any) -> Any:
    return anatomy_of(tiny_config(family, **sizes).to_dict())


def fractional(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    specs = specs_of(family)[1]
    return {axis: 0.2 + 0.7 * torch.rand(spec.shape, generator=generator, dtype=torch.float64) for axis, spec in specs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_change_nothing(family: str) -> None:
    model = tiny_model(family)
    expected = model(IDS).logits
    with Attachment(model, anatomy(family)) as gates:
        assert torch.equal(model(IDS).logits, expected)
        gates.set({axis: torch.ones(spec.shape) for axis, spec in specs_of(family)[1].items()})
        assert torch.equal(model(IDS).logits, expected)
        gates.set({axis: value.float() for axis, value in fractional(family).items()})
        assert not torch.allclose(model(IDS).logits, expected)
        gates.set({})
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_restores_the_model(family: str) -> None:
    model = tiny_model(family)
    expected = model(IDS).logits
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    norms = {name: m.variance_epsilon for name, m in model.named_modules() if hasattr(m, "variance_epsilon")}
    assert hooks(model) == 0
    with Attachment(model, anatomy(family)) as gates:
        gates.set({axis: (value > 0.5).float() for axis, value in fractional(family).items()})
        model(IDS)
        assert hooks(model) > 0
    assert hooks(model) == 0
    assert torch.equal(model(IDS).logits, expected)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    after = {name: m.variance_epsilon for name, m in model.named_modules() if hasattr(m, "variance_epsilon")}
    assert after == norms and {type(value) for value in after.values()} == {float}
    gates.remove()  # once more does no harm


@pytest.mark.parametrize("axis", ["layer", "hidden", "group", "query", "neuron"])
def test_an_axis_left_out_is_open(axis: str) -> None:
    model, specs = tiny_model("qwen3"), specs_of("qwen3")[1]
    value = fractional("qwen3")[axis].float()
    with Attachment(model, anatomy("qwen3")) as gates:
        gates.set({axis: value})
        alone = model(IDS).logits
        gates.set({**{name: torch.ones(spec.shape) for name, spec in specs.items()}, axis: value})
        torch.testing.assert_close(model(IDS).logits, alone, atol=1e-5, rtol=1e-5)
        gates.set({})
        assert not torch.allclose(model(IDS).logits, alone, atol=1e-3)


def test_a_closed_channel_is_zero_throughout_the_stream() -> None:
    model, source = tiny_model("llama"), anatomy("llama")
    mask = torch.ones(48)
    mask[[3, 17, 40]] = 0
    seen: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with Attachment(model, source) as gates:
        gates.set({"hidden": mask})
        model(IDS)
    assert len(seen) == 4
    for stream in seen:
        assert not stream[..., [3, 17, 40]].any() and (stream[..., mask > 0] != 0).all()


def test_a_closed_layer_passes_the_stream_on() -> None:
    model = tiny_model("mistral")
    streams: list[tuple[torch.Tensor, torch.Tensor]] = []
    with Attachment(model, anatomy("mistral")) as gates:
        model.model.layers[1].register_forward_hook(lambda module, args, out: streams.append((args[0], out)))
        gates.set({"layer": torch.tensor([1.0, 0.0, 1.0])})
        model(IDS)
        gates.set({"layer": torch.ones(3)})
        model(IDS)
    assert torch.equal(*streams[0]) and not torch.equal(*streams[1])


def test_no_shape_and_no_branch_depends_on_the_gates() -> None:
    """Under fake tensors, which have no values, whatever reads one raises; so nothing waits for the device."""
    specs = specs_of("qwen3")[1]
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(tiny_config("qwen3"))
        masks = {axis: torch.rand(spec.shape, requires_grad=True) for axis, spec in specs.items()}
        ids = torch.zeros(2, 11, dtype=torch.long)
        with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
            masks["hidden"].nonzero()  # the check can fail
        with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
            float(masks["hidden"].detach().sum())
        with Attachment(model, anatomy("qwen3")) as gates:
            gates.set(masks)
            token_losses(model, ids).mean().backward()
    assert all(mask.grad is not None and mask.grad.shape == mask.shape for mask in masks.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_on_every_gate_matches_finite_differences(family: str) -> None:
    model = tiny_model(family).double()
    wholly_double(model)
    model.requires_grad_(False)
    masks = {axis: value.requires_grad_() for axis, value in fractional(family).items()}

    with Attachment(model, anatomy(family)) as gates:

        def loss() -> torch.Tensor:
            gates.set(masks)
            logits = model(IDS).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())

        gradients = dict(zip(masks, torch.autograd.grad(loss(), list(masks.values())), strict=True))
        rng = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for axis, mask in masks.items():
                assert (gradients[axis] != 0).all(), axis
                flat, number = mask.view(-1), min(6, mask.numel())
                for index in torch.randperm(mask.numel(), generator=rng)[:number].tolist():
                    value, step = float(flat[index]), 1e-5
                    sides = []
                    for sign in (1, -1):
                        flat[index] = value + sign * step
                        sides.append(float(loss()))
                    flat[index] = value
                    slope = (sides[0] - sides[1]) / (2 * step)
                    assert slope == pytest.approx(float(gradients[axis].view(-1)[index]), rel=1e-5, abs=1e-9), (axis, index)


def test_a_closed_gate_still_has_a_gradient() -> None:
    """So that a head, neuron or layer that was closed by chance can come back."""
    model = tiny_model("llama").requires_grad_(False)
    masks = {axis: torch.ones(spec.shape) for axis, spec in specs_of("llama")[1].items()}
    for mask in masks.values():
        mask[..., 0] = 0
        mask.requires_grad_()
    with Attachment(model, anatomy("llama")) as gates:
        gates.set({axis: mask for axis, mask in masks.items() if axis != "layer"})
        token_losses(model, IDS).mean().backward()
        for axis in ("group", "query", "neuron"):
            assert (masks[axis].grad[..., 0] != 0).any(), axis
        gates.set({"layer": masks["layer"]})
        token_losses(model, IDS).mean().backward()
        assert masks["layer"].grad[0] != 0


def test_gates_stay_in_fp32_under_autocast() -> None:
    model = tiny_model("llama")
    mask = torch.full((3, 40), 0.7, requires_grad=True)
    with Attachment(model, anatomy("llama")) as gates, torch.autocast("cpu", dtype=torch.bfloat16):
        gates.set({"neuron": mask})
        token_losses(model, IDS).mean().backward()
    assert mask.grad is not None and mask.grad.dtype == torch.float32 and (mask.grad != 0).all()
