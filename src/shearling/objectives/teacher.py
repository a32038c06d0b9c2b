"""The source as a teacher: its predictions and states, without gradients, its logits a few rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from shearling.inputs import model_inputs
from shearling.objectives.distill import Prediction, Predictions, likeliest
from shearling.objectives.states import States


def take_off_head(model: nn.Module) -> Tensor:
    """Have a stock transformers model give the states that its head would read in the place of logits; returns the head's weight [V, H].

    For a model that is not sharded yet: the head then stays whole on every process.
    """
    head = cast("nn.Linear", model.get_output_embeddings())  # type: ignore[operator]
    (name,) = (name for name, module in model.named_modules() if module is head)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return head.weight.detach()


class Teacher:
    """What a model without its head, and the head's weight, know of token ids.

    Args:
        model: a stock transformers model after `take_off_head`, in the precision to compute in, on its device.
        head_VH: the head's weight, there too.
        temperature: what logits are divided by.
        top_k: how many tokens are told one by one; None: all.
        states: keeps the states to compare, of this model; None: none are compared.
        document_end: as for `model_inputs`.
    """

    def __init__(
        self,
        model: nn.Module,
        head_VH: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        states: States | None = None,
        document_end: int | None = None,
    ) -> None:
        self.model, self._head_VH, self._states = model, head_VH, states
        self._temperature, self._top_k, self._document_end = temperature, top_k, document_end

    @torch.no_grad()
    def __call__(self, ids_BT: Tensor) -> tuple[Predictions, Mapping[str, Tensor]]:
        """See `shearling.objectives.distill.Source`."""
        with torch.autocast(ids_BT.device.type, enabled=False):  # its weights are in the precision to compute in
            if self._states is not None:
                self._states.begin()
            states_BTH: Tensor = self.model(**model_inputs(ids_BT, self._document_end)).logits
            found = self._states.end() if self._states is not None else {}
        return _Rows(states_BTH.flatten(0, 1), self._head_VH, self._temperature, self._top_k), found


class _Rows:
    """Predictions from states [N, H], of which some hundred rows at a time meet the head: fewer would read it again and again."""

    def __init__(self, states_NH: Tensor, head_VH: Tensor, temperature: float, top_k: int | None) -> None:
        self._states_NH, self._head_VH, self._temperature, self._top_k = states_NH, head_VH, temperature, top_k
        self._at_once = max(1, (_ELEMENTS_GPU if states_NH.is_cuda else _ELEMENTS) // len(head_VH))
        self._begin, self._logits_MV = 0, head_VH[:0].new_empty(0, len(head_VH))

    @torch.no_grad()
    def __call__(self, rows: slice) -> Prediction:
        pieces = []
        start = rows.start
        while start < rows.stop:
            if not self._begin <= start < self._begin + len(self._logits_MV):
                self._begin = start
                with torch.autocast(self._states_NH.device.type, enabled=False):
                    self._logits_MV = self._states_NH[start : start + self._at_once] @ self._head_VH.T
            end = min(rows.stop, self._begin + len(self._logits_MV))
            pieces.append(self._logits_MV[start - self._begin : end - self._begin])
            start = end
        logits_nV = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).float()
        log_p_nV = (logits_nV if self._temperature == 1 else logits_nV / self._temperature).log_softmax(-1)
        return Prediction(log_p_nV) if self._top_k is None else likeliest(log_p_nV, self._top_k)


_ELEMENTS = 2**23
"""Logits that meet the head at a time: 16 MiB in bf16; ..."""
_ELEMENTS_GPU = 2**26
"""... and on a GPU, as many as are worked on at a time."""
