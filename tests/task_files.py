"""Small files of zero-shot tasks, in the form of the real ones, of words that the tokenizer of `models` knows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILES = {
    "hellaswag": "hellaswag_val",
    "piqa": "piqa_valid",
    "arc_easy": "arc_easy_test",
    "arc_challenge": "arc_challenge_test",
    "lambada_openai": "lambada_openai_test",
    "blimp": "blimp",
    "winogrande": "winogrande_xl_dev",
    "boolq": "boolq_dev",
    "openbookqa": "openbookqa_test",
}


def words(draw: random.Random, least: int = 2, most: int = 6) -> str:
    return " ".join(f"w{draw.randint(3, 95)}" for _ in range(draw.randint(least, most)))


def _chosen(draw: random.Random, field: str, number: int) -> dict[str, Any]:
    labels = "ABCDE"[: draw.randint(3, 5)]
    texts = [words(draw) for _ in labels]
    return {"id": f"x-{number}", field: words(draw), "choices": {"text": texts, "label": list(labels)}, "answerKey": draw.choice(labels)}


def rows(task: str, count: int = 12, subtasks: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Lines of a task's file; `subtasks` are BLiMP's, each with `count` lines."""
    draw = random.Random(task)
    if task == "blimp":
        return [{"sentence_good": words(draw), "sentence_bad": words(draw), "UID": name} for name in subtasks for _ in range(count)]
    found: list[dict[str, Any]] = []
    for number in range(count):
        if task == "hellaswag":
            endings = [words(draw) for _ in range(4)]
            context = {"ind": number, "activity_label": words(draw), "ctx_a": words(draw), "ctx_b": draw.choice(["", words(draw)])}
            found.append(context | {"endings": endings, "label": str(draw.randint(0, 3))})
        elif task == "piqa":
            found.append({"goal": words(draw), "sol1": words(draw), "sol2": words(draw), "label": draw.randint(0, 1)})
        elif task in ("arc_easy", "arc_challenge"):
            found.append(_chosen(draw, "question", number))
        elif task == "openbookqa":
            found.append(_chosen(draw, "question_stem", number))
        elif task == "lambada_openai":
            found.append({"text": words(draw, 4, 9)})
        elif task == "winogrande":
            sentence = f"{words(draw)} _ {words(draw)}."
            found.append(
                {"sentence": sentence, "option1": words(draw, 1, 2), "option2": words(draw, 1, 2), "answer": str(draw.randint(1, 2))}
            )
        elif task == "boolq":
            found.append({"passage": words(draw), "question": words(draw), "label": draw.randint(0, 1)})
    return found


def write(folder: Path, task: str, lines: Iterable[Mapping[str, Any]]) -> Path:
    """A task's file, plain."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{FILES[task]}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
