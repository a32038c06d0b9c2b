"""The table of faults names tests that exist, and all of its rows."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
DOC = TESTS.parent / "docs" / "reliability.md"


def rows() -> dict[int, str]:
    found = re.findall(r"^\| (\d+) \|(.*)\|$", DOC.read_text(), re.MULTILINE)
    return {int(number): text for number, text in found}


def test_every_fault_is_there() -> None:
    assert list(rows()) == list(range(1, 37))


def test_every_test_that_is_named_exists() -> None:
    missing = []
    for number, text in rows().items():
        tests = text.split("|")[2]
        files = re.split(r"`((?:\w+/)?\w+\.py)`", tests)[1:]
        assert files, f"row {number} names no test"
        for file, names in zip(files[::2], files[1::2], strict=True):
            source = (TESTS / file).read_text() if (TESTS / file).exists() else ""
            wanted = re.findall(r"`(test_\w+)`", names)
            missing += [f"{number}: {file}"] * (not source)
            missing += [f"{number}: {file}::{name}" for name in wanted if f"def {name}(" not in source]
            marked = re.findall(r"mark\.slow\n(?:@.*\n)*def (\w+)", source)
            missing += [f"{number}: {name} is slow" for name in wanted if name in marked]
    assert not missing, missing
