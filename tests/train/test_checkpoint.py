"""Checkpoints: exact, of one part or of many, damage found, old formats read and newer ones refused."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shearling.board import opened, sealed
from shearling.errors import ArtifactError, NewerFormatError
from shearling.train import checkpoint
from shearling.train.checkpoint import load, publish, steps, write_part
from shearling.train.saver import Saver
from shearling.world import World
from tiny_stage import bits

FIXTURES = Path(__file__).parents[1] / "fixtures"
STATE = {"mixture": {"web": 0.1 + 0.2, "code": 1e-300}, "best": float("inf"), "note": "ü"}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(5, 7, generator=draw),
        "half": torch.randn(3, generator=draw).bfloat16(),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "slice": torch.randn(6, 6, generator=draw)[::2, 1:],
        "nothing": torch.empty(0, 4),
        "odd": torch.tensor([float("nan"), float("-inf"), -0.0], dtype=torch.float64),
    }


def save(folder: Path, step: int, values: dict[str, Tensor], state: dict[str, Any], keep: int = 2, parts: int = 1) -> Path:
    """A checkpoint of so many parts: rows dealt as to so many processes, what has too few of them whole in the first."""
    staged = folder / f".tmp-step-{step:08d}-{'0' * 12}"
    staged.mkdir(parents=True)
    rows: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for name, value in values.items():
        pieces = value.chunk(parts) if value.dim() and len(value) >= parts else (value,)
        for rank, piece in enumerate(pieces):
            rows[rank][name] = piece
    return publish(staged, step, [write_part(staged, rank, own) for rank, own in enumerate(rows)], state, keep)


def same(found: checkpoint.Checkpoint, expected: dict[str, Tensor]) -> bool:
    return {name: bits(found.whole(name)) for name in found.shapes} == {name: bits(tensor) for name, tensor in expected.items()}


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_round_trip_is_exact(parts: int, tmp_path: Path) -> None:
    path = save(tmp_path / "c", 50, tensors(), STATE, parts=parts)
    assert sorted(file.name for file in path.glob("rank-*")) == [f"rank-{rank:05d}.safetensors" for rank in range(parts)]
    found = load(tmp_path / "c")
    assert found is not None and found.step == 50 and found.state == STATE and found.path == path
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in tensors().items()}
    assert same(found, tensors())
    found.whole("count").zero_()
    found.rows("w", 0, 1).zero_()  # mapped privately: the file keeps its content
    again = load(tmp_path / "c", 50)
    assert again is not None and same(again, tensors())


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_any_rows_are_read_across_the_parts(parts: int, tmp_path: Path) -> None:
    save(tmp_path, 1, tensors(), {}, parts=parts)
    found = load(tmp_path)
    assert found is not None
    for name, whole in tensors().items():
        for start in range(len(whole) if whole.dim() else 0):
            for end in range(start, len(whole) + 1):
                assert bits(found.rows(name, start, end)) == bits(whole[start:end]), (name, start, end)


def test_the_same_bytes_from_the_same_tensors(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, 1, tensors(), STATE, parts=2) for name in ("one", "other")]
    one, other = ({file.name: file.read_bytes() for file in path.iterdir()} for path in paths)
    assert one == other and len(one) == 4


def test_no_checkpoint_is_none_and_a_named_one_is_an_error(tmp_path: Path) -> None:
    assert load(tmp_path / "nowhere") is None and load(tmp_path) is None
    save(tmp_path, 10, tensors(), {})
    with pytest.raises(ArtifactError, match=r"no checkpoint of step 3[^0-9]") as caught:
        load(tmp_path, 3)
    assert "There are 10." in str(caught.value) and caught.value.exit_code == 3


def test_only_whole_names_are_steps(tmp_path: Path) -> None:
    for name in ("step-50", "xstep-00000050", "step-00000050.bak", ".tmp-step-00000050-aa", "step-0000000050", "step-00000007"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-123456789").mkdir()
    assert list(steps(tmp_path)) == [7, 123456789]


def damaged_variants(whole: Path) -> list[tuple[str, Any]]:
    """(file, its bytes torn, longer, flipped; None: gone) for every file of a checkpoint."""
    draw = random.Random(0)
    cases: list[tuple[str, Any]] = []
    for path in sorted(whole.iterdir()):
        data = path.read_bytes()
        cuts = sorted(cut for cut in {0, 1, 8, len(data) // 2, len(data) - 1} if cut < len(data))
        cases += [(path.name, data[:cut]) for cut in cuts] + [(path.name, data + b"x"), (path.name, None)]
        for _ in range(20):
            flipped = bytearray(data)
            flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            cases.append((path.name, bytes(flipped)))
    return cases


@pytest.mark.parametrize("parts", [1, 2])
def test_damage_is_found_and_passed_over(parts: int, tmp_path: Path) -> None:
    save(tmp_path, 10, tensors(1), {"n": 1}, parts=parts)
    newest = save(tmp_path, 20, tensors(2), {"n": 2}, parts=parts)
    variants = damaged_variants(newest)
    assert {name for name, _ in variants} == {"manifest.json", "state.json", *(f"rank-{rank:05d}.safetensors" for rank in range(parts))}
    for name, data in variants:
        whole = (newest / name).read_bytes()
        if data is None:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(data)
        with pytest.warns(UserWarning, match=name) as told:
            fallen_back = load(tmp_path)
        assert len(told) == 1 and "passed over" in str(told[0].message)
        assert fallen_back is not None and fallen_back.step == 10 and fallen_back.state == {"n": 1} and same(fallen_back, tensors(1))
        with pytest.raises(ArtifactError, match=name) as caught:
            load(tmp_path, 20)
        assert caught.value.exit_code == 3
        (newest / name).write_bytes(whole)
    found = load(tmp_path)
    assert found is not None and found.step == 20 and len(variants) >= (parts + 2) * 26


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (10, 20):
        (save(tmp_path, step, tensors(), {}) / "state.json").write_text("{}x")
    with pytest.warns(UserWarning, match="passed over") as told, pytest.raises(ArtifactError, match="no checkpoint is whole") as caught:
        load(tmp_path)
    assert len(told) == len(caught.value.problems) == 2


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest, and let it vouch for itself."""
    values = json.loads(path.read_text().partition("\n")[2])
    change(values)
    body = json.dumps(values)
    path.write_text(hashlib.sha256(body.encode()).hexdigest() + "\n" + body)


def test_a_newer_format_is_refused_naming_both(tmp_path: Path) -> None:
    """And there is no falling back from it unasked: what the newer version did since would be lost."""
    save(tmp_path, 10, tensors(), {})
    manifest = save(tmp_path, 20, tensors(), {}) / "manifest.json"
    rewritten(manifest, lambda values: values.update(format=checkpoint.FORMAT + 7))
    for step in (None, 20):
        with pytest.raises(ArtifactError, match=rf"format {checkpoint.FORMAT + 7}; this version reads up to {checkpoint.FORMAT}"):
            load(tmp_path, step)
    found = load(tmp_path, 10)
    assert found is not None and same(found, tensors())


def test_a_newer_format_told_by_another_process_is_refused_too(tmp_path: Path) -> None:
    """Its error keeps its class on the way over the board."""
    save(tmp_path, 10, tensors(), {})
    rewritten(save(tmp_path, 20, tensors(), {}) / "manifest.json", lambda values: values.update(format=9))

    class Told(World):
        def everywhere(self, work: Callable[[], Any]) -> Any:
            try:
                return work()
            except ArtifactError as error:
                return opened(json.loads(json.dumps(sealed(None, error))))

    with pytest.raises(NewerFormatError, match="format 9"):
        load(tmp_path, world=Told())


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "of another step": lambda values: values.update(step=19),
    "of no format": lambda values: values.pop("format"),
    "of a format that is text": lambda values: values.update(format="2"),
    "without files": lambda values: values.pop("files"),
    "with a list of files": lambda values: values.update(files=[]),
    "without the state": lambda values: values["files"].pop("state.json"),
    "without a digest": lambda values: values["files"]["state.json"].pop("sha256"),
    "without the first part": lambda values: values["files"].pop("rank-00000.safetensors"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_makes_no_sense_is_damage(change: str, tmp_path: Path) -> None:
    save(tmp_path, 10, tensors(1), {})
    path = save(tmp_path, 20, tensors(2), {}, parts=2)
    rewritten(path / "manifest.json", CHANGES[change])
    if change == "without the first part":
        (path / "rank-00000.safetensors").unlink()
    with pytest.raises(ArtifactError):
        load(tmp_path, 20)
    with pytest.warns(UserWarning, match="passed over"):
        found = load(tmp_path)
    assert found is not None and found.step == 10


def test_parts_that_do_not_go_together_are_damage(tmp_path: Path) -> None:
    staged = tmp_path / ".tmp-step-00000010-000000000000"
    staged.mkdir()
    parts = [write_part(staged, rank, {"w": torch.zeros(2, 3 + rank)}) for rank in (0, 1)]
    publish(staged, 10, parts, {}, 2)
    with pytest.raises(ArtifactError, match=r"w: found rows of shape \(2, 4\) after rows of shape \(2, 3\)"):
        load(tmp_path, 10)


def test_a_manifest_cannot_lead_outside(tmp_path: Path) -> None:
    path = save(tmp_path / "c", 10, tensors(), {}) / "manifest.json"
    rewritten(path, lambda values: values["files"].update({"../../secret": {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(ArtifactError, match="refuses to open"):
        load(tmp_path / "c", 10)


# Formats that were written once are read for good.


GOLDEN = {
    "gates/log_alpha.hidden": (torch.float32, (3,), "3c94bd66837cabe7"),
    "gates/steps": (torch.int64, (), "f0a0278e4372459c"),
    "model/embed.weight": (torch.float32, (7, 3), "7f41c74647d31407"),
    "model/half": (torch.bfloat16, (4, 2), "6dba1bc32aea8326"),
    "model/norm.weight": (torch.float32, (3,), "06a9293217b20bea"),
    "optimizer/exp_avg/embed.weight": (torch.float32, (7, 3), "7afcbe7885a7e0e5"),
    "optimizer/exp_avg_sq/embed.weight": (torch.float32, (7, 3), "9cf2f547bca23847"),
}
"""Dtype, shape and begin of the SHA-256 of every tensor of the checkpoints in tests/fixtures. They were drawn from torch's generator,
whose last bits are others on other kinds of CPU."""
GOLDEN_STATE = {"progress": {"step": 4, "weights": [0.25, 0.75]}, "optimizer": {"step": {"embed.weight": 4.0}}}


def is_golden(found: checkpoint.Checkpoint) -> bool:
    """Whether a checkpoint holds what those in tests/fixtures do, to the bit."""
    content = {name: bits(found.whole(name)) for name in found.shapes}
    digests = {name: (dtype, shape, hashlib.sha256(data).hexdigest()[:16]) for name, (dtype, shape, data) in content.items()}
    return digests == GOLDEN and found.state == GOLDEN_STATE


@pytest.mark.parametrize("version", [1, 2])
def test_golden_checkpoints_are_read(version: int) -> None:
    folder = FIXTURES / f"checkpoint-{version}"
    (path,) = folder.iterdir()
    assert json.loads((path / "manifest.json").read_text().partition("\n")[2])["format"] == version
    found = load(folder)
    assert found is not None and found.step == 4 and is_golden(found)
    assert len(found.pieces["model/embed.weight"]) == version
    whole = found.whole("model/embed.weight")
    assert all(bits(found.rows("model/embed.weight", start, 7)) == bits(whole[start:]) for start in range(8))


def test_what_is_written_now_is_the_golden_checkpoint(tmp_path: Path) -> None:
    """To the byte; where that is meant to change, FORMAT does too, and a new golden one comes beside the old."""
    assert max(int(path.name.partition("-")[2]) for path in FIXTURES.glob("checkpoint-*")) == checkpoint.FORMAT
    old = load(FIXTURES / "checkpoint-1")
    assert old is not None
    path = save(tmp_path, 4, {name: old.whole(name) for name in old.shapes}, old.state, parts=2)
    (kept,) = (FIXTURES / f"checkpoint-{checkpoint.FORMAT}").iterdir()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {file.name: file.read_bytes() for file in kept.iterdir()}


def test_an_old_checkpoint_is_gone_on_from_in_the_new_format(tmp_path: Path) -> None:
    """The newer one beside it is found first, and the old one counts when old ones are deleted."""
    folder = Path(shutil.copytree(FIXTURES / "checkpoint-1", tmp_path / "c"))
    old = load(folder)
    assert old is not None
    with Saver(folder) as saver:
        for step, left in ((5, [4, 5]), (6, [5, 6])):
            saver.save(step, {name: old.whole(name) for name in old.shapes}, old.state)
            found = load(folder)
            assert found is not None and found.step == step and is_golden(found)
            assert list(steps(folder)) == left
