"""Plans: to JSON and back, and every way in which one can be wrong."""

from __future__ import annotations

import json
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
    "an axis missing": (lambda v: v["keep"].pop("group"), r"keep\.group.*nothing"),
    "of another source": (lambda v: v["source"]["shape"].update(hidden_size=64), r"source\.shape.*64"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a plan"),
        ("{}", "not a plan"),
        ('{"format": 2}', "format"),
        ('{"format": 1, "keep": {"neuron": {"zero": []}}, "source": {}, "target": {}}', "not a plan"),
        ('{"format": 1, "keep": [], "source": {}, "target": {}}', "not a plan"),
    ],
)
def test_a_file_that_is_no_plan(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(ArtifactError, match="missing"):
        load_plan(tmp_path / "gone.json")


def test_the_cut_tensors_share_no_memory_with_the_source() -> None:
    state = tiny_model("llama").state_dict()
    whole = plan_from_masks(SOURCE, SOURCE, {})
    for plan, target in ((make_plan(), TARGET), (whole, SOURCE)):
        cut = dict(transform(plan, SOURCE, target, MemoryReader(state)))
        assert {name: tuple(tensor.shape) for name, tensor in cut.items()} == target.shapes()
        owners = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
        assert all(tensor.is_contiguous() and tensor.untyped_storage().data_ptr() not in owners for tensor in cut.values())
    assert all(torch.equal(tensor, state[name]) for name, tensor in cut.items())
