"""Tasks in the harness, against log-likelihoods computed here: one sequence at a time, from prompts written out by hand."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import shearling
from models import tiny_tokenizer
from shearling.cli import app
from shearling.errors import ArtifactError, ConfigError, DataError, Stopped
from shearling.evaluate import harness
from shearling.modeling_sheared import ShearedConfig, ShearedForCausalLM
from shearling.show import Silent
from task_files import FILES, rows, write

lm_eval = pytest.importorskip("lm_eval")

BLIMP = Path(lm_eval.__file__).parent / "tasks" / "blimp" / "_blimp.yaml"
SUBTASKS = [name.removeprefix("blimp_") for name in yaml.safe_load(BLIMP.read_text())["task"]]
HOW: dict[str, Any] = {"precision": "float32", "device": "cpu", "speed": False, "batch_size": 5}


class Notes(Silent):
    """Keeps what is shown, and may act on it."""

    def __init__(self, act: Callable[[str, int], None] = lambda what, done: None) -> None:
        self.notes: list[str] = []
        self.counts: list[tuple[str, int, str]] = []
        self._act = act

    def note(self, text: str) -> None:
        self.notes.append(text)

    def count(self, what: str, done: int, unit: str) -> None:
        self.counts.append((what, done, unit))
        self._act(what, done)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all tasks: 12 documents, and 3 of each of BLiMP's subtasks."""
    path = tmp_path_factory.mktemp("tasks")
    for task in FILES:
        write(path, task, rows(task, 3 if task == "blimp" else 12, SUBTASKS))
    return path


@pytest.fixture(scope="module")
def found(good_source: Path, folder: Path) -> dict[str, Any]:
    """What all tasks give on a tiny Llama."""
    return dict(shearling.evaluate(good_source, tasks=list(FILES), task_data=folder, **HOW)["tasks"])


def answers(task: str, row: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[str], int]:
    """Prompt and continuation of each choice, the choices as acc_norm measures them, and the right one; zero-shot, as published."""
    if task == "hellaswag":
        prompt = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return [(prompt.strip(), f" {text}") for text in row["endings"]], row["endings"], int(row["label"])
    if task == "piqa":
        choices = [row["sol1"], row["sol2"]]
        return [(f"Question: {row['goal']}\nAnswer:", f" {text}") for text in choices], choices, row["label"]
    if task in ("arc_easy", "arc_challenge", "openbookqa"):
        choices = row["choices"]["text"]
        prompt = row["question_stem"] if task == "openbookqa" else f"Question: {row['question']}\nAnswer:"
        return [(prompt, f" {text}") for text in choices], choices, row["choices"]["label"].index(row["answerKey"])
    if task == "winogrande":
        before, after = row["sentence"].split("_")
        prompts = [before + row["option1"], before + row["option2"]]
        return [(prompt, f" {after.strip()}") for prompt in prompts], prompts, int(row["answer"]) - 1
    if task == "boolq":
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        return [(prompt, " no"), (prompt, " yes")], ["no", "yes"], row["label"]
    assert task == "blimp"
    choices = [row["sentence_good"], row["sentence_bad"]]
    return [("", f" {text}") for text in choices], choices, 0


@torch.no_grad()
def likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, bool]:
    """ln p(answer | prompt), or after the beginning of a text where there is no prompt; and whether each token was the likeliest."""
    before = tokenizer.encode(prompt) if prompt else [tokenizer.bos_token_id]
    after = tokenizer.encode(answer)
    logits_TV = model(torch.tensor([before + after])).logits[0].double()
    said_TV = torch.log_softmax(logits_TV, dim=-1)[len(before) - 1 : -1]
    picked = said_TV[torch.arange(len(after)), torch.tensor(after)]
    return float(picked.sum()), bool((said_TV.argmax(-1) == torch.tensor(after)).all())


def by_hand(model: Any, tokenizer: Any, task: str, lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Metric -> its value for each document."""
    values: dict[str, list[float]] = {}
    for row in lines:
        if task == "lambada_openai":
            *most, last = row["text"].split(" ")
            said, greedy = likelihood(model, tokenizer, " ".join(most), f" {last}")
            values.setdefault("log", []).append(said)
            values.setdefault("acc", []).append(greedy)
            continue
        pairs, choices, right = answers(task, row)
        said_all = [likelihood(model, tokenizer, *pair)[0] for pair in pairs]
        values.setdefault("acc", []).append(int(np.argmax(said_all)) == right)
        lengths = [len(choice) for choice in choices]
        values.setdefault("acc_norm", []).append(int(np.argmax(np.array(said_all) / lengths)) == right)
    return {metric: np.array(found, dtype=float) for metric, found in values.items()}


def loaded(path: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("task", [task for task in FILES if task not in ("blimp", "lambada_openai")])
def test_accuracies_are_those_of_likelihoods_by_hand(found: dict[str, Any], good_source: Path, task: str) -> None:
    expected = by_hand(*loaded(good_source), task, rows(task))
    result = found[task]
    assert result["samples"] == result["of"] == 12
    normed = task not in ("winogrande", "boolq")
    assert ("acc_norm" in result) == normed
    for metric in ("acc", "acc_norm") if normed else ("acc",):
        mean = expected[metric].mean()
        assert result[metric] == pytest.approx(mean)
        assert result[f"{metric}_stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / 11))


def test_the_tasks_differ_enough_to_be_told_apart(found: dict[str, Any]) -> None:
    """Were all right or all wrong, the comparisons above would compare little."""
    assert sum(0 < result["acc"] < 1 for task, result in found.items()) >= 7
    assert any(result.get("acc_norm", result["acc"]) != result["acc"] for result in found.values())


def check_lambada(result: Mapping[str, Any], path: Path, rel: float = 1e-4) -> None:
    """A result against likelihoods by hand."""
    expected = by_hand(*loaded(path), "lambada_openai", rows("lambada_openai"))
    log = expected["log"]
    assert result["acc"] == expected["acc"].mean()
    assert result["perplexity"] == pytest.approx(math.exp(-log.mean()), rel=rel)
    assert result["perplexity_stderr"] == pytest.approx(math.exp(-log.mean()) * log.std(ddof=1) / math.sqrt(12), rel=max(rel, 0.01))


def test_a_perplexity_and_its_error(found: dict[str, Any], good_source: Path) -> None:
    check_lambada(found["lambada_openai"], good_source)


def test_blimp_is_the_mean_over_its_subtasks(found: dict[str, Any], good_source: Path) -> None:
    model, tokenizer = loaded(good_source)
    lines, result = rows("blimp", 3, SUBTASKS), found["blimp"]
    right = np.array([by_hand(model, tokenizer, "blimp", lines[i : i + 3])["acc"] for i in range(0, len(lines), 3)])
    assert result["subtasks"] == pytest.approx(dict(zip(SUBTASKS, right.mean(1), strict=True)))
    assert result["acc"] == pytest.approx(right.mean()) and 0.3 < result["acc"] < 0.7
    assert result["acc_stderr"] == pytest.approx(math.sqrt((right.var(1, ddof=1) / 3).sum()) / 67)
    assert result["samples"] == result["of"] == 201 and len(SUBTASKS) == 67


def test_blimp_needs_all_of_its_subtasks(good_source: Path, tmp_path: Path) -> None:
    write(tmp_path, "blimp", rows("blimp", 1, [*SUBTASKS[1:], "of_my_own"]))
    with pytest.raises(DataError, match=f"without blimp_{SUBTASKS[0]}; with blimp_of_my_own"):
        shearling.evaluate(good_source, tasks="blimp", task_data=tmp_path, **HOW)


def test_a_model_whose_blocks_differ(folder: Path, tmp_path: Path) -> None:
    sizes = {"num_attention_heads": [4, 2], "num_key_value_heads": [2, 1], "intermediate_size": [20, 32]}
    common = {"num_hidden_layers": 2, "hidden_size": 32, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 128}
    model = ShearedForCausalLM(ShearedConfig("llama", **common, **sizes, bos_token_id=0, eos_token_id=1))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(std=0.3)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    result = shearling.evaluate(tmp_path / "model", tasks="lambada_openai", task_data=folder, **HOW)["tasks"]["lambada_openai"]
    check_lambada(result, tmp_path / "model")


def test_in_bfloat16_the_forward_pass_alone_is(good_source: Path, folder: Path, found: dict[str, Any]) -> None:
    """What is made of the logits is in fp32, so that choices whose likelihoods are near are not thrown together."""
    how = HOW | {"precision": "bfloat16", "batch_size": 1}
    result = shearling.evaluate(good_source, tasks="lambada_openai", task_data=folder, **how)["tasks"]["lambada_openai"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log = by_hand(*loaded(good_source), "lambada_openai", rows("lambada_openai"))["log"]
    assert math.log(result["perplexity"]) == pytest.approx(-log.mean(), rel=1e-6)
    assert result["perplexity"] != found["lambada_openai"]["perplexity"]


def test_a_limit_asks_documents_evenly_spaced(good_source: Path, folder: Path) -> None:
    found = shearling.evaluate(good_source, tasks="piqa,blimp", task_data=folder, task_limit=5, **HOW)["tasks"]
    expected = by_hand(*loaded(good_source), "piqa", [rows("piqa")[i] for i in (0, 2, 4, 7, 9)])
    assert found["piqa"]["acc"] == expected["acc"].mean() and found["piqa"]["samples"] == 5 and found["piqa"]["of"] == 12
    assert found["blimp"]["samples"] == 67 and found["blimp"]["acc_stderr"] is None, "one document tells no spread"


def test_answers_of_one_token_are_read_off_one_pass(good_source: Path, tmp_path: Path) -> None:
    lines = [row | {"sol1": f"w{3 + i}", "sol2": f"w{60 + i}"} for i, row in enumerate(rows("piqa"))]
    write(tmp_path, "piqa", lines)
    show = Notes()
    result = shearling.evaluate(good_source, tasks="piqa", task_data=tmp_path, show=show, **HOW)["tasks"]["piqa"]
    assert show.counts[-1] == ("piqa", 12, "of 12 sequences")
    assert result["acc"] == pytest.approx(by_hand(*loaded(good_source), "piqa", lines)["acc"].mean()) and 0 < result["acc"] < 1


def test_a_long_prompt_is_cut_and_told_and_a_long_answer_refused(good_source: Path, tmp_path: Path) -> None:
    lines = rows("piqa", 3)
    long = " ".join(f"w{3 + i % 90}" for i in range(126))
    write(tmp_path, "piqa", [lines[0] | {"goal": long}, *lines[1:]])
    show = Notes()
    assert shearling.evaluate(good_source, tasks="piqa", task_data=tmp_path, show=show, **HOW)["tasks"]["piqa"]["truncated"] == 2
    assert "2 sequences cut at their beginning" in show.notes[-1]
    write(tmp_path, "piqa", [lines[0] | {"sol1": f"{long} {long}"}, *lines[1:]])
    with pytest.raises(ArtifactError, match="an answer is longer than the model's context"):
        shearling.evaluate(good_source, tasks="piqa", task_data=tmp_path, **HOW)


def test_stopped_between_tasks_it_goes_on(good_source: Path, folder: Path, tmp_path: Path, found: dict[str, Any]) -> None:
    out, names = tmp_path / "found.json", "arc_easy,piqa,winogrande"

    def stop(what: str, done: int) -> None:
        if what == "piqa" and done == 10:
            os.kill(os.getpid(), signal.SIGINT)

    show = Notes(stop)
    with pytest.raises(Stopped, match=rf"SIGINT in piqa; finished tasks are kept in {out}"):
        shearling.evaluate(good_source, tasks=names, task_data=folder, out=out, show=show, **HOW)
    assert max(done for what, done, _ in show.counts if what == "piqa") == 10, "it ends before the next batch"
    assert list(json.loads(out.read_text())["tasks"]) == ["arc_easy"]
    again = Notes()
    result = shearling.evaluate(good_source, tasks=names, task_data=folder, out=out, show=again, **HOW)["tasks"]
    assert result == {name: found[name] for name in names.split(",")} and list(result) == names.split(",")
    assert again.notes[0] == "arc_easy: done before" and "arc_easy" not in {what for what, _, _ in again.counts}
    assert ("piqa", 24, "of 24 sequences") in again.counts
    with pytest.raises(Stopped, match=r"nothing is kept. Give --out FILE.json"):
        shearling.evaluate(good_source, tasks="piqa", task_data=folder, show=Notes(stop), **HOW)
    with pytest.raises(ConfigError, match=r"limit: found None in the file, 3 now\. Give another --out"):
        shearling.evaluate(good_source, tasks=names, task_data=folder, out=out, task_limit=3, **HOW)
    write(tmp_path / "other", "arc_easy", rows("arc_easy")[1:])
    with pytest.raises(ConfigError, match="Its documents have changed"):
        shearling.evaluate(good_source, tasks="arc_easy", task_data=tmp_path / "other", out=out, **HOW)


def test_the_command_prints_each_task(good_source: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tasks", "piqa", "--task-data", str(folder), "--task-limit", "6", "--no-speed", "--device", "cpu"]
    told = CliRunner().invoke(app, ["evaluate", str(good_source), *options])
    assert told.exit_code == 0 and "nats/token" not in told.stdout
    assert "  piqa                 acc 0." in told.stdout and "on 6 of 12 documents" in told.stdout
    assert "%|" not in told.output, "the harness's own progress bars"


def test_with_text_there_are_losses_too(monkeypatch: pytest.MonkeyPatch, good_source: Path, folder: Path, tmp_path: Path) -> None:
    text = [{"text": " ".join(f"w{(7 * i + j) % 90 + 3}" for j in range(40))} for i in range(80)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    values = {"source": str(good_source), "target": {"num_hidden_layers": 2}, "runtime": {"device": "cpu"}}
    data = {"domains": {"a": str(tmp_path / "a.jsonl")}, "sequence_length": 32, "heldout_sequences": 2}
    shearling.prepare(values | {"data": data}, tmp_path / "run")
    both = shearling.evaluate(good_source, tmp_path / "run", tasks="piqa", task_data=folder, **HOW)
    assert both["loss"]["a"] > 0 and both["tasks"]["piqa"]["samples"] == 12


def test_documents_of_the_hub_that_do_not_come(good_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*given: Any, **named: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"no network.*--task-data DIR"):
        shearling.evaluate(good_source, tasks="piqa", **HOW)


def test_documents_of_the_hub(good_source: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> None:
    """The harness's own configuration, given what the hub would give: the same answers, by the same rule of choosing."""
    import datasets

    asked = []

    def hub(path: str, name: str | None = None, **named: Any) -> Any:
        asked.append((path, name))
        lines = rows("arc_easy") if path == "allenai/ai2_arc" else [row for row in rows("blimp", 3, SUBTASKS) if row["UID"] == name]
        dataset = datasets.Dataset.from_list(lines)
        return datasets.DatasetDict({split: dataset for split in ("train", "validation", "test")})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    result = shearling.evaluate(good_source, tasks="arc_easy", **HOW)["tasks"]["arc_easy"]
    assert asked == [("allenai/ai2_arc", "ARC-Easy")] and result == found["arc_easy"]
    result = shearling.evaluate(good_source, tasks="arc_easy", task_limit=5, **HOW)["tasks"]["arc_easy"]
    expected = by_hand(*loaded(good_source), "arc_easy", [rows("arc_easy")[i] for i in (0, 2, 4, 7, 9)])
    assert result["acc"] == expected["acc"].mean() and (result["samples"], result["of"]) == (5, 12)
    result = shearling.evaluate(good_source, tasks="blimp", **HOW)["tasks"]["blimp"]
    assert result == found["blimp"] and asked[2:] == [("nyu-mll/blimp", name) for name in SUBTASKS]


def test_a_gpu_that_is_too_small_is_told_with_the_remedy(good_source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM

    def full(*given: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HFLM, "_model_call", full)
    with pytest.raises(ConfigError, match=r"5 sequences of .* tokens. Give a smaller --batch-size"):
        shearling.evaluate(good_source, tasks="piqa", task_data=folder, **HOW)


def test_a_tokenizer_without_a_beginning_or_end() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ArtifactError, match="no token that begins or ends a text"):
        harness.harness_model(None, tokenizer, batch_size=1, bfloat16=False, watch=lambda done, total: None)
