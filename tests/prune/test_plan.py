"""Plans: to JSON and back, today's and those written before, and every way in which one can be wrong."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import tiny_config, tiny_model
from shearling.arch.families import anatomy_of
from shearling.errors import ArtifactError
from shearling.io.tensors import MemoryReader
from shearling.prune.gates import Gates, gate_specs
from shearling.prune.plan import PrunePlan, check_plan, load_plan, plan_from_masks
from shearling.prune.transform import transform
from shearling.shapes import shape_of

SOURCE = anatomy_of(tiny_config("llama").to_dict())
TARGET = SOURCE.with_sizes(layer=2, hidden=24, group=2, query=1, neuron=20)


def make_plan() -> PrunePlan:
    gates, generator = Gates(gate_specs(SOURCE, TARGET)), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for log_alpha in gates.log_alpha.values():
            log_alpha.copy_(torch.randn(log_alpha.shape, generator=generator))
    return plan_from_masks(SOURCE, TARGET, gates.hardened(), "f" * 64, {"method": "test", "seed": 4})


def changed(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> PrunePlan:
    """The plan with its JSON changed, read again."""
    values = json.loads(json.dumps(make_plan().to_json()))
    change(values)
    (tmp_path / "plan.json").write_text(json.dumps(values))
    return load_plan(tmp_path / "plan.json")


def test_a_plan_keeps_what_is_open() -> None:
    masks = {"layer": torch.tensor([1.0, 0, 1]), "neuron": torch.zeros(3, 40), "hidden": torch.zeros(48)}
    masks["neuron"][:, 20:] = 1
    masks["hidden"][::2] = 1
    target = SOURCE.with_sizes(layer=2, hidden=24, neuron=20)
    plan = plan_from_masks(SOURCE, target, masks)
    assert plan.layers == [0, 2] and plan.keep["hidden"] == list(range(0, 48, 2))
    assert plan.keep["neuron"] == {0: list(range(20, 40)), 2: list(range(20, 40))}
    assert plan.keep["group"] == {0: [0, 1, 2], 2: [0, 1, 2]}  # no mask: kept whole
    assert plan.keep["query"] == {0: [[0, 1]] * 3, 2: [[0, 1]] * 3}
    assert plan.keep_in(None) == {"hidden": plan.keep["hidden"]}
    assert set(plan.keep_in(2)) == {"hidden", "group", "query", "neuron"}


def test_each_kept_group_has_its_own_query_heads() -> None:
    masks = {"group": torch.tensor([[1.0, 0, 1]] * 3), "query": torch.zeros(3, 3, 2)}
    masks["query"][..., 0] = 1
    masks["query"][1, 2] = torch.tensor([0.0, 1.0])
    plan = plan_from_masks(SOURCE, SOURCE.with_sizes(group=2, query=1), masks)
    assert plan.keep["query"] == {0: [[0], [0]], 1: [[0], [1]], 2: [[0], [0]]}


def test_to_json_and_back(tmp_path: Path) -> None:
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    check_plan(load_plan(tmp_path / "plan.json"), SOURCE, TARGET)
    values = json.loads((tmp_path / "plan.json").read_text())
    assert set(values) == {"format", "source", "target", "keep", "made_by"}
    assert values["source"]["fingerprint"] == "f" * 64 and values["made_by"]["method"] == "test"
    assert values["target"]["shape"]["num_attention_heads"] == 2


def test_masks_of_another_count_are_refused() -> None:
    mask = torch.ones(48)
    mask[:23] = 0
    with pytest.raises(ArtifactError, match=r"keep\.hidden.*25 kept.*24"):
        plan_from_masks(SOURCE, SOURCE.with_sizes(hidden=24), {"hidden": mask})


def first_layer(values: dict[str, Any]) -> str:
    return str(values["keep"]["layer"][0])


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "one index too few": (lambda v: v["keep"]["hidden"].pop(), r"keep\.hidden.*23 kept"),
    "one layer too many": (lambda v: v["keep"].update(layer=[0, 1, 2]), r"keep\.layer.*3 kept"),
    "an index twice": (lambda v: v["keep"]["hidden"].__setitem__(1, v["keep"]["hidden"][0]), r"keep\.hidden.*ascend"),
    "not in order": (lambda v: v["keep"]["hidden"].reverse(), r"keep\.hidden.*ascend"),
    "an index beyond the source": (lambda v: v["keep"]["hidden"].__setitem__(-1, 48), r"keep\.hidden.*0\.\.47"),
    "a negative index": (lambda v: v["keep"]["neuron"][first_layer(v)].__setitem__(0, -1), r"keep\.neuron.*0\.\.39"),
    "a layer without neurons": (lambda v: v["keep"]["neuron"].pop(first_layer(v)), r"keep\.neuron.*0 kept"),
    "a layer without query heads": (lambda v: v["keep"]["query"].pop(first_layer(v)), r"keep\.query.*0 lists"),
    "a group without query heads": (lambda v: v["keep"]["query"][first_layer(v)].pop(), r"keep\.query.*1 lists"),
    "too many query heads": (lambda v: v["keep"]["query"][first_layer(v)].__setitem__(0, [0, 1]), r"keep\.query.*2 kept"),
    "of another source": (lambda v: v["source"]["shape"].update(hidden_size=64), r"source\.shape.*64"),
    "to another target": (lambda v: v["target"]["shape"].pop("hidden_size"), r"target\.shape"),
    "a layer that is not kept": (lambda v: v["keep"]["group"].update({"9": [0, 1]}), r"keep\.group\.9.*not kept"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_that_does_not_fit(change: str, tmp_path: Path) -> None:
    """Refused by the check, and by the transform before it reads a tensor."""
    edit, message = CHANGES[change]
    plan = changed(edit, tmp_path)
    with pytest.raises(ArtifactError, match=message) as refused:
        check_plan(plan, SOURCE, TARGET)
    assert refused.value.exit_code == 3
    with pytest.raises(ArtifactError):
        next(transform(plan, SOURCE, TARGET, MemoryReader({})))


def test_every_problem_at_once(tmp_path: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["keep"]["hidden"].pop()
        values["keep"]["neuron"][first_layer(values)].pop()

    with pytest.raises(ArtifactError) as refused:
        check_plan(changed(edit, tmp_path), SOURCE, TARGET)
    assert len(refused.value.problems) == 2


KEEP = '{"format": 1, "source": {"shape": {}, "fingerprint": ""}, "target": {"shape": {}}, "made_by": {}, "keep": %s}'


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("{", ["JSON"]),
        ("[]", ["plan"]),
        ("null", ["plan"]),
        ('{"format": 1, "format": 1}', ["JSON"]),
        ("{}", ["format", "source", "source.fingerprint", "target", "made_by", "source.shape", "target.shape", "keep"]),
        (KEEP % "[]", ["keep"]),
        (KEEP % "{}", [f"keep.{axis}" for axis in ("layer", "hidden", "group", "query", "neuron")]),
        (
            KEEP % '{"layer": [true], "hidden": {"0": []}, "group": [], "query": {"0": [[0], 0]}, "neuron": {"0": [1.0], "1": 3}, "x": []}',
            ["keep.layer", "keep.hidden", "keep.group", "keep.query.0", "keep.neuron.0", "keep.neuron.1", "keep.x"],
        ),
        (
            KEEP % '{"layer": [], "hidden": [], "group": {}, "query": {}, "neuron": {"": [], "-1": [], "01": [], "\u0661": [], "1": [0]}}',
            ["keep.neuron.", "keep.neuron.-1", "keep.neuron.01", "keep.neuron.\u0661"],
        ),
        (KEEP % ("[" * 400 + "]" * 400), ["keep"]),
    ],
)
def test_a_file_that_is_no_plan(text: str, fields: list[str], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"plan\.json") as refused:
        load_plan(tmp_path / "plan.json")
    assert refused.value.exit_code == 3 and [problem.field for problem in refused.value.problems] == fields
    with pytest.raises(ArtifactError, match="missing"):
        load_plan(tmp_path / "gone.json")


@pytest.mark.parametrize("version", [2, 17])
def test_a_newer_plan_is_refused_naming_both_versions(version: int, tmp_path: Path) -> None:
    """Whatever else is in it."""
    (tmp_path / "plan.json").write_text(json.dumps({"format": version, "news": []}))
    with pytest.raises(ArtifactError, match=f"format {version}; this version reads up to 1") as refused:
        load_plan(tmp_path / "plan.json")
    assert refused.value.exit_code == 3


def test_a_plan_of_format_1() -> None:
    """The file that the first version wrote is read, and the present one writes the same."""
    path = Path(__file__).parents[1] / "fixtures" / "plan-1.json"
    plan = load_plan(path)
    keep = {"layer": [0, 2], "hidden": [1, 3, 4, 11], "group": {0: [1, 2], 2: [0, 2]}, "query": {0: [[0], [1]], 2: [[1], [1]]}}
    source = anatomy_of(tiny_config("llama", layers=3, hidden=12, heads=6, groups=3, head_dim=2, neurons=6, vocab=16).to_dict())
    target = source.with_sizes(layer=2, hidden=4, group=2, query=1, neuron=3)
    assert plan.keep == {**keep, "neuron": {0: [0, 2, 5], 2: [1, 2, 3]}}
    assert plan.source_shape == shape_of(source) and plan.target_shape == shape_of(target)
    assert plan.source_fingerprint == "0123456789abcdef" * 4
    assert plan.made_by == {"method": "sheared-llama", "seed": 17, "steps": 12}
    numbered = {name: torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape) for name, shape in source.shapes().items()}
    cut = dict(transform(plan, source, target, MemoryReader(numbered)))
    up = numbered["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(cut["model.layers.1.mlp.up_proj.weight"], up[[1, 2, 3]][:, [1, 3, 4, 11]])
    queries = numbered["model.layers.0.self_attn.q_proj.weight"].reshape(3, 2, 2, 12)  # of groups 1 and 2 the heads 0 and 1
    kept = torch.cat([queries[1, 0], queries[2, 1]])[:, [1, 3, 4, 11]]
    assert torch.equal(cut["model.layers.0.self_attn.q_proj.weight"], kept)
    assert json.dumps(plan.to_json()) + "\n" == path.read_text()


OTHERS: list[Any] = [None, True, 0, -1, 7, 1.5, 1e400, "", "x", [], [None], [[]], [0, "1"], {}, {"0": None}, {"x": {}}, 10**30]
"""Values of every type, to stand where another is due."""


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path into nested plain values, containers and leaves, the outermost left out."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [found for key, value in inner for found in ((*path, key), *places(value, (*path, key)))]


def mutated(whole: dict[str, Any], rng: random.Random, spots: list[tuple[Any, ...]]) -> dict[str, Any]:
    """A plan in which one to three values are dropped or replaced."""
    values = copy.deepcopy(whole)
    for _ in range(rng.randint(1, 3)):
        *way, last = rng.choice(spots)
        node: Any = values
        try:
            for key in way:
                node = node[key]
            if rng.random() < 0.3:
                del node[last]
            else:
                node[last] = rng.choice(OTHERS)
        except (KeyError, IndexError, TypeError):  # an earlier change took it away
            continue
    return values


def test_every_malformed_plan_is_an_artifact_error(tmp_path: Path) -> None:
    """Every field dropped and replaced, then 500 seeded mutations: a sound plan, or one error that lists what is wrong."""
    whole = json.loads(json.dumps(make_plan().to_json()))
    path, spots, accepted = tmp_path / "plan.json", places(whole), 0

    def refused(values: Any) -> list[str]:
        nonlocal accepted
        path.write_text(json.dumps(values))
        try:
            plan = load_plan(path)
            check_plan(plan, SOURCE, TARGET)
            accepted += 1
            assert plan.keep == make_plan().keep and plan.target_shape == shape_of(TARGET)
            return []
        except ArtifactError as error:
            assert error.exit_code == 3 and error.problems
            return [problem.field for problem in error.problems]

    for way in [way for way in spots if all(isinstance(key, str) for key in way) and way[:-1] != ("made_by",)]:
        node = dropped = copy.deepcopy(whole)
        for key in way[:-1]:
            node = node[key]
        where, old = ".".join(way), node.pop(way[-1])
        missing = where if where.count(".") < 2 else where.rpartition(".")[0]  # a size: of its shape; a layer: of its axis
        assert any(field.startswith(missing) for field in refused(dropped)), where
        for other in [other for other in OTHERS if type(other) is not type(old)]:
            node[way[-1]] = other
            assert any(field.startswith(missing) for field in refused(dropped)), (where, other)
    assert accepted == 0
    small = [way for way in spots if len(way) < 4] + random.Random(0).sample([way for way in spots if len(way) >= 4], 40)
    for seed in range(500):
        refused(mutated(whole, random.Random(seed), small))
    assert 0 < accepted < 50  # what made the plan is for the reader alone


def test_the_cut_tensors_share_no_memory_with_the_source() -> None:
    state = tiny_model("llama").state_dict()
    whole = plan_from_masks(SOURCE, SOURCE, {})
    for plan, target in ((make_plan(), TARGET), (whole, SOURCE)):
        cut = dict(transform(plan, SOURCE, target, MemoryReader(state)))
        assert {name: tuple(tensor.shape) for name, tensor in cut.items()} == target.shapes()
        owners = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
        assert all(tensor.is_contiguous() and tensor.untyped_storage().data_ptr() not in owners for tensor in cut.values())
    assert all(torch.equal(tensor, state[name]) for name, tensor in cut.items())
