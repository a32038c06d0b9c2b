"""Statistics against direct computations; one pass, memory of the sums alone, the same bits on any number of processes, all put back."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import hooks, tiny_model
from ranks import codes, launch
from shearling.objectives.lm import token_losses
from shearling.prune.attach import Attachment
from shearling.prune.scores import compute
from shearling.prune.stats import NEEDS, Stats, _Fold, collect, weights_of
from tiny_gates import specs_of

BATCHES = [torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
FORWARD = {"activations", "influence"}


def collected(model: Any, needs: Any = NEEDS, batches: Any = BATCHES, objective: Any = token_losses, **more: Any) -> Stats:
    return collect(model, *specs_of(model.config.model_type, tied=model.config.tie_word_embeddings), objective, batches, needs, **more)


def close(found: Tensor, expected: Tensor, name: str, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def tensors(stats: Stats) -> dict[str, Tensor]:
    """Everything that was collected, by name."""
    whole = {kind: getattr(stats, kind) for kind in ("gradients", "squares", "sizes", "cosines")}
    found = {f"{kind} {name}": value for kind, values in whole.items() for name, value in values.items()}
    for kind in ("gates", "inputs"):
        for name, moments in getattr(stats, kind).items():
            found |= {f"{kind} {name} {what}": value for what, value in vars(moments).items()}
    return {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in found.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_autograd(family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    stats = collected(model, {"weight_gradients", "squared_gradients"})
    assert set(stats.gradients) == set(stats.squares) == {name for name, pattern, _ in weights_of(stats.anatomy)}
    mean = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    squared = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for sequence in torch.cat(BATCHES):
        model.zero_grad()
        token_losses(model, sequence[None]).mean().backward()
        for name, weight in model.named_parameters():
            mean[name] += weight.grad / 6
            squared[name] += weight.grad.square() / 6
    for name in stats.gradients:
        close(stats.gradients[name], mean[name], name)
        close(stats.squares[name], squared[name], name)


def test_gates_have_the_mean_and_variance_of_their_absolute_gradients() -> None:
    model = tiny_model("llama")
    source, specs = specs_of("llama")
    found = collected(model, {"gate_gradients"}).gates
    slopes: dict[str, list[Tensor]] = {axis: [] for axis in specs}
    with Attachment(model, source) as attachment:
        for ids_BT in BATCHES:
            gates = {axis: torch.ones(spec.shape, requires_grad=True) for axis, spec in specs.items()}
            attachment.set(gates)
            token_losses(model, ids_BT).mean().backward()
            for axis, gate in gates.items():
                slopes[axis].append(gate.grad.abs().double())
    assert set(found) == set(specs)
    for axis, moments in found.items():
        close(moments.mean, torch.stack(slopes[axis]).mean(0), axis)
        close(moments.variance, torch.stack(slopes[axis]).var(0, correction=0), axis)
        assert moments.mean.dtype == torch.float32 and moments.mean.shape == specs[axis].shape


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_passes_through_is_that_of_all_tokens_at_once(family: str) -> None:
    model = tiny_model(family)
    stats = collected(model, FORWARD)
    kept: dict[str, list[Tensor]] = {"heads": [], "neurons": [], "norms": []}
    handles = []
    for block in model.model.layers:
        for module, what in ((block.self_attn.o_proj, "heads"), (block.mlp.down_proj, "neurons")):
            handles.append(module.register_forward_pre_hook(lambda m, a, what=what: kept[what].append(a[0])))
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            handles.append(norm.register_forward_hook(lambda m, a, out: kept["norms"].append(out)))
    handles.append(model.model.norm.register_forward_hook(lambda m, a, out: kept["norms"].append(out)))
    with torch.no_grad():
        states = model(torch.cat(BATCHES), output_hidden_states=True).hidden_states[:3]
        rope = model.model.rotary_emb(states[0], torch.arange(9)[None])
        ends = [block(state, position_embeddings=rope) for state, block in zip(states, model.model.layers, strict=True)]
    for handle in handles:
        handle.remove()
    for what in ("heads", "neurons"):
        whole = torch.stack([x.flatten(0, 1) for x in kept[what][:3]]).double()  # layer, token, channel
        close(stats.inputs[what].mean, whole.mean(1), what)
        close(stats.inputs[what].absolute, whole.abs().mean(1), what)
        close(stats.inputs[what].variance, whole.var(1, correction=0), what)
        if what == "heads":
            close(stats.sizes["heads"], whole.view(3, 54, 3, 2, 8).norm(dim=-1).mean(1), "norms of heads")
    close(stats.sizes["hidden"], torch.stack([x.flatten(0, 1).abs().mean(0) for x in kept["norms"][:7]]).sum(0), "norms")
    cosines = [torch.cosine_similarity(state, end, dim=-1).mean() for state, end in zip(states, ends, strict=True)]
    close(stats.cosines["layer"], torch.stack(cosines), "cosines")


def test_cosines_are_taken_in_fp32() -> None:
    def in_bfloat16(model: nn.Module, ids_BT: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return token_losses(model, ids_BT)

    model = tiny_model("llama")
    for block in model.model.layers:  # nothing is written: input and output are the same
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    found = collected(model.to(torch.bfloat16), {"influence"}, objective=in_bfloat16)
    close(found.cosines["layer"], torch.ones(3), "cosines", atol=1e-6)


@pytest.mark.parametrize(
    ("needs", "filled"),
    [
        (set(), set()),
        ({"weights"}, set()),
        ({"gate_gradients"}, {"gates"}),
        ({"weight_gradients"}, {"gradients"}),
        ({"squared_gradients"}, {"squares"}),
        ({"activations"}, {"inputs", "sizes"}),
        ({"influence"}, {"cosines"}),
        (set(NEEDS), {"gates", "gradients", "squares", "inputs", "sizes", "cosines"}),
    ],
)
def test_one_pass_for_what_is_needed_and_nothing_else(needs: set[str], filled: set[str]) -> None:
    passes = []

    def counted(model: nn.Module, ids_BT: Tensor) -> Tensor:
        passes.append((len(ids_BT), torch.is_grad_enabled()))
        return token_losses(model, ids_BT)

    stats = collected(tiny_model("llama"), needs, objective=counted)
    assert {kind for kind in ("gates", "gradients", "squares", "inputs", "sizes", "cosines") if getattr(stats, kind)} == filled
    backward = bool(needs - FORWARD - {"weights"})
    if "squared_gradients" in needs:
        assert passes == [(1, backward)] * 6
    else:
        assert passes == ([(2, backward)] * 3 if needs - {"weights"} else [])


def test_squares_leave_the_rest_as_it_is() -> None:
    model = tiny_model("llama")
    alone, beside = tensors(collected(model, set(NEEDS) - {"squared_gradients"})), tensors(collected(model))
    assert set(alone) < set(beside)
    for name, value in alone.items():
        close(beside[name], value, name, rtol=1e-4, atol=1e-5)


def test_only_weights_that_an_axis_touches_get_gradients() -> None:
    model = tiny_model("qwen2")
    source, specs = specs_of("qwen2")
    found = collect(model, source, {"query": specs["query"]}, token_losses, BATCHES, {"weight_gradients"}).gradients
    names = ("q_proj.weight", "q_proj.bias", "o_proj.weight")
    assert set(found) == {f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in names}
    everything = collected(model, {"weight_gradients"}).gradients
    assert all(torch.equal(found[name], everything[name]) for name in found)


def test_memory_is_that_of_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def alive() -> int:
        return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter))

    def levels(number: int) -> list[int]:
        seen: list[int] = []
        gc.collect()
        before = alive()
        collected(model, batches=[BATCHES[0]] * number, between=lambda: seen.append(alive() - before))
        return seen

    few, many = levels(2), levels(5)
    assert max(many) == max(few) and len(set(many[1:])) == 1

    most = []
    fold = _Fold._add

    def watched(self: _Fold, name: str, weight: Tensor) -> None:
        most.append(sum(weight.grad is not None for weight in model.parameters()))
        fold(self, name, weight)

    monkeypatch.setattr(_Fold, "_add", watched)
    collected(model, {"weight_gradients"})
    assert set(most) == {1} and len(most) == 3 * len(list(model.parameters()))


@pytest.mark.parametrize("failing", [None, "between", "objective", "backward"])
def test_the_model_is_left_as_it_was(failing: str | None) -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    modes = [module.training for module in model.modules()]
    wanted = [weight.requires_grad for weight in model.parameters()]
    weights = [weight.detach().clone() for weight in model.parameters()]
    epsilons = [module.variance_epsilon for module in model.modules() if hasattr(module, "variance_epsilon")]
    logits = model(BATCHES[0]).logits
    seen: list[str] = []

    def interrupt(where: str) -> None:
        seen.append(where)
        if where == failing and seen.count(where) == 2:
            raise InterruptedError

    class Interrupted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            interrupt("backward")
            return gradient

    def objective(model: nn.Module, ids_BT: Tensor) -> Tensor:
        handle = model.get_submodule("model.layers.1").register_forward_hook(lambda m, a, out: Interrupted.apply(out))
        try:
            losses = token_losses(model, ids_BT)
        finally:
            handle.remove()
        interrupt("objective")
        return losses

    with pytest.raises(InterruptedError) if failing else torch.no_grad():
        collected(model, objective=objective, between=lambda: interrupt("between"))
    assert [module.training for module in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()] == wanted
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert sum(weight.grad is not None for weight in model.parameters()) == 1
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))
    assert [module.variance_epsilon for module in model.modules() if hasattr(module, "variance_epsilon")] == epsilons
    assert hooks(model) == 0 and torch.equal(model(BATCHES[0]).logits, logits)


def test_beside_an_attachment_and_twice_the_same_bits() -> None:
    model = tiny_model("qwen3")
    expected = tensors(collected(model))
    with Attachment(model, specs_of("qwen3")[0]):
        before = hooks(model)
        found = tensors(collected(model))
        assert hooks(model) == before
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_compiled_blocks_are_seen_through() -> None:
    plain, compiled = tiny_model("llama"), tiny_model("llama")
    for block in compiled.model.layers:
        block.compile(backend="eager")
    with torch.no_grad():
        logits = compiled(BATCHES[0]).logits
    expected, found = tensors(collected(plain)), tensors(collected(compiled))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(compiled(BATCHES[0]).logits, logits)


def test_what_cannot_be_collected() -> None:
    with pytest.raises(ValueError, match=r"\['gradients'\].*weight_gradients"):
        collected(tiny_model("llama"), {"gradients"})
    with pytest.raises(ValueError, match="at least one calibration batch"):
        collected(tiny_model("llama"), {"influence"}, batches=[])


@pytest.mark.parametrize("size", [1, 2])
def test_sharded_over_processes_the_same_bits(size: int, tmp_path: Path) -> None:
    """Over a mesh of one and of two, and whole on two: the sums are those of one process alone, and each process has all of them."""
    processes = launch(size, _rank, size, str(tmp_path))
    model = tiny_model("llama")
    expected = {"small": tensors(collected(model, {"gate_gradients", *FORWARD})), "all": tensors(collected(model)), "scores": scored(model)}
    assert codes(processes, 60) == [0] * size
    for rank in range(size):
        for kind, found in torch.load(tmp_path / f"{rank}.pt").items():
            for name, value in expected[kind.split()[1]].items():
                assert torch.equal(found[name], value), (rank, kind, name)


def scored(model: Any, **more: Any) -> dict[str, Tensor]:
    names = {"layer": "fused", "hidden": "taylor-element-mixed", "group": "taylor-vector", "query": "fluctuation", "neuron": "magnitude-l2"}
    return compute(names, model, *specs_of("llama"), token_losses, BATCHES, **more)


def _rank(rank: int, size: int, folder: str) -> None:
    """One process of a test: what it collects of a sharded and of a whole model."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    from shearling.train.config import RuntimeConfig
    from shearling.train.parallel import parallelize
    from shearling.world import World, join

    world = join("cpu", 60.0) if size > 1 else World()
    if size == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {}
    with world:
        mesh, device = init_device_mesh("cpu", (size,)), torch.device("cpu")
        sharded = parallelize(tiny_model("llama"), "model.layers", RuntimeConfig(), device, mesh)
        for kind, model in (("sharded", sharded), ("whole", tiny_model("llama"))):
            with torch.no_grad():
                model(BATCHES[0])  # which leaves gathered weights in the modules
            found[f"{kind} small"] = tensors(collected(model, {"gate_gradients", *FORWARD}, world=world))
            collected(model, FORWARD, world=world)
            assert all(isinstance(weight, DTensor) == (kind == "sharded") for weight in model.parameters())
            stats = collected(model, world=world)
            assert all(isinstance(value, DTensor) == (kind == "sharded") for value in (*stats.gradients.values(), *stats.squares.values()))
            assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
            found[f"{kind} all"], found[f"{kind} scores"] = tensors(stats), scored(model, world=world)
    torch.save(found, Path(folder) / f"{rank}.pt")
