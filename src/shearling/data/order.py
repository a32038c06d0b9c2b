"""Which sample stands at which position: a keyed permutation per epoch, computed, never stored.

A balanced Feistel network on the smallest even number of bits that holds `size`; a result outside [0, size) is sent through
again (cycle walking) until it falls inside, which keeps the map a permutation (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", CT-RSA 2002). A cursor is therefore all the state that a domain has.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_BLOCK = 8192
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sample_indices(positions: NDArray[np.int64], size: int, seed: int, domain: str) -> NDArray[np.int64]:
    """The sample at each position of a domain's endless order.

    Position p lies in epoch p // size; within an epoch each sample stands exactly once, in a new order each epoch. A function of
    its arguments alone, O(1) in memory beyond the result.

    Args:
        positions: [n], each >= 0.
        size: samples in the domain, >= 1.
        seed: any integer.
        domain: the domain's name, so that domains of one size have different orders.

    Returns:
        [n], each in [0, size).
    """
    assert size >= 1, size
    positions = np.asarray(positions, dtype=np.int64)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    key = np.frombuffer(hashlib.sha256(f"{seed}/{domain}".encode()).digest()[:8], dtype="<u8").astype(np.uint64)
    keys = _mix(key + (positions // size).astype(np.uint64) * _GOLDEN)
    values = (positions % size).astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], keys[outside], half)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


class Order:
    """The same order, computed in blocks of positions: one position costs a hundred times more by itself than in a block.

    Two blocks are kept, whatever `size` is. Not for several threads at once.

    Args:
        size: samples in the domain, >= 1.
        seed: any integer.
        domain: the domain's name.
    """

    def __init__(self, size: int, seed: int, domain: str) -> None:
        self.size = size
        self._seed, self._domain = seed, domain
        self._blocks: dict[int, NDArray[np.int64]] = {}

    def samples(self, first: int, n: int) -> NDArray[np.int64]:
        """The samples [n] at the positions `first`, `first + 1`, ...: those of `sample_indices`."""
        parts = []
        while n > 0:
            number, start = divmod(first, _BLOCK)
            parts.append(self._block(number)[start : start + n])
            first, n = first + len(parts[-1]), n - len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _block(self, number: int) -> NDArray[np.int64]:
        found = self._blocks.get(number)
        if found is None:
            positions = np.arange(number * _BLOCK, (number + 1) * _BLOCK)
            found = sample_indices(positions, self.size, self._seed, self._domain)
            self._blocks = {**dict(list(self._blocks.items())[-1:]), number: found}
        return found


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], half: np.uint64) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(keys + right * _GOLDEN + np.uint64(number << 56)) & mask)
    return (left << half) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every bit of the result depends on every bit of the value. Wraps modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
