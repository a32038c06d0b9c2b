"""Order: each sample once an epoch, another order every epoch, nothing remembered."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.data.order import sample_indices


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(-(2**63), 2**70), epoch=st.integers(0, 2**20), domain=st.text(max_size=5))
def test_each_epoch_is_a_permutation(size: int, seed: int, epoch: int, domain: str) -> None:
    positions = np.arange(epoch * size, (epoch + 1) * size)
    assert np.array_equal(np.sort(sample_indices(positions, size, seed, domain)), np.arange(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(20, 3000), seed=st.integers(0, 2**32))
def test_epochs_seeds_and_domains_differ(size: int, seed: int) -> None:
    first = sample_indices(np.arange(size), size, seed, "web")
    assert not np.array_equal(first, np.arange(size))
    assert not np.array_equal(first, sample_indices(np.arange(size, 2 * size), size, seed, "web"))
    assert not np.array_equal(first, sample_indices(np.arange(size), size, seed + 1, "web"))
    assert not np.array_equal(first, sample_indices(np.arange(size), size, seed, "code"))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 500), positions=st.lists(st.integers(0, 2000), max_size=40))
def test_a_position_stands_alone(size: int, positions: list[int]) -> None:
    together = sample_indices(np.array(positions, dtype=np.int64), size, 5, "web")
    alone = [sample_indices(np.array([position]), size, 5, "web")[0] for position in positions]
    assert together.tolist() == alone


def test_large_domains_take_no_memory_of_their_size() -> None:
    size = 10**12
    samples = sample_indices(np.arange(1000), size, 1, "web")
    assert len(np.unique(samples)) == 1000
    assert samples.min() >= 0
    assert samples.max() < size
    assert abs(samples.mean() / size - 0.5) < 0.05  # five standard deviations


def test_order_is_uniform_in_small_domains() -> None:
    """Where the first of 5 samples comes to stand over 20000 epochs: chi-square with 4 degrees of freedom."""
    epochs = 20000
    places = sample_indices(np.arange(epochs) * 5, 5, 3, "web")
    expected = epochs / 5
    assert np.square(np.bincount(places, minlength=5) - expected).sum() / expected < 23.5  # p = 1e-4


def test_golden_order() -> None:
    """A change of this order would change every run that is resumed."""
    assert sample_indices(np.arange(10), 10, 17, "web").tolist() == [0, 9, 3, 7, 4, 1, 8, 6, 2, 5]
