"""The notation of axes, and slicing against a reference that reshapes to one dimension an axis and indexes."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.arch.axes import count, dimensions, kept_positions, parse_pattern, slice_tensor, sum_onto

PATTERNS = (
    "hidden",
    "vocab hidden",
    "neuron hidden",
    "hidden neuron",
    "head_dim",
    "(group head_dim)",
    "(group head_dim) hidden",
    "(group query head_dim)",
    "(group query head_dim) hidden",
    "hidden (group query head_dim)",
)
SIZES = {"layer": 2, "hidden": 5, "group": 3, "query": 2, "head_dim": 4, "neuron": 7, "vocab": 6}


def test_patterns_are_read() -> None:
    assert parse_pattern("(group query head_dim) hidden") == (("group", "query", "head_dim"), ("hidden",))
    assert parse_pattern("hidden") == (("hidden",),)
    assert parse_pattern("  neuron   hidden ") == (("neuron",), ("hidden",))
    assert parse_pattern("hidden ( group  head_dim )") == (("hidden",), ("group", "head_dim"))


@pytest.mark.parametrize("text", ["", "width", "(group query) width", "() hidden", "heads hidden"])
def test_patterns_that_mean_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(text)


def test_dimensions_and_counts() -> None:
    assert dimensions("(group query head_dim) hidden", SIZES) == (24, 5)
    assert count("(group query head_dim) hidden", SIZES) == 120
    assert dimensions("head_dim", SIZES) == (4,)


@st.composite
def choices(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, Any]]:
    """Sizes, and what to keep of some of the axes; every kept group keeps the same number of query heads."""
    sizes = {axis: draw(st.integers(1, 5)) for axis in SIZES}

    def some(axis: str, number: int | None = None) -> list[int]:
        number = draw(st.integers(1, sizes[axis])) if number is None else number
        return sorted(draw(st.permutations(range(sizes[axis])))[:number])

    keep: dict[str, Any] = {axis: some(axis) for axis in ("hidden", "group", "neuron") if draw(st.booleans())}
    if draw(st.booleans()):
        number = draw(st.integers(1, sizes["query"]))
        keep["query"] = [some("query", number) for _ in keep.get("group", range(sizes["group"]))]
    return sizes, keep


def reference(tensor: np.ndarray, pattern: str, sizes: dict[str, int], keep: dict[str, Any]) -> np.ndarray:
    """One dimension an axis; take along each, query heads inside each kept group; put back together."""
    split = parse_pattern(pattern)
    axes = [axis for dimension in split for axis in dimension]
    whole = tensor.reshape([sizes[axis] for axis in axes])
    for axis in ("hidden", "group", "neuron"):
        if axis in axes and axis in keep:
            whole = np.take(whole, keep[axis], axis=axes.index(axis))
    if "query" in axes and "query" in keep:
        group, query = axes.index("group"), axes.index("query")
        parts = [np.take(np.take(whole, [i], axis=group), chosen, axis=query) for i, chosen in enumerate(keep["query"])]
        whole = np.concatenate(parts, axis=group)
    ends = np.cumsum([len(dimension) for dimension in split])
    return whole.reshape([prod(whole.shape[end - len(dimension) : end]) for end, dimension in zip(ends, split, strict=True)])


@settings(deadline=None)
@given(choice=choices(), pattern=st.sampled_from(PATTERNS))
def test_slices_are_those_of_the_reference(choice: tuple[dict[str, int], dict[str, Any]], pattern: str) -> None:
    sizes, keep = choice
    tensor = np.arange(count(pattern, sizes)).reshape(dimensions(pattern, sizes))
    found = slice_tensor(torch.from_numpy(tensor), pattern, sizes, keep).numpy()
    np.testing.assert_array_equal(found, reference(tensor, pattern, sizes, keep))


def test_each_group_keeps_its_own_query_heads() -> None:
    keep = {"group": [0, 2], "query": [[1], [0]]}
    positions = kept_positions(("group", "query", "head_dim"), SIZES, keep)
    assert positions == [4, 5, 6, 7, 16, 17, 18, 19]  # head 1 of group 0, and head 0 of group 2, of four channels each
    assert kept_positions(("group", "head_dim"), SIZES, keep) == [0, 1, 2, 3, 8, 9, 10, 11]


def test_an_axis_without_a_choice_is_kept_whole() -> None:
    assert kept_positions(("vocab",), SIZES, {"hidden": [0]}) is None
    tensor = torch.arange(30.0).reshape(6, 5)
    assert torch.equal(slice_tensor(tensor, "vocab hidden", SIZES, {}), tensor)


def test_a_tensor_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5, 6\).*vocab hidden"):
        slice_tensor(torch.zeros(5, 6), "vocab hidden", SIZES, {"hidden": [0]})


@settings(deadline=None)
@given(data=st.data(), pattern=st.sampled_from(PATTERNS))
def test_sums_onto_axes_are_those_of_the_reference(data: st.DataObject, pattern: str) -> None:
    sizes = {axis: data.draw(st.integers(1, 5)) for axis in SIZES}
    spread = [axis for dimension in parse_pattern(pattern) for axis in dimension]
    axes = data.draw(st.permutations(spread))[: data.draw(st.integers(0, len(spread)))]
    tensor = np.arange(count(pattern, sizes)).reshape(dimensions(pattern, sizes))
    found = sum_onto(torch.from_numpy(tensor), pattern, sizes, axes)
    apart = tensor.reshape([sizes[axis] for axis in spread])
    letters = {axis: "abcdefg"[i] for i, axis in enumerate(SIZES)}
    formula = "".join(letters[axis] for axis in spread) + "->" + "".join(letters[axis] for axis in axes)
    np.testing.assert_array_equal(found.numpy(), np.einsum(formula, apart))
    assert found.shape == tuple(sizes[axis] for axis in axes)


def test_sums_by_hand() -> None:
    rows = torch.arange(24.0)[:, None].expand(24, 5)  # (group query head_dim) hidden: every row holds its number
    found = sum_onto(rows, "(group query head_dim) hidden", SIZES, ("group", "query"))
    assert found.tolist() == [[5 * sum(range(4 * (2 * g + q), 4 * (2 * g + q) + 4)) for q in range(2)] for g in range(3)]
    assert sum_onto(rows, "(group query head_dim) hidden", SIZES, ()).item() == rows.sum()


def test_sums_that_mean_nothing() -> None:
    with pytest.raises(ValueError, match=r"\(5, 6\).*vocab hidden"):
        sum_onto(torch.zeros(5, 6), "vocab hidden", SIZES, ("hidden",))
    with pytest.raises(ValueError, match=r"'vocab hidden' does not have the axes \['neuron'\]"):
        sum_onto(torch.zeros(6, 5), "vocab hidden", SIZES, ("neuron",))
