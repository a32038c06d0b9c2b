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

Gates on the input and output of a projection are put on its weight, W diag(in) and diag(out) W, which is the same function as on the
activations, takes time by the size of the weight and not of the batch, and keeps no activation twice. For the length of a
forward pass the gated weight stands in front of the module's parameter, which is not touched.

Shapes: D hidden, O output and I input channels of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.hooks import RemovableHandle

from shearling.arch.families import Anatomy

PerLayer = tuple[Tensor, ...] | None
"""One gate vector a layer, or None where nothing is gated."""


class Attachment:
    """Gates attached to a model. Call `set(masks)` before each forward pass; `remove()` (or leave `with`) restores the model."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._residual: PerLayer = None  # [D] each
        self._heads: PerLayer = None  # [group * query * head_dim] each
        self._neurons: PerLayer = None  # [neuron] each
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
            channels = layer.new_ones(sizes["hidden"]) if hidden is None else hidden
            self._residual = (layer[:, None] * channels).unbind(0)
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

        def gate_stream(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            return out if self._hidden is None else out * self._hidden.to(out.dtype)

        self._handles.append(model.get_submodule(anchors.embedding).register_forward_hook(gate_stream))
        self._place_norm(model.get_submodule(anchors.final_norm))
        for index in range(self._anatomy.sizes["layer"]):
            block = model.get_submodule(f"{anchors.layers}.{index}")
            for name in anchors.block_norms:
                self._place_norm(block.get_submodule(name))
            self._place_projection(block.get_submodule(anchors.attention_output), index, "_heads")
            self._place_projection(block.get_submodule(anchors.mlp_output), index, "_neurons")

    def _place_norm(self, norm: nn.Module) -> None:
        epsilon: float = norm.variance_epsilon  # type: ignore[assignment]

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._norm_scale is not None:
                module.variance_epsilon = epsilon * self._norm_scale.square()
                _stand_in(module, "weight", module.get_parameter("weight") * self._norm_scale)

        def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            module.variance_epsilon = epsilon  # type: ignore[assignment]
            _step_back(module)

        self._handles.append(norm.register_forward_pre_hook(before))
        self._handles.append(norm.register_forward_hook(after, always_call=True))

    def _place_projection(self, projection: nn.Module, layer: int, inputs: str) -> None:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            entering: PerLayer = getattr(self, inputs)
            if entering is None and self._residual is None:
                return
            weight, bias = module._parameters["weight"], module._parameters.get("bias")
            assert weight is not None
            out_O = weight.new_ones(weight.shape[0]) if self._residual is None else self._residual[layer]
            in_I = weight.new_ones(weight.shape[1]) if entering is None else entering[layer]
            _stand_in(module, "weight", _GatedWeight.apply(weight, out_O, in_I))  # type: ignore[no-untyped-call]
            if bias is not None:
                _stand_in(module, "bias", bias * out_O)

        self._handles.append(projection.register_forward_pre_hook(before))
        self._handles.append(projection.register_forward_hook(lambda module, args, out: _step_back(module), always_call=True))


class _GatedWeight(torch.autograd.Function):
    """diag(out) W diag(in), of shape [O, I]; written out so that its backward pass keeps nothing but W and the gates."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, out_O: Tensor, in_I: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI, out_O, in_I)
        return (weight_OI * out_O[:, None]).mul_(in_I)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, gradient_OI: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, out_O, in_I = ctx.saved_tensors  # type: ignore[attr-defined]
        wanted = ctx.needs_input_grad  # type: ignore[attr-defined]
        for_out = for_in = None
        if wanted[1] or wanted[2]:
            product_OI = gradient_OI * weight_OI
            for_out = product_OI @ in_I if wanted[1] else None
            for_in = out_O @ product_OI if wanted[2] else None
        return (gradient_OI * out_O[:, None]).mul_(in_I) if wanted[0] else None, for_out, for_in


def _stand_in(module: nn.Module, name: str, value: Tensor) -> None:
    """Let `module.name` be `value`: an instance's own attribute is found before the parameter of that name."""
    module.__dict__[name] = value


def _step_back(module: nn.Module) -> None:
    for name in ("weight", "bias"):
        module.__dict__.pop(name, None)
