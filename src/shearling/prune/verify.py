"""Masked equals cut: the logits of the hardened gated model against those of the cut model; and where not, which tensor is to blame.

In fp32 first. Weights that grow a few activations to the ten thousands, as pretrained ones do, grow their rounding along: on single
tokens two ways to compute one function can differ by far more than fp32's precision. Where they differ by more than the tolerance but
by no more than rounding might, both are computed once more in fp64, in which a difference is a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import cast

import torch
from torch import Tensor, nn

from shearling.arch.axes import open_positions, parse_pattern
from shearling.arch.families import Anatomy
from shearling.errors import NumericsError
from shearling.inputs import model_inputs
from shearling.io.tensors import MemoryReader
from shearling.prune.attach import Attachment
from shearling.prune.transform import Reader

TOLERANCE = 1e-4
"""Largest difference that may be published, relative to the range of the logits, in fp32."""
ROUNDING = 1e-2
"""Largest difference in fp32 that may come of rounding, and is looked at again in fp64."""
TOLERANCE_FLOAT64 = 1e-8
"""Largest difference that may be published, relative to the range of the logits, in fp64."""


@dataclass(frozen=True)
class Difference:
    """How far two models' logits are apart: at most, and relative to the reference's range."""

    max_abs_logit_difference: float
    relative_difference: float


@dataclass(frozen=True)
class TensorDifference:
    """How far a tensor of the cut model is from what the masks leave of the source's."""

    name: str
    max_abs_difference: float
    """Infinite where the tensor is missing, of another shape, or not a number somewhere."""
    found: str
    """What was found, in words."""


@torch.no_grad()
def masked_logits(
    model: nn.Module, anatomy: Anatomy, masks: Mapping[str, Tensor], ids_BT: Tensor, document_end: int | None = None
) -> Tensor:
    """Logits [B, T, V] of the source model with these gates, in its own dtype; `document_end` as for `model_inputs`."""
    with Attachment(model, anatomy) as gates:
        gates.set(masks)
        return logits_of(model, ids_BT, document_end)


@contextmanager
def in_float64(model: nn.Module, weights: Reader) -> Iterator[None]:
    """Let a model, whatever its dtype, compute in fp64 from `weights`, of which one module's at a time are held in fp64.

    Its own weights only have to have their names. Norms compute in fp64 too, where the stock ones round to fp32. Gates are
    attached inside.
    """
    handles = []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue

        def before(module: nn.Module, args: object, own: dict[str, nn.Parameter] = own) -> None:
            for name, parameter in own.items():
                exact = weights.get(names[id(parameter)]).detach().to(parameter.device, torch.float64)
                module._parameters[name] = nn.Parameter(exact, requires_grad=False)

        def norm(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            if not hasattr(module, "variance_epsilon"):
                return None
            weight, epsilon = cast("Tensor", module.weight), cast("float", module.variance_epsilon)
            return weight * args[0] * torch.rsqrt(args[0].square().mean(-1, keepdim=True) + epsilon)

        def after(module: nn.Module, args: object, out: object, own: dict[str, nn.Parameter] = own) -> None:
            module._parameters.update(own)

        handles += [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(norm),
            module.register_forward_hook(after, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def compare_in_float64(
    model: nn.Module,
    anatomy: Anatomy,
    masks: Mapping[str, Tensor],
    weights: Reader,
    cut: nn.Module,
    ids_BT: Tensor,
    document_end: int | None = None,
) -> Difference:
    """Compare the gated and the cut model in fp64.

    Args:
        model: a model of the source's config, of any dtype; its weights do not count.
        weights: the source's tensors by their full names.
        document_end: as for `model_inputs`.
    """
    state = cut.state_dict()
    exact = {axis: mask.to(ids_BT.device, torch.float64) for axis, mask in masks.items()}
    with in_float64(model, weights):
        expected = masked_logits(model, anatomy, exact, ids_BT, document_end)
    with in_float64(cut, MemoryReader(state)):
        return difference_of(expected, logits_of(cut, ids_BT, document_end))


@torch.no_grad()
def compare_logits(cut: nn.Module, expected_BTV: Tensor, ids_BT: Tensor, document_end: int | None = None) -> Difference:
    """Compare a cut model with logits computed before; `document_end` as for `model_inputs`, and as it was for those."""
    return difference_of(expected_BTV, logits_of(cut, ids_BT, document_end))


def difference_of(expected: Tensor, found: Tensor) -> Difference:
    """How far `found` is from `expected`, both [B, T, V]; NaN counts as an infinite difference."""
    expected, found = expected.double(), found.to(expected.device).double()
    largest = float((found - expected).abs().nan_to_num(nan=float("inf")).max())
    spread = float(expected.max() - expected.min())
    return Difference(largest, largest / (spread or 1.0))


def require_equal(
    difference: Difference,
    tolerance: float = TOLERANCE,
    what: str = "the gated model and the cut model",
    detail: str | Callable[[], str] = "",
) -> None:
    """Raise `NumericsError` where the difference is more than the tolerance.

    `detail`: a sentence for the message, or a function that gives one and is called only where there is something to say.
    """
    if not difference.relative_difference <= tolerance:
        more = detail if isinstance(detail, str) else detail()
        raise NumericsError(
            f"{what} do not compute the same: logits differ by {difference.max_abs_logit_difference:.3g}, "
            f"{difference.relative_difference:.3g} of their range, where {tolerance:g} is allowed; nothing was published. "
            f"{more}{' ' if more else ''}This is a bug, unless weights or plan were changed in between"
        )


def require_same_function(
    difference: Difference, exact: Callable[[], Difference], what: str, detail: str | Callable[[], str] = ""
) -> Difference:
    """Raise `NumericsError` where a difference in fp32 shows a mistake; where rounding may be all of it, fp64 decides.

    Args:
        exact: compares the same two in fp64; called only where it has to be.

    Returns:
        the difference that decided.
    """
    if not TOLERANCE < difference.relative_difference <= ROUNDING:
        require_equal(difference, TOLERANCE, what, detail)
        return difference
    found = exact()
    require_equal(found, TOLERANCE_FLOAT64, f"in fp64, {what}", detail)
    return found


def blame(masks: Mapping[str, Tensor], source: Anatomy, target: Anatomy, weights: Reader, cut: Mapping[str, Tensor]) -> str:
    """One sentence on what `worst_tensor` finds, for `require_equal`."""
    worst = worst_tensor(masks, source, target, weights, cut)
    if worst is None:
        return "Every tensor of the cut model is what the masks leave of the source's, so it is the gates that compute otherwise."
    return f"The tensor that is furthest from what the masks leave of the source's is {worst.name}: {worst.found}."


@torch.no_grad()
def worst_tensor(
    masks: Mapping[str, Tensor], source: Anatomy, target: Anatomy, weights: Reader, cut: Mapping[str, Tensor]
) -> TensorDifference | None:
    """The tensor of a cut model that differs most from what hardened `masks` leave of the source's; None where none differs.

    Every tensor is cut here a second way, by boolean masks over its dimensions and without a plan or an index, so that a mistake
    in plan or transform shows. One source tensor is in memory at a time, beside its cut.

    Args:
        masks: {axis: 0/1 tensor of the gates' shape}, as `Attachment.set` takes them; an axis left out is open everywhere.
        weights: the source's tensors by their full names.
        cut: the cut model's tensors by their full names, of any dtype and device; names that `target` has not are let be.
    """
    layers = masks["layer"].flatten().gt(0).nonzero().flatten().tolist() if "layer" in masks else list(range(source.sizes["layer"]))
    worst: TensorDifference | None = None
    for name, pattern in target.tensors().items():
        number = target.layer_of(name)
        if number is not None and number >= len(layers):
            return TensorDifference(name, inf, f"the masks leave only {len(layers)} layers")
        source_name, layer = target.moved(name, layers)
        expected = weights.get(source_name).detach()
        for dim, axes in enumerate(parse_pattern(pattern)):
            open_ = open_positions(axes, source.sizes_in(layer), masks, layer).to(expected.device)
            expected = expected[(slice(None),) * dim + (open_,)]
        difference = _tensor_difference(name, expected, cut.get(name))
        if difference and (worst is None or difference.max_abs_difference > worst.max_abs_difference):
            worst = difference
    return worst


def _tensor_difference(name: str, expected: Tensor, found: Tensor | None) -> TensorDifference | None:
    if found is None:
        return TensorDifference(name, inf, "it is missing")
    if found.shape != expected.shape:
        return TensorDifference(name, inf, f"it has shape {tuple(found.shape)} where {tuple(expected.shape)} is due")
    apart = (found.to(expected.device).double() - expected.to(found.dtype).double()).abs().nan_to_num(nan=inf)
    largest = float(apart.max()) if apart.numel() else 0.0
    share = float(apart.gt(0).double().mean()) if largest else 0.0
    return TensorDifference(name, largest, f"{share:.3%} of its values differ, by up to {largest:.3g}") if largest else None


@torch.no_grad()
def logits_of(model: nn.Module, ids_BT: Tensor, document_end: int | None = None) -> Tensor:
    """Logits [B, T, V] of a model as it stands, in its own dtype; `document_end` as for `model_inputs`."""
    logits: Tensor = model(**model_inputs(ids_BT, document_end)).logits
    return logits
