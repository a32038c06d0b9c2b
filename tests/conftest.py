"""Fixtures of every test: seeded, and on one thread: on a busy machine a second one makes tiny tensors far slower."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def good_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk, of all tests that ask for it: only to be read."""
    from models import save_tiny_source  # here, as transformers takes seconds that most files need not spend

    path = tmp_path_factory.mktemp("good") / "source"
    save_tiny_source(path, "llama")
    return path


@pytest.fixture
def source(good_source: Path, tmp_path: Path) -> Path:
    """A copy of it, of this test alone."""
    return Path(shutil.copytree(good_source, tmp_path / "source"))


@pytest.fixture(scope="session")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two domains of text, of all tests that ask for them: only to be read."""
    from runs import write_text

    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> a tiny source of it on disk, of the sizes that the test's module has in SOURCES; made once, and only to be read."""
    from models import save_tiny_source

    root = tmp_path_factory.mktemp("sources")

    def get(family: str) -> Path:
        if not (root / family).exists():
            save_tiny_source(root / family, family, **request.module.SOURCES[family])
        return root / family

    return get


def pytest_configure() -> None:
    torch.set_num_threads(1)
