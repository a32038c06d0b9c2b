"""What is told of tasks before any model is loaded, with or without the harness; which documents a limit takes; what is kept."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from safetensors.torch import load_file, save_file

import shearling
from shearling.errors import ConfigError, DataError, OutputError, ShearlingError
from shearling.evaluate import kept
from shearling.evaluate.harness import harness_version
from shearling.evaluate.kept import Kept, model_mark
from shearling.evaluate.tasks import TASKS, chosen_names, limits, read_documents, spaced
from shearling.sources import Source, open_source
from task_files import FILES, rows, write


@pytest.fixture(autouse=True)
def _no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Source, dtype: Any = None) -> Any:
        raise AssertionError("a model is loaded before what is wrong is told")

    monkeypatch.setattr(Source, "load_model", load)


def refused(kind: type[ShearlingError], source: Path, **how: Any) -> str:
    with pytest.raises(kind) as caught:
        shearling.evaluate(source, device="cpu", **how)
    return str(caught.value)


def test_wrong_options_are_told_at_once(good_source: Path) -> None:
    assert "--data DIR, --tasks" in refused(ConfigError, good_source)
    told = refused(ConfigError, good_source, tasks="piqa", task_limit=0, attend="all")
    assert "task_limit" in told and "attend" in told
    told = refused(ConfigError, good_source, data="somewhere", task_limit=3, out="x.json", task_data="y")
    assert all(field in told for field in ("task_limit: found 3", "out: found x.json", "task_data: found y"))


def test_unknown_tasks_are_told_with_the_list(good_source: Path) -> None:
    told = refused(ConfigError, good_source, tasks="piqa,helaswag,,mmlu")
    assert "'helaswag'" in told and "'mmlu'" in told and all(name in told for name in TASKS) and "'piqa'" not in told
    assert "no tasks" in refused(ConfigError, good_source, tasks=" ,")
    assert chosen_names(" piqa, blimp,piqa") == chosen_names(["piqa", "blimp"]) == ["piqa", "blimp"]


def test_all_missing_files_are_told(good_source: Path, tmp_path: Path) -> None:
    write(tmp_path / "tasks", "piqa", rows("piqa"))
    told = refused(DataError, good_source, tasks=list(FILES), task_data=tmp_path / "tasks")
    assert all(f"Put {stem}.jsonl there" in told for task, stem in FILES.items() if task != "piqa") and "piqa_valid" not in told
    assert "no such folder" in refused(DataError, good_source, tasks="piqa", task_data=tmp_path / "nowhere")


BROKEN: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "no JSON": ("piqa", lambda row: "{", "is not JSON"),
    "a list": ("piqa", lambda row: [1], "is not a JSON object"),
    "a field missing": ("piqa", lambda row: {key: row[key] for key in ("goal", "sol1", "label")}, "has no field 'sol2'"),
    "a label out of range": ("piqa", lambda row: row | {"label": 2}, "It must be 0 or 1"),
    "a label that is true": ("boolq", lambda row: row | {"label": True}, "It must be a whole number"),
    "a label without its ending": ("hellaswag", lambda row: row | {"label": "4"}, "label is 4, and there are 4 endings"),
    "endings that are no list": ("hellaswag", lambda row: row | {"endings": "w3"}, "a list of two texts"),
    "an answer that is no choice": ("arc_easy", lambda row: row | {"answerKey": "1"}, "answerKey is '1'"),
    "labels too few": ("openbookqa", lambda row: row | {"choices": {"text": ["w3", "w4"], "label": ["A"]}}, "each with a label"),
    "no blank": ("winogrande", lambda row: row | {"sentence": "w3 w4."}, "sentence has no _"),
    "an answer of three": ("winogrande", lambda row: row | {"answer": "3"}, '"1" or "2"'),
    "one word": ("lambada_openai", lambda row: {"text": "w3 "}, "a word to be predicted"),
    "a blank sentence": ("blimp", lambda row: row | {"sentence_bad": " "}, "a text that is not blank"),
}


@pytest.mark.parametrize("wrong", BROKEN)
def test_a_wrong_line_is_told_by_file_and_line(good_source: Path, tmp_path: Path, wrong: str) -> None:
    task, change, words = BROKEN[wrong]
    lines = rows(task, 4, subtasks=["adjunct_island"])
    path = write(tmp_path, task, lines)
    assert read_documents(task, path, None).size == 4, "without the change nothing is wrong"
    changed = change(dict(lines[2]))
    text = [json.dumps(line) for line in lines]
    text[2] = changed if isinstance(changed, str) else json.dumps(changed)
    path.write_text("\n".join(text))
    told = refused(DataError, good_source, tasks=task, task_data=tmp_path)
    assert f"{path}: line 3" in told and words in told


def test_a_damaged_or_empty_file_is_told(good_source: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "piqa", [])
    assert "no documents" in refused(DataError, good_source, tasks="piqa", task_data=tmp_path)
    path.unlink()
    whole = zstandard.compress("".join(json.dumps(row) + "\n" for row in rows("piqa", 50)).encode())
    (tmp_path / "piqa_valid.jsonl.zst").write_bytes(whole[:-5])
    assert "piqa_valid.jsonl.zst" in refused(DataError, good_source, tasks="piqa", task_data=tmp_path)
    (tmp_path / "piqa_valid.jsonl.zst").write_bytes(whole)
    plain = read_documents("piqa", write(tmp_path / "plain", "piqa", rows("piqa", 50)), 7)
    assert read_documents("piqa", tmp_path / "piqa_valid.jsonl.zst", 7) == plain, "and so does compression, in the mark, too"


def test_without_the_harness_the_remedy_is_told(good_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name, *rest))
    write(tmp_path, "piqa", rows("piqa"))
    assert "pip install 'shearling[eval]'" in refused(ConfigError, good_source, tasks="piqa", task_data=tmp_path)
    with pytest.raises(ConfigError, match=r"shearling\[eval\]"):
        harness_version()


def test_a_limit_takes_documents_evenly_spaced() -> None:
    assert spaced(10, 4) == [0, 2, 5, 7] and spaced(3, 5) == spaced(3, None) == [0, 1, 2] and spaced(10042, 1) == [0]
    for size, limit in ((10042, 200), (1267, 1266), (67, 66)):
        chosen = spaced(size, limit)
        steps = {after - before for before, after in zip(chosen, [*chosen[1:], size], strict=True)}
        assert len(set(chosen)) == limit and steps <= {size // limit, size // limit + 1}


def test_a_limit_is_shared_among_subtasks(tmp_path: Path) -> None:
    sizes = [1000] * 67
    shares = limits(sizes, 200)
    assert sum(share or 0 for share in shares) == 200 and set(shares) == {2, 3}
    assert limits(sizes, 5) == [1] * 67 and limits(sizes, None) == [None] * 67 and limits([12], 5) == [5]
    lines = rows("blimp", 10, subtasks=["adjunct_island", "causative", "drop_argument"])
    documents = read_documents("blimp", write(tmp_path, "blimp", lines), 5)
    assert {name: len(found) for name, found in documents.chosen.items()} == {
        "blimp_adjunct_island": 1,
        "blimp_causative": 2,
        "blimp_drop_argument": 2,
    }
    assert documents.size == 30 and documents.chosen["blimp_causative"][1] == lines[15]


def test_the_documentation_has_each_tasks_file_and_fields() -> None:
    table = [line for line in (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text().splitlines() if line.startswith("| `")]
    for name, task in TASKS.items():
        line = next(line for line in table if f"`{name}`" in line)
        assert all(f"`{word}`" in line for word in (task.file, *task.fields)), name


ASKED = {"model": "m", "limit": 5, "precision": "float32", "lm_eval": "0"}


def test_finished_tasks_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    first = Kept(path, ASKED)
    assert first.result("piqa", "d") is None and not path.exists()
    first.keep("piqa", "d", {"acc": 0.5})
    first.keep("boolq", "e", {"acc": 0.25})
    again = Kept(path, ASKED)
    assert (
        again.result("piqa", "d") == {"acc": 0.5} and again.result("boolq", "e") == {"acc": 0.25} and again.result("arc_easy", "d") is None
    )
    with pytest.raises(ConfigError, match=r"piqa: found documents d in the file, f now.*another --out"):
        again.result("piqa", "f")
    for key, other in (("model", "n"), ("limit", None), ("precision", "bfloat16"), ("lm_eval", "1")):
        with pytest.raises(ConfigError, match=rf"{key}: found .* in the file, .* now\. Give another --out"):
            Kept(path, ASKED | {key: other})
    assert sorted(tmp_path.iterdir()) == [path]


def test_what_is_no_file_of_ours_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    for text in ('{"format": 1}', "[]", json.dumps({"format": 1, "asked": ASKED, "tasks": {"piqa": {"documents": "d"}}})):
        path.write_text(text)
        with pytest.raises(OutputError, match="holds no results of tasks"):
            Kept(path, ASKED)
        assert path.read_text() == text
    with pytest.raises(OutputError):
        Kept(tmp_path, ASKED)
    monkeypatch.setattr(kept, "ROOM", 2**60)
    with pytest.raises(shearling.StorageError, match="are needed and"):
        Kept(tmp_path / "new.json", ASKED)


def test_two_trainings_of_one_shape_are_two_models(source: Path) -> None:
    before, header = model_mark(open_source(source)), open_source(source).fingerprint()
    weights = load_file(source / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    weights[name][0, 0] += 1
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert open_source(source).fingerprint() == header, "headers do not tell them apart"
    assert model_mark(open_source(source)) != before
