"""Gates on a stock transformers model, through hooks placed from the family's table; no model code is touched.

What every axis' gate multiplies:

    hidden         every write to the residual stream: the embedding's, attention's and MLP's output
    layer          both writes of a block
    group, query   a head's output, at the input of the attention's output projection
    neuron         the MLP's activation, at the input of its down projection

so that a closed channel of the stream is zero throughout. A norm then has to take its mean over the open channels alone, or the
gated model would differ from the cut one by sqrt(open/D): with n open channels of D, the stock norm gives

    x / sqrt(sum(x^2)/D + eps'),   eps' = eps * n/D;   times sqrt(n/D) that is   x / sqrt(sum(x^2)/n + eps)

exactly what the cut model computes. n stays a tensor: no host synchronisation, no shapes that depend on data.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shearling.arch.families import Anatomy


class Attachment:
    """Gates attached to a model. Call `set(masks)` before each forward pass; `remove()` (or leave `with`) restores the model."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._residual: tuple[Tensor, ...] | None = None  # per layer [D]
        self._heads: tuple[Tensor, ...] | None = None  # per layer [G * Q * head_dim]
        self._neurons: tuple[Tensor, ...] | None = None  # per layer [M]
        self._hidden: Tensor | None = None  # [D]
        self._norm_scale: Tensor | None = None  # sqrt(n / D)
        self._handles: list[RemovableHandle] = []
        self._place(model)

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Use these gates from now on: {axis: z} with shapes as `gate_specs` gives; an axis left out is open everywhere."""
        sizes = self._anatomy.sizes
        hidden, layer = masks.get("hidden"), masks.get("layer")
        self._hidden = hidden
        self._norm_scale = None if hidden is None else ((hidden.detach() != 0).sum(dtype=hidden.dtype) / sizes["hidden"]).sqrt()
        if layer is None:
            self._residual = None if hidden is None else (hidden,) * sizes["layer"]
        else:
            self._residual = (layer[:, None] if hidden is None else layer[:, None] * hidden).unbind(0)
        group, query = masks.get("group"), masks.get("query")
        heads = group[:, :, None].expand(-1, -1, sizes["query"]) if group is not None else None
        if query is not None:
            heads = query if heads is None else heads * query
        self._heads = None if heads is None else heads.flatten(1).repeat_interleave(sizes["head_dim"], dim=1).unbind(0)
        neuron = masks.get("neuron")
        self._neurons = None if neuron is None else neuron.unbind(0)

    def remove(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def _place(self, model: nn.Module) -> None:
        anchors = self._anatomy.family.anchors
        keep = self._handles.append
        keep(model.get_submodule(anchors.embedding).register_forward_hook(lambda m, a, out: _times(out, self._hidden)))
        self._place_norm(model.get_submodule(anchors.final_norm))
        for index in range(self._anatomy.sizes["layer"]):
            block = model.get_submodule(f"{anchors.layers}.{index}")
            for name in anchors.block_norms:
                self._place_norm(block.get_submodule(name))
            attention, mlp = block.get_submodule(anchors.attention_output), block.get_submodule(anchors.mlp_output)
            keep(attention.register_forward_pre_hook(lambda m, args, i=index: _first_times(args, self._heads, i)))
            keep(mlp.register_forward_pre_hook(lambda m, args, i=index: _first_times(args, self._neurons, i)))
            for output in (attention, mlp):
                keep(output.register_forward_hook(lambda m, args, out, i=index: _times(out, _at(self._residual, i))))

    def _place_norm(self, norm: nn.Module) -> None:
        epsilon: float = norm.variance_epsilon  # type: ignore[assignment]

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._norm_scale is not None:
                module.variance_epsilon = epsilon * self._norm_scale.square()

        def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            module.variance_epsilon = epsilon  # type: ignore[assignment]
            return _times(out, self._norm_scale)

        self._handles.append(norm.register_forward_pre_hook(before))
        self._handles.append(norm.register_forward_hook(after))


def _at(per_layer: tuple[Tensor, ...] | None, layer: int) -> Tensor | None:
    return None if per_layer is None else per_layer[layer]


def _times(activation: Tensor, gate: Tensor | None) -> Tensor:
    return activation if gate is None else activation * gate.to(activation.dtype)


def _first_times(args: tuple[Any, ...], per_layer: tuple[Tensor, ...] | None, layer: int) -> tuple[Any, ...]:
    return args if per_layer is None else (_times(args[0], per_layer[layer]), *args[1:])
