"""Scores against their formulas written out, unit by unit, on real models; the registry; what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import repeat_kv

from models import FAMILIES, tiny_model
from shearling.arch.families import anatomy_of
from shearling.errors import ConfigError, NumericsError
from shearling.objectives.lm import token_losses
from shearling.prune import scores
from shearling.prune.gates import GateSpec, gate_specs
from shearling.prune.scores import SCORES, Scores, compute
from shearling.prune.stats import NEEDS
from shearling.shapes import PRUNABLE
from tiny_gates import random_masks, specs_of

BATCHES = [torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
Piece = tuple[str, int, slice | int]
"""Name of a weight, the dimension that is cut, and what goes along it."""


def scored(name: str, model: Any, axes: Any = None, batches: Any = BATCHES, objective: Any = token_losses, **more: Any) -> Scores:
    source, specs = specs_of(model.config.model_type, tied=model.config.tie_word_embeddings)
    axes = [axis for axis in specs if axis in SCORES[name].axes] if axes is None else axes
    return compute(dict.fromkeys(axes, name), model, source, specs, objective, batches, **more)


def close(found: Tensor, expected: Tensor, name: str, rtol: float = 1e-4) -> None:
    atol = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def derivatives(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Weights, mean gradients, and mean squared gradients of single sequences, by name, from plain autograd."""
    names = dict(model.named_parameters())
    mean = {name: torch.zeros_like(weight) for name, weight in names.items()}
    squared = {name: torch.zeros_like(weight) for name, weight in names.items()}
    for sequence in torch.cat(BATCHES):
        gradients = torch.autograd.grad(token_losses(model, sequence[None]).mean(), list(names.values()))
        for name, gradient in zip(names, gradients, strict=True):
            mean[name] += gradient / 6
            squared[name] += gradient.square() / 6
    return {name: weight.detach() for name, weight in names.items()}, mean, squared


def pieces(axis: str, unit: tuple[int, ...], names: Any) -> Iterator[Piece]:
    """What goes with one unit of a model of 3 layers, 3 key/value heads, 2 query heads in each, head_dim 8."""
    layer, *inner = unit
    attention, mlp = (f"model.layers.{layer}.{part}." for part in ("self_attn", "mlp"))

    def head(group: int, query: int) -> Iterator[Piece]:
        rows = slice((group * 2 + query) * 8, (group * 2 + query) * 8 + 8)
        yield from ((f"{attention}q_proj.weight", 0, rows), (f"{attention}q_proj.bias", 0, rows), (f"{attention}o_proj.weight", 1, rows))

    def found() -> Iterator[Piece]:
        if axis == "layer":
            yield from ((name, -1, slice(None)) for name in names if name.startswith(f"model.layers.{layer}."))
        elif axis == "hidden":
            for name in names:
                if "q_norm" not in name and "k_norm" not in name:
                    reads = any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate", "up_proj", "embed", "lm_head"))
                    if not (reads and name.endswith("bias")):
                        yield name, int(reads), slice(layer, layer + 1)
        elif axis == "neuron":
            channel = slice(inner[0], inner[0] + 1)
            yield from (
                (f"{mlp}gate_proj.weight", 0, channel),
                (f"{mlp}up_proj.weight", 0, channel),
                (f"{mlp}down_proj.weight", 1, channel),
            )
        elif axis == "query":
            yield from head(*inner)
        else:
            for part in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
                yield f"{attention}{part}", 0, slice(inner[0] * 8, inner[0] * 8 + 8)
            for query in range(2):
                yield from head(inner[0], query)

    return (piece for piece in found() if piece[0] in names)


def by_pieces(axis: str, shape: tuple[int, ...], values: dict[str, Tensor], by_channel: bool = False) -> Tensor:
    """Sum over the pieces of every unit; or of the absolute sums of each of their channels."""
    result = torch.zeros(shape, dtype=torch.float64)
    for unit in torch.cartesian_prod(*(torch.arange(size) for size in shape)).reshape(-1, len(shape)).tolist():
        for name, dim, cut in pieces(axis, tuple(unit), values):
            value = values[name].double()
            if dim < 0:
                result[tuple(unit)] += value.sum().abs() if by_channel else value.sum()
                continue
            channels = value.transpose(0, dim)[cut].flatten(1).sum(1) if value.dim() > 1 else value[cut]
            result[tuple(unit)] += (channels.abs() if by_channel else channels).sum()
    return result


FORMULAS: dict[str, Any] = {
    "taylor-vector": lambda w, g, f: w * g,
    "taylor-element": lambda w, g, f: (w * g).abs(),
    "taylor-element-second": lambda w, g, f: f * w**2,
    "taylor-element-mixed": lambda w, g, f: (w * g - f * w**2 / 2).abs(),
    "magnitude-l1": lambda w, g, f: w.abs(),
    "magnitude-l2": lambda w, g, f: w**2,
}


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("qwen3", False)])
def test_scores_of_weights_are_their_formulas_written_out(family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    known = derivatives(model)
    for name, formula in FORMULAS.items():
        found = scored(name, model)
        values = {weight: formula(*(kind[weight].double() for kind in known)) for weight in known[0]}
        for axis, spec in specs_of(family)[1].items():
            close(found[axis], by_pieces(axis, spec.shape, values, by_channel=name == "taylor-vector"), f"{name} {axis}", rtol=1e-3)


def test_magnitude_of_weights_set_by_hand() -> None:
    """Every weight is 1, and one head's value rows are 3: 16 channels of 48 for queries and outputs, 8 of 48 for keys and values."""
    model = tiny_model("llama")
    for weight in model.parameters():
        weight.data.fill_(1.0)
    model.model.layers[1].self_attn.v_proj.weight.data[8:16] = -3.0
    l1, l2 = scored("magnitude-l1", model), scored("magnitude-l2", model)
    group = torch.full((3, 3), 2 * 16 * 48.0 + 2 * 8 * 48)
    group[1, 1] += 8 * 48 * 2
    assert torch.equal(l1["group"], group) and float(l2["group"][1, 1]) == float(group[0, 0]) + 8 * 48 * 8
    assert (l1["query"] == 2 * 8 * 48).all() and (l1["neuron"] == 3 * 48).all()
    plain = 2 * 48 * 48 + 2 * 24 * 48 + 3 * 40 * 48 + 2 * 48.0
    assert l1["layer"].tolist() == [plain, plain + 8 * 48 * 2, plain]
    hidden = 2 * 96 + 3 * (48 + 24 + 24 + 48 + 3 * 40 + 2) + 1 + 8 * 2
    assert (l1["hidden"] == hidden).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_elements_never_weigh_less_than_vectors(family: str) -> None:
    model = tiny_model(family)
    vector, element = scored("taylor-vector", model), scored("taylor-element", model)
    for axis in vector:
        assert (element[axis] >= vector[axis] * (1 - 1e-5)).all() and (vector[axis] > 0).all()


def repeated(model: Any) -> Any:
    """The same function with a key/value head for every query head, as transformers repeats them while it computes."""
    wide = tiny_model(model.config.model_type, groups=6)
    weights = model.state_dict()
    for name, value in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = repeat_kv(value.view(1, 3, 8, -1), 2).reshape(48, *value.shape[1:])
    wide.load_state_dict(weights)
    return wide


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_heads_that_share_keys_are_scored_as_if_they_were_repeated(family: str) -> None:
    model = tiny_model(family)
    wide = repeated(model)
    torch.testing.assert_close(wide(BATCHES[0]).logits, model(BATCHES[0]).logits)
    axes = ["group"]
    source = anatomy_of(wide.config.to_dict())
    specs = gate_specs(source, source.with_sizes(group=3))
    for name in ("taylor", "activation", "fluctuation"):
        found = scored(name, model, ["query", "group"])
        apart = compute(dict.fromkeys(axes, name), wide, source, specs, token_losses, BATCHES)["group"]
        close(found["query"].flatten(1), apart, name)
        if name != "taylor":
            close(found["group"], apart.view(3, 3, 2).sum(-1), name)
    weights, gradients, _ = derivatives(wide)  # a shared key's gradient is the sum over its copies
    found = scored("taylor-element", model, ["query", "group"])
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn."
        own, shared = torch.zeros(6), torch.zeros(3)
        for part in ("q_proj.weight", "q_proj.bias", "o_proj.weight", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
            if prefix + part not in weights:
                continue
            products = weights[prefix + part] * gradients[prefix + part]
            if part[0] in "qo":
                rows = products.T if part[0] == "o" else products
                own += rows.reshape(6, -1).abs().sum(1)
            else:
                shared += products.reshape(3, 2, -1).sum(1).abs().sum(1)
        close(found["query"][layer].flatten(), own, name)
        close(found["group"][layer], own.view(3, 2).sum(1) + shared, name)


def by_activations(model: Any, ids_BT: Tensor) -> dict[str, Tensor]:
    """dL/dz at z = 1 from the chain rule: what a gate multiplies, times the loss' gradient on it, summed over where it acts."""
    kept: dict[str, list[Tensor]] = {"heads": [], "neurons": [], "writes": []}

    def keep(what: str, value: Tensor) -> None:
        value.retain_grad()
        kept[what].append(value)

    handles = [model.model.embed_tokens.register_forward_hook(lambda m, a, out: keep("writes", out))]
    for block in model.model.layers:
        for module, what in ((block.self_attn.o_proj, "heads"), (block.mlp.down_proj, "neurons")):
            handles.append(module.register_forward_pre_hook(lambda m, a, what=what: keep(what, a[0])))
            handles.append(module.register_forward_hook(lambda m, a, out: keep("writes", out)))
    token_losses(model, ids_BT).mean().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    products = {what: [(v.detach() * v.grad).sum((0, 1)) for v in values] for what, values in kept.items()}
    embedding, *writes = products["writes"]
    heads = torch.stack(products["heads"]).view(3, 3, 2, 8).sum(-1)
    return {
        "layer": torch.stack([(writes[2 * i] + writes[2 * i + 1]).sum() for i in range(3)]),
        "hidden": embedding + sum(writes),
        "group": heads.sum(-1),
        "query": heads,
        "neuron": torch.stack(products["neurons"]),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_is_the_mean_of_absolute_gradients(family: str) -> None:
    model = tiny_model(family)
    found = scored("taylor", model)
    expected = [by_activations(model, ids_BT) for ids_BT in BATCHES]
    assert set(found) == set(PRUNABLE)
    for axis, score in found.items():
        close(score, torch.stack([batch[axis].abs() for batch in expected]).mean(0), axis)
        assert not score.requires_grad and (score > 0).all()


def test_signs_cancel_inside_a_batch_not_between_batches() -> None:
    model = tiny_model("llama")
    apart, together = (scored("taylor", model, ["neuron"], b)["neuron"] for b in (BATCHES[:2], [torch.cat(BATCHES[:2])]))
    assert (apart >= together - 1e-6).all() and (apart > together + 1e-4).any()


def test_fusion_does_not_change_with_the_scale_of_either_score(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    expected = scored("fused", model)
    vector, element = scored("taylor-vector", model), scored("taylor-element", model)
    for axis, values in expected.items():
        close(values, (vector[axis] / vector[axis].mean() + element[axis] / element[axis].mean()) / 2, axis)
        assert float(values.mean()) == pytest.approx(1, abs=1e-5)
    louder = scored("fused", model, objective=lambda model, ids_BT: 7 * token_losses(model, ids_BT))
    plain = scores.taylor_element
    monkeypatch.setattr(scores, "taylor_element", lambda stats: {axis: 1e-3 * values for axis, values in plain(stats).items()})
    for found in (louder, scored("fused", model)):
        for axis, values in found.items():
            close(values, expected[axis], axis)


def test_fluctuation_is_the_error_of_replacing_an_input_by_its_mean() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[5] = 0.0  # this neuron is always 0, and is its mean
    found = scored("fluctuation", model)
    inputs: dict[nn.Module, Tensor] = {}
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            for module in (block.mlp.down_proj, block.self_attn.o_proj):
                handle = module.register_forward_pre_hook(lambda m, a: inputs.update({m: a[0].flatten(0, 1).double()}))
                model(torch.cat(BATCHES))
                handle.remove()
            mlp, attention = block.mlp.down_proj, block.self_attn.o_proj
            for neuron in (0, 5, 39):
                moved = (inputs[mlp] - inputs[mlp].mean(0))[:, [neuron]] @ mlp.weight[:, [neuron]].T.double()
                assert float(found["neuron"][layer, neuron]) == pytest.approx(float(moved.square().sum(1).mean()), rel=1e-4, abs=1e-9)
            moved_channels = (inputs[attention] - inputs[attention].mean(0)).square().mean(0) * attention.weight.double().square().sum(0)
            close(found["query"][layer].flatten(), moved_channels.view(6, 8).sum(1), "query")
    assert found["neuron"][0, 5] == 0
    close(found["group"], found["query"].sum(-1), "group")


def test_activation_is_the_size_of_what_is_passed_on() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:  # every value is the same everywhere: heads give out their values, whatever they attend to
        block.self_attn.v_proj.weight.data.zero_()
        block.self_attn.v_proj.bias = nn.Parameter(torch.arange(24.0))
    source, specs = specs_of("llama")
    found = compute(dict.fromkeys(("group", "query", "hidden"), "activation"), model, source, specs, token_losses, BATCHES)
    norms = torch.arange(24.0).view(3, 8).norm(dim=1)
    close(found["query"], norms[None, :, None].expand(3, 3, 2), "query")
    close(found["group"], 2 * norms.expand(3, 3), "group")
    model.model.layers[2].input_layernorm.weight.data[7] += 100.0
    assert compute({"hidden": "activation"}, model, source, specs, token_losses, BATCHES)["hidden"].argmax() == 7


def test_a_block_that_writes_nothing_has_no_influence() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    found = scored("block-influence", model)["layer"]
    assert abs(float(found[1])) < 1e-6 and (found[[0, 2]] > 0.01).all() and (found <= 2).all()


@pytest.mark.parametrize(("name", "layers", "kept"), [
    ("last-blocks", 6, {6: [0, 1, 2, 3, 4, 5], 4: [0, 1, 2, 5], 2: [0, 5], 1: [5]}),
    ("last-blocks", 1, {1: [0]}),
    ("every-nth", 6, {6: [0, 1, 2, 3, 4, 5], 4: [0, 2, 3, 5], 3: [0, 3, 5], 2: [0, 5], 1: [0]}),
    ("every-nth", 5, {3: [0, 2, 4]}),
])  # fmt: skip
def test_blocks_that_go_by_their_place(name: str, layers: int, kept: dict[int, list[int]]) -> None:
    model = tiny_model("llama", layers=layers)
    source = anatomy_of(model.config.to_dict())
    for target, expected in kept.items():
        specs = {"layer": GateSpec("layer", (layers,), target)}
        found = compute({"layer": name}, model, source, specs, token_losses, [])["layer"]
        assert sorted(found.topk(target).indices.tolist()) == expected


def test_chance_follows_from_the_seed_and_the_axis() -> None:
    model = tiny_model("llama")
    one, same, other = (scored("random", model, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[axis], same[axis]) and not torch.equal(one[axis], other[axis]) for axis in PRUNABLE)
    assert torch.equal(scored("random", model, ["neuron"], seed=1)["neuron"], one["neuron"])
    assert all((one[axis] >= 0).all() and (one[axis] < 1).all() for axis in PRUNABLE)


def test_fused_does_not_change_its_scale_where_gates_are_closed() -> None:
    """So that axes compare as in a model from which what is closed was cut."""
    model = tiny_model("qwen3")
    source, specs = specs_of("qwen3")
    masks = random_masks(source, source.with_sizes(layer=2, hidden=24, group=2, query=1, neuron=20), seed=3)
    found = compute(dict.fromkeys(specs, "fused"), model, source, specs, token_losses, BATCHES, masks=masks)
    for axis, values in found.items():
        open_ = masks[axis]
        for around in {"group": ("layer",), "query": ("layer", "group"), "neuron": ("layer",)}.get(axis, ()):
            open_ = open_ * masks[around].reshape(*masks[around].shape, *[1] * (open_.dim() - masks[around].dim()))
        assert values[open_ > 0].mean() == pytest.approx(1, rel=1e-4)
        assert not values[open_ == 0].any()


def test_many_scores_take_one_pass() -> None:
    passes = []

    def counted(model: nn.Module, ids_BT: Tensor) -> Tensor:
        passes.append(ids_BT)
        return token_losses(model, ids_BT)

    model, (source, specs) = tiny_model("llama"), specs_of("llama")
    names = {"layer": "block-influence", "hidden": "activation", "group": "taylor", "query": "fluctuation", "neuron": "fused"}
    found = compute(names, model, source, specs, counted, BATCHES)
    assert len(passes) == len(BATCHES)
    for axis, name in names.items():
        close(found[axis], scored(name, model, [axis])[axis], axis)
    assert list(found) == list(names)


@pytest.mark.parametrize("name", SCORES)
def test_every_score_says_what_it_is_and_has_the_gates_shapes(name: str) -> None:
    entry = SCORES[name]
    assert entry.name == name and entry.needs <= set(NEEDS) and set() < entry.axes <= set(PRUNABLE)
    assert entry.about.endswith(".") and len(entry.about) < 140 and ("arXiv" in entry.paper or name == "random")
    found = scored(name, tiny_model("mistral"))
    assert set(found) == entry.axes
    for axis, values in found.items():
        assert values.shape == specs_of("mistral")[1][axis].shape and values.dtype == torch.float32 and not values.requires_grad


def test_what_cannot_be_scored_is_told_at_once() -> None:
    model, (source, specs) = tiny_model("llama"), specs_of("llama")
    del specs["hidden"]
    names = {
        "layer": "activation",
        "neuron": "magnitude_l1",
        "group": "no such thing",
        "hidden": "taylor",
        "width": "taylor",
        "query": "fused",
    }
    with pytest.raises(ConfigError) as refused:
        compute(names, model, source, specs, token_losses, BATCHES)
    told = {problem.field: f"{problem.found} {problem.remedy}" for problem in refused.value.problems}
    assert set(told) == {f"prune.scores.{axis}" for axis in names if axis != "query"}
    assert "group, hidden, neuron, query" in told["prune.scores.layer"] and "block-influence" in told["prune.scores.layer"]
    assert "Did you mean 'magnitude-l1'?" in told["prune.scores.neuron"] and "fluctuation" in told["prune.scores.group"]
    assert "keeps its size" in told["prune.scores.hidden"] and "not there" in told["prune.scores.width"]


def test_scores_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3] = float("inf")
    with pytest.raises(NumericsError, match=r"'magnitude-l2' of 1 of 120 gates of the axis 'neuron'"):
        scored("magnitude-l2", model, ["neuron"])


def test_ranks() -> None:
    found = scores.ranks(torch.tensor([[0.3, -2.0, 9.0], [5.0, 7.0, 6.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.0, 1.0], [0.0, 1.0, 0.5]]))
    torch.testing.assert_close(scores.ranks(torch.ones(4)), torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]))  # ties by place, none lost
    assert scores.ranks(torch.tensor([[3.0]])).tolist() == [[0.0]]
