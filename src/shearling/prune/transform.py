"""Apply a plan: slice every tensor along the axes of its pattern, one at a time, and write the smaller model's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from shearling.arch.axes import slice_tensor
from shearling.arch.families import Anatomy
from shearling.prune.plan import PrunePlan, check_plan


class Reader(Protocol):
    """Anything that gives a source tensor by name."""

    def get(self, name: str) -> Tensor:
        """The tensor of that name."""
        ...


def transform(plan: PrunePlan, source: Anatomy, target: Anatomy, reader: Reader) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the cut model in order; one source tensor is in memory at a time.

    The result is contiguous and shares no memory with the source. Raises `ArtifactError` where the plan does not fit.
    """
    check_plan(plan, source, target)
    layers = plan.layers
    for name, pattern in target.tensors().items():
        source_name, layer = target.moved(name, layers)
        whole = reader.get(source_name).detach()
        tensor = slice_tensor(whole, pattern, source.sizes_in(layer), plan.keep_in(layer)).contiguous()
        if tensor.data_ptr() == whole.data_ptr():
            tensor = tensor.clone()
        del whole  # and with it the mapping of its file, before the next is opened
        yield name, tensor
