"""Attention inside documents: a packed row gives each document what the document alone gives, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import FAMILIES, tiny_model
from shearling.arch.families import Anatomy, anatomy_of
from shearling.inputs import document_positions, model_inputs
from shearling.io.tensors import MemoryReader
from shearling.modeling_sheared import ShearedConfig, ShearedForCausalLM
from shearling.objectives.lm import token_losses
from shearling.planning import stage_memory, training_memory
from shearling.prune.attach import Attachment
from shearling.prune.compensate import compensate
from shearling.prune.gates import gate_specs
from shearling.prune.rotate import fit_norms, norms_of, stream_covariance
from shearling.prune.stats import collect
from shearling.prune.verify import compare_in_float64, masked_logits
from shearling.recipe import load_recipe
from shearling.sources import Source
from shearling.train.config import TrainConfig

END = 1
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "use_sliding_window": True}
WINDOWS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 5}, "qwen2": WINDOW, "qwen3": WINDOW}
BLOCKS = {"num_attention_heads": [4, 2, 6], "num_key_value_heads": [2, 1, 3], "intermediate_size": [40, 24, 33]}
KINDS = [*FAMILIES, *(f"{family} window" for family in WINDOWS), *(f"{family} sheared" for family in FAMILIES), "mistral sheared window"]
CUTS = [(9, 16), (16,), (1, 16), (1, 2, 3, 15, 16), (15, 16), (8, 15)]
"""Where the documents of each row end, of 16 tokens; the last row ends inside of one, and the second has no mark but its last."""


def packed(cuts: list[tuple[int, ...]] = CUTS, length: int = 16, seed: int = 3) -> Tensor:
    """Rows [B, T] of random words with marks at the ends of their documents."""
    ids_BT = torch.randint(2, 96, (len(cuts), length), generator=torch.Generator().manual_seed(seed))
    for row_T, ends in zip(ids_BT, cuts, strict=True):
        row_T[torch.tensor(ends) - 1] = END
    return ids_BT


def documents(ids_BT: Tensor) -> Iterator[tuple[int, int, int]]:
    """(row, start, end) of every document, or of what a row holds of it; found token by token."""
    for row, ids_T in enumerate(ids_BT.tolist()):
        start = 0
        for place, token in enumerate(ids_T, start=1):
            if token == END or place == len(ids_T):
                yield row, start, place
                start = place


def made(kind: str, attention: str = "sdpa") -> Any:
    """A tiny model in fp64 throughout, norms included, which stock ones round to fp32."""
    family, *more = kind.split()
    fields = WINDOWS[family] if "window" in more else {}
    if "sheared" in more:
        sizes = {"num_hidden_layers": 3, "hidden_size": 48, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 128}
        model = ShearedForCausalLM(ShearedConfig(family, **sizes, **BLOCKS, **fields))
        for parameter in model.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    else:
        model = tiny_model(family)
        if fields:
            model = type(model)(type(model.config)(**{**model.config.to_dict(), **fields}))
    model.set_attn_implementation(attention)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.register_forward_hook(_exact_norm)
    return model.eval().double()


def _exact_norm(norm: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    x: Tensor = args[0]
    found: Tensor = norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return found


def logits(model: Any, ids_BT: Tensor, document_end: int | None) -> Tensor:
    found: Tensor = model(**model_inputs(ids_BT, document_end)).logits
    return found


def alone(model: Any, ids_BT: Tensor) -> Tensor:
    """Logits [B, T, V] of each document by itself, in the places of its tokens."""
    rows: list[list[Tensor]] = [[] for _ in ids_BT]
    for row, start, end in documents(ids_BT):
        rows[row].append(logits(model, ids_BT[row : row + 1, start:end], None)[0])
    return torch.stack([torch.cat(parts) for parts in rows])


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation; the eager one takes its softmax in fp32, here in fp64."""
    original = F.softmax
    monkeypatch.setattr(F, "softmax", lambda *args, dtype=None, **options: original(*args, **options))
    name: str = request.param
    return name


def test_positions_begin_anew_after_each_mark() -> None:
    rows = torch.tensor([[5, 1, 7, 8, 9, 1], [1, 1, 5, 6, 1, 7], [2, 3, 4, 5, 6, 7], [1, 4, 4, 4, 4, 4]])
    expected = [[0, 1, 0, 1, 2, 3], [0, 0, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4]]
    assert document_positions(rows, 1).tolist() == expected
    assert document_positions(rows[:, :1], 1).tolist() == [[0]] * 4
    assert document_positions(packed(), END).tolist() == [
        [place - start for of, start, end in documents(packed()) if of == row for place in range(start, end)] for row in range(len(CUTS))
    ]


def test_without_a_mark_to_look_for_a_model_is_given_what_it_always_was() -> None:
    ids_BT = packed()
    given = model_inputs(ids_BT, None)
    assert given.keys() == {"input_ids", "use_cache"} and given["input_ids"] is ids_BT and given["use_cache"] is False
    model = tiny_model("llama")
    with torch.no_grad():
        plain_BTV = model(input_ids=ids_BT, use_cache=False).logits
        expected_N = F.cross_entropy(plain_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
        assert torch.equal(token_losses(model, ids_BT).flatten(), expected_N)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_document_has_the_logits_that_it_has_alone(kind: str, attention: str) -> None:
    model, ids_BT = made(kind, attention), packed()
    expected, found = alone(model, ids_BT), logits(model, ids_BT, END)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    apart = (logits(model, ids_BT, None) - expected).abs().amax(2)
    for row, start, end in documents(ids_BT):
        if start == 0:
            assert apart[row, start:end].max() < 1e-12
        elif end - start > 1:  # a mark after nothing but marks sees the same either way
            assert apart[row, start:end].max() > 1e-3


@torch.no_grad()
def test_a_row_without_a_mark_gives_the_same_bits() -> None:
    ids_BT = packed([(16,), (16,)])
    ids_BT[0, -1] = 5  # and in the other row a mark at the last place, which nothing follows
    for family in FAMILIES:
        model = tiny_model(family)
        assert torch.equal(logits(model, ids_BT, END), logits(model, ids_BT, None))


@torch.no_grad()
def test_what_follows_a_mark_is_predicted_from_the_mark() -> None:
    """Every token but a row's first counts, those that begin a document included."""
    model, ids_BT = made("qwen2"), packed()
    expected = F.cross_entropy(alone(model, ids_BT)[:, :-1].transpose(1, 2), ids_BT[:, 1:], reduction="none")
    torch.testing.assert_close(token_losses(model, ids_BT, END), expected.float(), rtol=1e-5, atol=1e-5)
    others = ids_BT.clone()
    others[0, :8] = 2  # the first document's words
    changed = (token_losses(model, others, END) != token_losses(model, ids_BT, END))[0]
    assert changed.tolist() == [True] * 8 + [False] * 7 or changed.tolist() == [True] * 9 + [False] * 6


def gates_of(anatomy: Anatomy) -> dict[str, Tensor]:
    """Soft gates on every axis, some of them closed."""
    generator = torch.Generator().manual_seed(2)
    target = anatomy.with_sizes(**{axis: anatomy.sizes[axis] - 1 for axis in ("layer", "hidden", "group", "query", "neuron")})
    specs = gate_specs(anatomy, target)
    assert specs.keys() == {"layer", "hidden", "group", "query", "neuron"}
    drawn = {axis: torch.rand(spec.shape, generator=generator, dtype=torch.float64) for axis, spec in specs.items()}
    return {axis: torch.where(gates < 0.1, 0.0, 0.5 + gates).requires_grad_() for axis, gates in drawn.items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_weights_and_gates_are_those_of_the_documents_alone(family: str, checkpointing: bool, attention: str) -> None:
    ids_BT, model = packed(), made(family, attention)
    anatomy = anatomy_of(model.config.to_dict())
    masks = gates_of(anatomy)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its name before 5.23
        enable({"use_reentrant": False})
        model.train()
    wanted = [*model.parameters(), *masks.values()]

    def gradients(forward: Callable[[Any, Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        with Attachment(model, anatomy) as attachment:
            attachment.set(masks)
            found_BTV = forward(model, ids_BT)
            loss = F.cross_entropy(found_BTV[:, :-1].transpose(1, 2), ids_BT[:, 1:])
            return found_BTV.detach(), list(torch.autograd.grad(loss, wanted))

    expected_BTV, expected = gradients(alone)
    found_BTV, found = gradients(partial(logits, document_end=END))
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(masked_logits(model, anatomy, {a: m.detach() for a, m in masks.items()}, ids_BT, END), found_BTV)
    crossing = gradients(partial(logits, document_end=None))[1]
    assert all((one - other).abs().max() > 1e-6 for one, other in zip(crossing[-len(masks) :], expected[-len(masks) :], strict=True))


def test_a_packed_row_calibrates_as_its_documents_do() -> None:
    """Moments, cosines, covariance, norms' weights, compensated projections: of rows of two documents, and of the documents as rows."""
    rows_BT = packed([(8, 16)] * 4)
    apart_BT = rows_BT.reshape(8, 8)
    model = made("llama")
    anatomy = anatomy_of(model.config.to_dict())
    masks = {
        "hidden": torch.arange(48).ne(5).double(),
        "neuron": torch.ones(3, 40).index_fill(1, torch.arange(7), 0.0),
        "group": torch.ones(3, 3).index_fill(1, torch.tensor([1]), 0.0),
    }
    specs = gate_specs(anatomy, anatomy.with_sizes(layer=2, hidden=36))

    def measured(ids_BT: Tensor, end: int | None) -> dict[str, Any]:
        batches = list(ids_BT.chunk(2))
        objective = partial(token_losses, document_end=end)
        stats = collect(model, anatomy, specs, objective, batches, {"activations", "influence"})
        return {
            "moments": {name: [moments.mean, moments.absolute, moments.variance] for name, moments in stats.inputs.items()},
            "sizes": {**stats.sizes, **stats.cosines},
            "covariance": stream_covariance(model, anatomy, batches, document_end=end),
            "covariance of one": stream_covariance(model, anatomy, batches, norms_of(anatomy)[-1:], document_end=end),
            "norms": fit_norms(model, anatomy, masks["hidden"], batches, document_end=end),
            "compensated": compensate(model, anatomy, masks, batches, ridge=1e-3, document_end=end),
        }

    expected, found, crossing = measured(apart_BT, None), measured(rows_BT, END), measured(rows_BT, None)
    for name, value in expected.items():
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if name in ("moments", "sizes") else {"rtol": 1e-9, "atol": 1e-10}  # of fp32 and of fp64
        torch.testing.assert_close(found[name], value, **tolerance)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(crossing[name], value, rtol=1e-4, atol=1e-5)


def test_masked_and_cut_are_compared_inside_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    anatomy, reader = anatomy_of(model.config.to_dict()), MemoryReader(model.state_dict())
    seen: list[Tensor] = []
    original = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *args, **given: (seen.append(given["position_ids"]), original(*args, **given))[1])
    found = compare_in_float64(model, anatomy, {"hidden": torch.ones(48)}, reader, tiny_model("qwen3"), packed(), END)
    assert found.relative_difference < 1e-12
    assert len(seen) == 2 and all(torch.equal(positions_BT, document_positions(packed(), END)) for positions_BT in seen)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_memory_of_masks_is_what_autograd_keeps(checkpointing: bool, bfloat16: bool) -> None:
    """Within a tenth of what the estimate adds, less the mask that all blocks have: that is held by what runs, not by autograd."""
    length, model = 256, tiny_model("llama", layers=4, groups=6)
    anatomy, ids_BT = anatomy_of(model.config.to_dict()), packed([(100, 200, 256)] * 2, 256)
    part = model.model.layers[:1] if checkpointing else model.model.layers
    model.model.layers = part

    def kept(end: int | None) -> int:
        storages: dict[int, int] = {}
        tensors = []

        def pack(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        context = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
            token_losses(model, ids_BT, end)
        return sum(storages.values())

    fit = TrainConfig(batch_size=2, microbatches=1)
    whole, masked = (
        training_memory(anatomy, fit, length, bfloat16, activation_checkpointing=checkpointing, masked=masked)["activations"]
        for masked in (False, True)
    )
    assert kept(END) - kept(None) == pytest.approx(masked - whole - ids_BT.numel() * length, rel=0.1)


def test_a_plan_counts_masks_where_attention_stays_inside_documents() -> None:
    """Two sequences of 64 tokens a microbatch, in bfloat16: a byte and, of each of three blocks, two for every pair of places."""
    config = tiny_model("llama").config.to_dict()
    source = Source("owner/model", config, anatomy_of(config), Path)

    def memory(attend: str, **runtime: Any) -> int:
        data = {"domains": {"a": "a.txt"}, "sequence_length": 64, "attend": attend}
        recipe = load_recipe(
            {"source": "owner/model", "data": data, "train": {"batch_size": 4, "microbatches": 2}, "runtime": runtime},
        )
        return stage_memory(source, recipe, "train")["total"]

    assert memory("document") - memory("sequence") == 2 * 64 * 64 * (1 + 3 * 2)
    once = {"activation_checkpointing": True, "precision": "float32"}
    assert memory("document", **once) - memory("sequence", **once) == 2 * 64 * 64 * (1 + 4)
