"""What goes into a checkpoint by name comes back whatever the order of parameters and the number of processes; what does not fit, not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from shearling.errors import ArtifactError
from shearling.train import checkpoint
from shearling.train.saver import Saver
from shearling.train.state import pack, unpack
from shearling.world import World, local
from tiny_stage import Place, Stage, bits

SHAPES: dict[str, tuple[int, ...]] = {"wide": (7, 3), "tall": (2, 5), "long": (9,), "scalar": (), "unused": (4,)}


class Weights(nn.Module):
    """Parameters of many shapes, under names of their own."""

    def __init__(self, fill: float = 0.0) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, fill)))


def optimizer_of(model: nn.Module, order: list[int] | None = None, split: int = 2) -> torch.optim.AdamW:
    """AdamW in two groups, their parameters in the order asked for."""
    listed = list(model.parameters())
    listed = [listed[index] for index in order or range(len(listed))]
    groups = [{"params": listed[:split], "weight_decay": 0.1}, {"params": listed[split:], "lr": 0.05, "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, lr=0.05)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One step on gradients that follow from the names; `tall` has none in the first, `unused` never."""
    for name, parameter in model.named_parameters():
        draw = torch.Generator().manual_seed(100 * step + sorted(SHAPES).index(name))
        none = name == "unused" or (name == "tall" and step == 0)
        parameter.grad = None if none else torch.randn(parameter.shape, generator=draw)
    optimizer.step()


def trained(steps: int = 3) -> tuple[Weights, torch.optim.AdamW]:
    model = Weights()
    optimizer = optimizer_of(model)
    for step in range(steps):
        take_step(model, optimizer, step)
    return model, optimizer


def written(folder: Path, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> checkpoint.Checkpoint:
    with Saver(folder) as saver:
        saver.save(3, tensors, {"optimizer": scalars})
    found = checkpoint.load(folder)
    assert found is not None
    return found


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors, scalars = pack(model, optimizer, None)
    return {name: bits(local(tensor)) for name, tensor in tensors.items()}, scalars


def test_names_and_counts() -> None:
    tensors, scalars = pack(*trained(), None)
    stepped = [name for name in SHAPES if name != "unused"]
    moments = [f"optimizer/{key}/{name}" for key in ("exp_avg", "exp_avg_sq") for name in stepped]
    assert sorted(tensors) == sorted([*(f"model/{name}" for name in SHAPES), *moments])
    assert all(tuple(tensor.shape) == SHAPES[path.split("/")[-1]] for path, tensor in tensors.items())
    assert scalars == {"step": {"wide": 3.0, "tall": 2.0, "long": 3.0, "scalar": 3.0}}


@pytest.mark.parametrize(("order", "split"), [([0, 1, 2, 3, 4], 2), ([4, 2, 0, 3, 1], 2), ([1, 0, 4, 3, 2], 4)])
def test_it_comes_back_whatever_the_order_of_parameters_and_groups(order: list[int], split: int, tmp_path: Path) -> None:
    model, optimizer = trained()
    found = written(tmp_path, *pack(model, optimizer, None))
    before = everything(model, optimizer)
    other = Weights(9.0)
    fresh = optimizer_of(other, order, split)
    take_step(other, fresh, 7)  # what it had is gone
    unpack(found, found.state["optimizer"], other, fresh, None, World())
    assert everything(other, fresh) == before
    assert fresh.param_groups[0]["lr"] == 0.05 and [len(group["params"]) for group in fresh.param_groups] == [split, 5 - split]
    for step in (3, 4):
        take_step(model, optimizer, step)
        take_step(other, fresh, step)
    assert everything(other, fresh) == everything(model, optimizer) != before
    again = checkpoint.load(tmp_path)
    assert again is not None
    assert {name: bits(again.whole(name)) for name in again.shapes} == before[0], "stepping reached what was saved"


def test_gates_come_back_with_their_moments_and_count(tmp_path: Path) -> None:
    stage, other = Stage("lagrangian", {"save_every": 3}, steps=6), Stage("lagrangian")
    stage.fit(tmp_path)
    found = checkpoint.load(stage.checkpoints(tmp_path), 3)
    assert found is not None and other.gates is not None
    optimizer = torch.optim.AdamW(other.model.parameters())
    unpack(found, found.state["optimizer"], other.model, optimizer, other.gates, World())
    tensors, scalars = pack(other.model, optimizer, other.gates)
    assert {name: bits(tensor) for name, tensor in tensors.items()} == {name: bits(found.whole(name)) for name in found.shapes}
    assert scalars == found.state["optimizer"] and int(tensors["gates/steps"]) == 3


def change(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    """Puts tensors (None: takes away) under names in which _ stands for /; `step_NAME` is a count."""

    def apply(tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        for key, value in changes.items():
            if key.startswith("step_"):
                scalars["step"][key.removeprefix("step_")] = value
            elif value is None:
                del tensors[key.replace("__", "/")]
            else:
                tensors[key.replace("__", "/")] = torch.zeros(value)

    return apply


MISFITS: dict[str, tuple[Callable[..., None], list[str]]] = {
    "a weight is missing": (change(model__wide=None), ["model/wide"]),
    "a weight of another shape": (change(model__wide=(7, 4)), ["model/wide"]),
    "one that would broadcast": (change(model__wide=(1, 3)), ["model/wide"]),
    "a strange weight": (change(model__other=(2,)), ["model/other"]),
    "a moment of another shape": (change(optimizer__exp_avg__long=(8,)), ["optimizer/exp_avg/long"]),
    "a strange moment": (change(optimizer__exp_avg__other=(2,)), ["optimizer/exp_avg/other"]),
    "a strange part": (change(scheduler__long=(9,)), ["scheduler/long"]),
    "a strange count": (change(step_other=3.0), ["step/other"]),
    "all at once": (
        change(model__wide=None, model__tall=(5, 2), model__other=(2,), optimizer__exp_avg_sq__long=(1,), step_other=1.0),
        ["model/wide", "model/tall", "model/other", "optimizer/exp_avg_sq/long", "step/other"],
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_refused_before_anything_changes(misfit: str, tmp_path: Path) -> None:
    """And all of it is named at once."""
    spoil, fields = MISFITS[misfit]
    tensors, scalars = pack(*trained(), None)
    spoil(tensors, scalars)
    found = written(tmp_path, tensors, scalars)
    model, optimizer = trained(1)
    before = everything(model, optimizer)
    with pytest.raises(ArtifactError, match="does not fit the model") as caught:
        unpack(found, found.state["optimizer"], model, optimizer, None, World())
    assert sorted(problem.field for problem in caught.value.problems) == sorted(fields)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("misfit", ["missing", "shape", "strange", "none"])
def test_gates_that_do_not_fit_are_refused_before_anything_changes(misfit: str, tmp_path: Path) -> None:
    """Of another target, say; or the checkpoint of a stage without gates."""
    stage = Stage("projected")
    assert stage.gates is not None
    tensors, scalars = pack(stage.model, torch.optim.AdamW(stage.model.parameters()), stage.gates)
    name = "gates/first/log_alpha.hidden"
    if misfit == "missing":
        del tensors[name]
    elif misfit == "shape":
        tensors[name] = torch.zeros(1)
    elif misfit == "strange":
        tensors["gates/log_alpha.group"] = torch.zeros(2)
    else:
        tensors = {path: tensor for path, tensor in tensors.items() if not path.startswith("gates/")}
    found = written(tmp_path, tensors, scalars)
    other = Stage("projected")
    assert other.gates is not None
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1.0)
    optimizer = torch.optim.AdamW(other.model.parameters())
    before = {path: bits(tensor) for path, tensor in pack(other.model, optimizer, other.gates)[0].items()}
    with pytest.raises(ArtifactError, match="does not fit the model") as caught:
        unpack(found, found.state["optimizer"], other.model, optimizer, other.gates, World())
    if misfit != "none":
        assert [problem.field for problem in caught.value.problems] == ["gates/log_alpha.group" if misfit == "strange" else name]
    assert {path: bits(tensor) for path, tensor in pack(other.model, optimizer, other.gates)[0].items()} == before


# Sharded: each process of a number of them in turn, with torch's process group that exchanges nothing.


@contextmanager
def process(rank: int, size: int) -> Iterator[Callable[[Weights], Weights]]:
    """Gives what shards a model as FSDP2 does: rows by `torch.chunk`, a process without rows where there are too few of them."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))

    def shard(model: Weights) -> Weights:
        for name, parameter in list(model.named_parameters()):
            if parameter.dim():
                each = -(-len(parameter) // size)
                rows = parameter.detach()[rank * each : (rank + 1) * each].clone()
                whole = {"shape": parameter.shape, "stride": parameter.stride()}
                model.register_parameter(name, nn.Parameter(DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, **whole)))
        return model

    try:
        yield shard
    finally:
        dist.destroy_process_group()


def restored(found: checkpoint.Checkpoint, rank: int, size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What process `rank` of `size` has of a checkpoint, packed again: its rows."""
    with process(rank, size) as shard:
        model = shard(Weights(9.0))
        optimizer = optimizer_of(model)
        unpack(found, found.state["optimizer"], model, optimizer, None, Place(rank, size))
        tensors, scalars = pack(model, optimizer, None)
        assert sum(isinstance(tensor, DTensor) for tensor in tensors.values()) == len(tensors) - 3  # of the scalar, which is whole
        return {name: local(tensor) for name, tensor in tensors.items()}, scalars


@pytest.mark.parametrize("many", [2, 3, 5])
def test_any_number_of_processes_reads_what_any_other_wrote(many: int, tmp_path: Path) -> None:
    """1 -> many -> 4 -> 1, and every row is where it was."""
    model, optimizer = trained()
    expected = everything(model, optimizer)
    found = written(tmp_path / "start", *pack(model, optimizer, None))
    for size in (many, 4):
        staged = tmp_path / str(size) / ".tmp-staged"
        staged.mkdir(parents=True)
        parts = []
        for rank in range(size):
            tensors, scalars = restored(found, rank, size)
            rows = {name: t for name, t in tensors.items() if (t.dim() and t.numel()) or (not t.dim() and rank == 0)}
            parts.append(checkpoint.write_part(staged, rank, rows))
            assert scalars == expected[1]
        checkpoint.publish(staged, 3, parts, {"optimizer": scalars}, 2)
        loaded = checkpoint.load(tmp_path / str(size))
        assert loaded is not None
        found = loaded
        assert {name: bits(found.whole(name)) for name in found.shapes} == expected[0]
    other = Weights(9.0)
    fresh = optimizer_of(other)
    unpack(found, found.state["optimizer"], other, fresh, None, World())
    assert everything(other, fresh) == expected
