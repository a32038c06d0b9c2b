"""Nothing that is not a function of seed and step creeps in: a fresh process gives the bits of this one, and the golden losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_stage
from tiny_stage import GOLDEN_STEPS, KINDS, Stage, result_of

GOLDEN = Path(__file__).parent / "golden" / "losses.json"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Every kind of stage fitted in a process of its own, with another hash of text, and in this one; each on one thread."""
    fresh, here = (tmp_path_factory.mktemp(name) for name in ("fresh", "here"))
    environment = os.environ | {"PYTHONHASHSEED": "4", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, tiny_stage.__file__, str(fresh)], env=environment)
    tiny_stage.main(here)
    assert process.wait(120) == 0
    return fresh, here


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_same_bits(kind: str, runs: tuple[Path, Path]) -> None:
    fresh, here = (result_of(Stage(kind), run / kind) for run in runs)
    assert fresh == here and here["saved"]["step"] == GOLDEN_STEPS


def test_the_losses_are_the_golden_ones(runs: tuple[Path, Path]) -> None:
    """A change of the code must not move them; where it is meant to, `tests/tiny_stage.py` makes them anew.

    Not bitwise: other CPUs have other vector units, and so add and round in another order. At these rates and this length, torch's
    kernels for CPUs without any give losses that differ by less than 1e-6 from those for the newest.
    """
    golden, found = json.loads(GOLDEN.read_text()), json.loads((runs[0] / "losses.json").read_text())
    assert golden.keys() == found.keys() == set(KINDS)
    for kind in KINDS:
        assert len(golden[kind]) == GOLDEN_STEPS and found[kind] == pytest.approx(golden[kind], rel=1e-5), kind
