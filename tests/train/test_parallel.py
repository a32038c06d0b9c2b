"""One model over one process or a mesh: the same bits; and how microbatches and rows are dealt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shearling.errors import ConfigError
from shearling.train.config import TrainConfig
from shearling.train.optim import build_optimizer
from shearling.train.parallel import check_microbatches, rows_of
from shearling.train.step import train_step
from shearling.world import World
from tiny_stage import Place


def test_a_mesh_of_one_gives_the_same_bits() -> None:
    """With gates, activation checkpointing, and both ways of keeping gathered weights; in a process of its own, as it joins a group."""
    command = [sys.executable, "-m", "train.test_parallel"]  # from the folder of tests, whose helpers it needs
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1], timeout=120)
    assert done.returncode == 0 and "same bits" in done.stdout, done.stderr


def _same_bits() -> None:
    import numpy as np
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from models import tiny_model
    from shearling.arch.families import anatomy_of
    from shearling.objectives.lm import in_training, token_losses
    from shearling.prune.attach import Attachment
    from shearling.prune.config import GateConfig
    from shearling.prune.gates import Gates, gate_specs
    from shearling.prune.learn import GateLearner
    from shearling.shapes import Target, target_anatomy
    from shearling.train.config import RuntimeConfig
    from shearling.train.parallel import parallelize
    from shearling.world import forget_gathered, local

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh, device = init_device_mesh("cpu", (1,)), torch.device("cpu")
    ids = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(0))

    def trained(sharded: bool, **runtime: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = tiny_model("llama")
        anatomy = anatomy_of(model.config.to_dict())
        blocks = anatomy.family.anchors.layers
        model = parallelize(model, blocks, RuntimeConfig(**runtime), device, mesh if sharded else None).train()
        optimizer = build_optimizer(model, TrainConfig(learning_rate=1e-2))
        with Attachment(model, anatomy) as attachment:
            gates = Gates(gate_specs(anatomy, target_anatomy(anatomy, Target(num_hidden_layers=1, intermediate_size=24))))
            learner = GateLearner(gates, attachment, GateConfig(), steps=4, warmup=0, seed=0)
            for step in range(1, 5):
                train_step(
                    model,
                    ids,
                    np.zeros(4, np.int64),
                    in_training(token_losses),
                    optimizer,
                    step=step,
                    microbatches=2,
                    clip=1.0,
                    rate=1e-2,
                    gates=learner,
                )
        forget_gathered(model)
        found = {name: local(parameter).detach().clone() for name, parameter in model.named_parameters()}
        return found | learner.tensors()

    plain = trained(False)
    for runtime in ({}, {"reshard_after_forward": True}, {"activation_checkpointing": True}):
        found = trained(True, **runtime)
        for name, tensor in plain.items():
            assert torch.equal(tensor, found[name]), (runtime, name)
    assert any(not torch.equal(plain[name], tensor) for name, tensor in tiny_model("llama").named_parameters())
    print("same bits")


def test_microbatches_that_cannot_be_dealt() -> None:
    stages = {"prune": TrainConfig(microbatches=4), "train": TrainConfig(batch_size=6, microbatches=6)}
    check_microbatches(stages, 2)
    with pytest.raises(ConfigError) as refused:
        check_microbatches(stages, 3)
    assert [problem.field for problem in refused.value.problems] == ["prune.microbatches"]
    assert "1 or 2 or 4" in str(refused.value) and refused.value.exit_code == 2
    check_microbatches({"prune": TrainConfig(steps=0, microbatches=1)}, 3)  # a stage without steps deals nothing


def test_rows_of_what_is_whole() -> None:
    assert rows_of(torch.zeros(5, 2), Place(1, 2)) == (0, 5) and rows_of(torch.zeros(()), World()) == (0, 1)


if __name__ == "__main__":
    _same_bits()
