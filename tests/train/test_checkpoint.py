"""Checkpoints: exact, never half a one, damage found, and optimizer state by name."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import in_child_killed_at
from shearling.errors import ArtifactError, StorageError
from shearling.train import checkpoint
from shearling.train.checkpoint import load, pack_optimizer, save, steps, unpack_optimizer

STATE = {"mixture": {"web": 0.1 + 0.2, "code": 1e-300}, "best": float("inf"), "note": "ü"}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(5, 7, generator=g),
        "half": torch.randn(3, generator=g).bfloat16(),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "slice": torch.randn(6, 6, generator=g)[::2, 1:],
        "nothing": torch.empty(0, 4),
        "odd": torch.tensor([float("nan"), float("-inf"), -0.0], dtype=torch.float64),
    }


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return {n: bits(t) for n, t in a.items()} == {n: bits(t) for n, t in b.items()}


@pytest.mark.parametrize("shard_bytes", [checkpoint.SHARD_BYTES, 64])
def test_round_trip_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", shard_bytes)
    save(tmp_path / "c", 50, tensors(), STATE)
    loaded = load(tmp_path / "c")
    assert loaded is not None and loaded.step == 50 and loaded.state == STATE and same(loaded.tensors, tensors())
    loaded.tensors["w"].zero_()  # mapped privately: the file keeps its content
    again = load(tmp_path / "c", 50)
    assert again is not None and same(again.tensors, tensors())


def test_no_checkpoint_is_none_and_a_named_one_is_an_error(tmp_path: Path) -> None:
    assert load(tmp_path / "nowhere") is None and load(tmp_path) is None
    with pytest.raises(ArtifactError, match="no checkpoint of step 3"):
        load(tmp_path, 3)


def test_only_whole_names_are_steps(tmp_path: Path) -> None:
    for name in ("step-50", "xstep-00000050", "step-00000050.bak", ".tmp-step-00000050-aa", "step-0000000050", "step-00000007"):
        (tmp_path / name).mkdir()
    assert list(steps(tmp_path)) == [7]


def damaged_variants(whole: Path) -> list[tuple[str, Any]]:
    rng = random.Random(0)
    cases: list[tuple[str, Any]] = []
    for path in sorted(whole.iterdir()):
        data = path.read_bytes()
        cuts = sorted(cut for cut in {0, 1, 8, len(data) // 2, len(data) - 1} if cut < len(data))
        cases += [(path.name, data[:cut]) for cut in cuts] + [(path.name, data + b"x"), (path.name, None)]
        for _ in range(12):
            flipped = bytearray(data)
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            cases.append((path.name, bytes(flipped)))
    return cases


def test_damage_is_found_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100)
    save(tmp_path / "c", 10, tensors(1), {"n": 1})
    newest = save(tmp_path / "c", 20, tensors(2), {"n": 2})
    for name, data in damaged_variants(newest):
        whole = (newest / name).read_bytes()
        if data is None:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(data)
        with pytest.warns(UserWarning, match=name):
            fallen_back = load(tmp_path / "c")
        assert fallen_back is not None and fallen_back.step == 10 and same(fallen_back.tensors, tensors(1))
        with pytest.raises(ArtifactError, match=name):
            load(tmp_path / "c", 20)
        (newest / name).write_bytes(whole)
    loaded = load(tmp_path / "c")
    assert loaded is not None and loaded.step == 20


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (save(tmp_path, 10, tensors(), {}) / "state.json").write_text("{}x")
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(ArtifactError, match="no checkpoint is whole"):
        load(tmp_path)


def test_newer_format_is_refused_naming_both(tmp_path: Path) -> None:
    save(tmp_path, 10, tensors(), {})
    path = save(tmp_path, 20, tensors(), {}) / "manifest.json"
    body = json.dumps(json.loads(path.read_text().partition("\n")[2]) | {"format": 9})
    path.write_text(checkpoint.hashlib.sha256(body.encode()).hexdigest() + "\n" + body)
    with pytest.raises(ArtifactError, match="format 9; this version reads up to 1"):
        load(tmp_path)


def test_manifest_cannot_lead_outside(tmp_path: Path) -> None:
    path = save(tmp_path / "c", 10, tensors(), {}) / "manifest.json"
    values = json.loads(path.read_text().partition("\n")[2])
    values["files"]["../../secret"] = {"bytes": 1, "sha256": "0"}
    body = json.dumps(values)
    path.write_text(checkpoint.hashlib.sha256(body.encode()).hexdigest() + "\n" + body)
    with pytest.raises(ArtifactError, match="refuses to open"):
        load(tmp_path / "c", 10)


def test_keeps_the_newest_two_whole_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, tensors(), {}, keep=1)
    assert list(steps(tmp_path)) == [30, 40]
    (tmp_path / "step-00000040" / "state.json").unlink()  # broken ones do not count
    save(tmp_path, 50, tensors(), {})
    assert list(steps(tmp_path)) == [30, 40, 50]
    save(tmp_path, 60, tensors(), {})
    assert list(steps(tmp_path)) == [50, 60]
    save(tmp_path, 45, tensors(), {})  # gone back to an earlier step: it is kept
    assert list(steps(tmp_path)) == [45, 50, 60]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 10, tensors(1), {"n": 1})
    save(tmp_path, 10, tensors(2), {"n": 2})
    loaded = load(tmp_path)
    assert loaded is not None and loaded.state == {"n": 2} and same(loaded.tensors, tensors(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010"]


def test_failed_delete_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, tensors(), {})
    save(tmp_path, 20, tensors(), {})

    def refuse(path: Path) -> None:
        raise PermissionError(13, "refused")

    monkeypatch.setattr(checkpoint, "remove_tree", refuse)
    with pytest.warns(UserWarning, match="could not be deleted"):
        save(tmp_path, 30, tensors(), {})
    assert not checkpoint._complete(tmp_path / "step-00000010", 10)
    monkeypatch.undo()
    loaded = load(tmp_path)
    assert loaded is not None and loaded.step == 30


@pytest.mark.parametrize("again", [False, True])
def test_killed_at_any_filesystem_call_leaves_old_or_new(tmp_path: Path, again: bool) -> None:
    """`again`: the step exists already and is replaced."""
    save(tmp_path / "start", 10, tensors(1), {"n": 1})
    save(tmp_path / "start", 20, tensors(2), {"n": 2})
    k = 0
    while True:
        k += 1
        folder = Path(shutil.copytree(tmp_path / "start", tmp_path / str(k)))
        new = 20 if again else 30
        killed = in_child_killed_at(k, lambda folder=folder, new=new: save(folder, new, tensors(3), {"n": 3}))
        loaded = load(folder)
        assert loaded is not None and loaded.state["n"] in (1, 2, 3) and same(loaded.tensors, tensors(loaded.state["n"]))
        assert loaded.state["n"] != 1 or again
        save(folder, new, tensors(4), {"n": 4})  # the next save of the same step goes well and sweeps up
        loaded = load(folder)
        assert loaded is not None and loaded.state == {"n": 4} and same(loaded.tensors, tensors(4))
        assert all(path.name.startswith("step-") for path in folder.iterdir())
        shutil.rmtree(folder)
        if not killed:
            break
    assert k > 12


def test_disk_full_keeps_the_old_and_leaves_no_rubbish(tmp_path: Path) -> None:
    save(tmp_path, 10, tensors(1), {})
    large = {"w": torch.zeros(100_000)}  # made before the fork: torch's threads do not survive one
    pid = os.fork()
    if pid == 0:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save(tmp_path, 20, large, {})
        except StorageError as error:
            os._exit(6 if "400" in str(error) and error.exit_code == 6 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def model_and_optimizer(order: list[int]) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer, dict[int, str]]:
    parameters = {f"p{i}": torch.nn.Parameter(torch.full((i + 1, 2), float(i))) for i in range(3)} | {
        "scalar": torch.nn.Parameter(torch.tensor(1.0)),
        "unused": torch.nn.Parameter(torch.zeros(2)),
    }
    listed = [list(parameters.values())[i] for i in order]
    groups = [{"params": listed[:2], "weight_decay": 0.1}, {"params": listed[2:], "lr": 0.05}]
    return parameters, torch.optim.AdamW(groups, lr=0.01), {id(p): name for name, p in parameters.items()}


def take_step(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
    for i, (name, parameter) in enumerate(parameters.items()):
        g = torch.Generator().manual_seed(100 * step + i)
        parameter.grad = None if name == "unused" or (name == "p1" and step == 0) else torch.randn(parameter.shape, generator=g)
    optimizer.step()


def test_optimizer_state_survives_reordering(tmp_path: Path) -> None:
    parameters, optimizer, names = model_and_optimizer([0, 1, 2, 3, 4])
    for step in range(3):
        take_step(parameters, optimizer, step)
    packed, scalars = pack_optimizer(optimizer, names)
    assert scalars == {"step": {"p0": 3.0, "p1": 2.0, "p2": 3.0, "scalar": 3.0}}
    assert all(tensor.shape == parameters[name.split("/")[1]].shape for name, tensor in packed.items())
    save(tmp_path, 3, packed, scalars)
    loaded = load(tmp_path)
    assert loaded is not None

    others, fresh, other_names = model_and_optimizer([0, 1, 4, 3, 2])
    with torch.no_grad():
        for name, parameter in others.items():
            parameter.copy_(parameters[name])
    unpack_optimizer(fresh, other_names, loaded.tensors, loaded.state)
    assert fresh.param_groups[0]["weight_decay"] == 0.1 and fresh.param_groups[1]["lr"] == 0.05
    take_step(parameters, optimizer, 3)
    take_step(others, fresh, 3)
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)
    again = load(tmp_path)
    assert again is not None and same(again.tensors, loaded.tensors)  # stepping changed copies, not what was loaded


def test_optimizer_state_that_does_not_fit_is_refused() -> None:
    parameters, optimizer, names = model_and_optimizer([0, 1, 2, 3, 4])
    take_step(parameters, optimizer, 1)
    packed, scalars = pack_optimizer(optimizer, names)
    packed["exp_avg/p0"] = torch.zeros(9)
    packed["exp_avg/stranger"] = torch.zeros(2)
    with pytest.raises(ArtifactError) as caught:
        unpack_optimizer(optimizer, names, packed, scalars)
    assert [problem.field for problem in caught.value.problems] == ["exp_avg/p0", "exp_avg/stranger"]


def test_optimizer_state_of_sharded_parameters() -> None:
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parameter = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
        optimizer = torch.optim.AdamW([parameter])
        parameter.grad = distribute_tensor(torch.full((4, 2), 0.5), mesh, [Shard(0)])
        optimizer.step()
        packed, scalars = pack_optimizer(optimizer, {id(parameter): "w"})
        assert not any(isinstance(tensor, DTensor) for tensor in packed.values())
        fresh = torch.optim.AdamW([parameter])
        unpack_optimizer(fresh, {id(parameter): "w"}, packed, scalars)
        moment = fresh.state[parameter]["exp_avg"]
        assert isinstance(moment, DTensor) and torch.equal(moment.full_tensor(), packed["exp_avg/w"])
    finally:
        destroy_process_group()
