"""The batch of a step: which domains, which samples, their ids. A function of (seed, step, weights, cursors); there is no other state.

Legend: D domains, R sequences in a batch, N of them that this process reads, T tokens in a sequence.
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
    """What one step trains on. All but the ids is of the whole batch, and the same in every process."""

    ids: NDArray[np.int64]
    """[N, T] token ids of the rows that were asked for."""
    domains: NDArray[np.int64]
    """[R] index of each sequence's domain."""
    samples: NDArray[np.int64]
    """[R] index of each sequence in its domain's training shard."""
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

    def batch(
        self, step: int, weights: NDArray[np.float64], cursors: NDArray[np.int64], rows: NDArray[np.int64] | slice | None = None
    ) -> Batch:
        """The batch of `step`.

        Args:
            step: any number, another for each batch of a run.
            weights: [D] shares by which the domains are drawn.
            cursors: [D] how far each domain has been read.
            rows: which of the R sequences this process reads, as [N] indices or a slice; None for all of them.
        """
        domains_R = draw(weights, self.batch_size, self.seed, step)
        counts_D = np.bincount(domains_R, minlength=len(self.sizes))
        samples_R = np.empty(self.batch_size, dtype=np.int64)
        for index in np.flatnonzero(counts_D).tolist():
            positions = cursors[index] + np.arange(counts_D[index])
            samples_R[domains_R == index] = sample_indices(positions, int(self.sizes[index]), self.seed, self.tokens.domains[index])
        chosen = slice(None) if rows is None else rows
        return Batch(self._read(domains_R[chosen], samples_R[chosen]), domains_R, samples_R, cursors + counts_D)

    def _read(self, domains_N: NDArray[np.int64], samples_N: NDArray[np.int64]) -> NDArray[np.int64]:
        ids_NT = np.empty((len(domains_N), self.tokens.sequence_length), dtype=np.int64)
        for index in np.unique(domains_N).tolist():
            here_N = domains_N == index
            ids_NT[here_N] = self.tokens.sequences(self.tokens.domains[index], "train")[samples_N[here_N]]
        return ids_NT

    def epochs(self, cursors: NDArray[np.int64]) -> NDArray[np.float64]:
        """How often each domain [D] has been gone through; above 1 its samples repeat."""
        return np.asarray(cursors / self.sizes)
