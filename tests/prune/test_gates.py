"""Hard-concrete gates: their statistics against closed forms, their gradients, what is counted, and what is kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import tiny_config
from shearling.arch.families import anatomy_of
from shearling.prune.gates import (
    BETA,
    EPSILON,
    GAMMA,
    LIMIT,
    ZERO_EDGE,
    ZETA,
    Gates,
    GateSpec,
    expected_open,
    gate_specs,
    gate_values,
    probability_open,
)

SPECS = {"hidden": GateSpec("hidden", (12,), 5), "query": GateSpec("query", (2, 3, 4), 1), "neuron": GateSpec("neuron", (2, 9), 9)}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def integrated_mean(log_alpha: float, noise: float) -> float:
    """E[z] by the midpoint rule over the noise."""
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    s = 1 / (1 + np.exp(-(noise * np.log(u / (1 - u)) + log_alpha) / (2 / 3)))
    return float(np.clip(s * 1.2 - 0.1, 0, 1).mean())


@pytest.mark.parametrize("noise", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("log_alpha", [-LIMIT, -1.7, 0.0, 0.8, 3.0, LIMIT])
def test_statistics_are_the_closed_forms(log_alpha: float, noise: float) -> None:
    """P(z=0), P(z=1) and E[z] of drawn gates within 4.5 standard errors of their values."""
    number = 200_000
    gates = Gates({"neuron": GateSpec("neuron", (number,), 1)})
    uniform = gates.uniform("neuron", torch.Generator().manual_seed(round(1000 * (log_alpha + 10 * noise))))
    z = gate_values(torch.full((number,), log_alpha), uniform, noise)
    assert z.min() >= 0 and z.max() <= 1
    edge = 2 / 3 * math.log(1 / 11)  # -gamma / zeta = 1/11, and (1 - gamma) / (zeta - 1) = 11
    for found, probability in (
        ((z == 0).double().mean(), sigmoid((edge - log_alpha) / noise)),
        ((z == 1).double().mean(), sigmoid((log_alpha + edge) / noise)),
        ((z != 0).double().mean(), float(probability_open(torch.tensor(log_alpha, dtype=torch.float64), noise))),
    ):
        error = math.sqrt(probability * (1 - probability) / number)
        assert abs(float(found) - probability) <= 4.5 * error + 1e-12
    error = float(z.double().std()) / math.sqrt(number)
    assert abs(float(z.double().mean()) - integrated_mean(log_alpha, noise)) <= 4.5 * error + 1e-5


@pytest.mark.parametrize(
    ("log_alpha", "zero", "one", "score"),
    [(-4.60517, 0.95287, 0.00202, 0.04713), (0.0, 0.16818, 0.16818, 0.83182), (4.60517, 0.00202, 0.95287, 0.99798)],
)
def test_the_papers_numbers(log_alpha: float, zero: float, one: float, score: float) -> None:
    assert (GAMMA, ZETA, BETA, EPSILON) == (-0.1, 1.1, 2 / 3, 1e-6)
    assert pytest.approx(4.60517, abs=1e-5) == LIMIT and pytest.approx(-1.5986, abs=1e-4) == ZERO_EDGE
    value = torch.tensor(log_alpha, dtype=torch.float64)
    assert float(probability_open(value)) == pytest.approx(score, abs=5e-6)
    assert 1 - float(probability_open(value)) == pytest.approx(zero, abs=5e-6)
    assert 1 - float(probability_open(-value)) == pytest.approx(one, abs=5e-6)  # P(z = 1) is P(z = 0) of the negative


def test_without_noise_a_gate_is_its_median() -> None:
    log_alpha = torch.linspace(-3, 3, 13, dtype=torch.float64)
    half = torch.full_like(log_alpha, 0.5)
    assert torch.equal(gate_values(log_alpha), gate_values(log_alpha, half))
    assert torch.equal(gate_values(log_alpha, torch.rand(13, dtype=torch.float64), noise=0.0), gate_values(log_alpha))
    edges = torch.tensor([ZERO_EDGE - 1e-6, ZERO_EDGE + 1e-6, -ZERO_EDGE - 1e-6, -ZERO_EDGE + 1e-6], dtype=torch.float64)
    zero, above, below, one = gate_values(edges).tolist()
    assert zero == 0 and 0 < above < 1e-5 and 1 - 1e-5 < below < 1 and one == 1


@pytest.mark.parametrize("noise", [1.0, 0.3])
def test_gradients_match_finite_differences(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    log_alpha = torch.empty(64, dtype=torch.float64).uniform_(-4, 4, generator=generator).requires_grad_()
    uniform = torch.rand(64, dtype=torch.float64, generator=generator)
    z = gate_values(log_alpha, uniform, noise)
    assert 0 < int(((z > 0) & (z < 1)).sum()) < 64
    for function in (lambda x: gate_values(x, uniform, noise), lambda x: probability_open(x, noise), expected_open):
        assert torch.autograd.gradcheck(function, (log_alpha,), eps=1e-6, atol=1e-7, rtol=1e-6)
    (gradient,) = torch.autograd.grad(z.sum(), log_alpha)
    assert torch.equal(gradient != 0, (z > 0) & (z < 1))


def test_noise_stays_inside_the_unit_interval() -> None:
    gates = Gates({"neuron": GateSpec("neuron", (100, 10_000), 1)})
    uniform = gates.uniform("neuron", torch.Generator().manual_seed(3))
    assert uniform.shape == (100, 10_000) and uniform.min() > 0 and uniform.max() < 1
    assert torch.isfinite(gate_values(gates.log_alpha["neuron"], uniform)).all()
    assert torch.equal(uniform, gates.uniform("neuron", torch.Generator().manual_seed(3)))


def test_finished_gates_at_the_target_satisfy_the_count() -> None:
    """At the limits the unscaled count is off by percents, the floor of the original; the scaled one is exact."""
    log_alpha = torch.full((4096,), -LIMIT, dtype=torch.float64)
    log_alpha[:2048] = LIMIT
    assert float(expected_open(log_alpha).sum()) == pytest.approx(2048, abs=1e-8)
    assert float(probability_open(log_alpha).sum()) == pytest.approx(0.5226 * 4096, abs=1)
    gates = Gates(SPECS)
    with torch.no_grad():
        for axis, spec in SPECS.items():
            gates.log_alpha[axis].fill_(-LIMIT)
            gates.log_alpha[axis][..., : spec.target] = LIMIT
    for axis, sizes in gates.expected_sizes().items():
        assert sizes.shape == SPECS[axis].shape[:-1]
        torch.testing.assert_close(sizes, torch.full_like(sizes, SPECS[axis].target), atol=1e-6, rtol=0)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans(), size=st.integers(1, 20), data=st.data())
def test_hardened_gates_keep_exactly_the_target(seed: int, ties: bool, size: int, data: st.DataObject) -> None:
    target = data.draw(st.integers(1, size))
    gates = Gates({"query": GateSpec("query", (2, 3, size), target)})
    log_alpha = torch.randn((2, 3, size), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        gates.log_alpha["query"].copy_(log_alpha.round() if ties else log_alpha)
    mask = gates.hardened()["query"]
    assert not mask.requires_grad and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert (mask.sum(-1) == target).all()
    kept, dropped = gates.log_alpha["query"].where(mask > 0, torch.inf), gates.log_alpha["query"].where(mask == 0, -torch.inf)
    assert (kept.amin(-1) >= dropped.amax(-1)).all()


def test_axes_that_keep_their_size_have_no_gates() -> None:
    source = anatomy_of(tiny_config("llama").to_dict())
    assert gate_specs(source, source) == {}
    assert gate_specs(source, source.with_sizes(neuron=24)) == {"neuron": GateSpec("neuron", (3, 40), 24)}
    assert gate_specs(source, source.with_sizes(layer=1, hidden=36, group=2, query=1)) == {
        "layer": GateSpec("layer", (3,), 1),
        "hidden": GateSpec("hidden", (48,), 36),
        "group": GateSpec("group", (3, 3), 2),
        "query": GateSpec("query", (3, 3, 2), 1),
    }


def test_gates_and_multipliers_are_fp32_and_one_pair_a_vector() -> None:
    gates = Gates(SPECS)
    assert {p.dtype for p in gates.parameters()} == {torch.float32}
    for axis, spec in SPECS.items():
        assert gates.log_alpha[axis].shape == spec.shape
        assert gates.lambda_1[axis].shape == gates.lambda_2[axis].shape == spec.shape[:-1]
        assert not gates.lambda_1[axis].any() and not gates.lambda_2[axis].any()


def test_the_stored_logit_is_clamped() -> None:
    gates = Gates(SPECS, start=9.0)
    gates.clamp_()
    assert all(float(p.detach().abs().max()) == pytest.approx(LIMIT) for p in gates.log_alpha.values())
