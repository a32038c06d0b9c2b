"""One training step: the forward and backward passes of its microbatches, and the update. A test can call it.

The microbatches of a step are fixed, and are dealt to the processes in turn. Gradients are added in an order that is the same for one
process and for two: first within each pair of microbatches, then the pairs. A sum of two does not depend on their order, so on the
CPU one process and two give the same bits; for more, the same order of data and the rounding of another sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shearling.objectives.lm import Objective
from shearling.train.guard import objection
from shearling.train.parallel import before_backward
from shearling.world import World, local


class GateTraining(Protocol):
    """What a step needs of gates in training (`shearling.prune.learn.GateLearner`)."""

    def draw(self, step: int, microbatch: int) -> None:
        """Set fresh gates on the model for this microbatch."""
        ...

    def parameters(self) -> Sequence[nn.Parameter]:
        """What gets gradients from the backward passes, whole on every process."""
        ...

    def update(self, step: int) -> None:
        """Add the constraint's gradient, and move gates and multipliers."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What one step measured."""

    loss: float
    """Mean loss of the step's tokens, nats."""
    domain_losses: dict[int, float]
    """The same by domain number, of the domains that occurred."""
    gradient_norm: float
    """Norm of the weights' gradient before clipping."""
    tokens: int
    terms: dict[str, float]
    """Means of what the loss is made of, by name, where the objective tells."""
    skipped: str | None = None
    """Why nothing was updated, where nothing was."""


def own_microbatches(microbatches: int, world: World) -> range:
    """The numbers of the microbatches that this process computes."""
    return range(world.rank, microbatches, world.size)


def own_rows(batch_size: int, microbatches: int, world: World) -> np.ndarray:
    """The rows of the batch that this process computes, in order of its microbatches."""
    rows = np.arange(batch_size).reshape(microbatches, -1)
    return rows[list(own_microbatches(microbatches, world))].reshape(-1)


def train_step(
    model: nn.Module,
    ids_BT: Tensor,
    domains_R: np.ndarray,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    microbatches: int,
    clip: float,
    rate: float,
    gates: GateTraining | None = None,
    world: World | None = None,
    object_to: Callable[[float, float], str | None] = lambda loss, norm: objection(loss, norm, (), None),
    frees: bool = True,
) -> StepResult:
    """Take step number `step` at weight learning rate `rate`, or skip it where `object_to(loss, gradient norm)` says why.

    `ids_BT` are this process' rows of the step's R sequences (`own_rows`); the loss is the mean over all tokens of the step. A step
    that is skipped changes neither weights, moments nor gates. `frees`: see `parallel.frees_after_forward`.
    """
    world = world or World()
    sequences, predicted = len(domains_R), ids_BT.shape[1] - 1
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = own_microbatches(microbatches, world)
    sums = GradientSums(weights, list(gates.parameters()) if gates is not None else [], microbatches, world)
    values: list[Tensor] = []
    chunks = ids_BT.chunk(len(own))
    for position, (number, chunk) in enumerate(zip(own, chunks, strict=True)):
        last = position == len(own) - 1
        world.goes_on()
        if gates is not None:
            gates.draw(step, number)
        before_backward(model, last, frees)
        found = objective(model, chunk, step)
        (found["loss"].sum() / (sequences * predicted)).backward()  # type: ignore[no-untyped-call]
        sums.add(last)
        values.append(torch.stack([value.detach().sum(1) / predicted for value in found.values()]))
    names = list(found)
    values_KR = torch.zeros(len(names), sequences, dtype=torch.float64)
    values_KR[:, own_rows(sequences, microbatches, world)] = torch.cat(values, dim=1).double().cpu()
    # What all processes decide by, in one exchange: every sequence's values (zero on the others), the square of the gradient's norm.
    shared = world.sum_(torch.cat([values_KR.flatten(), squared_norm(weights).cpu()[None]]))
    named, norm = dict(zip(names, shared[:-1].view(-1, sequences).numpy(), strict=True)), float(shared[-1].sqrt().float())
    sequence_losses = named.pop("loss")
    loss = float(sequence_losses.mean())
    # in fp32, in which the gates' second moments are: a square that overflows there must not reach them
    gates_norm = float(squared_norm(sums.replicated).float().sqrt()) if sums.replicated else 0.0
    skipped = object_to(loss, norm + 0 * gates_norm)  # not finite where either is not
    if skipped is None:
        if norm > clip:
            torch._foreach_mul_([local(p.grad) for p in weights if p.grad is not None], clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if gates is not None:
            gates.update(step)
    for parameter in (*weights, *sums.replicated):
        parameter.grad = None
    by_domain = {int(d): float(sequence_losses[domains_R == d].mean()) for d in np.unique(domains_R)}
    terms = {name: float(of_sequences.mean()) for name, of_sequences in named.items()}
    return StepResult(loss, by_domain, norm, sequences * ids_BT.shape[1], terms, skipped)


class GradientSums:
    """Adds up the microbatches' gradients in the order that the module's docstring gives; in the end `.grad` holds the sums.

    `sharded`: weights, which FSDP2 adds over the processes by itself. `replicated`: gates. On one process on the CPU this takes a second
    buffer for the gradients where a step has more than two microbatches; on a GPU, where kernels promise no bits, it is spared.
    """

    def __init__(self, sharded: Sequence[Tensor], replicated: Sequence[Tensor], microbatches: int, world: World) -> None:
        self.replicated = replicated
        on_cpu = next(iter(sharded)).device.type == "cpu"
        pairs = world.size == 1 and microbatches > 2 and on_cpu
        self._summed = [*sharded, *replicated] if pairs else list(replicated) if world.size > 1 else []
        self._every = 2 if pairs else 1
        self._world, self._seen = world, 0
        self._totals: list[Tensor | None] = [None] * len(self._summed)

    def add(self, last: bool) -> None:
        """After a backward pass; `last` of this process in this step."""
        self._seen += 1
        if not self._summed or (self._seen % self._every and not last):
            return
        for index, parameter in enumerate(self._summed):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            if self._world.size > 1:
                gradient = self._world.sum_(gradient)
            total = self._totals[index]
            self._totals[index] = gradient if total is None else total.add_(gradient)
        if last:
            for parameter, total in zip(self._summed, self._totals, strict=True):
                parameter.grad = total


def squared_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Square of the norm of the gradients' part on this process, a scalar in fp64: so fine that, rounded to fp32, the norm is the same
    however they are sharded (but for one in some ten million, where a sum lies on the edge of rounding).

    It goes piece by piece, since on a CPU an fp64 norm makes an fp64 copy of what it reads: of a whole embedding, gigabytes.
    """
    flat = [local(p.grad).reshape(-1) for p in parameters if p.grad is not None]
    pieces = [values[start : start + _PIECE] for values in flat for start in range(0, len(values), _PIECE)]
    squares = [torch.linalg.vector_norm(piece, dtype=torch.float64).square() for piece in pieces]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)


_PIECE = 2**22  # elements, 32 MiB in fp64
