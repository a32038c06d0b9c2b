"""What of a stage goes into a checkpoint, by name, and how it comes back: weights, the optimizer's moments, the gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shearling.errors import ArtifactError, Problem
from shearling.io.tensors import shortened
from shearling.train.parallel import rows_of
from shearling.world import World, forget_gathered, local


class Saved(Protocol):
    """Where tensors come back from (`shearling.train.checkpoint.Checkpoint`)."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> whole shape."""
        ...

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows `start` to `end` of a tensor."""
        ...

    def whole(self, name: str) -> Tensor:
        """A whole tensor."""
        ...


class SavedGates(Protocol):
    """What is needed of gates here (`shearling.prune.learn.GateLearner`)."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint has to hold of the gates."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what `tensors` gave back."""
        ...


def pack(model: nn.Module, optimizer: torch.optim.Optimizer, gates: SavedGates | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything of a stage as tensors by name (not copied; sharded ones stay sharded), and the optimizer's step counts.

    Of the parameters those that are trained: what is frozen comes from the model itself.
    `model/PARAMETER`, `optimizer/MOMENT/PARAMETER` and `gates/NAME`: names outlive any reordering of parameters and groups.
    Hyperparameters are not part of it: they come from the recipe and its schedules.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    scalars: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step":
                tensors[f"optimizer/{key}/{names[id(parameter)]}"] = value
            else:
                scalars.setdefault(key, {})[names[id(parameter)]] = value.item() if isinstance(value, Tensor) else value
    return tensors | {f"gates/{name}": tensor for name, tensor in (gates.tensors() if gates else {}).items()}, scalars


def unpack(
    saved: Saved, scalars: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, gates: SavedGates | None, world: World
) -> None:
    """Put back what `pack` gave, whatever the number of processes was; each reads its own rows alone.

    The optimizer's state of a parameter that is not in it is empty, as before its first step. Raises `ArtifactError`, before
    anything is changed, for tensors that model, optimizer or gates do not have, for missing weights and gates, and for other shapes.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _check(saved, scalars, parameters, gates)
    with torch.no_grad():
        for name, parameter in parameters.items():
            _fill(parameter, saved, f"model/{name}", world)
    forget_gathered(model)
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in parameters.items()}
    # counts in the dtype in which torch makes them itself
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    state: dict[int, dict[str, Any]] = {}
    moments: dict[str, list[str]] = {}  # parameter -> names of its moments
    for path in saved.shapes:
        part, _, rest = path.partition("/")
        if part == "optimizer":
            key, _, of = rest.partition("/")
            moments.setdefault(of, []).append(key)
    for index, parameter in enumerate(ordered):
        name = names[id(parameter)]
        for key in moments.get(name, []):
            moment = torch.empty_like(parameter, requires_grad=False)
            _fill(moment, saved, f"optimizer/{key}/{name}", world)
            state.setdefault(index, {})[key] = moment
        for key, values in scalars.items():
            if name in values:
                state.setdefault(index, {})[key] = torch.tensor(values[name], dtype=dtype)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if gates is not None:
        gates.load({path.removeprefix("gates/"): saved.whole(path) for path in saved.shapes if path.startswith("gates/")})


@dataclass(frozen=True)
class SavedKind:
    """The tensors of one kind of a checkpoint, the weights or one of their moments, by the parameters' names."""

    saved: Saved
    prefix: str

    def get(self, name: str) -> Tensor:
        """That of a parameter, whole."""
        return self.saved.whole(self.prefix + name)


def rewritten(
    saved: Saved,
    scalars: Mapping[str, Any],
    gates: Mapping[str, Tensor],
    change: Callable[[SavedKind], Iterable[tuple[str, Tensor]]],
    formerly: Callable[[str], str],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `pack` would give of the same moment of a stage with other weights and gates.

    `change`: (tensors of one kind) -> (name, tensor) of every parameter that there then is; weights and moments go through it alike.
    `formerly`: its name before, by which it keeps its count of steps.
    """
    kinds = {"model/"} | {"/".join(path.split("/")[:2]) + "/" for path in saved.shapes if path.startswith("optimizer/")}
    tensors: dict[str, Tensor] = {}
    for prefix in sorted(kinds):
        tensors |= {prefix + name: tensor for name, tensor in change(SavedKind(saved, prefix))}
    names = [path.removeprefix("model/") for path in tensors if path.startswith("model/")]
    counts = {key: {name: values[formerly(name)] for name in names if formerly(name) in values} for key, values in scalars.items()}
    return tensors | {f"gates/{name}": tensor for name, tensor in gates.items()}, counts


def _check(saved: Saved, scalars: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], gates: SavedGates | None) -> None:
    of_another = "The checkpoint is of another model or stage."
    wanted = {f"model/{name}": tuple(parameter.shape) for name, parameter in parameters.items()}
    wanted |= {f"gates/{name}": tuple(tensor.shape) for name, tensor in (gates.tensors() if gates else {}).items()}
    problems = [Problem(path, "no such tensor", of_another) for path in wanted if path not in saved.shapes]
    for path, shape in saved.shapes.items():
        part, _, rest = path.partition("/")
        of = f"model/{rest.partition('/')[2]}" if part == "optimizer" else path
        if of not in wanted:
            problems.append(Problem(path, "a tensor of an unknown parameter", of_another))
        elif shape != wanted[of]:
            problems.append(Problem(path, f"shape {shape}", f"The parameter has {wanted[of]}; it is of another shape."))
    problems += [
        Problem(f"{key}/{name}", "the count of an unknown parameter", of_another)
        for key, values in scalars.items()
        for name in values
        if name not in parameters
    ]
    if problems:
        raise ArtifactError("this checkpoint does not fit the model", shortened(problems))


@torch.no_grad()
def _fill(tensor: Tensor, saved: Saved, name: str, world: World) -> None:
    start, end = rows_of(tensor, world)
    if end > start:
        local(tensor).copy_(saved.rows(name, start, end) if tensor.dim() else saved.whole(name))
