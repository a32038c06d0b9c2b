"""What is made of the rows of a comparison: means, spreads, compute at equal loss, the table and the picture. On made-up rows."""

from __future__ import annotations

from typing import Any

import pytest

from shearling.comparison import Curve, Ratio, curve_of, ratio_at_equal_loss, summarise, table
from shearling.comparison_picture import draw


def made_up(label: str, seed: int, final: float, curve: list[tuple[int, float]], **more: Any) -> dict[str, Any]:
    """A row of two domains, of which `b` is 1 above the mean and `a` 1 below."""
    losses = {"a": final - 1, "b": final + 1, "mean": final}
    row = {"name": label, "label": label, "seed": seed, "learning_rate": None, "folder": label, "checkpoint": False, "shape": "alike"}
    row |= {"parameters": 1000, "pruning_tokens": 0, "tokens": curve[-1][0], "seconds": {"prune": 1.0, "train": 2.0}, "speed": None}
    return row | {"loss": {"cut": losses, "final": losses}, "curve": [[at, {"mean": loss}] for at, loss in curve], **more}


SOURCE = {"name": "source", "parameters": 2000, "loss": {"a": 2.0, "b": 4.0, "mean": 3.0}}


@pytest.mark.parametrize(
    ("loss", "tokens", "expected"),
    [
        (8.0, 10, (10.0, "")),  # at a point of the curve
        (7.0, 100, (1000**0.5 * 10 / 100, "")),  # half-way between 100 and 1000, in logarithms
        (6.0, 1000, (1.0, "")),
        (5.9, 100, (10.0, "more than")),
        (9.5, 100, (1.0, "less than")),  # between 0 and 100 tokens
        (11.0, 50, (2.0, "less than")),  # before the first step
    ],
)
def test_the_compute_at_equal_loss(loss: float, tokens: int, expected: tuple[float, str]) -> None:
    curve = Curve([0, 100, 1000], [10.0, 8.0, 6.0], [], [])
    found = ratio_at_equal_loss(curve, loss, tokens)
    assert found is not None and (found.times, found.bound) == (pytest.approx(expected[0]), expected[1])
    assert ratio_at_equal_loss(curve, loss, 0) is None


def test_a_ratio_reads_well() -> None:
    assert [str(Ratio(3.14159)), str(Ratio(10, "more than"))] == ["3.1", "more than 10"]


def test_curves_of_seeds_are_averaged_where_all_were_measured() -> None:
    rows = [made_up("x", 1, 5, [(0, 8), (10, 6), (20, 5)]), made_up("x", 2, 6, [(5, 8), (10, 7), (25, 4)])]
    found = curve_of(rows)
    assert found.tokens == [5, 10, 20] and found.mean == pytest.approx([7.5, 6.5, 5.0])
    assert found.low == pytest.approx([7.0, 6.0, 5.0]) and found.high == pytest.approx([8.0, 7.0, 5.0])


def test_what_the_rows_say_together() -> None:
    speed = {"source": {"prefill": 10.0, "generation": 5.0}, "model": {"prefill": 20.0, "generation": 5.0}}
    other = {"source": {"prefill": 20.0, "generation": 5.0}, "model": {"prefill": 30.0, "generation": 10.0}}
    rows = [made_up("cut", seed, final, [(0, 9), (100, final)], speed=speed) for seed, final in ((1, 5.0), (2, 5.2), (3, 5.4))]
    rows += [made_up("from-scratch", 1, 5.0, [(0, 9), (100, 7), (1000, 5)])]
    rows += [made_up("tool|x", 1, 6.0, [(0, 9), (100, 6)], checkpoint=True, speed=other)]
    rows += [{"name": "bad", "label": "bad", "seed": 1, "learning_rate": None, "failed": "numbers\nwent wrong"}]
    found = {**summarise(rows, SOURCE), "source": SOURCE, "tokens": 100, "cuts_only": False, "rows": rows}
    scratch, cut, tool = found["contenders"]
    assert [one["label"] for one in found["contenders"]] == ["from-scratch", "cut", "tool|x"]
    assert cut["final"]["mean"] == pytest.approx(5.2) and cut["spread"]["a"] == pytest.approx(0.2) and tool["spread"]["a"] is None
    assert cut["excess"] == pytest.approx({"a": 2.2, "b": 2.2, "mean": 2.2}) and tool["excess"]["b"] == 3.0
    assert cut["speed"] == {"prefill": 2.0, "generation": 1.0} and scratch["speed"] is None
    assert tool["speed"] == {"prefill": 3.0, "generation": 2.0}  # against the source, and not against itself
    assert cut["ratio"]["times"] == pytest.approx(10 ** (1.8 / 2)) and cut["seconds"] == 3.0
    text = table(found)
    assert "5.200 ± 0.200 | 4.200 ± 0.200 | 6.200 ± 0.200 | 2.200 | 2.200 (" in text and "2.00× | 1.00× | 3 | 7.9 |" in text
    assert "tool\\|x" in text and "(1 of 3 seeds)" in text and "bad, seed 1, failed: numbers went wrong" in text
    rows_of_table = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows_of_table}) == 1
    assert draw(found).startswith(b"\x89PNG")


def test_names_of_users_do_not_spoil_the_picture() -> None:
    names = ["_a", "$x_1$", "c", "d", "e", "f", "g"]
    rows = [made_up(name, 1, 5.0 + i, [(0, 9), (10 ** (2 + i % 2), 5 + i)]) for i, name in enumerate(names)]
    one, other = ({**summarise(chosen, SOURCE), "source": SOURCE} for chosen in (rows, rows[:6]))
    assert draw(one) == draw(one) != draw(other)
