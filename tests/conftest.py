"""Fixtures of every test: seeded, and on one thread: on a busy machine a second one makes tiny tensors far slower."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_configure() -> None:
    torch.set_num_threads(1)
