"""Masked logits equal cut logits, for every family, with random masks on every axis at once."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from models import FAMILIES, tiny_config, tiny_model
from shearling.arch.families import Anatomy, anatomy_of
from shearling.io.tensors import MemoryReader
from shearling.prune.gates import Gates, gate_specs
from shearling.prune.plan import plan_from_masks
from shearling.prune.transform import transform
from shearling.prune.verify import compare_logits, masked_logits
from shearling.shapes import Target, target_anatomy, target_config

FULL = Target(num_hidden_layers=2, hidden_size=36, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24)
VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILIES},
    **{f"{family} tied": {"family": family, "tied": True} for family in FAMILIES},
    "llama multi-head": {"family": "llama", "groups": 6},
    "mistral multi-query": {"family": "mistral", "groups": 1},
}


def random_masks(source: Anatomy, target: Anatomy, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gates = Gates(gate_specs(source, target))
    with torch.no_grad():
        for log_alpha in gates.log_alpha.values():
            log_alpha.copy_(torch.randn(log_alpha.shape, generator=generator))
    return gates.hardened()


def cut_model(model: Any, config: dict[str, Any], source: Anatomy, target: Anatomy, masks: dict[str, torch.Tensor]) -> Any:
    """The cut model, made in memory by the plan and the transform."""
    plan = plan_from_masks(source, target, masks)
    state = dict(transform(plan, source, target, MemoryReader(model.state_dict())))
    values = target_config(config, source, target, plan.layers)
    small = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).to(model.dtype)
    missing, unexpected = small.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    small.tie_weights()
    assert {name: tuple(p.shape) for name, p in small.named_parameters()} == {n: tuple(t.shape) for n, t in state.items()}
    return small.eval()


def wholly_double(model: Any) -> None:
    """Let the norms compute in fp64: the stock ones round their input to fp32 whatever the model's dtype, about 1e-7."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward, module)


def difference(variant: dict[str, Any], asked: Target, seed: int, dtype: torch.dtype) -> float:
    """Relative difference between masked and cut logits of a tiny model."""
    sizes = {key: value for key, value in variant.items() if key != "family"}
    model = tiny_model(variant["family"], seed=seed, **sizes).to(dtype)
    config = tiny_config(variant["family"], **sizes).to_dict()
    source = anatomy_of(config)
    target = target_anatomy(source, asked)
    ids = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(seed))
    masks = {axis: mask.to(dtype) for axis, mask in random_masks(source, target, seed).items()}
    cut = cut_model(model, config, source, target, masks)
    if dtype == torch.float64:
        wholly_double(model)
        wholly_double(cut)
    return compare_logits(cut, masked_logits(model, source, masks, ids), ids).relative_difference


def adapted(variant: dict[str, Any]) -> Target:
    groups = variant.get("groups", 3)
    kept = min(groups, 2)
    query = 6 // groups
    return FULL.model_copy(update={"num_key_value_heads": kept, "num_attention_heads": kept * max(1, query - 1)})


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_axis_at_once(name: str, dtype: torch.dtype, tolerance: float) -> None:
    for seed in range(3):
        assert difference(VARIANTS[name], adapted(VARIANTS[name]), seed, dtype) <= tolerance


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    tied=st.booleans(),
    layers=st.integers(1, 3),
    groups=st.integers(1, 3),
    query=st.integers(1, 2),
    multiple=st.integers(1, 8),
    neurons=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_any_feasible_shape(family: str, tied: bool, layers: int, groups: int, query: int, multiple: int, neurons: int, seed: int) -> None:
    heads = groups * query
    asked = Target(
        num_hidden_layers=layers,
        hidden_size=min(48 // heads * heads, heads * multiple),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=neurons,
    )
    # In fp64, since the norm of a stream of one or two channels is too ill-conditioned for a bound in fp32.
    assert difference({"family": family, "tied": tied}, asked, seed, torch.float64) <= 1e-10


def test_a_wrong_index_is_seen() -> None:
    """The check can fail: a plan with one other channel gives other logits."""
    model = tiny_model("qwen3")
    config = tiny_config("qwen3").to_dict()
    source = anatomy_of(config)
    target = target_anatomy(source, FULL)
    ids = torch.arange(16).reshape(1, 16)
    masks = random_masks(source, target, 0)
    expected = masked_logits(model, source, masks, ids)
    wrong = {**masks, "hidden": masks["hidden"].roll(1)}
    assert compare_logits(cut_model(model, config, source, target, wrong), expected, ids).relative_difference > 1e-2
