"""Statistics of a model over calibration batches, from which scores are made: one pass, whatever number of scores asks for them.

| need | what is collected |
|---|---|
| `weights` | nothing: the weights themselves are read |
| `gate_gradients` | of every gate, mean and variance over batches of the absolute dL/dz at z = 1 |
| `weight_gradients` | of every weight that an axis with gates touches, the mean g of its gradient over batches |
| `squared_gradients` | of the same, the mean over sequences of its squared gradient: the diagonal of the empirical Fisher information |
| `activations` | moments of the inputs of the attention's and the MLP's output projection, and sizes of heads' and norms' outputs |
| `influence` | of every block, the mean cosine between its input and its output |

The last two take forward passes alone. Memory is that of the sums, whatever the number of batches: a weight's gradient is folded into
its sum and freed as soon as autograd has it.

Several processes: what is small is dealt to them by batches, and added in the batches' order, so that any number of processes gives
the same bits. Gradients of weights are not small: every process takes part in every batch, and keeps the sums of the rows it has.

Shapes: B sequences of T tokens; L layers, G key/value heads, Q query heads in each, M neurons, D hidden channels, I inputs of a
projection, N of tokens or of entries in all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shearling.arch.axes import close, parse_pattern, sum_onto
from shearling.arch.families import Anatomy
from shearling.prune.attach import Attachment
from shearling.prune.gates import SPANNED, GateSpec
from shearling.prune.watch import Moments, Watch, evaluating, views
from shearling.world import World, forget_gathered, local, whole

Objective = Callable[[nn.Module, Tensor], Tensor]
"""(model, token ids [B, T]) -> losses of any shape; their mean is scored by."""
Scores = dict[str, Tensor]
"""{axis: one number a gate, of the gates' shape}; larger means: keep."""

NEEDS = ("weights", "gate_gradients", "weight_gradients", "squared_gradients", "activations", "influence")

_UNITS = {axis: tuple(other for other in spanned if other != "layer") for axis, spanned in SPANNED.items()}
"""The axes of a weight whose product are the units of an axis; of `layer`, a block's weights have none."""


@dataclass(frozen=True)
class Weight:
    """One weight, and what was collected of it: fp32 and whole, gathered when asked for, which is a collective where it is sharded."""

    name: str
    pattern: str
    layer: int | None
    """Number of its block; None outside the blocks."""
    _stats: Stats

    @property
    def value(self) -> Tensor:
        """The weight w itself; zero where the masks close it."""
        value, masks = _whole(self._stats.parameters[self.name]), self._stats.masks
        if "layer" in masks and self.layer is not None:
            value = value * masks["layer"][self.layer].to(value)
        return close(value, self.pattern, self._stats.anatomy.sizes, masks, self.layer)

    @property
    def gradient(self) -> Tensor:
        """Mean over batches of dL/dw. Needs `weight_gradients`."""
        return _whole(self._stats.gradients[self.name])

    @property
    def squared_gradient(self) -> Tensor:
        """Mean over sequences of (dL/dw)^2. Needs `squared_gradients`."""
        return _whole(self._stats.squares[self.name])


@dataclass(frozen=True)
class Stats:
    """What `collect` gives; what was not asked for is empty. The weights are the model's own, and must not move before they are read."""

    anatomy: Anatomy
    specs: Mapping[str, GateSpec]
    """The gates to score, by axis."""
    parameters: Mapping[str, Tensor]
    """Name in the family's table -> weight, whole or sharded."""
    seed: int = 0
    """For scores that draw."""
    gates: Mapping[str, Moments] = field(default_factory=dict)
    """Axis -> of |dL/dz| over batches, in nats; of the gates' shape."""
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> mean over batches of the gradient, in fp32, sharded as the weight is."""
    squares: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> mean over sequences of the squared gradient, in fp32, sharded as the weight is."""
    inputs: Mapping[str, Moments] = field(default_factory=dict)
    """`heads` -> of the inputs of the attention's output projection over tokens [L, G*Q*head_dim]; `neurons` -> of the MLP's [L, M]."""
    sizes: Mapping[str, Tensor] = field(default_factory=dict)
    """`heads` -> mean over tokens of the Euclidean norm of a head's output [L, G, Q]; `hidden` -> mean absolute output of a norm,
    summed over all norms [D]."""
    cosines: Mapping[str, Tensor] = field(default_factory=dict)
    """`layer` -> mean over tokens of the cosine between input and output of a block [L]."""
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    """At which it was measured, {axis: 0/1 of the gates' shape}; an axis left out is open everywhere."""

    def sum_elements(self, value: Callable[[Weight], Tensor]) -> Scores:
        """Sum an elementwise value of the weights (of the weight's shape) over everything that goes with a unit, for every axis.

        What goes with a unit are its slices of all weights whose pattern has the axis: with a key/value head those of the keys,
        values, and of its query heads' queries and outputs; with a block all of its weights.
        """
        return self._sum(value, lambda tensor, pattern, axis: sum_onto(tensor, pattern, self.anatomy.sizes, _UNITS[axis]))

    def sum_channels(self, value: Callable[[Weight], Tensor]) -> Scores:
        """The same, with the absolute value of the sum over each row or column of a weight; where a block goes, over each weight."""
        return self._sum(value, self._channels)

    def _channels(self, tensor: Tensor, pattern: str, axis: str) -> Tensor:
        sizes = self.anatomy.sizes
        dimension = next((part for part in parse_pattern(pattern) if axis in part), ())
        channels = sum_onto(tensor, pattern, sizes, dimension).abs()
        return sum_onto(channels.flatten(), f"({' '.join(dimension)})", sizes, _UNITS[axis]) if dimension else channels

    @torch.no_grad()
    def _sum(self, value: Callable[[Weight], Tensor], onto: Callable[[Tensor, str, str], Tensor]) -> Scores:
        found: Scores = {}
        for name, pattern, layer in weights_of(self.anatomy):
            axes = [axis for axis in self.specs if _touches(axis, pattern, layer)]
            if not axes:
                continue
            tensor = value(Weight(name, pattern, layer, self))
            for axis in axes:
                total = found.setdefault(axis, torch.zeros(self.specs[axis].shape, device=tensor.device))
                (total if axis == "hidden" else total[layer]).add_(onto(tensor, pattern, axis))
        return {axis: total.cpu() for axis, total in found.items()}


def weights_of(anatomy: Anatomy) -> Iterator[tuple[str, str, int | None]]:
    """(full name, pattern, number of its block or None) of every weight of the table."""
    for layer in range(anatomy.sizes["layer"]):
        for row in anatomy.rows(anatomy.family.block):
            yield f"{anatomy.family.anchors.layers}.{layer}.{row.name}", row.pattern, layer
    for row in anatomy.rows(anatomy.family.outer):
        yield row.name, row.pattern, None


def collect(
    model: nn.Module,
    anatomy: Anatomy,
    specs: Mapping[str, GateSpec],
    objective: Objective,
    batches_BT: Sequence[Tensor],
    needs: Collection[str],
    world: World | None = None,
    between: Callable[[], None] = lambda: None,
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
) -> Stats:
    """Everything that `needs` names, from one pass over the batches (token ids on the model's device); the same on all processes.

    Small batches tell more of gradients than large ones, since signs cancel inside a batch. `squared_gradients` squares those of
    single sequences, and gives each a pass of its own; whatever else is collected stays that of whole batches. `between` runs
    before each batch, on all processes as often. An `Attachment` that the model has already must have no gates set; `masks` are those at
    which everything is measured, instead of open ones, for the axes that have any. The model is
    evaluated in eval mode without compiled code, and is left as it was. Sharded, its gradients must be sums over the processes.
    """
    wanted, world = set(needs) - {"weights"}, world or World()
    if unknown := wanted - set(NEEDS):
        raise ValueError(f"unknown needs {sorted(unknown)}; the needs are {NEEDS}")
    forget_gathered(model)
    parameters = {name: model.get_parameter(name) for name, _, _ in weights_of(anatomy)}
    if not wanted:
        return Stats(anatomy, specs, parameters, seed, masks=masks or {})
    if not batches_BT:
        raise ValueError("statistics need at least one calibration batch")
    touched = {name for name, pattern, layer in weights_of(anatomy) if any(_touches(axis, pattern, layer) for axis in specs)}
    device = next(model.parameters()).device
    watch = Watch(anatomy, wanted, device, masks or {})
    fold = _Fold({name: weight for name, weight in parameters.items() if name in touched}, wanted)
    shapes = {axis: spec.shape for axis, spec in specs.items()} if "gate_gradients" in wanted else {}
    slopes_N = torch.zeros(sum(map(prod, shapes.values())), device=device)
    squares_N, sums_N, masks = slopes_N.double(), torch.zeros_like(watch.sums_N), {a: m.to(device) for a, m in (masks or {}).items()}
    start_N = torch.cat([slopes_N[:0], *((masks[a] if a in masks else slopes_N.new_ones(shape)).flatten() for a, shape in shapes.items())])
    backward, dealt = bool(shapes or fold.weights), not fold.weights
    with evaluating(model), _without_gradients(model), Attachment(model, anatomy) as attachment, watch.on(model), fold.on():
        for first in range(0, len(batches_BT), world.size if dealt else 1):
            between()
            # a sharded model needs every process for each pass, so those that have no batch left repeat the last
            ids_BT = batches_BT[min(first + world.rank, len(batches_BT) - 1) if dealt else first]
            parts = list(ids_BT.split(1)) if fold.squares else [ids_BT]  # type: ignore[no-untyped-call]
            gates_N = start_N.clone().requires_grad_(bool(shapes))
            watch.sums_N.zero_()
            fold.share = 1 / len(parts)
            for part_BT in parts:
                attachment.set({**masks, **views(gates_N, shapes)})
                with torch.set_grad_enabled(backward):
                    loss = objective(model, part_BT).mean()
                if backward:
                    loss.backward()  # type: ignore[no-untyped-call]
            slope_N = torch.zeros_like(slopes_N) if gates_N.grad is None else gates_N.grad.div_(len(parts)).abs()
            for found_N in _gathered(watch.sums_N, world, dealt)[: len(batches_BT) - first]:  # added in the order of the batches
                sums_N += found_N
            for found_N in _gathered(slope_N, world, dealt)[: len(batches_BT) - first]:
                slopes_N += found_N
                squares_N += found_N.double().square()
    fold.divide(len(batches_BT), sum(len(ids_BT) for ids_BT in batches_BT))
    gates = _gate_moments(slopes_N.cpu(), squares_N.cpu(), len(batches_BT), shapes)
    return Stats(anatomy, specs, parameters, seed, gates, fold.gradients, fold.squares, *watch.means(sums_N.cpu()), masks)


def _gate_moments(slopes_N: Tensor, squares_N: Tensor, batches: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Moments]:
    mean_N = slopes_N / batches
    variance_N = (squares_N / batches - mean_N.double().square()).clamp(min=0.0)
    means, variances = views(mean_N, shapes), views(variance_N, shapes)
    return {axis: Moments(means[axis], means[axis], variances[axis]) for axis in shapes}


class _Fold:
    """Sums of weights' gradients and of their squares, in the rows that lie on this process."""

    def __init__(self, weights: Mapping[str, Tensor], wanted: Collection[str]) -> None:
        self.weights = weights if {"weight_gradients", "squared_gradients"} & set(wanted) else {}
        self.share = 1.0
        """What of a batch the next backward pass is of."""
        self.gradients = {name: _zeros(weight) for name, weight in self.weights.items() if "weight_gradients" in wanted}
        self.squares = {name: _zeros(weight) for name, weight in self.weights.items() if "squared_gradients" in wanted}

    @contextmanager
    def on(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, weight in self.weights.items():
                hook = weight.requires_grad_(True).register_post_accumulate_grad_hook(partial(self._add, name))  # type: ignore[no-untyped-call]
                hooks.callback(hook.remove)
            yield

    @torch.no_grad()
    def _add(self, name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        processes = weight.grad.device_mesh.size() if isinstance(weight.grad, DTensor) else 1  # each added the same batch's
        gradient = local(weight.grad).float()
        weight.grad = None
        if name in self.gradients:
            local(self.gradients[name]).add_(gradient, alpha=self.share / processes)
        if name in self.squares:
            local(self.squares[name]).addcmul_(gradient, gradient, value=1 / processes**2)

    def divide(self, batches: int, sequences: int) -> None:
        for sums, count in ((self.gradients, batches), (self.squares, sequences)):
            for total in sums.values():
                local(total).div_(count)


def _touches(axis: str, pattern: str, layer: int | None) -> bool:
    """Whether a weight goes, in part or whole, where a unit of the axis goes."""
    return layer is not None if axis == "layer" else any(axis in dimension for dimension in parse_pattern(pattern))


def _gathered(tensor: Tensor, world: World, dealt: bool) -> list[Tensor]:
    if not tensor.numel():
        return []
    found = world.gather(tensor)
    return found if dealt else found[:1]  # of process 0: on GPUs the same work need not give the same bits


def _whole(tensor: Tensor) -> Tensor:
    """All of it, in fp32. A collective where it is sharded."""
    return whole(tensor.detach()).float()


def _zeros(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight.detach(), dtype=torch.float32)


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No gradients of weights; afterwards as before, gradients that were there included."""
    weights = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    try:
        for weight, _, _ in weights:
            weight.grad = None
            weight.requires_grad_(False)
        yield
    finally:
        forget_gathered(model)
        for weight, wants, gradient in weights:
            weight.requires_grad_(wants)
            weight.grad = gradient
