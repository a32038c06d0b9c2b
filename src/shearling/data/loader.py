"""The batch of a step: which domains, which samples, their ids. A function of (seed, step, weights, cursors); there is no other state.

Legend: D domains, R sequences in a batch, T tokens in a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shearling.data.mixture import draw
from shearling.data.order import sample_indices
from shearling.data.tokens import TokenSet


@dataclass(frozen=True)
class Batch:
    """What one step trains on."""

    ids: NDArray[np.int64]
    """[R, T] token ids."""
    domains: NDArray[np.int64]
    """[R] index of each sequence's domain."""
    cursors: NDArray[np.int64]
    """[D] samples of each domain used up to and including this batch: what the next step passes in."""


class Loader:
    """Draws batches from a token set. A domain that is used up begins anew in another order.

    Args:
        tokens: the prepared text.
        batch_size: R, sequences in a batch over all processes.
        seed: of the order of the samples and of the draws of the domains.
    """

    def __init__(self, tokens: TokenSet, batch_size: int, seed: int) -> None:
        self.tokens = tokens
        self.batch_size = batch_size
        self.seed = seed
        self.sizes = np.array([len(tokens.sequences(name, "train")) for name in tokens.domains], dtype=np.int64)
        """[D] training samples of each domain."""

    def start(self) -> NDArray[np.int64]:
        """The cursors [D] before the first step."""
        return np.zeros(len(self.sizes), dtype=np.int64)

    def batch(self, step: int, weights: NDArray[np.float64], cursors: NDArray[np.int64]) -> Batch:
        """The batch of `step`, with domains drawn by `weights` [D]; `cursors` [D] says how far each domain has been read."""
        domains_R = draw(weights, self.batch_size, self.seed, step)
        counts_D = np.bincount(domains_R, minlength=len(self.sizes))
        ids_RT = np.empty((self.batch_size, self.tokens.sequence_length), dtype=np.int64)
        for index in np.flatnonzero(counts_D).tolist():
            name = self.tokens.domains[index]
            positions = cursors[index] + np.arange(counts_D[index])
            samples = sample_indices(positions, int(self.sizes[index]), self.seed, name)
            ids_RT[domains_R == index] = self.tokens.sequences(name, "train")[samples]
        return Batch(ids_RT, domains_R, cursors + counts_D)

    def heldout(self, domain: str, n: int) -> NDArray[np.int64]:
        """The first n held-out sequences of a domain, or all of them if there are fewer: ids [n, T]."""
        return self.tokens.sequences(domain, "heldout")[:n].astype(np.int64)

    def epochs(self, cursors: NDArray[np.int64]) -> NDArray[np.float64]:
        """How often each domain [D] has been gone through; above 1 its samples repeat."""
        return np.asarray(cursors / self.sizes)
