"""Write three small domains of text from this machine's own Python, for a first run without downloads.

    python recipes/quickstart_text.py OUT_DIR

code.jsonl        sources of the standard library, one file a document
reference.jsonl   topics of Python's language reference (`help()`'s own text), one topic a document
docstrings.jsonl  docstrings of the installed packages, one module a document; read, never imported

Needs nothing but the standard library. The same Python with the same packages gives the same bytes.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

DOCSTRING_BYTES = 12_000_000
LARGEST_SOURCE = 400_000
"""Bytes; a longer module is generated more often than written."""
NOT_CODE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data", "__phello__"}
TABLES = {"entities.py", "_sysconfigdata.py", "sre_constants.py", "stringprep.py"}


def sources(root: Path) -> Iterator[Path]:
    """Python files below `root` in the order of their names; no tests, no data tables, nothing hidden."""
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in NOT_CODE and not name.startswith("."))
        for name in sorted(files):
            path = Path(parent) / name
            wanted = name.endswith(".py") and name not in TABLES and not name.startswith(("test_", "_sysconfigdata"))
            if wanted and path.stat().st_size <= LARGEST_SOURCE:
                yield path


def read(path: Path) -> str:
    """A Python source in the encoding that it declares, or nothing where it does not keep to that."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return ""


def code() -> Iterator[str]:
    """The standard library, file by file."""
    for path in sources(Path(sysconfig.get_paths()["stdlib"])):
        yield read(path)


def reference() -> Iterator[str]:
    """The topics that `help("topics")` lists."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        sys.exit("this Python comes without pydoc_data, where the topics are; install the whole standard library")
    for name in sorted(topics):
        yield topics[name]


def docstrings() -> Iterator[str]:
    """Docstrings of each module of the installed packages, in the order of the source."""
    for path in sources(Path(sysconfig.get_paths()["purelib"])):
        text = read(path)
        if text.count('"""') < 6:  # not worth the parsing
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        owners = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef))
        found = [(getattr(node, "lineno", 0), doc) for node in owners if (doc := ast.get_docstring(node)) and len(doc) > 60]
        yield "\n\n".join(doc for _, doc in sorted(found))


def write(path: Path, documents: Iterable[str], limit: float = float("inf")) -> None:
    """Write documents as JSON lines under a temporary name, then rename; blank ones are left out."""
    staged = path.with_name(f".tmp-{path.name}")
    number = size = 0
    try:
        with open(staged, "w", encoding="utf-8", newline="\n") as file:
            for text in documents:
                if not text.strip():
                    continue
                size += file.write(json.dumps({"text": text}) + "\n")  # ASCII, so a character is a byte
                number += 1
                if size >= limit:
                    break
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    print(f"{path}: {number} documents, {size / 1e6:.1f} MB")


def main(arguments: list[str]) -> None:
    """Write the three files into the folder named on the command line."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        sys.exit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # old sources have escapes that newer Pythons frown on
    write(folder / "code.jsonl", code())
    write(folder / "reference.jsonl", reference())
    write(folder / "docstrings.jsonl", docstrings(), DOCSTRING_BYTES)


if __name__ == "__main__":
    main(sys.argv[1:])
