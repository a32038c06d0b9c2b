"""Sums over the tokens that pass through a model forwards: what activation-based scores are made of.

Shapes: L layers, G key/value heads, Q query heads in each, M neurons, D hidden channels, I inputs of a projection, N of tokens or
of entries in all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shearling.arch.families import Anatomy


@dataclass(frozen=True)
class Moments:
    """Of one value per entry, over tokens or batches: fp64, of gates' means fp32; on the CPU."""

    mean: Tensor
    absolute: Tensor
    """Mean of the absolute value."""
    variance: Tensor
    """Mean squared distance from the mean: divided by the number, not by one less."""


class Watch:
    """Sums, in fp64, over the tokens that pass through a model forwards; closed blocks and query heads by `masks` do not count.

    wanted: `activations`, `influence` or both. `sums_N` holds all sums, so that processes can add theirs up.
    """

    def __init__(self, anatomy: Anatomy, wanted: Collection[str], device: torch.device, masks: Mapping[str, Tensor]) -> None:
        sizes = anatomy.sizes
        self.closed = masks["layer"].eq(0).tolist() if "layer" in masks else [False] * sizes["layer"]
        self.queries = masks["query"].to(device)[..., None] if "query" in masks else None
        self.anchors, self.layers, self.heads = anatomy.family.anchors, sizes["layer"], (sizes["group"], sizes["query"])
        self.shapes: dict[str, tuple[int, ...]] = {"tokens": (1,)} if {"activations", "influence"} & set(wanted) else {}
        if "activations" in wanted:
            for what, inputs in (("heads", prod(self.heads) * sizes["head_dim"]), ("neurons", sizes["neuron"])):
                self.shapes |= {f"{what} {power}": (self.layers, inputs) for power in ("total", "absolute", "squared")}
            self.shapes |= {"norms of heads": (self.layers, *self.heads), "stream": (sizes["hidden"],)}
        if "influence" in wanted:
            self.shapes["cosines"] = (self.layers,)
        self.sums_N = torch.zeros(sum(map(prod, self.shapes.values())), dtype=torch.float64, device=device)
        self._sums = views(self.sums_N, self.shapes)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """While inside, forward passes of `model` are added."""
        with ExitStack() as hooks:
            for layer in range(self.layers if self.shapes else 0):
                block = model.get_submodule(f"{self.anchors.layers}.{layer}")
                hooks.callback(block.register_forward_hook(partial(self._block, layer), with_kwargs=True).remove)
                if "stream" in self.shapes:
                    for name, what in ((self.anchors.attention_output, "heads"), (self.anchors.mlp_output, "neurons")):
                        hooks.callback(block.get_submodule(name).register_forward_pre_hook(partial(self._inputs, what, layer)).remove)
                    for name in self.anchors.block_norms:
                        hooks.callback(block.get_submodule(name).register_forward_hook(partial(self._norm, layer)).remove)
            if "stream" in self.shapes:
                hooks.callback(model.get_submodule(self.anchors.final_norm).register_forward_hook(partial(self._norm, None)).remove)
            yield

    @torch.no_grad()
    def _block(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        if layer == 0:
            self._sums["tokens"] += before[..., 0].numel()
        if "cosines" in self.shapes:
            after = out[0] if isinstance(out, tuple) else out
            self._sums["cosines"][layer] += F.cosine_similarity(before.float(), after.float(), dim=-1).sum(dtype=torch.float64)

    @torch.no_grad()
    def _inputs(self, what: str, layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        x_NI = args[0].flatten(0, -2).float()
        if what == "heads" and self.queries is not None:
            x_NI = (x_NI.unflatten(1, (*self.heads, -1)) * self.queries[layer]).flatten(1)
        self._sums[f"{what} total"][layer] += x_NI.sum(0, dtype=torch.float64)
        self._sums[f"{what} absolute"][layer] += x_NI.abs().sum(0, dtype=torch.float64)
        self._sums[f"{what} squared"][layer] += x_NI.square().sum(0, dtype=torch.float64)
        if what == "heads":
            norms = torch.linalg.vector_norm(x_NI.unflatten(1, (*self.heads, -1)), dim=-1)
            self._sums["norms of heads"][layer] += norms.sum(0, dtype=torch.float64)

    @torch.no_grad()
    def _norm(self, layer: int | None, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if layer is None or not self.closed[layer]:
            self._sums["stream"] += out.flatten(0, -2).abs().sum(0, dtype=torch.float64)

    def means(self, sums_N: Tensor) -> tuple[dict[str, Moments], dict[str, Tensor], dict[str, Tensor]]:
        """`inputs`, `sizes` and `cosines` of `Stats`, from the sums over all batches."""
        sums = views(sums_N, self.shapes)
        means = {name: total / sums["tokens"] for name, total in sums.items()}
        cosines = {"layer": means["cosines"]} if "cosines" in means else {}
        if "stream" not in means:
            return {}, {}, cosines
        inputs = {}
        for what in ("heads", "neurons"):
            mean = means[f"{what} total"]
            inputs[what] = Moments(mean, means[f"{what} absolute"], (means[f"{what} squared"] - mean.square()).clamp(min=0.0))
        sizes = {"heads": means["norms of heads"], "hidden": means["stream"]}
        return inputs, sizes, cosines


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without compiled code, which does not see that hooks come and go; afterwards as before."""
    modes = [(module, module.training) for module in model.modules()]
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    try:
        model.eval()
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, training in modes:
            module.training = training


def views(flat_N: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Parts of a flat tensor [N], by name, of these shapes; no copy."""
    parts = flat_N.split([prod(shape) for shape in shapes.values()]) if shapes else ()  # type: ignore[no-untyped-call]
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
