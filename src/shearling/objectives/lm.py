"""Next-token cross-entropy, the loss of pretraining."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shearling.inputs import model_inputs

Objective = Callable[[nn.Module, Tensor], Tensor]
"""(model, token ids [B, T]) -> loss in nats of every predicted token [B, T - 1]."""


def token_losses(model: nn.Module, ids_BT: Tensor, document_end: int | None = None) -> Tensor:
    """Cross-entropy in nats of every token given those before, fp32 whatever the model computes in: [B, T - 1].

    With `document_end`, the mark's id, given those before in the same document. The first token of a document is then predicted from
    the mark that ends the one before; see `shearling.inputs.document_positions`.
    """
    logits_BTV: Tensor = model(**model_inputs(ids_BT, document_end)).logits
    batch, length = ids_BT.shape
    labels_BT = F.pad(ids_BT[:, 1:], (0, 1), value=_NONE)  # ignoring the last position spares a shifted copy of the logits
    losses: Tensor = _CrossEntropy.apply(logits_BTV.flatten(0, 1), labels_BT.flatten())  # type: ignore[no-untyped-call]
    return losses.view(batch, length)[:, :-1]


_NONE = -100
_ELEMENTS = 2**23


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy [N] of logits [N, V] in any dtype, a few rows at a time in fp32.

    Of a model with a large vocabulary the logits are the largest activation. Torch's own function on `logits.float()` holds them
    four times over in fp32 and twice as they are; here it is twice as they are: the logits, and their gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        ctx.save_for_backward(logits_NV, labels_N)
        parts = ((logits_NV[rows], labels_N[rows]) for rows in _parts(logits_NV))
        return torch.cat([F.cross_entropy(logits.float(), labels, ignore_index=_NONE, reduction="none") for logits, labels in parts])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, labels_N = ctx.saved_tensors
        found_NV = torch.empty_like(logits_NV)
        for rows in _parts(logits_NV):
            labels, gradient = labels_N[rows, None], logits_NV[rows].float().softmax(-1)
            gradient.scatter_add_(1, labels.clamp(min=0), gradient.new_full(labels.shape, -1.0))
            found_NV[rows] = gradient.mul_(gradient_N[rows, None] * (labels != _NONE))
        return found_NV, None


def _parts(logits_NV: Tensor) -> Iterator[slice]:
    count, vocab = logits_NV.shape
    rows = max(1, _ELEMENTS // vocab)
    return (slice(start, start + rows) for start in range(0, count, rows))
