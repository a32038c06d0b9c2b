"""Steps that must not move the weights: known by their loss and gradient, skipped without a trace but in the log, counted in a row."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runs import metrics
from shearling.data.loader import Loader
from shearling.errors import NumericsError, Stopped
from shearling.train import checkpoint
from shearling.train.guard import FLOOR, LEAST, objection, remember
from tiny_stage import DOMAINS, AskedToStop, Stage, Tokens, finished, poisoned, saved

NAN, INF = math.nan, math.inf


# What is objected to.


@pytest.mark.parametrize("deviations", [None, 4.0])
@pytest.mark.parametrize("recent", [[], [2.0] * 20])
def test_what_is_not_finite_is_refused_whatever_the_window(recent: list[float], deviations: float | None) -> None:
    for bad in (NAN, INF, -INF):
        assert f"the loss is {bad}" == objection(bad, 1.0, recent, deviations)
        assert f"the gradient's norm is {bad}" == objection(2.0, bad, recent, deviations)
    assert objection(2.0, 1.0, recent, deviations) is None


def test_a_spike_is_named_with_its_numbers() -> None:
    recent = [2.0, 2.2] * 10
    assert objection(2.1 + 0.1 * 4.01, 1.0, recent, 4.0) == "the loss 2.5010 stands 4.0 deviations above the mean 2.1000 of 20 steps"
    assert objection(2.1 + 0.1 * 3.99, 1.0, recent, 4.0) is None
    assert objection(99.0, 1.0, recent, None) is None
    assert objection(0.1, 1.0, recent, 4.0) is None, "a loss far below the mean is no spike"


def test_nothing_is_a_spike_before_enough_is_known() -> None:
    assert objection(50.0, 1.0, [2.0] * (LEAST - 1), 4.0) is None
    assert objection(50.0, 1.0, [2.0] * LEAST, 4.0) is not None


@pytest.mark.parametrize("level", [3.0, 1e-3, 1e9, 0.0])
def test_a_constant_window_has_a_floor(level: float) -> None:
    """Equal losses have no deviation, and the least rise would be infinitely many of it."""
    assert objection(level * (1 + 3.9 * FLOOR), 1.0, [level] * 50, 4.0) is None
    assert objection(level * (1 + 4.1 * FLOOR) + (level == 0), 1.0, [level] * 50, 4.0) is not None


def test_a_step_up_becomes_the_new_level_if_it_is_let_in_and_stays_a_spike_if_not() -> None:
    let_in, kept_out = [2.0 + 0.01 * (i % 3) for i in range(16)], [2.0] * 16
    for _ in range(16):
        let_in = remember(let_in, 5.0, 16)
    assert objection(5.0, 1.0, let_in, 4.0) is None
    for _ in range(16):
        assert objection(5.0, 1.0, kept_out, 4.0) is not None


def test_the_window_keeps_the_newest_and_leaves_its_argument_alone() -> None:
    recent: list[float] = []
    for number in range(20):
        recent = remember(recent, float(number), 8)
    assert recent == [12.0, 13.0, 14.0, 15.0, 16.0, 17.0, 18.0, 19.0]
    assert remember(recent, 1.0, 8)[-1] == 1.0 and recent[-1] == 19.0


@pytest.mark.parametrize("seed", range(12))
def test_any_series(seed: int) -> None:
    """Over any series, with what is not finite and with spikes in it: the window holds the last losses that were not refused, all of them
    finite; the verdict is that of the rule in other words, does not hang on the unit, and holds for all that is larger."""
    draw = random.Random(seed)
    window, deviations = draw.randint(LEAST, 40), draw.uniform(0.5, 8)
    level, spread = 10 ** draw.uniform(-3, 3), 10 ** draw.uniform(-4, 0)
    recent: list[float] = []
    accepted: list[float] = []
    refused = 0
    for _ in range(120):
        loss = level * (1 + spread * draw.gauss(0, 1))
        loss = draw.choice([NAN, INF, -INF, loss + 100 * level]) if draw.random() < 0.1 else loss
        norm = draw.choice([NAN, INF]) if draw.random() < 0.05 else 1.0
        found = objection(loss, norm, recent, deviations)
        if not math.isfinite(loss) or not math.isfinite(norm):
            assert found is not None
        else:
            edge = np.mean(recent) + deviations * max(np.std(recent), FLOOR * np.mean(recent)) if len(recent) >= LEAST else INF
            assert (found is None) == (loss <= edge) or loss == pytest.approx(edge, rel=1e-9)
            assert found is None or objection(loss * 1.1, norm, recent, deviations) is not None
            assert (objection(loss * 2, norm, [other * 2 for other in recent], deviations) is None) == (found is None)
        if found is None:
            recent = remember(recent, loss, window)
            accepted.append(loss)
        else:
            refused += 1
        assert recent == accepted[-window:] and all(map(math.isfinite, recent))
    assert accepted and refused


# A stage in which they occur.


def only_the_gradient(bad: float, step: int) -> Callable[[tuple[int, int], Tensor], Tensor]:
    """The loss of a microbatch stays as it is, while one token's part of its gradient is not finite."""

    def look(at: tuple[int, int], found: Tensor) -> Tensor:
        if at == (step, 1):
            spoilt = torch.ones_like(found)
            spoilt[0, 0] = bad
            found.register_hook(lambda gradient: gradient * spoilt)
        return found

    return look


def every_step(kind: str, run: Path, prepare: Callable[[Stage], None] = lambda stage: None, **config: Any) -> list[dict[str, Any]]:
    """Fit, and what every step's checkpoint holds."""
    stage = Stage(kind, {"save_every": 1, "keep_checkpoints": 99}, **config)
    prepare(stage)
    stage.fit(run)
    return [saved(stage.checkpoints(run), step) for step in range(1, stage.config.steps + 1)]


def samples_of(stage: Stage, step: int, weights: dict[str, float], cursors: list[int]) -> dict[str, str]:
    """What `samples` should be of a step: the domains and numbers of its sequences, drawn again."""
    number = step + (0 if stage.gates else 40)
    batch = Loader(Tokens(), 6, 17).batch(number, np.array([weights[d] for d in DOMAINS]), np.array(cursors))  # type: ignore[arg-type]
    return {DOMAINS[d]: " ".join(str(s) for s in batch.samples[batch.domains == d]) for d in sorted(set(batch.domains.tolist()))}


BAD = {
    "plain": ("loss-nan", "loss-inf", "gradient-nan", "gradient-inf"),
    "projected": ("loss-inf", "gradient-nan", "gate-nan", "gate-inf"),
    "lagrangian": ("loss-nan", "gradient-inf", "gate-nan"),
}


@pytest.mark.parametrize(("kind", "where"), [(kind, where) for kind, places in BAD.items() for where in places])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(kind: str, where: str, tmp_path: Path) -> None:
    place, _, value = where.partition("-")
    bad = float(value)

    def spoil(stage: Stage) -> None:
        if place == "loss":
            stage.after_forward = poisoned({3: bad})
        elif place == "gradient":
            stage.after_forward = only_the_gradient(bad, 3)
        else:
            logits = stage.gates.gates.log_alpha["neuron"]  # type: ignore[union-attr]
            logits.register_hook(lambda gradient: gradient * bad if stage.at == (3, 1) else gradient)

    steps = every_step(kind, tmp_path, spoil)
    before, after, later = steps[1:4]
    assert after["tensors"] == before["tensors"], "weights, moments or gates have changed"
    assert after["state"]["optimizer"] == before["state"]["optimizer"]
    assert {kind_of.split("/")[0] for kind_of in after["tensors"]} == {"model", "optimizer"} | ({"gates"} if kind != "plain" else set())
    assert all(later["tensors"][name] != after["tensors"][name] for name in after["tensors"] if name.startswith("model/"))
    assert [step["state"]["progress"]["bad_steps"] for step in steps] == [0, 0, 1, 0, 0]
    clean = finished(kind)
    lines = metrics(tmp_path)
    line = lines[3]
    assert line["skipped"] == ("the gradient's norm is nan" if place != "loss" and value == "nan" else line["skipped"])
    assert line["skipped"].startswith("the loss is" if place == "loss" else "the gradient's norm is")
    progress = before["state"]["progress"]
    assert line["samples"] == samples_of(Stage(kind), 3, line["weights"], progress["cursors"])
    assert sum(len(numbers.split()) for numbers in line["samples"].values()) == 6
    assert [("skipped" in other, "samples" in other) for other in lines] == [(other is line,) * 2 for other in lines]
    # The data go on as they would have: up to the next evaluation the same sequences, and as many of them.
    assert after["state"]["progress"]["cursors"] == [
        sum(pair) for pair in zip(progress["cursors"], (len(line["samples"].get(d, "").split()) for d in DOMAINS), strict=True)
    ]
    assert line["tokens"] == clean["log"][3]["tokens"] and line["weights"] == clean["log"][3]["weights"]


def test_a_skipped_step_is_told(tmp_path: Path) -> None:
    stage = Stage("plain")
    stage.after_forward = poisoned({2: NAN})
    stage.fit(tmp_path)
    assert stage.notes == ["step 2 of train was skipped: the loss is nan; its samples are in metrics.jsonl"]


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    stage = Stage("projected", {"async_save": False}, steps=9)
    stage.after_forward = poisoned({5: NAN, 6: INF, 7: NAN})
    with pytest.raises(NumericsError, match=r"^3 steps in a row up to step 7 of prune were bad \(the loss is nan\)") as caught:
        stage.fit(tmp_path)
    assert caught.value.exit_code == 4 and stage.steps[-1] == 7
    last = checkpoint.directory_of(stage.checkpoints(tmp_path), 6)
    assert f"The last good checkpoint is {last};" in str(caught.value)
    good = saved(stage.checkpoints(tmp_path), 4)
    assert saved(stage.checkpoints(tmp_path))["step"] == 6
    assert saved(stage.checkpoints(tmp_path))["tensors"] == good["tensors"], "a bad step got into the checkpoint"
    assert ["skipped" in line for line in metrics(tmp_path)] == [False] * 5 + [True] * 3

    again = Stage("projected", steps=9)  # the same command meets the same samples
    again.after_forward = stage.after_forward
    with pytest.raises(NumericsError, match="3 steps in a row up to step 7"):
        again.fit(tmp_path)
    assert again.steps == [7] and saved(stage.checkpoints(tmp_path))["step"] == 6

    mended = Stage("projected", steps=9)
    assert mended.fit(tmp_path).step == 9 and mended.steps == [7, 8, 9]


def test_without_a_checkpoint_it_says_so(tmp_path: Path) -> None:
    stage = Stage("plain", max_bad_steps=1)
    stage.after_forward = poisoned({1: NAN})
    with pytest.raises(NumericsError, match="There is no checkpoint of this stage"):
        stage.fit(tmp_path)


def test_fewer_in_a_row_are_borne_again_and_again(tmp_path: Path) -> None:
    stage = Stage("plain", steps=9)
    stage.after_forward = poisoned({1: NAN, 2: NAN, 4: NAN, 5: NAN, 7: NAN, 8: NAN})
    assert stage.fit(tmp_path).bad_steps == 0 and len(stage.notes) == 6


def test_the_count_of_bad_steps_outlives_an_interruption(tmp_path: Path) -> None:
    bad = {3: NAN, 4: NAN, 5: NAN}
    stage = Stage("lagrangian")
    stage.after_forward = poisoned(bad)
    world = stage.world = AskedToStop()
    stage.after_step = lambda step: world.ask() if step == 4 else None
    with pytest.raises(Stopped):
        stage.fit(tmp_path)
    again = Stage("lagrangian")
    again.after_forward = poisoned(bad)
    with pytest.raises(NumericsError, match="3 steps in a row up to step 5"):
        again.fit(tmp_path)
    assert again.steps == [5]


def test_a_planted_spike_is_skipped_and_no_more(tmp_path: Path) -> None:
    """The rest is as if the step had been skipped for another reason; and without the option, the spike is trained on."""

    def spike(stage: Stage) -> None:
        stage.after_forward = poisoned({9: 40.0})

    def other(stage: Stage) -> None:
        stage.after_forward = poisoned({9: NAN})

    config = {"steps": 10, "skip_spikes": 6.0, "spike_window": 8, "learning_rate": 1e-3}
    found, expected = (
        every_step("lagrangian", tmp_path / "spike", spike, **config),
        every_step("lagrangian", tmp_path / "nan", other, **config),
    )
    lines = metrics(tmp_path / "spike")
    assert [line["step"] for line in lines if "skipped" in line] == [9]
    assert "deviations above the mean" in lines[9]["skipped"] and lines[9]["loss"] > 10
    assert found == expected
    losses = [line["loss"] for line in lines if line["step"] and "skipped" not in line]
    assert found[-1]["state"]["progress"]["recent"] == losses[-8:]
    trained_on = every_step("lagrangian", tmp_path / "taken", spike, **{**config, "skip_spikes": None})
    assert trained_on[7]["tensors"] == found[7]["tensors"] == found[8]["tensors"] != trained_on[8]["tensors"]
    assert trained_on[-1]["state"]["progress"]["recent"] == []


def test_the_window_outlives_an_interruption(tmp_path: Path) -> None:
    """A spike just after going on is known by the steps before."""
    config = {"steps": 12, "skip_spikes": 6.0, "learning_rate": 1e-3}
    stage = Stage("plain", **config)
    world = stage.world = AskedToStop()
    stage.after_step = lambda step: world.ask() if step == 10 else None
    with pytest.raises(Stopped):
        stage.fit(tmp_path)
    again = Stage("plain", **config)
    again.after_forward = poisoned({11: 40.0})
    again.fit(tmp_path)
    assert again.steps == [11, 12] and [line["step"] for line in metrics(tmp_path) if "skipped" in line] == [11]
