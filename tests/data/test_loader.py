"""Loader: a batch is a function of (seed, step, weights, cursors), and every sample has its turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shearling.config import parse
from shearling.data.config import DataConfig
from shearling.data.loader import Loader
from shearling.data.prepare import prepare
from shearling.data.tokens import TokenSet, open_tokens

WEIGHTS = np.array([0.7, 0.3])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, texts: Any, jsonl: Any, tokenizer: Any) -> TokenSet:
    folder: Path = tmp_path_factory.mktemp("loader")
    domains = {name: str(jsonl(folder / f"{name}.jsonl", texts(number, seed=number))) for name, number in (("web", 40), ("code", 12))}
    prepare(parse(DataConfig, {"domains": domains, "sequence_length": 8}), tokenizer, 100, folder / "out", seed=1)
    return open_tokens(folder / "out")


def test_two_passes_are_equal_and_any_step_can_be_resumed(tokens: TokenSet) -> None:
    batches = []
    for _ in range(2):
        loader = Loader(tokens, 16, seed=5)
        cursors = loader.start()
        for step in range(20):
            batch = loader.batch(step, WEIGHTS, cursors)
            batches.append((cursors, batch))
            cursors = batch.cursors
    for (_, first), (_, second) in zip(batches[:20], batches[20:], strict=True):
        assert np.array_equal(first.ids, second.ids)
    cursors, batch = batches[13]
    assert np.array_equal(Loader(tokens, 16, seed=5).batch(13, WEIGHTS, cursors).ids, batch.ids)


def test_batches_hold_rows_of_the_domains_they_name(tokens: TokenSet) -> None:
    loader = Loader(tokens, 32, seed=5)
    cursors = loader.start()
    batch = loader.batch(0, WEIGHTS, cursors)
    assert batch.ids.shape == (32, 8)
    assert batch.ids.dtype == np.int64
    assert cursors.tolist() == [0, 0]  # not changed in place
    assert batch.cursors.tolist() == np.bincount(batch.domains, minlength=2).tolist()
    for row, domain in zip(batch.ids, batch.domains, strict=True):
        assert (tokens.sequences(tokens.domains[domain], "train") == row).all(axis=1).any()


def test_each_sample_comes_once_an_epoch_across_batches_and_changing_weights(tokens: TokenSet) -> None:
    loader = Loader(tokens, 7, seed=5)
    cursors, rows = loader.start(), []
    size = int(loader.sizes[1])
    step = 0
    while cursors[1] < 3 * size:
        share = 0.2 + 0.6 * (step % 3) / 2
        batch = loader.batch(step, np.array([1 - share, share]), cursors)
        rows += batch.ids[batch.domains == 1].tolist()
        cursors, step = batch.cursors, step + 1
    expected = sorted(tokens.sequences("code", "train").tolist())
    for epoch in range(3):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == expected
    assert rows[:size] != rows[size : 2 * size]
    assert loader.epochs(cursors)[1] >= 3


def test_heldout(tokens: TokenSet) -> None:
    loader = Loader(tokens, 4, seed=5)
    rows = tokens.sequences("web", "heldout")
    assert np.array_equal(loader.heldout("web", 2), rows[:2])
    assert loader.heldout("web", 10**6).shape == rows.shape
    assert loader.heldout("web", 2).dtype == np.int64
