"""Zero-padding: a model whose layers differ, as a checkpoint of the stock family that computes the same function.

Every layer gets the heads and neurons of the largest. What is added is zero on both sides: a neuron's rows of gate and up and its
column of down; a query head's rows of q and its columns of o; a key/value head's rows of k and v, and all of its query heads. Its
attention is then uniform over values that are zero, or is multiplied by zero columns. Padding is the inverse of slicing: each tensor
is scattered to the positions at which `slice_tensor` would find it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from shearling.arch.axes import PER_LAYER, dimensions, kept_positions, parse_pattern
from shearling.arch.families import Anatomy
from shearling.errors import Problem, ShapeError
from shearling.prune.transform import Reader
from shearling.shapes import shape_of

LARGEST = 4
"""Most query heads that padding may end at, as a multiple of those that the layers need."""


def pad_to_uniform(anatomy: Anatomy, reader: Reader) -> tuple[Anatomy, Iterator[tuple[str, Tensor]]]:
    """The smallest stock anatomy that holds every layer, and (name, tensor) of its model in order, each padded with zeros.

    The tensors are contiguous, of the source's dtype, and share no memory with it; one is in memory at a time. Raises `ShapeError`
    where the family has no such shape: see `uniform_anatomy`.
    """
    uniform = uniform_anatomy(anatomy)
    return uniform, _padded(anatomy, uniform, reader)


def _padded(anatomy: Anatomy, uniform: Anatomy, reader: Reader) -> Iterator[tuple[str, Tensor]]:
    for name, pattern in uniform.tensors().items():
        yield name, pad_tensor(reader.get(name).detach(), pattern, anatomy.sizes_in(anatomy.layer_of(name)), uniform.sizes)


def pad_tensor(tensor: Tensor, pattern: str, sizes: Mapping[str, int], wider: Mapping[str, int]) -> Tensor:
    """A tensor of `pattern` at `sizes`, scattered into zeros at the sizes `wider`; query heads stay in their group. Always a copy.

    Shape in: `dimensions(pattern, sizes)`; out: `dimensions(pattern, wider)`. Raises `ValueError` for a tensor of another shape.
    """
    if tuple(tensor.shape) != dimensions(pattern, sizes):
        raise ValueError(f"tensor of shape {tuple(tensor.shape)} does not have pattern {pattern!r} at sizes {dict(sizes)}")
    own: dict[str, Any] = {axis: range(sizes[axis]) for axis in PER_LAYER}
    own["query"] = [range(sizes["query"])] * sizes["group"]
    padded = tensor.clone(memory_format=torch.contiguous_format)
    for dim, (axes, size) in enumerate(zip(parse_pattern(pattern), dimensions(pattern, wider), strict=True)):
        positions = kept_positions(axes, wider, own)
        if positions is not None and size > padded.shape[dim]:
            zeros = padded.new_zeros(*padded.shape[:dim], size, *padded.shape[dim + 1 :])
            padded = zeros.index_copy_(dim, torch.tensor(positions, device=padded.device), padded)
    return padded


def uniform_anatomy(anatomy: Anatomy) -> Anatomy:
    """The stock anatomy, alike in all layers, with fewest parameters of those that hold every layer.

    That is each axis at its largest size, unless the family asks that the number of query heads divides hidden_size: then groups and
    query heads are added until it does. Raises `ShapeError` where that takes more than `LARGEST` times the heads.
    """
    smallest = anatomy.with_sizes()
    if not anatomy.family.hidden_divisible_by_heads:
        return smallest
    hidden, group, query = (anatomy.sizes[axis] for axis in ("hidden", "group", "query"))
    most = LARGEST * group * query
    shapes = [(g, q) for g in range(group, most // query + 1) for q in range(query, most // g + 1) if hidden % (g * q) == 0]
    if not shapes:
        remedy = f"Transformers loads {anatomy.family.model_type} only where it divides hidden_size ({hidden}); keep other head counts."
        problem = Problem("num_attention_heads", f"{group * query} ({query} on each of {group} key/value heads)", remedy)
        raise ShapeError(f"no stock shape of up to {LARGEST} times the heads holds every layer", [problem])
    return min((smallest.with_sizes(group=g, query=q) for g, q in shapes), key=Anatomy.parameters)


def padding_cost(anatomy: Anatomy) -> dict[str, float]:
    """Parameters `before` and `after` padding, and their `ratio`. Raises `ShapeError` like `uniform_anatomy`."""
    before, after = anatomy.parameters(), uniform_anatomy(anatomy).parameters()
    return {"before": before, "after": after, "ratio": after / before}


def padded_config(config: Mapping[str, Any], uniform: Anatomy) -> dict[str, Any]:
    """The stock family's config of the padded model, from the plain values of the config of the model whose layers differ."""
    plain = {key: value for key, value in config.items() if key not in ("base_model_type", "auto_map", "architectures")}
    return {**plain, "model_type": uniform.family.model_type, **shape_of(uniform)}
