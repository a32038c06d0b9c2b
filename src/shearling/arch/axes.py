"""Named axes: the notation in which every weight of a decoder is described, and what follows from it.

A pattern names, for each dimension of a tensor, the axes that span it; parentheses join axes into one dimension, the first
varying slowest, as in einops:

    q_proj.weight    (group query head_dim) hidden
    down_proj.weight hidden neuron

The axes are `layer` (a block), `hidden` (a channel of the residual stream), `group` (a key/value head), `query` (a query head
inside its group), `head_dim`, `neuron` (an intermediate channel) and `vocab`. A choice of what to keep is a mapping from axis
to kept indices; `query` alone hangs on another axis: its choice is a list per kept group, since every group keeps its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

AXES = ("layer", "hidden", "group", "query", "head_dim", "neuron", "vocab")
PER_LAYER = ("group", "query", "neuron")
"""Axes of which every layer has its own: what is kept there may differ from layer to layer."""

Pattern = tuple[tuple[str, ...], ...]


@cache
def parse_pattern(text: str) -> Pattern:
    """`"(group head_dim) hidden"` -> `(("group", "head_dim"), ("hidden",))`."""
    dimensions = tuple(tuple(part.strip("()").split()) for part in re.findall(r"\([^()]*\)|[^\s()]+", text))
    unknown = [axis for dimension in dimensions for axis in dimension if axis not in AXES]
    if unknown or not dimensions or not all(dimensions):
        raise ValueError(f"pattern {text!r}: unknown axes {unknown}; the axes are {AXES}")
    return dimensions


def dimensions(pattern: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor of this pattern at these axis sizes."""
    return tuple(prod(sizes[axis] for axis in dimension) for dimension in parse_pattern(pattern))


def count(pattern: str, sizes: Mapping[str, int]) -> int:
    """Number of elements of a tensor of this pattern."""
    return prod(dimensions(pattern, sizes))


def kept_positions(dimension: Sequence[str], sizes: Mapping[str, int], keep: Mapping[str, Any]) -> list[int] | None:
    """Positions along one dimension that survive, in order; None where everything does.

    `keep[axis]` lists kept indices; `keep["query"]` holds one list for each kept group. An axis without entry is kept whole.
    """
    if not any(axis in keep for axis in dimension):
        return None
    strides = {axis: prod(sizes[inner] for inner in dimension[i + 1 :]) for i, axis in enumerate(dimension)}
    positions = [(0, 0)]  # (offset so far, ordinal of the kept group it lies in)
    for axis in dimension:
        wider = []
        for offset, ordinal in positions:
            if axis == "query" and "query" in keep:
                chosen = keep["query"][ordinal]
            else:
                chosen = keep.get(axis, range(sizes[axis]))
            for i, index in enumerate(chosen):
                wider.append((offset + index * strides[axis], i if axis == "group" else ordinal))
        positions = wider
    return [offset for offset, _ in positions]


def slice_tensor(tensor: Tensor, pattern: str, sizes: Mapping[str, int], keep: Mapping[str, Any]) -> Tensor:
    """Cut a tensor to what is kept along every axis of its pattern. Shape in: `dimensions(pattern, sizes)`."""
    import torch

    if tuple(tensor.shape) != dimensions(pattern, sizes):
        raise ValueError(f"tensor of shape {tuple(tensor.shape)} does not have pattern {pattern!r} at sizes {dict(sizes)}")
    for dim, axes in enumerate(parse_pattern(pattern)):
        positions = kept_positions(axes, sizes, keep)
        if positions is not None:
            tensor = tensor.index_select(dim, torch.tensor(positions, dtype=torch.long, device=tensor.device))
    return tensor


def openness(dimension: Sequence[str], sizes: Mapping[str, int], gates: Mapping[str, Tensor], layer: int | None) -> Tensor:
    """By what gates multiply each position along one dimension: the product of the gates of its axes, on the CPU.

    `gates`: {axis: tensor of the gates' shape}; an axis left out is 1. `layer`: the block that the tensor is of, None for none.
    """
    import torch

    found = torch.ones([sizes[axis] for axis in dimension])
    for axis in (axis for axis in dimension if axis in gates):
        own = gates[axis] if layer is None or axis not in PER_LAYER else gates[axis][layer]
        spanned = ("group", "query") if axis == "query" else (axis,)
        found = found * own.detach().float().cpu().reshape([sizes[other] if other in spanned else 1 for other in dimension])
    return found.flatten()


def open_positions(dimension: Sequence[str], sizes: Mapping[str, int], masks: Mapping[str, Tensor], layer: int | None) -> Tensor:
    """Which positions along one dimension are open, those at which the mask of none of its axes is closed: booleans on the CPU.

    `masks`: {axis: 0/1 tensor of the gates' shape}; an axis left out is open. `layer`: the block that the tensor is of, None for none.
    """
    return openness(dimension, sizes, {axis: mask.gt(0) for axis, mask in masks.items()}, layer).gt(0)


def close(tensor: Tensor, pattern: str, sizes: Mapping[str, int], masks: Mapping[str, Tensor], layer: int | None) -> Tensor:
    """Zeros where a unit that the element is of is closed; masks and block as in `open_positions`. The tensor's shape stays."""
    for dim, axes in enumerate(parse_pattern(pattern)):
        if any(axis in masks for axis in axes):
            along = open_positions(axes, sizes, masks, layer).to(tensor)
            tensor = tensor * along.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
    return tensor


def sum_onto(tensor: Tensor, pattern: str, sizes: Mapping[str, int], axes: Sequence[str]) -> Tensor:
    """Sum a tensor over every axis of its pattern but `axes`. Shape in: `dimensions(pattern, sizes)`; out: the sizes of `axes`."""
    if tuple(tensor.shape) != dimensions(pattern, sizes):
        raise ValueError(f"tensor of shape {tuple(tensor.shape)} does not have pattern {pattern!r} at sizes {dict(sizes)}")
    spread = [axis for dimension in parse_pattern(pattern) for axis in dimension]
    if missing := [axis for axis in axes if axis not in spread]:
        raise ValueError(f"pattern {pattern!r} does not have the axes {missing}")
    apart = tensor.reshape([sizes[axis] for axis in spread])
    others = [dim for dim, axis in enumerate(spread) if axis not in axes]
    summed = apart.sum(others) if others else apart
    left = [axis for axis in spread if axis in axes]
    return summed.permute([left.index(axis) for axis in axes])
