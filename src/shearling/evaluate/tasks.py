"""Zero-shot tasks by name: the local file that each reads, what a line of it must hold, and which documents a limit takes.

The tasks themselves (prompts, targets, metrics) are those of EleutherAI's lm-evaluation-harness; harness.py runs them. Nothing here needs
it, so that a wrong name or file is told without it, and before any model is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shearling.data.documents import BadDocument, Cursor, LinesPart
from shearling.data.files import TextFile
from shearling.errors import ConfigError, DataError, Problem

ENDINGS = (".jsonl", ".jsonl.zst", ".jsonl.gz")
"""How the name of a local file may end; of several the first is read."""

Document = dict[str, Any]
Reading = Callable[[Any], Any]
"""A field's value as a file has it -> as the harness's task reads it. Raises `ValueError` that says what is needed."""


@dataclass(frozen=True)
class LocalTask:
    """A task that is known here."""

    folder: str
    """Where its configuration lies below the harness's tasks."""
    file: str
    """Its local file, without the ending."""
    fields: Mapping[str, Reading]
    """The fields that its prompts, targets and choices are made of."""
    whole: Callable[[Document], str | None] = lambda row: None
    """What is wrong with the fields together."""
    subtask: str | None = None
    """For a task of several: the field that, after the task's name and `_`, names a document's subtask."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def _words(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not blank")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError("a list of two texts or more, none of them blank")
    return value


def _number(value: Any) -> int:
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, str) and value.isdecimal())):
        raise ValueError("a whole number from 0 on")
    if int(value) < 0:
        raise ValueError("a whole number from 0 on")
    return int(value)


def _zero_or_one(value: Any) -> int:
    if _number(value) > 1:
        raise ValueError("0 or 1")
    return int(value)


def _one_or_two(value: Any) -> str:
    if str(value) not in ("1", "2"):
        raise ValueError('"1" or "2"')
    return str(value)


def _choices(value: Any) -> dict[str, list[str]]:
    try:
        texts, labels = _texts(value["text"]), _texts(value["label"])
    except (KeyError, TypeError, ValueError):
        texts, labels = [], []
    if not texts or len(texts) != len(labels):
        raise ValueError('a mapping {"text": [...], "label": [...]} of two texts or more, each with a label')
    return {"text": texts, "label": labels}


def _hellaswag(row: Document) -> str | None:
    known = int(row["label"]) < len(row["endings"])
    return None if known else f"label is {row['label']}, and there are {len(row['endings'])} endings, counted from 0"


def _answered(row: Document) -> str | None:
    return None if row["answerKey"] in row["choices"]["label"] else f"answerKey is {row['answerKey']!r}, which is no choice's label"


def _with_blank(row: Document) -> str | None:
    return None if "_" in row["sentence"] else "sentence has no _ where the options go"


def _two_words(row: Document) -> str | None:
    context, _, target = row["text"].rpartition(" ")
    return None if context.strip() and target.strip() else "text does not end with a space and a word to be predicted"


_ARC: Mapping[str, Reading] = {"question": _words, "choices": _choices, "answerKey": _words}
_PAIRS: Mapping[str, Reading] = {"sentence_good": _words, "sentence_bad": _words, "UID": _words}

TASKS: Mapping[str, LocalTask] = {
    "hellaswag": LocalTask(
        "hellaswag",
        "hellaswag_val",
        {"activity_label": _text, "ctx_a": _text, "ctx_b": _text, "endings": _texts, "label": lambda value: str(_number(value))},
        _hellaswag,
    ),
    "piqa": LocalTask("piqa", "piqa_valid", {"goal": _words, "sol1": _words, "sol2": _words, "label": _zero_or_one}),
    "arc_easy": LocalTask("arc", "arc_easy_test", _ARC, _answered),
    "arc_challenge": LocalTask("arc", "arc_challenge_test", _ARC, _answered),
    "lambada_openai": LocalTask("lambada", "lambada_openai_test", {"text": _words}, _two_words),
    "blimp": LocalTask("blimp", "blimp", _PAIRS, subtask="UID"),
    "winogrande": LocalTask(
        "winogrande",
        "winogrande_xl_dev",
        {"sentence": _words, "option1": _words, "option2": _words, "answer": _one_or_two},
        _with_blank,
    ),
    "boolq": LocalTask("super_glue/boolq", "boolq_dev", {"passage": _words, "question": _words, "label": _zero_or_one}),
    "openbookqa": LocalTask(
        "openbookqa", "openbookqa_test", {"question_stem": _words, "choices": _choices, "answerKey": _words}, _answered
    ),
}
"""Name -> task; the names are the harness's."""


@dataclass(frozen=True)
class Documents:
    """What a task is to be asked."""

    chosen: dict[str, list[Document]]
    """Subtask, by the harness's name -> its chosen documents, in the file's order. A task without subtasks has itself."""
    size: int
    """Documents of the whole file."""
    mark: str
    """SHA-256 (hex) of the chosen documents' fields."""


def chosen_names(names: str | Sequence[str]) -> list[str]:
    """The tasks asked for, in their order, each once: a list, or a text with commas. Raises `ConfigError` for unknown ones, or none."""
    parts = names.split(",") if isinstance(names, str) else names
    found = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    remedy = f"Known are {', '.join(TASKS)}."
    if problems := [Problem("tasks", repr(name), remedy) for name in found if name not in TASKS]:
        raise ConfigError("unknown tasks", problems)
    if not found:
        raise ConfigError("no tasks", [Problem("tasks", repr(names), remedy)])
    return found


def spaced(size: int, limit: int | None) -> list[int]:
    """Which of `size` documents a limit takes: all, or `limit` of them, evenly spaced from the first on: floor(i size / limit).

    The rule knows no seed and no model, so every model is asked the same. It is not the harness's, which takes the first: files of
    several sources lie in parts (HellaSwag has ActivityNet before WikiHow), and the first documents are of one part alone.
    """
    if limit is None or limit >= size:
        return list(range(size))
    return [number * size // limit for number in range(limit)]


def limits(sizes: Sequence[int], limit: int | None) -> list[int | None]:
    """A task's limit, shared among its subtasks: to within one alike, and one at least of each; None: no limit."""
    count = len(sizes)
    return [None if limit is None else max(1, limit * (place + 1) // count - limit * place // count) for place in range(count)]


def find_task_files(names: Iterable[str], folder: str | Path) -> dict[str, Path]:
    """The local file of each task in `folder`. Raises `DataError` that lists every one that is missing."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder", [Problem("task_data", str(root), "Give the folder that holds the tasks' files.")])
    found: dict[str, Path] = {}
    problems = []
    for name in names:
        candidates = [root / f"{TASKS[name].file}{ending}" for ending in ENDINGS]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            remedy = f"Put {TASKS[name].file}.jsonl there, plain or as .zst or .gz; its fields are {', '.join(TASKS[name].fields)}."
            problems.append(Problem(name, "no file of it", remedy))
        else:
            found[name] = path
    if problems:
        raise DataError(f"{root}: tasks without their files", problems)
    return found


def read_documents(name: str, path: Path, limit: int | None) -> Documents:
    """Read a task's file, check every line of it, and choose by `limit` (documents; None: all).

    Raises `DataError` that names the file and the line: for what is no JSON object, for a field that is missing or not what it must be;
    and for a file without documents.
    """
    task = TASKS[name]
    part, cursor = LinesPart(TextFile(str(path), path.stat().st_size)), Cursor()
    rows: dict[str, list[Document]] = {}
    for raw, number in part.raw(cursor):
        row = part.row(raw, number)
        if row is not None:
            document = _document(task, row, part.place(number))
            rows.setdefault(name if task.subtask is None else f"{name}_{document[task.subtask]}", []).append(document)
    if not rows:
        raise DataError(f"{path}: no documents", [Problem(name, "an empty file", "Get the file again.")])
    sizes = [len(documents) for documents in rows.values()]
    shares = zip(rows.items(), limits(sizes, limit), strict=True)
    chosen = {subtask: [documents[i] for i in spaced(len(documents), most)] for (subtask, documents), most in shares}
    return Documents(chosen, sum(sizes), marked(chosen))


def marked(chosen: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """SHA-256 (hex) of documents by subtask."""
    return hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()


def _document(task: LocalTask, row: Mapping[str, Any], place: str) -> Document:
    document: Document = {}
    for field, reading in task.fields.items():
        if field not in row:
            remedy = f"Each line must have {', '.join(task.fields)}."
            raise BadDocument(f"{place} has no field {field!r}", [Problem(field, f"the fields {', '.join(list(row)[:20])}", remedy)])
        try:
            document[field] = reading(row[field])
        except ValueError as error:
            shown = json.dumps(row[field])[:80]
            raise BadDocument(f"{place}: the field {field!r} is wrong", [Problem(field, shown, f"It must be {error}.")]) from None
    if wrong := task.whole(document):
        raise BadDocument(f"{place}: the fields do not go together", [Problem(task.file, wrong, "Mend or remove this line.")])
    return document
