"""Adapters: they alone move, to the same bits after a stop and on two processes; merged they leave a stock model that computes the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import FAMILIES, tiny_config, tiny_model
from ranks import codes, launch
from shearling.arch.families import anatomy_of
from shearling.errors import ArtifactError, ConfigError, Stopped
from shearling.io.loading import load_stock
from shearling.objectives.lm import in_training, token_losses
from shearling.prune.verify import difference_of, logits_of
from shearling.recipe import load_recipe
from shearling.train import checkpoint
from shearling.train.config import LoraConfig, RuntimeConfig, TrainConfig
from shearling.train.lora import add_adapters, check_targets, merge
from shearling.train.optim import build_optimizer, in_precision
from shearling.train.parallel import make_mesh, parallelize, whole_weights
from shearling.train.step import train_step
from shearling.world import World, join
from tiny_stage import STEPS, AskedToStop, Stage, bits, result_of, saved

CPU = torch.device("cpu")
BLOCKS = "model.layers"
RANK = 3


def ids(rows: int = 4, length: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def weights_of(model: nn.Module) -> dict[str, Any]:
    return {name: bits(parameter) for name, parameter in model.named_parameters()}


def adapters_of(model: nn.Module) -> dict[str, Any]:
    return {name: bits(parameter) for name, parameter in model.named_parameters() if ".lora_" in name}


def disturbed(model: nn.Module, seed: int = 5) -> nn.Module:
    """The same model with adapters as after much training: none of their numbers is zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    return model


def stage_with(config: LoraConfig | None = None, seed: int = 17, **values: Any) -> Stage:
    stage = Stage(**{"layers": 2, **values})
    add_adapters(stage.model, config or LoraConfig(rank=RANK), seed)
    return stage


def take_steps(model: nn.Module, steps: int = 3, objective: Any = token_losses) -> nn.Module:
    optimizer = build_optimizer(model, TrainConfig(learning_rate=1e-2))
    for step in range(1, steps + 1):
        zeros = np.zeros(4, np.int64)
        train_step(model, ids(seed=step), zeros, in_training(objective), optimizer, step=step, microbatches=2, clip=1.0, rate=1e-2)
    return model


def test_defaults_and_what_the_recipe_refuses() -> None:
    values = {"source": "owner/model", "data": {"domains": {"web": "web.jsonl"}}}
    assert load_recipe(values).train.lora is None
    given = load_recipe(values, ["train.lora.rank=4"]).train.lora
    assert given is not None and (given.rank, given.alpha) == (4, 16.0)
    assert given.targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj") == LoraConfig().targets
    assert load_recipe(values, ["train.lora={targets: [v_proj]}"]).train.lora == LoraConfig(targets=("v_proj",))
    for wrong, field in (
        ("train.lora.rank=0", "train.lora.rank"),
        ("train.lora.alpha=0", "train.lora.alpha"),
        ("train.lora.targets=[]", "train.lora.targets"),
        ("train.lora.dropout=0.05", "train.lora.dropout"),
        ("prune.lora.rank=4", "prune.lora"),
    ):
        with pytest.raises(ConfigError) as refused:
            load_recipe(values, [wrong])
        assert [problem.field for problem in refused.value.problems] == [field]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_what_it_was_with_an_adapter_on_each_target_of_each_block(family: str) -> None:
    model = tiny_model(family)
    before, expected = weights_of(model), logits_of(model, ids())
    assert add_adapters(model, LoraConfig(rank=2, targets=("o_proj", "down_proj")), 0) is model
    assert torch.equal(logits_of(model, ids()), expected)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{BLOCKS}.{layer}.{module}.lora_{factor}.default.weight": shape
        for layer in range(3)
        for module, wide in (("self_attn.o_proj", 48), ("mlp.down_proj", 40))
        for factor, shape in (("A", (2, wide)), ("B", (48, 2)))
    }
    frozen = {name.replace(".base_layer", ""): bits(p) for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == before


def test_more_targets_than_peft_would_list_one_by_one() -> None:
    """Peft shortens a long list of names; what it matches must not become more."""
    model = tiny_model("llama", layers=12, hidden=8, heads=1, groups=1, head_dim=8, neurons=8)
    add_adapters(model, LoraConfig(rank=1, targets=("q_proj", "up_proj")), 0)
    found = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert found == {f"{BLOCKS}.{layer}.{module}" for layer in range(12) for module in ("self_attn.q_proj", "mlp.up_proj")}


def test_the_start_follows_from_the_seed_and_the_name_alone() -> None:
    def start(seed: int, **config: Any) -> dict[str, Any]:
        return adapters_of(add_adapters(tiny_model("llama"), LoraConfig(**config), seed))

    first, model = start(17), tiny_model("llama")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert adapters_of(add_adapters(model, LoraConfig(), 17)) == first
    assert torch.equal(torch.get_rng_state(), state), "it used up draws of somebody else"
    fewer = start(17, targets=["up_proj", "q_proj"])
    assert fewer == {name: first[name] for name in fewer} and 0 < len(fewer) < len(first)
    other = start(18)
    a, b = [name for name in first if ".lora_A" in name], [name for name in first if ".lora_B" in name]
    assert len(a) == len(b) == 7 * 3 and all(other[name] != first[name] for name in a)
    assert len({first[name] for name in a}) == len(a), "two projections start alike"
    model = add_adapters(tiny_model("llama"), LoraConfig(rank=8), 17)
    for layer in model.get_submodule(BLOCKS):  # type: ignore[union-attr]
        drawn, zero = (factor["default"].weight.detach() for factor in (layer.mlp.down_proj.lora_A, layer.mlp.down_proj.lora_B))
        assert 0.9 * 40**-0.5 < float(drawn.abs().max()) <= 40**-0.5 and not zero.any()
        assert float(drawn.std()) == pytest.approx((3 * 40) ** -0.5, rel=0.1)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_norm", "qproj", "proj", "self_attn", "self_attn.q_proj"])
@pytest.mark.parametrize("tied", [False, True])
def test_targets_that_do_not_exist_are_named(target: str, tied: bool) -> None:
    """Before any weight is open, and with the model, which is then left as it was."""
    config = LoraConfig(targets=("q_proj", target, "w1"))
    model = tiny_model("qwen3", tied=tied)
    before = weights_of(model)
    anatomy = anatomy_of(tiny_config("qwen3", tied=tied).to_dict())
    for refuse in (lambda: check_targets(config, anatomy), lambda: add_adapters(model, config, 0)):
        with pytest.raises(ConfigError) as refused:
            refuse()
        assert [(problem.field, problem.found) for problem in refused.value.problems] == [
            ("train.lora.targets", repr(target)),
            ("train.lora.targets", "'w1'"),
        ]
        assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(refused.value)
    assert weights_of(model) == before and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_default_targets(family: str) -> None:
    check_targets(LoraConfig(), anatomy_of(tiny_config(family).to_dict()))
    assert len(adapters_of(add_adapters(tiny_model(family), LoraConfig(), 0))) == 2 * 7 * 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_merged_computes_what_unmerged_does_and_is_a_stock_model(family: str, tied: bool, tmp_path: Path) -> None:
    model, stock = tiny_model(family, tied=tied), tiny_model(family, tied=tied)
    before = logits_of(model, ids())
    disturbed(add_adapters(model, LoraConfig(rank=4, alpha=6), 0))
    expected = logits_of(model, ids())
    assert difference_of(before, expected).relative_difference > 0.05, "the adapters do nothing that could be merged wrongly"
    assert merge(model) is model
    assert difference_of(expected, logits_of(model, ids())).relative_difference < 1e-5
    form = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    assert form == [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in stock.named_parameters()]
    assert [(name, type(module)) for name, module in model.named_modules()] == [(n, type(m)) for n, m in stock.named_modules()]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert vars(model).keys() == vars(stock).keys() and model.config.to_dict() == stock.config.to_dict()
    targets = LoraConfig().targets
    for name, parameter in stock.named_parameters():
        moved = not torch.equal(parameter, model.get_parameter(name))
        assert moved == (name.endswith(".weight") and name.split(".")[-2] in targets), name
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert weights_of(load_stock(tmp_path, torch.float32, "merged")) == weights_of(model)


def test_merging_is_bitwise_that_of_peft() -> None:
    model = disturbed(add_adapters(tiny_model("qwen2"), LoraConfig(rank=5, alpha=3), 0))
    config = peft.LoraConfig(r=5, lora_alpha=3, target_modules=list(LoraConfig().targets))
    theirs = LoraModel(tiny_model("qwen2"), config, "default")
    theirs.model.load_state_dict(model.state_dict())
    assert weights_of(theirs.merge_and_unload()) == weights_of(merge(model)) != weights_of(tiny_model("qwen2"))


def test_a_model_without_adapters_is_left_as_it_is() -> None:
    model = tiny_model("llama")
    before = weights_of(model)
    model.lm_head.weight.requires_grad_(False)
    merge(model)
    assert weights_of(model) == before and not model.lm_head.weight.requires_grad


def test_adapters_can_be_put_on_what_was_merged() -> None:
    model = merge(disturbed(add_adapters(tiny_model("llama"), LoraConfig(), 0)))
    fresh = copy.deepcopy(model)
    expected = logits_of(model, ids())
    add_adapters(model, LoraConfig(rank=2), 1)
    assert torch.equal(logits_of(model, ids()), expected)
    assert adapters_of(model) == adapters_of(add_adapters(fresh, LoraConfig(rank=2), 1)) != {}


def test_only_adapters_move_and_have_moments(tmp_path: Path) -> None:
    stage = stage_with()
    before = weights_of(stage.model)
    stage.fit(tmp_path)
    for name, found in weights_of(stage.model).items():
        assert (found != before[name]) is (".lora_" in name), name
    shapes = checkpoint.load(stage.checkpoints(tmp_path)).shapes  # type: ignore[union-attr]
    moments = {name for name in shapes if name.startswith("optimizer/")}
    trained = adapters_of(stage.model)
    assert moments == {f"optimizer/{key}/{name}" for key in ("exp_avg", "exp_avg_sq") for name in trained} and trained
    assert {f"model/{name}" for name in trained} <= shapes.keys()


def test_stopped_and_gone_on_is_the_same_bits(tmp_path: Path) -> None:
    """At every step in turn; adapters come from the checkpoint, whatever seed they were made anew with."""
    whole = stage_with()
    whole.fit(tmp_path / "whole")
    expected, merged = result_of(whole, tmp_path / "whole"), weights_of(merge(whole.model))
    for step in range(1, STEPS):
        stage = stage_with(seed=17 if step == 1 else step)
        world = stage.world = AskedToStop()
        stage.after_step = lambda at, world=world, step=step: world.ask() if at == step else None  # type: ignore[misc]
        with pytest.raises(Stopped, match=f"after step {step} of {STEPS}"):
            stage.fit(tmp_path / "stopped")
        assert saved(stage.checkpoints(tmp_path / "stopped"))["step"] == step
    last = stage_with(seed=99)
    last.fit(tmp_path / "stopped")
    assert last.steps == [STEPS]
    assert result_of(last, tmp_path / "stopped") == expected
    assert weights_of(merge(last.model)) == merged


@pytest.mark.parametrize("other", [None, LoraConfig(rank=RANK + 1), LoraConfig(rank=RANK, targets=("q_proj",))])
def test_a_checkpoint_of_other_adapters_is_refused(other: LoraConfig | None, tmp_path: Path) -> None:
    stage_with().fit(tmp_path)
    stage = stage_with(other) if other else Stage(layers=2)
    with pytest.raises(ArtifactError, match="does not fit the model"):
        stage.fit(tmp_path)


@pytest.mark.parametrize("runtime", [{"activation_checkpointing": True}, {"precision": "bfloat16"}])
def test_what_the_runtime_asks_for(runtime: dict[str, Any]) -> None:
    """Recomputing activations gives the same bits though no block's input asks for a gradient; autocast leads to about the same."""
    plain = take_steps(add_adapters(tiny_model("llama"), LoraConfig(), 0).train())
    config = RuntimeConfig(**{"precision": "float32", **runtime})
    model = parallelize(add_adapters(tiny_model("llama"), LoraConfig(), 0), BLOCKS, config, CPU, None)
    take_steps(model.train(), objective=in_precision(token_losses, CPU, config))
    start, expected, found = (logits_of(m.eval(), ids(seed=9)) for m in (tiny_model("llama"), plain, model))
    moved, apart = (difference_of(expected, other).relative_difference for other in (start, found))
    assert moved > 1e-2
    if "precision" in runtime:
        assert 0 < apart < moved / 4
    else:
        assert apart == 0 and adapters_of(model) == adapters_of(plain)


def test_two_processes_train_and_merge_to_what_one_does(tmp_path: Path) -> None:
    """Frozen and trained parameters in one group of FSDP2. With rank 8, to the same bits. With rank 1, the second process has no row of
    any A; and torch's fused AdamW rounds otherwise behind the last whole vector of a tensor, which is elsewhere in its rows."""
    assert codes(launch(2, _process, tmp_path)) == [0, 0]
    for name, rank in RANKS.items():
        alone = _fit_and_merge(tmp_path / f"one-{rank}", name, World())
        together = load_file(tmp_path / f"two-{rank}.safetensors")
        assert alone.keys() == together.keys() == {name for name, _ in Stage(layers=2).model.named_parameters()}
        for weight, tensor in alone.items():
            found = together[weight]
            assert bits(found) == bits(tensor) if rank == 8 else torch.allclose(found, tensor, rtol=0, atol=1e-6), weight
        one, two = (tmp_path / f"{number}-{rank}" / "checkpoints" / name for number in ("one", "two"))
        assert saved(one) == saved(two) if rank == 8 else saved(one)["tensors"].keys() == saved(two)["tensors"].keys()
        assert len(list(two.glob(f"step-{STEPS:08d}/rank-*.safetensors"))) == 2


RANKS = {"train": 8, "prune": 1}
"""Rank of the adapters by the name of the stage; a name is used once in a world, since notes about checkpoints go by it."""


def _fit_and_merge(run: Path, name: str, world: World) -> dict[str, Tensor]:
    """A whole stage and what is published of it, on this process alone or with others; whole weights on process 0."""
    stage = stage_with(LoraConfig(rank=RANKS[name]))
    stage.world, stage.name = world, name
    parallelize(stage.model, BLOCKS, stage.runtime, CPU, make_mesh(CPU, world))
    stage.fit(run)
    stage.model.eval()
    before = logits_of(stage.model, ids(2, 12) % 48)
    merge(stage.model)
    after = logits_of(stage.model, ids(2, 12) % 48)
    assert 0 < difference_of(before, after).relative_difference < 1e-5
    return whole_weights(stage.model, world)


def _process(number: int, folder: Path) -> None:
    with join() as world:
        for name, rank in RANKS.items():
            weights = _fit_and_merge(folder / f"two-{rank}", name, world)
            if world.first:
                save_file(weights, folder / f"two-{rank}.safetensors")
