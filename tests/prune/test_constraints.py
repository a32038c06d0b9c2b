"""The constraints: the Lagrangian by hand, which way its gradients push, and the shift that meets a count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.prune.constraints import lagrangian, project, scheduled_sizes
from shearling.prune.gates import DETERMINISTIC, HARD_CONCRETE, LIMIT, Gates, GateSpec, expected_open, gate_values, ramp_values

SPECS = {"layer": GateSpec("layer", (4,), 2), "neuron": GateSpec("neuron", (3, 10), 6)}
COUNTS = ((HARD_CONCRETE, 0.0, expected_open), (HARD_CONCRETE, 1.0, gate_values), (DETERMINISTIC, 0.0, ramp_values))
"""(kind of gate, how far it counts as settled, what counts an open gate then)."""


def gates_at(**logits: float) -> Gates:
    gates = Gates(SPECS)
    with torch.no_grad():
        for axis, value in logits.items():
            gates.log_alpha[axis].fill_(value)
    return gates


def test_the_schedule_is_linear_from_source_to_target() -> None:
    gates = Gates(SPECS)
    assert scheduled_sizes(gates, 0.0) == {"layer": 4, "neuron": 10}
    assert scheduled_sizes(gates, 0.25) == {"layer": 3.5, "neuron": 9}
    assert scheduled_sizes(gates, 1.0) == {"layer": 2, "neuron": 6}


def test_the_lagrangian_by_hand() -> None:
    """A count from the hard-concrete distribution's own formula, scaled to its limits; multipliers of each vector for itself."""
    gates = gates_at(layer=0.3, neuron=-1.1)
    with torch.no_grad():
        gates.log_alpha["neuron"][2].fill_(LIMIT)
        gates.lambda_1["layer"].fill_(0.7)
        gates.lambda_2["layer"].fill_(1.3)
        gates.lambda_1["neuron"].copy_(torch.tensor([-0.5, 0.2, 2.0]))
        gates.lambda_2["neuron"].copy_(torch.tensor([0.0, 3.0, 1.0]))

    def open_share(log_alpha: float) -> float:
        def score(x: float) -> float:
            return 1 / (1 + math.exp(2 / 3 * math.log(1 / 11) - x))

        return (score(log_alpha) - score(-LIMIT)) / (score(LIMIT) - score(-LIMIT))

    progress = 0.5
    layer = (1 - open_share(0.3)) - 0.5 * (1 - 2 / 4)
    neuron = [(1 - share) - 0.5 * (1 - 6 / 10) for share in (open_share(-1.1), open_share(-1.1), 1.0)]
    wanted = 0.7 * layer + 1.3 * layer**2
    wanted += sum(a * d + b * d**2 for a, b, d in zip((-0.5, 0.2, 2.0), (0.0, 3.0, 1.0), neuron, strict=True)) / 3
    assert float(lagrangian(gates, progress).detach()) == pytest.approx(wanted, rel=1e-5)


def test_finished_gates_pay_nothing() -> None:
    gates = gates_at(layer=-LIMIT, neuron=-LIMIT)
    with torch.no_grad():
        gates.log_alpha["layer"][:2] = LIMIT
        gates.log_alpha["neuron"][:, 4:] = LIMIT
        for pair in (gates.lambda_1, gates.lambda_2):
            for multiplier in pair.values():
                multiplier.fill_(50.0)
    assert float(lagrangian(gates, 1.0).detach()) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("logit", "sign"), [(LIMIT, -1.0), (-LIMIT, 1.0)])
def test_which_way_multipliers_go(logit: float, sign: float) -> None:
    """Multipliers ascend: with too many open lambda_1 falls below 0, and then the loss falls with the logits; lambda_2 only grows."""
    gates = gates_at(layer=logit, neuron=logit)
    lagrangian(gates, 1.0).backward()
    for axis in SPECS:
        first, second = gates.lambda_1[axis].grad, gates.lambda_2[axis].grad
        assert first is not None and (first.sign() == sign).all()
        assert second is not None and (second > 0).all()
        assert not gates.log_alpha[axis].grad.any()  # multipliers of 0 do not push yet
    gates = gates_at(layer=0.1 * logit, neuron=0.1 * logit)
    with torch.no_grad():
        for axis in SPECS:
            gates.lambda_1[axis].fill_(sign)
    lagrangian(gates, 1.0).backward()
    for axis in SPECS:
        assert (gates.log_alpha[axis].grad.sign() == -sign).all()


def test_a_vector_that_lags_is_pushed_by_itself() -> None:
    gates = gates_at(layer=-LIMIT, neuron=-LIMIT)
    with torch.no_grad():
        gates.log_alpha["layer"][:2] = LIMIT
        gates.log_alpha["neuron"][:2, :6] = LIMIT
        gates.log_alpha["neuron"][2] = LIMIT
    lagrangian(gates, 1.0).backward()
    done, late = gates.lambda_1["neuron"].grad[:2], gates.lambda_1["neuron"].grad[2]
    assert done.abs().max() < 1e-6 and float(late) == pytest.approx(-0.4 / 3, rel=1e-5)


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 60),
    spread=st.floats(0, 30),
    share=st.floats(0, 1),
    temperature=st.floats(0.05, 1),
    counted=st.sampled_from(COUNTS),
)
def test_projected_logits_have_the_wanted_count(
    seed: int, size: int, spread: float, share: float, temperature: float, counted: Any
) -> None:
    kind, settled, count = counted
    log_alpha = spread * torch.randn(3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = project(log_alpha, share * size, temperature, settled, kind)
    assert found.shape == log_alpha.shape and found.abs().max() <= LIMIT + 1e-12
    torch.testing.assert_close(count(found).sum(-1), torch.full((3,), share * size, dtype=torch.float64), atol=1e-6, rtol=0)
    order = log_alpha.argsort(-1)
    assert (found.gather(-1, order).diff(dim=-1) >= -1e-12).all()  # a shift keeps the order


def test_projected_logits_in_fp32() -> None:
    log_alpha = 3 * torch.randn(5, 4096, generator=torch.Generator().manual_seed(0))
    sizes = gate_values(project(log_alpha, 2048.0, 0.3, 1.0)).sum(-1)
    torch.testing.assert_close(sizes, torch.full((5,), 2048.0), atol=0.05, rtol=0)


def test_the_gradient_passes_the_projection() -> None:
    """As if the shift were given, and to clipped gates, too, so that one at the limit can come back."""
    log_alpha = torch.tensor([[-9.0, -1.0, 0.0, 1.0, 9.0]], dtype=torch.float64, requires_grad=True)
    found = project(log_alpha, 2.5, 0.5, 0.0)
    assert (found.abs() >= LIMIT - 1e-9).any()
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    (found * weights).sum().backward()
    torch.testing.assert_close(log_alpha.grad, (weights / 0.5)[None])


def test_every_vector_is_shifted_for_itself() -> None:
    log_alpha = torch.stack([torch.linspace(-3, 3, 11), torch.linspace(4, 9, 11)])
    together = project(log_alpha, 4.0, 0.7, 0.5)
    alone = torch.stack([project(row, 4.0, 0.7, 0.5) for row in log_alpha])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
