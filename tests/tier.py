"""Prints the tests of one tier of docs/reliability.md, as pytest takes them:

    python -m pytest $(python tests/tier.py T1)

Of rows that two tiers share, the files that start processes of their own (test_ranks.py) are left to the later tier.
"""

from __future__ import annotations

import re
import sys

from test_reliability import rows

LATER = "test_ranks.py"


def tests_of(tier: str) -> list[str]:
    """Node ids, each once, in the order of the table."""
    found: list[str] = []
    for text in rows().values():
        *_, tests, tiers = text.rstrip(" |").split("|")
        if tier not in tiers:
            continue
        files = re.split(r"`((?:\w+/)?\w+\.py)`", tests)[1:]
        for file, names in zip(files[::2], files[1::2], strict=True):
            if file != LATER or tiers.strip() == tier:
                wanted = re.findall(r"`(test_\w+)`", names)
                found += [f"tests/{file}::{name}" for name in wanted] or [f"tests/{file}"]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print("\n".join(tests_of(sys.argv[1])))
