"""Gates in training: they reach the target, keep what the loss wants, go on bitwise after a save, and owe their noise to the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shearling.prune.config import GateConfig
from shearling.prune.gates import KINDS, LIMIT, Gates, GateSpec, gate_values
from shearling.prune.learn import GateLearner
from tiny_gates import LAGRANGIAN, MULTIPLIED, PROJECTED, TARGETS, Training, same

NOISY = GateConfig(noise=1.0, final_noise=0.5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("config", [GateConfig(), NOISY], ids=["default", "noisy"])
def test_projected_gates_reach_the_target_in_few_steps(target: str, config: GateConfig) -> None:
    """60 steps: every vector within one unit before hardening, by its expected count."""
    training = Training(config, steps=60, target=target)
    training.start()
    training.run(1, 60)
    sizes = training.learner.metrics(60)["sizes"]
    assert set(sizes) == set(training.gates.specs)
    for axis, spec in training.gates.specs.items():
        assert sizes[axis]["target"] == spec.target
        assert sizes[axis]["worst"] <= 1 and abs(sizes[axis]["expected"] - spec.target) <= 1


def test_the_gates_of_the_last_evaluation_are_within_a_unit_of_the_target() -> None:
    """What the held-out losses before hardening are measured with: the gates themselves, not their expected count."""
    for target in TARGETS:
        training = Training(GateConfig(), steps=60, target=target)
        training.start()
        training.run(1, 60)
        training.learner.settle(60)
        for axis, spec in training.gates.specs.items():
            assert ((training.attachment.masks[axis].sum(-1) - spec.target).abs() <= 1).all(), axis


def test_lagrangian_gates_reach_the_target_in_many_steps() -> None:
    training = Training(LAGRANGIAN, steps=600)
    training.start()
    training.run(1, 600)
    found = training.learner.metrics(600)
    for axis, spec in training.gates.specs.items():
        assert found["sizes"][axis]["target"] == spec.target
        assert found["sizes"][axis]["worst"] <= 1, (axis, found["sizes"][axis])
    assert all(pair["lambda_1"] != 0 and pair["lambda_2"] > 0 for pair in found["multipliers"].values())


def test_multipliers_ascend() -> None:
    """With all gates open lambda_1 falls and lambda_2 grows, at once and for every vector; with too few open lambda_1 grows."""
    for logit, sign in ((LIMIT, -1), (-LIMIT, 1)):
        training = Training(LAGRANGIAN, steps=10)
        with torch.no_grad():
            for log_alpha in training.gates.log_alpha.values():
                log_alpha.fill_(logit)
        training.run(10, 10)
        for axis in training.gates.specs:
            assert (training.gates.lambda_1[axis].detach() * sign > 0).all()
            assert (training.gates.lambda_2[axis].detach() > 0).all()


def test_the_logged_sizes_follow_the_ramp() -> None:
    training = Training(GateConfig(ramp=0.5), steps=20)
    training.start()
    for step, share in ((0, 0.0), (5, 0.5), (10, 1.0), (20, 1.0)):
        for axis, size in training.learner.metrics(step)["sizes"].items():
            spec = training.gates.specs[axis]
            assert size["target"] == pytest.approx(spec.shape[-1] - share * (spec.shape[-1] - spec.target))
            assert size["worst"] < 0.01 and size["expected"] == pytest.approx(size["target"], abs=0.01)


@pytest.mark.parametrize(
    "config", [GateConfig(), NOISY, LAGRANGIAN, PROJECTED, MULTIPLIED], ids=["default", "noisy", "lagrangian", "ramps", "lagrangian ramps"]
)
def test_what_is_saved_goes_on_bitwise(config: GateConfig) -> None:
    whole = Training(config, steps=12)
    whole.start()
    whole.run(1, 12)

    first = Training(config, steps=12)
    first.start()
    first.run(1, 7)
    saved = first.state()
    second = Training(config, steps=12)  # not started: all that it knows is what was saved
    second.learner.load(saved)
    assert same(second.state(), saved)
    second.run(8, 12)
    assert same(second.state(), whole.state())
    assert same(second.gates.hardened(), whole.gates.hardened())
    assert not same(saved, whole.state())
    assert all(torch.is_tensor(tensor) and not tensor.requires_grad for tensor in saved.values())
    default = Training(GateConfig(), steps=12).state()  # of no kind of gates does a checkpoint hold more
    assert {name: tensor.shape for name, tensor in saved.items()} == {name: tensor.shape for name, tensor in default.items()}


def test_noise_follows_from_seed_step_and_microbatch() -> None:
    training, twin = Training(NOISY, steps=10), Training(NOISY, steps=10)
    for each in (training, twin):
        each.start()
    wanted = training.drawn(3, 1)
    training.drawn(4, 0)
    assert same(training.drawn(3, 1), wanted)  # whatever was drawn between
    assert same(twin.drawn(3, 1), wanted)
    for other in ((3, 0), (3, 2), (4, 1), (1, 3)):
        assert not same(training.drawn(*other), wanted), other


@pytest.mark.parametrize("seed", [6, 5 + 2048, 5 + 2**31])
def test_another_seed_gives_other_noise(seed: int) -> None:
    training, other = Training(NOISY, steps=10), Training(NOISY, steps=10, seed=seed)
    for each in (training, other):
        each.start()
    assert not same(training.drawn(3, 1), other.drawn(3, 1))


def test_settled_gates_have_no_noise() -> None:
    training = Training(NOISY, steps=10)
    training.start()
    training.learner.settle(4)
    settled = {axis: mask.clone() for axis, mask in training.attachment.masks.items()}
    assert same(settled, {axis: gate_values(logits).detach() for axis, logits in training.learner.logits(4).items()})
    assert not any(mask.requires_grad for mask in training.attachment.masks.values())
    assert not same(settled, training.drawn(4, 0))


def test_the_gates_begin_in_the_order_of_the_score() -> None:
    training = Training(GateConfig(), steps=10)
    score = {axis: torch.rand(spec.shape) for axis, spec in training.gates.specs.items()}
    training.learner.start_from(score)
    for axis, spec in training.gates.specs.items():
        log_alpha = training.gates.log_alpha[axis].detach()
        assert torch.equal(log_alpha.argsort(-1), score[axis].argsort(-1))
        assert log_alpha.abs().max() <= LIMIT + 1e-6
        best = score[axis].topk(spec.target, dim=-1).indices
        mask = training.gates.hardened()[axis]
        assert mask.gather(-1, best).all() and (mask.sum(-1) == spec.target).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("constraint", ["projected", "lagrangian"])
def test_the_loss_decides_what_is_kept(constraint: str, kind: str) -> None:
    """Two vectors whose score was wrong: a loss that needs the other half brings the other half."""
    multiplied = LAGRANGIAN if kind == "hard_concrete" else MULTIPLIED
    config = multiplied if constraint == "lagrangian" else GateConfig(kind=kind, learning_rate=0.3)
    gates, needed, steps = Gates({"neuron": GateSpec("neuron", (2, 16), 8)}), torch.zeros(2, 16), 300
    needed[0, :8] = 1
    needed[1, 8:] = 1

    class Holder:
        masks: dict[str, torch.Tensor]

        def set(self, masks: Any) -> None:
            self.masks = masks

    holder = Holder()
    learner = GateLearner(gates, holder, config, steps=steps, warmup=10, seed=1)  # type: ignore[arg-type]
    learner.start_from({"neuron": -needed})
    assert not (gates.hardened()["neuron"] * needed).any()
    for step in range(1, steps + 1):
        learner.draw(step, 0)
        (-(holder.masks["neuron"] * needed).sum()).backward()
        learner.update(step)
    assert torch.equal(gates.hardened()["neuron"], needed)
